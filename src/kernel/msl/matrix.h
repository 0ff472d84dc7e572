// Matrices floatCxR, halfCxR: C columns of R components, as Metal stores them.
namespace metal {

template <class T, int C, int R> struct matrix {
    vec<T, R> columns[C];

    matrix() = default;
    MSL_FN constexpr explicit matrix(T diagonal) : matrix(of_diagonal(diagonal)) {}
    // columns
    template <int N = C, class = enable_if_t<N == 2>>
    MSL_FN constexpr matrix(const vec<T, R> &a, const vec<T, R> &b) : columns{a, b} {}
    template <int N = C, class = enable_if_t<N == 3>>
    MSL_FN constexpr matrix(const vec<T, R> &a, const vec<T, R> &b, const vec<T, R> &c) : columns{a, b, c} {}
    template <int N = C, class = enable_if_t<N == 4>>
    MSL_FN constexpr matrix(const vec<T, R> &a, const vec<T, R> &b, const vec<T, R> &c, const vec<T, R> &d)
        : columns{a, b, c, d} {}
    // C * R scalars, column by column
    template <class... A, class = msl_::if_scalars<A...>, class = enable_if_t<sizeof...(A) == C * R>>
    MSL_FN constexpr matrix(A... a) : matrix(of_elements({T(a)...})) {}
    template <class U> MSL_FN constexpr explicit matrix(const matrix<U, C, R> &m) : matrix(of_matrix(m)) {}
    MSL_FN constexpr vec<T, R> &operator[](int c) { return columns[c]; }
    MSL_FN constexpr const vec<T, R> &operator[](int c) const { return columns[c]; }

  private:
    struct elements {
        T e[C * R];
    };
    static MSL_FN constexpr vec<T, R> column(const elements &all, int c) {
        const T *e = all.e + c * R;
        if constexpr (R == 2) return vec<T, 2>(e[0], e[1]);
        else if constexpr (R == 3) return vec<T, 3>(e[0], e[1], e[2]);
        else return vec<T, 4>(e[0], e[1], e[2], e[3]);
    }
    static MSL_FN constexpr matrix of_elements(const elements &all) {
        if constexpr (C == 2) return matrix(column(all, 0), column(all, 1));
        else if constexpr (C == 3) return matrix(column(all, 0), column(all, 1), column(all, 2));
        else return matrix(column(all, 0), column(all, 1), column(all, 2), column(all, 3));
    }
    static MSL_FN constexpr matrix of_diagonal(T diagonal) {
        elements all{};
        for (int i = 0; i < (C < R ? C : R); ++i) all.e[i * R + i] = diagonal;
        return of_elements(all);
    }
    template <class U> static MSL_FN constexpr matrix of_matrix(const matrix<U, C, R> &m) {
        elements all{};
        for (int i = 0; i < C * R; ++i) all.e[i] = T(m.columns[i / R][i % R]);
        return of_elements(all);
    }

  public:
    friend MSL_FN matrix operator+(matrix a, const matrix &b) {
        for (int c = 0; c < C; ++c) a.columns[c] += b.columns[c];
        return a;
    }
    friend MSL_FN matrix operator-(matrix a, const matrix &b) {
        for (int c = 0; c < C; ++c) a.columns[c] -= b.columns[c];
        return a;
    }
    friend MSL_FN matrix operator-(matrix a) {
        for (int c = 0; c < C; ++c) a.columns[c] = -a.columns[c];
        return a;
    }
    template <class A, class = msl_::if_scalars<A>> friend MSL_FN matrix operator*(matrix a, A s) {
        for (int c = 0; c < C; ++c) a.columns[c] *= T(s);
        return a;
    }
    template <class A, class = msl_::if_scalars<A>> friend MSL_FN matrix operator*(A s, const matrix &a) {
        return a * s;
    }
    friend MSL_FN vec<T, R> operator*(const matrix &a, const vec<T, C> &v) {
        vec<T, R> sum = a.columns[0] * v[0];
        for (int c = 1; c < C; ++c) sum += a.columns[c] * v[c];
        return sum;
    }
    friend MSL_FN vec<T, C> operator*(const vec<T, R> &v, const matrix &a) {
        vec<T, C> r;
        for (int c = 0; c < C; ++c) r[c] = T(msl_::dot_of(v, a.columns[c]));
        return r;
    }
    friend MSL_FN bool operator==(const matrix &a, const matrix &b) {
        bool equal = true;
        for (int c = 0; c < C; ++c) equal = equal && all(a.columns[c] == b.columns[c]);
        return equal;
    }
    friend MSL_FN bool operator!=(const matrix &a, const matrix &b) { return !(a == b); }
    template <class A> MSL_FN matrix &operator+=(const A &a) { return *this = *this + a; }
    template <class A> MSL_FN matrix &operator-=(const A &a) { return *this = *this - a; }
    template <class A> MSL_FN matrix &operator*=(const A &a) { return *this = *this * a; }
};
template <class T, int N, int R, int C>
MSL_FN matrix<T, C, R> operator*(const matrix<T, N, R> &a, const matrix<T, C, N> &b) {
    matrix<T, C, R> product;
    for (int c = 0; c < C; ++c) product.columns[c] = a * b.columns[c];
    return product;
}
template <class T, int C, int R> MSL_FN matrix<T, R, C> transpose(const matrix<T, C, R> &m) {
    matrix<T, R, C> t;
    for (int c = 0; c < C; ++c)
        for (int r = 0; r < R; ++r) t.columns[r][c] = m.columns[c][r];
    return t;
}
template <class T, int N> MSL_FN T determinant(const matrix<T, N, N> &m) {
    if constexpr (N == 2) {
        return T(float(m[0][0]) * float(m[1][1]) - float(m[0][1]) * float(m[1][0]));
    } else if constexpr (N == 3) {
        return T(msl_::dot_of(m[0], cross(m[1], m[2])));
    } else { // by the minors of rows 0, 1 and of rows 2, 3
        auto minor2 = [&](int a, int b, int r) {
            return float(m[a][r]) * float(m[b][r + 1]) - float(m[b][r]) * float(m[a][r + 1]);
        };
        return T(minor2(0, 1, 0) * minor2(2, 3, 2) - minor2(0, 2, 0) * minor2(1, 3, 2) +
                 minor2(0, 3, 0) * minor2(1, 2, 2) + minor2(1, 2, 0) * minor2(0, 3, 2) -
                 minor2(1, 3, 0) * minor2(0, 2, 2) + minor2(2, 3, 0) * minor2(0, 1, 2));
    }
}
#define MSL_MATRIX_NAMES(T)         \
    typedef matrix<T, 2, 2> T##2x2; \
    typedef matrix<T, 2, 3> T##2x3; \
    typedef matrix<T, 2, 4> T##2x4; \
    typedef matrix<T, 3, 2> T##3x2; \
    typedef matrix<T, 3, 3> T##3x3; \
    typedef matrix<T, 3, 4> T##3x4; \
    typedef matrix<T, 4, 2> T##4x2; \
    typedef matrix<T, 4, 3> T##4x3; \
    typedef matrix<T, 4, 4> T##4x4;
MSL_MATRIX_NAMES(float)
MSL_MATRIX_NAMES(half)
#undef MSL_MATRIX_NAMES

} // namespace metal
