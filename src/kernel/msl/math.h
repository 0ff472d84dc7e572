// metal_math. On the CPU the functions are ours, without branches and calls, so that a loop over a body that calls them becomes
// vector code; IEEE special values come out right. On the GPU they are CUDA's.
//
// Error on the CPU in units in the last place of float: exp exp2 log tanh below 2; the others compute in double and are below 1
// (sin, cos, tan up to |x| = 2^48, lower accuracy beyond; fmod exact up to quotients of 2^52). half and bfloat compute in float
// and round once. Polynomials are Chebyshev fits to the functions named beside them; reductions are Cody and Waite's.
// metal::fast:: and metal::precise:: name the same functions on the CPU; on the GPU fast:: are the special function unit's.
#if !MSL_GPU
#pragma float_control(precise, on, push)
#endif

namespace metal {
namespace msl_ {

#if MSL_GPU

#define MSL_GPU_1(name, call) \
    MSL_FN float name(float x) { return call; }
MSL_GPU_1(exp, ::expf(x))
MSL_GPU_1(exp2, ::exp2f(x))
MSL_GPU_1(exp10, ::exp10f(x))
MSL_GPU_1(expm1, ::expm1f(x))
MSL_GPU_1(log, ::logf(x))
MSL_GPU_1(log2, ::log2f(x))
MSL_GPU_1(log10, ::log10f(x))
MSL_GPU_1(log1p, ::log1pf(x))
MSL_GPU_1(sin, ::sinf(x))
MSL_GPU_1(cos, ::cosf(x))
MSL_GPU_1(tan, ::tanf(x))
MSL_GPU_1(sinpi, ::sinpif(x))
MSL_GPU_1(cospi, ::cospif(x))
MSL_GPU_1(tanpi, ::sinpif(x) / ::cospif(x))
MSL_GPU_1(asin, ::asinf(x))
MSL_GPU_1(acos, ::acosf(x))
MSL_GPU_1(atan, ::atanf(x))
MSL_GPU_1(sinh, ::sinhf(x))
MSL_GPU_1(cosh, ::coshf(x))
MSL_GPU_1(tanh, ::tanhf(x))
MSL_GPU_1(asinh, ::asinhf(x))
MSL_GPU_1(acosh, ::acoshf(x))
MSL_GPU_1(atanh, ::atanhf(x))
MSL_GPU_1(erf, ::erff(x))
MSL_GPU_1(erfinv, ::erfinvf(x))
MSL_GPU_1(sqrt, ::sqrtf(x))
MSL_GPU_1(rsqrt, ::rsqrtf(x))
MSL_GPU_1(floor, ::floorf(x))
MSL_GPU_1(ceil, ::ceilf(x))
MSL_GPU_1(trunc, ::truncf(x))
MSL_GPU_1(rint, ::rintf(x))
MSL_GPU_1(round, ::roundf(x))
#undef MSL_GPU_1
MSL_FN float pow(float x, float y) { return ::powf(x, y); }
MSL_FN float atan2(float y, float x) { return ::atan2f(y, x); }
MSL_FN float fmod(float x, float y) { return ::fmodf(x, y); }
MSL_FN float nextafter(float x, float y) { return ::nextafterf(x, y); }
MSL_FN float fma(float x, float y, float z) { return ::fmaf(x, y, z); }
MSL_FN float ldexp(float x, int k) { return ::ldexpf(x, k); }

#else

MSL_FN ulong bits(double x) { return __builtin_bit_cast(ulong, x); }
MSL_FN double double_of(ulong x) { return __builtin_bit_cast(double, x); }
#if defined(__FMA__) || defined(__aarch64__)
MSL_FN float mul_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
MSL_FN double mul_add(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
MSL_FN float mul_add(float a, float b, float c) { return a * b + c; }
MSL_FN double mul_add(double a, double b, double c) { return a * b + c; }
#endif
template <class T> MSL_FN T polynomial(T, T c) { return c; }
template <class T, class... C> MSL_FN T polynomial(T x, T c0, T c1, C... c) {
    return polynomial(x, mul_add(c0, x, c1), c...);
}
MSL_FN float copy_sign(float magnitude, float sign) {
    return float_of((bits(magnitude) & 0x7fffffffu) | (bits(sign) & 0x80000000u));
}
MSL_FN double copy_sign(double magnitude, double sign) {
    return double_of((bits(magnitude) & 0x7ffffffffffffffful) | (bits(sign) & 0x8000000000000000ul));
}
MSL_FN double magnitude(double x) { return double_of(bits(x) & 0x7ffffffffffffffful); }
MSL_FN float magnitude(float x) { return float_of(bits(x) & 0x7fffffffu); }
constexpr float inf = numeric_limits<float>::infinity();
constexpr float nan = numeric_limits<float>::quiet_NaN();
// An integer in double or float, to be added into an exponent: its low bits stand at the bottom of the sum with 1.5 * 2^52 (2^23).
MSL_FN ulong integer_bits(double n) { return bits(n + 0x1.8p52); }
MSL_FN uint integer_bits(float n) { return bits(n + 0x1.8p23f); }

// 2^n e^r, |r| <= ln(2) / 2, n in -298..256: in two steps, so that subnormal results are rounded once.
MSL_FN float exp_scaled(float n, float r) {
    float q = polynomial(r, 0.00139262033616f, 0.00836319488242f, 0.0416665544984f, 0.166665768946f, 0.5f);
    float e = mul_add(r * r, q, r) + 1.0f;
    float half_n = __builtin_rintf(n * 0.5f);
    float a = float_of((integer_bits(half_n) + 127u) << 23);
    float b = float_of((integer_bits(n - half_n) + 127u) << 23);
    return e * a * b;
}
MSL_FN float exp(float x) {
    float c = x > 89.0f ? 89.0f : x;
    c = c < -105.0f ? -105.0f : c;
    float n = __builtin_rintf(c * 1.44269504f);
    float r = mul_add(n, -0.693359375f, c);
    return exp_scaled(n, mul_add(n, 2.12194440e-4f, r));
}
MSL_FN float exp2(float x) {
    float c = x > 129.0f ? 129.0f : x;
    c = c < -151.0f ? -151.0f : c;
    float n = __builtin_rintf(c);
    return exp_scaled(n, (c - n) * 0.693147181f);
}

// log(2^k m) with m in [sqrt(1/2), sqrt(2)): s = f / (2 + f), f = m - 1, log m = 2 s + s^3 R(s^2).
MSL_FN float log(float x) {
    bool subnormal = x < 0x1p-126f;
    uint w = bits(subnormal ? x * 0x1p25f : x);
    uint shifted = w + (0x3f800000u - 0x3f3504f3u);
    float k = float(int(shifted >> 23) - 127) - (subnormal ? 25.0f : 0.0f);
    float f = float_of((shifted & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    float s = f / (2.0f + f), z = s * s;
    float R = z * polynomial(z, 0.2333096405f, 0.2855080255f, 0.4000012200f, 0.6666666655f);
    float h = 0.5f * f * f;
    float y = mul_add(s, h + R, k * 9.0580006145e-6f);
    y = mul_add(k, 0.69313812256f, f - (h - y));
    y = x < inf ? y : x;
    y = x == 0.0f ? -inf : y;
    return x < 0.0f ? nan : y;
}

// The same in double, for x that is normal in double and finite: Taylor's series is enough at |s| < 0.172.
MSL_FN double log_double(double x) {
    ulong shifted = bits(x) + (0x3ff0000000000000ul - 0x3fe6a09e667f3bcdul);
    double k = double_of((shifted >> 52) | 0x4330000000000000ul) - (0x1p52 + 1023.0);
    double f = double_of((shifted & 0xffffffffffffful) + 0x3fe6a09e667f3bcdul) - 1.0;
    double s = f / (2.0 + f), z = s * s;
    double R = polynomial(z, 2.0 / 19, 2.0 / 17, 2.0 / 15, 2.0 / 13, 2.0 / 11, 2.0 / 9, 2.0 / 7, 2.0 / 5, 2.0 / 3, 2.0);
    return mul_add(k, 0.69314718055994530942, s * R);
}
// log(1 + u) without loss for small u: the error of 1 + u is divided out.
MSL_FN double log1p_double(double u) {
    double w = 1.0 + u;
    double l = log_double(w) * (u / (w == 1.0 ? 1.0 : w - 1.0));
    return w == 1.0 ? u : l;
}
// e^x - 1 = 2^n (e^r - 1) + (2^n - 1), x within +-700
struct exp_parts {
    double power, rest; // e^x = power * (1 + rest)
};
MSL_FN exp_parts exp_double_parts(double x) {
    x = x > 700.0 ? 700.0 : x;
    x = x < -700.0 ? -700.0 : x;
    double n = __builtin_rint(x * 1.44269504088896340736);
    double r = mul_add(n, -6.93147180369123816490e-01, x);
    r = mul_add(n, -1.90821492927058770002e-10, r);
    double q = polynomial(r, 1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                          1.0 / 720, 1.0 / 120, 1.0 / 24, 1.0 / 6, 0.5);
    return {double_of((integer_bits(n) + 1023ul) << 52), mul_add(r * r, q, r)};
}
MSL_FN double exp_double(double x) {
    exp_parts e = exp_double_parts(x);
    return mul_add(e.power, e.rest, e.power);
}
MSL_FN double expm1_double(double x) {
    exp_parts e = exp_double_parts(x);
    return mul_add(e.power, e.rest, e.power - 1.0);
}

MSL_FN float exp10(float x) { return float(exp_double(double(x) * 2.30258509299404568402)); }
MSL_FN float expm1(float x) { return x == 0.0f ? x : float(expm1_double(x)); }
// What is no positive finite number gives log's special values.
MSL_FN float log_special(float x, double y) {
    float r = x < inf ? float(y) : x;
    r = x == 0.0f ? -inf : r;
    return x < 0.0f ? nan : r;
}
MSL_FN float log2(float x) { return log_special(x, log_double(x) * 1.44269504088896340736); }
MSL_FN float log10(float x) { return log_special(x, log_double(x) * 0.43429448190325182765); }
MSL_FN float log1p(float x) {
    float r = x < inf ? float(log1p_double(x)) : x;
    r = x == -1.0f ? -inf : r;
    r = x < -1.0f ? nan : r;
    return x == 0.0f ? x : r;
}

// sin and cos of r, |r| <= pi / 4, and of r + quadrant * pi / 2
MSL_FN double sin_double(double r) {
    double z = r * r;
    return mul_add(r * z,
                   polynomial(z, 1.0 / 6227020800, -1.0 / 39916800, 1.0 / 362880, -1.0 / 5040, 1.0 / 120, -1.0 / 6), r);
}
MSL_FN double cos_double(double r) {
    double z = r * r;
    return mul_add(
        z, polynomial(z, -1.0 / 87178291200, 1.0 / 479001600, -1.0 / 3628800, 1.0 / 40320, -1.0 / 720, 1.0 / 24, -0.5),
        1.0);
}
struct angle {
    double r;
    ulong quadrant;
};
MSL_FN angle reduce(float x) {
    double n = __builtin_rint(double(x) * 0.63661977236758134308);
    double r = mul_add(n, -1.57079632673412561417e+00, double(x));
    r = mul_add(n, -6.07710050630396597660e-11, r);
    r = mul_add(n, -2.02226624879595063154e-21, r);
    return {r, integer_bits(n)};
}
MSL_FN angle reduce_pi(float x) {
    double n = __builtin_rint(2.0 * double(x));
    return {(double(x) - 0.5 * n) * 3.14159265358979323846, integer_bits(n)};
}
MSL_FN float sin_of(angle a, ulong turn) {
    ulong q = a.quadrant + turn;
    double v = q & 1 ? cos_double(a.r) : sin_double(a.r);
    return float(double_of(bits(v) ^ (q & 2) << 62));
}
MSL_FN float tan_of(angle a) {
    double s = sin_double(a.r), c = cos_double(a.r);
    return float(a.quadrant & 1 ? -c / s : s / c);
}
MSL_FN float sin(float x) { return x == 0.0f ? x : sin_of(reduce(x), 0); }
MSL_FN float cos(float x) { return sin_of(reduce(x), 1); }
MSL_FN float tan(float x) { return x == 0.0f ? x : tan_of(reduce(x)); }
MSL_FN float sinpi(float x) { return sin_of(reduce_pi(x), 0); }
MSL_FN float cospi(float x) { return sin_of(reduce_pi(x), 1); }
MSL_FN float tanpi(float x) { return tan_of(reduce_pi(x)); }

// atan of t in [0, 1]; atan(sqrt z) / sqrt z up to tan(pi / 8), around pi / 4 above
MSL_FN double atan_unit(double t) {
    bool upper = t > 0.41421356237309504880;
    double u = upper ? (t - 1.0) / (t + 1.0) : t;
    double p = u * polynomial(u * u, 0.0306616567537526248, -0.058744550821707238, 0.0756369036443347217,
                              -0.090783902895086733, 0.111103849132550416, -0.142856904184955434, 0.19999999604787235,
                              -0.333333333308026707, 0.999999999999973222);
    return upper ? p + 0.78539816339744830962 : p;
}
MSL_FN float atan(float x) {
    double a = magnitude(double(x));
    bool inverse = a > 1.0;
    double p = atan_unit(inverse ? 1.0 / a : a);
    return float(copy_sign(inverse ? 1.57079632679489661923 - p : p, double(x)));
}
MSL_FN float atan2(float y, float x) {
    double ax = magnitude(double(x)), ay = magnitude(double(y));
    bool steep = ay > ax;
    double large = steep ? ay : ax, small = steep ? ax : ay;
    double t = small / (large == 0.0 ? 1.0 : large);
    t = small == double(inf) ? 1.0 : t;
    double p = atan_unit(t);
    p = steep ? 1.57079632679489661923 - p : p;
    p = bits(x) >> 31 ? 3.14159265358979323846 - p : p;
    return x != x || y != y ? nan : float(copy_sign(p, double(y)));
}
// asin(sqrt z) / sqrt z up to 1 / 2, and the half-angle formula above
MSL_FN double asin_double(double x) {
    double a = magnitude(x);
    bool upper = a > 0.5;
    double z = upper ? 0.5 - 0.5 * a : a * a;
    double s = upper ? __builtin_sqrt(z) : a;
    double p = s * polynomial(z, 0.0319608031067493076, -0.00287414550965602001, 0.0186463281345264847,
                              0.0164708931980774965, 0.0224728816578913985, 0.0303750266764757505,
                              0.0446431277956301865, 0.0749999946554190042, 0.166666666707399844, 0.999999999999949007);
    return copy_sign(upper ? 1.57079632679489661923 - 2.0 * p : p, x);
}
MSL_FN float asin(float x) { return float(asin_double(x)); }
MSL_FN float acos(float x) { return x == 1.0f ? 0.0f : float(1.57079632679489661923 - asin_double(x)); }

MSL_FN float sinh(float x) {
    double e = expm1_double(magnitude(double(x)));
    return x != x ? x : float(copy_sign(0.5 * (e + e / (e + 1.0)), double(x)));
}
MSL_FN float cosh(float x) {
    double e = exp_double(magnitude(double(x)));
    return x != x ? x : float(0.5 * (e + 1.0 / e));
}
// tanh(sqrt z) / sqrt z below 0.55, 1 - 2 / (e^2x + 1) above
MSL_FN float tanh(float x) {
    float a = magnitude(x), z = a * a;
    float small =
        x * polynomial(z, -0.006181804033f, 0.02100238580f, -0.05383374992f, 0.1333237409f, -0.3333330807f, 1.0f);
    float large = 1.0f - 2.0f / (exp(2.0f * a) + 1.0f);
    float r = a < 0.55f ? small : copy_sign(large, x);
    return x != x ? x : r;
}
MSL_FN float asinh(float x) {
    double a = magnitude(double(x));
    double l = log1p_double(a + a * a / (1.0 + __builtin_sqrt(mul_add(a, a, 1.0))));
    return a < double(inf) ? float(copy_sign(l, double(x))) : x;
}
MSL_FN float acosh(float x) {
    double t = double(x) - 1.0;
    double l = log1p_double(t + __builtin_sqrt(t * (t + 2.0)));
    float r = x < inf ? float(l) : x;
    return x < 1.0f ? nan : r;
}
MSL_FN float atanh(float x) {
    double a = magnitude(double(x));
    float r = float(copy_sign(0.5 * log1p_double(2.0 * a / (1.0 - a)), double(x)));
    r = a == 1.0 ? copy_sign(inf, x) : r;
    return a <= 1.0 ? r : nan;
}

// erf(sqrt z) / sqrt z below 1, 1 - e^(-x^2) erfcx(x) above with erfcx in 1 / (1 + x / 2)
MSL_FN float erf(float x) {
    double a = magnitude(double(x)), z = a * a;
    double small =
        a * polynomial(z, 9.4285969568341643e-9, -1.51882812473351669e-7, 1.63103565138717414e-6,
                       -1.49133009063163957e-5, 1.20546819183105988e-4, -8.54830487178274063e-4, 5.22397715410530472e-3,
                       -2.68661705864968724e-2, 0.112837916705804224, -0.376126389031744003, 1.12837916709551219);
    double t = 1.0 / (1.0 + 0.5 * a);
    double scaled =
        polynomial(t, 0.0204257451272782659, -0.186905697189803971, 0.622787507069569075, -0.98982354630481212,
                   0.74506782520819451, -0.311029862471118022, 0.31799852454635174, 0.212262144885748313,
                   0.287606946857146498, 0.281575186109885113, 2.20050089444093359e-5);
    double large = 1.0 - exp_double(-z) * scaled;
    large = a > 4.1 ? 1.0 : large;
    return x != x ? x : float(copy_sign(a < 1.0 ? small : large, double(x)));
}
// erfinv(x) / x in w = -log(1 - x^2), below 5 and above (Giles, Approximating the erfinv function, GPU Computing Gems 2011)
MSL_FN float erfinv(float x) {
    double a = double(x), w = -log_double((1.0 - a) * (1.0 + a));
    double u = w - 2.5;
    double p =
        polynomial(u, -2.79604104843321938e-13, -2.05184096143305622e-11, 1.28615726787301557e-10,
                   8.19835042458827974e-10, -1.08971686570167673e-8, 1.37821109816674571e-8, 4.78801162538588204e-7,
                   -3.41740952969037506e-6, -4.99615707571471272e-6, 2.18251081695785771e-4, -1.25270787786382914e-3,
                   -4.17731804257807302e-3, 0.24664027674226104, 1.50140935113107144);
    double v = __builtin_sqrt(w > 5.0 ? w : 5.0) - 3.0;
    double tail =
        polynomial(v, -3.4456183690803279e-5, 1.68271588897549004e-4, -2.72291927560613399e-4, -1.3095603203351669e-4,
                   1.47365411174941748e-3, -3.56184649794997668e-3, 5.68773664372697397e-3, -7.64371577936532665e-3,
                   9.44531637809899452e-3, 1.00167528379598904, 2.83297680128480549);
    float r = float(a * (w < 5.0 ? p : tail));
    r = a == 1.0 || a == -1.0 ? copy_sign(inf, x) : r;
    return a >= -1.0 && a <= 1.0 ? r : nan;
}

MSL_FN float sqrt(float x) { return __builtin_sqrtf(x); }
MSL_FN float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
MSL_FN float floor(float x) { return __builtin_floorf(x); }
MSL_FN float ceil(float x) { return __builtin_ceilf(x); }
MSL_FN float trunc(float x) { return __builtin_truncf(x); }
MSL_FN float rint(float x) { return __builtin_rintf(x); }
MSL_FN float round(float x) { return __builtin_truncf(x + copy_sign(0x1.fffffep-2f, x)); }

MSL_FN float pow(float x, float y) {
    double a = magnitude(double(x));
    double p = double(y) * log_double(a);
    float r = float(exp_double(p));
    bool y_is_integer = __builtin_rintf(y) == y;
    bool y_is_odd = y_is_integer && __builtin_rintf(0.5f * y) != 0.5f * y;
    r = a == 0.0 ? (y < 0.0f ? inf : 0.0f) : r;
    r = a == double(inf) ? (y < 0.0f ? 0.0f : inf) : r;
    r = a == 1.0 ? 1.0f : r;
    r = x < 0.0f && !y_is_integer && a < double(inf) ? nan : r;
    r = y_is_odd ? copy_sign(r, x) : r;
    r = x != x || y != y ? nan : r;
    return y == 0.0f || x == 1.0f ? 1.0f : r;
}
MSL_FN float fmod(float x, float y) {
    double a = magnitude(double(x)), b = magnitude(double(y));
    double r = mul_add(-__builtin_trunc(a / b), b, a);
    r = r < 0.0 ? r + b : r;
    r = r >= b ? r - b : r;
    r = b == double(inf) && a < b ? a : r;
    return float(copy_sign(r, double(x)));
}
MSL_FN float nextafter(float x, float y) {
    uint w = bits(x);
    uint stepped = x == 0.0f ? (bits(y) & 0x80000000u) | 1u : (y > x) == (x > 0.0f) ? w + 1u : w - 1u;
    float r = x == y ? y : float_of(stepped);
    return x != x || y != y ? nan : r;
}
MSL_FN float fma(float x, float y, float z) {
#if defined(__FMA__) || defined(__aarch64__)
    return __builtin_fmaf(x, y, z);
#else
    return float(double(x) * double(y) + double(z));
#endif
}
MSL_FN float ldexp(float x, int k) {
    k = k > 1000 ? 1000 : k < -1000 ? -1000 : k;
    return float(double(x) * double_of(ulong(k + 1023) << 52));
}
#endif

// ---- what needs no function of either side

MSL_FN constexpr bool is_nan(float x) { return (bits(x) & 0x7fffffffu) > 0x7f800000u; }
MSL_FN constexpr bool is_inf(float x) { return (bits(x) & 0x7fffffffu) == 0x7f800000u; }
#if MSL_GPU
MSL_FN float fmax(float a, float b) { return ::fmaxf(a, b); }
MSL_FN float fmin(float a, float b) { return ::fminf(a, b); }
#else
MSL_FN constexpr float fmax(float a, float b) { return a > b || b != b ? a : b; }
MSL_FN constexpr float fmin(float a, float b) { return a < b || b != b ? a : b; }
#endif
template <class T> MSL_FN constexpr T max_of(T a, T b) {
    if constexpr (scalar<T>::kind == 3) return T(fmax(float(a), float(b)));
    else return a > b ? a : b;
}
template <class T> MSL_FN constexpr T min_of(T a, T b) {
    if constexpr (scalar<T>::kind == 3) return T(fmin(float(a), float(b)));
    else return a < b ? a : b;
}
template <class T> MSL_FN constexpr T abs_of(T a) {
    if constexpr (is_same_v<T, float>) return float_of(bits(a) & 0x7fffffffu);
    else if constexpr (scalar<T>::kind == 3) return as_type<T>(ushort(as_type<ushort>(a) & 0x7fffu));
    else if constexpr (scalar<T>::is_signed) return a < 0 ? T(-a) : a;
    else return a;
}

#define MSL_FUNCTOR(name, parameters, body)                                \
    struct name##_f {                                                      \
        MSL_FN constexpr auto operator() parameters const { return body; } \
    };
#define MSL_FUNCTOR_T(name, parameters, body)                                                 \
    struct name##_f {                                                                         \
        template <class T> MSL_FN constexpr T operator() parameters const { return T(body); } \
    };
} // namespace msl_

// Functions of floating point with one, two, three arguments, on scalars and vectors; integers count as float.
#define MSL_MATH_1(name, body)                                                          \
    namespace msl_ {                                                                    \
    MSL_FUNCTOR(name, (float x), body)                                                  \
    }                                                                                   \
    template <class A, MSL_REST> MSL_FN constexpr msl_::float_t<A> name(A a, Rest...) { \
        MSL_NO_REST(name);                                                              \
        using V = msl_::float_t<A>;                                                     \
        return msl_::each<V>(msl_::name##_f(), V(a));                                   \
    }
#define MSL_MATH_2(name, body)                                                                                  \
    namespace msl_ {                                                                                            \
    MSL_FUNCTOR(name, (float x, float y), body)                                                                 \
    }                                                                                                           \
    template <class A, class B, MSL_REST> MSL_FN constexpr msl_::common_float_t<A, B> name(A a, B b, Rest...) { \
        MSL_NO_REST(name);                                                                                      \
        using V = msl_::common_float_t<A, B>;                                                                   \
        return msl_::each<V>(msl_::name##_f(), V(a), V(b));                                                     \
    }
#define MSL_MATH_3(name, body)                                                     \
    namespace msl_ {                                                               \
    MSL_FUNCTOR(name, (float x, float y, float z), body)                           \
    }                                                                              \
    template <class A, class B, class C, MSL_REST>                                 \
    MSL_FN constexpr msl_::common3_float_t<A, B, C> name(A a, B b, C c, Rest...) { \
        MSL_NO_REST(name);                                                         \
        using V = msl_::common3_float_t<A, B, C>;                                  \
        return msl_::each<V>(msl_::name##_f(), V(a), V(b), V(c));                  \
    }
// The same for any arithmetic type.
#define MSL_ANY_1(name, body)                                                            \
    namespace msl_ {                                                                     \
    MSL_FUNCTOR_T(name, (T x), body)                                                     \
    }                                                                                    \
    template <class A, MSL_REST> MSL_FN constexpr msl_::number_t<A> name(A a, Rest...) { \
        MSL_NO_REST(name);                                                               \
        using V = msl_::number_t<A>;                                                     \
        return msl_::each<V>(msl_::name##_f(), V(a));                                    \
    }
#define MSL_ANY_2(name, body)                                                                             \
    namespace msl_ {                                                                                      \
    MSL_FUNCTOR_T(name, (T x, T y), body)                                                                 \
    }                                                                                                     \
    template <class A, class B, MSL_REST> MSL_FN constexpr msl_::common_t<A, B> name(A a, B b, Rest...) { \
        MSL_NO_REST(name);                                                                                \
        using V = msl_::common_t<A, B>;                                                                   \
        return msl_::each<V>(msl_::name##_f(), V(a), V(b));                                               \
    }
#define MSL_ANY_3(name, body)                                                \
    namespace msl_ {                                                         \
    MSL_FUNCTOR_T(name, (T x, T y, T z), body)                               \
    }                                                                        \
    template <class A, class B, class C, MSL_REST>                           \
    MSL_FN constexpr msl_::common3_t<A, B, C> name(A a, B b, C c, Rest...) { \
        MSL_NO_REST(name);                                                   \
        using V = msl_::common3_t<A, B, C>;                                  \
        return msl_::each<V>(msl_::name##_f(), V(a), V(b), V(c));            \
    }

// Those of the list have two more names, precise:: and fast::.
#define MSL_TRANSCENDENTALS(F1, F2) \
    F1(exp)                         \
    F1(exp2)                        \
    F1(exp10)                       \
    F1(log)                         \
    F1(log2)                        \
    F1(log10)                       \
    F1(sin)                         \
    F1(cos)                         \
    F1(tan)                         \
    F1(sinpi)                       \
    F1(cospi)                       \
    F1(tanpi)                       \
    F1(asin)                        \
    F1(acos)                        \
    F1(atan)                        \
    F1(sinh)                        \
    F1(cosh)                        \
    F1(tanh)                        \
    F1(asinh)                       \
    F1(acosh)                       \
    F1(atanh)                       \
    F1(sqrt)                        \
    F1(rsqrt)                       \
    F1(floor)                       \
    F1(ceil)                        \
    F1(trunc)                       \
    F1(rint)                        \
    F1(round)                       \
    F2(pow)                         \
    F2(atan2)                       \
    F2(fmod)                        \
    F2(nextafter)
#define MSL_F1(name) MSL_MATH_1(name, msl_::name(x))
#define MSL_F2(name) MSL_MATH_2(name, msl_::name(x, y))
MSL_TRANSCENDENTALS(MSL_F1, MSL_F2)
#undef MSL_F1
#undef MSL_F2

MSL_MATH_1(fabs, msl_::abs_of(x))
MSL_MATH_1(fract, msl_::fmin(x - msl_::floor(x), 0x1.fffffep-1f))
MSL_MATH_1(saturate, msl_::fmin(msl_::fmax(x, 0.0f), 1.0f))
MSL_MATH_1(sign, x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : x == 0.0f ? x : 0.0f)
MSL_MATH_2(powr, msl_::pow(x, y))
MSL_MATH_2(divide, x / y)
MSL_MATH_2(fdim, x > y ? x - y : x <= y ? 0.0f : x + y)
MSL_MATH_2(copysign, msl_::float_of((msl_::bits(x) & 0x7fffffffu) | (msl_::bits(y) & 0x80000000u)))
MSL_MATH_2(fmax, msl_::fmax(x, y))
MSL_MATH_2(fmin, msl_::fmin(x, y))
MSL_MATH_2(step, y < x ? 0.0f : 1.0f)
MSL_MATH_3(fma, msl_::fma(x, y, z))
MSL_MATH_3(fmax3, msl_::fmax(x, msl_::fmax(y, z)))
MSL_MATH_3(fmin3, msl_::fmin(x, msl_::fmin(y, z)))
MSL_MATH_3(fmedian3, msl_::fmax(msl_::fmin(x, y), msl_::fmin(msl_::fmax(x, y), z)))
MSL_MATH_3(mix, x + (y - x) * z)
namespace msl_ {
MSL_FN constexpr float smooth(float t) { return t * t * (3.0f - 2.0f * t); }
} // namespace msl_
MSL_MATH_3(smoothstep, msl_::smooth(msl_::fmin(msl_::fmax((z - x) / (y - x), 0.0f), 1.0f)))

MSL_ANY_1(abs, msl_::abs_of(x))
MSL_ANY_2(max, msl_::max_of(x, y))
MSL_ANY_2(min, msl_::min_of(x, y))
MSL_ANY_3(max3, msl_::max_of(x, msl_::max_of(y, z)))
MSL_ANY_3(min3, msl_::min_of(x, msl_::min_of(y, z)))
MSL_ANY_3(median3, msl_::max_of(msl_::min_of(x, y), msl_::min_of(msl_::max_of(x, y), z)))
MSL_ANY_3(clamp, msl_::min_of(msl_::max_of(x, y), z))

template <class A, class B, MSL_REST> MSL_FN msl_::float_t<A> ldexp(A a, B k, Rest...) {
    MSL_NO_REST(ldexp);
    using V = msl_::float_t<A>;
    return msl_::each<V>([](float x, int n) { return msl_::ldexp(x, n); }, V(a), msl_::rebind_t<V, int>(k));
}
namespace msl_ {
struct ilogb_f {
    MSL_FN int operator()(float x) const {
        uint magnitude = bits(x) & 0x7fffffffu;
        if (magnitude == 0) return -2147483647 - 1;
        if (magnitude >= 0x7f800000u) return 2147483647;
        uint w = magnitude < 0x00800000u ? bits(float_of(magnitude) * 0x1p25f) : magnitude;
        return int(w >> 23) - 127 - (magnitude < 0x00800000u ? 25 : 0);
    }
};
template <class V, class I, class F> MSL_FN void each_component(V &v, I &i, F f) {
    if constexpr (is_vector_v<V>) {
        for (int c = 0; c < V::width; ++c) f(v.e[c], i.e[c]);
    } else {
        f(v, i);
    }
}
} // namespace msl_
template <class A, MSL_REST> MSL_FN msl_::rebind_t<msl_::float_t<A>, int> ilogb(A a, Rest...) {
    MSL_NO_REST(ilogb);
    using V = msl_::float_t<A>;
    return msl_::each<msl_::rebind_t<V, int>>(msl_::ilogb_f(), V(a));
}
template <class A, class E, MSL_REST> MSL_FN msl_::float_t<A> frexp(A a, E &exponent, Rest...) {
    MSL_NO_REST(frexp);
    msl_::float_t<A> v(a);
    msl_::each_component(v, exponent, [](auto &x, auto &e) {
        float f = float(x);
        bool finite = f != 0.0f && !msl_::is_inf(f) && !msl_::is_nan(f);
        e = finite ? msl_::ilogb_f()(f) + 1 : 0;
        x = finite ? msl_::ldexp(f, -e) : f;
    });
    return v;
}
template <class A, class V, MSL_REST> MSL_FN V modf(A a, V &whole, Rest...) {
    MSL_NO_REST(modf);
    whole = trunc(V(a));
    V fraction(a);
    msl_::each_component(fraction, whole, [](auto &x, auto &w) {
        float f = msl_::is_inf(float(x)) ? 0.0f : float(x) - float(w);
        x = msl_::float_of((msl_::bits(f) & 0x7fffffffu) | (msl_::bits(float(w)) & 0x80000000u));
    });
    return fraction;
}
template <class A, class V, MSL_REST> MSL_FN V sincos(A a, V &cosine, Rest...) {
    MSL_NO_REST(sincos);
    V v(a);
    cosine = cos(v);
    return sin(v);
}

namespace precise {
#define MSL_ALSO(name) using metal::name;
MSL_TRANSCENDENTALS(MSL_ALSO, MSL_ALSO)
#define MSL_OTHERS       \
    MSL_ALSO(abs)        \
    MSL_ALSO(fabs)       \
    MSL_ALSO(fract)      \
    MSL_ALSO(saturate)   \
    MSL_ALSO(sign)       \
    MSL_ALSO(powr)       \
    MSL_ALSO(divide)     \
    MSL_ALSO(fdim)       \
    MSL_ALSO(copysign)   \
    MSL_ALSO(fmax)       \
    MSL_ALSO(fmin)       \
    MSL_ALSO(step)       \
    MSL_ALSO(fma)        \
    MSL_ALSO(fmax3)      \
    MSL_ALSO(fmin3)      \
    MSL_ALSO(fmedian3)   \
    MSL_ALSO(mix)        \
    MSL_ALSO(smoothstep) \
    MSL_ALSO(max)        \
    MSL_ALSO(min)        \
    MSL_ALSO(max3)       \
    MSL_ALSO(min3)       \
    MSL_ALSO(median3)    \
    MSL_ALSO(clamp)      \
    MSL_ALSO(ldexp)      \
    MSL_ALSO(ilogb)      \
    MSL_ALSO(frexp)      \
    MSL_ALSO(modf)       \
    MSL_ALSO(sincos)
MSL_OTHERS
} // namespace precise

namespace fast {
#if MSL_GPU
#define MSL_FAST_1(name, call)                                    \
    template <class A> MSL_FN msl_::float_t<A> name(A a) {        \
        using V = msl_::float_t<A>;                               \
        return msl_::each<V>([](float x) { return call; }, V(a)); \
    }
MSL_FAST_1(exp, ::__expf(x))
MSL_FAST_1(exp2, ::__expf(x * 0.693147181f))
MSL_FAST_1(exp10, ::__exp10f(x))
MSL_FAST_1(log, ::__logf(x))
MSL_FAST_1(log2, ::__log2f(x))
MSL_FAST_1(log10, ::__log10f(x))
MSL_FAST_1(sin, ::__sinf(x))
MSL_FAST_1(cos, ::__cosf(x))
MSL_FAST_1(tan, ::__tanf(x))
#undef MSL_FAST_1
template <class A, class B> MSL_FN msl_::common_float_t<A, B> pow(A a, B b) {
    using V = msl_::common_float_t<A, B>;
    return msl_::each<V>([](float x, float y) { return ::__powf(x, y); }, V(a), V(b));
}
MSL_ALSO(sinpi)
MSL_ALSO(cospi)
MSL_ALSO(tanpi)
MSL_ALSO(asin)
MSL_ALSO(acos)
MSL_ALSO(atan)
MSL_ALSO(sinh)
MSL_ALSO(cosh)
MSL_ALSO(tanh)
MSL_ALSO(asinh)
MSL_ALSO(acosh)
MSL_ALSO(atanh)
MSL_ALSO(sqrt)
MSL_ALSO(rsqrt)
MSL_ALSO(floor)
MSL_ALSO(ceil)
MSL_ALSO(trunc)
MSL_ALSO(rint)
MSL_ALSO(round)
MSL_ALSO(atan2)
MSL_ALSO(fmod)
MSL_ALSO(nextafter)
#else
MSL_TRANSCENDENTALS(MSL_ALSO, MSL_ALSO)
#endif
MSL_OTHERS
} // namespace fast
#undef MSL_ALSO
#undef MSL_OTHERS
#undef MSL_TRANSCENDENTALS

} // namespace metal

#if !MSL_GPU
#pragma float_control(pop)
#endif
