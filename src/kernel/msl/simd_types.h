// <simd/simd.h>: other names of vectors and matrices, by which headers that C and Metal share know them.
namespace metal {

namespace simd {
using namespace ::metal;
}
#define MSL_SIMD_VECTORS(T)                  \
    typedef T##2 simd_##T##2, vector_##T##2; \
    typedef T##3 simd_##T##3, vector_##T##3; \
    typedef T##4 simd_##T##4, vector_##T##4;
MSL_SIMD_VECTORS(char)
MSL_SIMD_VECTORS(uchar)
MSL_SIMD_VECTORS(short)
MSL_SIMD_VECTORS(ushort)
MSL_SIMD_VECTORS(int)
MSL_SIMD_VECTORS(uint)
MSL_SIMD_VECTORS(long)
MSL_SIMD_VECTORS(ulong)
MSL_SIMD_VECTORS(half)
MSL_SIMD_VECTORS(float)
#undef MSL_SIMD_VECTORS
#define MSL_SIMD_MATRICES(T)                       \
    typedef T##2x2 simd_##T##2x2, matrix_##T##2x2; \
    typedef T##2x3 simd_##T##2x3, matrix_##T##2x3; \
    typedef T##2x4 simd_##T##2x4, matrix_##T##2x4; \
    typedef T##3x2 simd_##T##3x2, matrix_##T##3x2; \
    typedef T##3x3 simd_##T##3x3, matrix_##T##3x3; \
    typedef T##3x4 simd_##T##3x4, matrix_##T##3x4; \
    typedef T##4x2 simd_##T##4x2, matrix_##T##4x2; \
    typedef T##4x3 simd_##T##4x3, matrix_##T##4x3; \
    typedef T##4x4 simd_##T##4x4, matrix_##T##4x4;
MSL_SIMD_MATRICES(half)
MSL_SIMD_MATRICES(float)
#undef MSL_SIMD_MATRICES

} // namespace metal
