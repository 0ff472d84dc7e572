// What custom kernels cannot use: a name of it is an error that says so.
namespace metal {

#if MSL_GPU
#define MSL_UNSUPPORTED_TYPE(name, what)                                                   \
    struct name {                                                                          \
        template <class... A> name(A...) {                                                 \
            static_assert(sizeof...(A) > 99, what " are not supported in custom kernels"); \
        }                                                                                  \
    };
#else
#define MSL_UNSUPPORTED_TYPE(name, what) \
    struct __attribute__((unavailable(what " are not supported in custom kernels"))) name {};
#endif
namespace msl_ {
template <class...> constexpr bool never = false;
}
enum class access { sample, read, write, read_write };
#define MSL_UNSUPPORTED(name, what)                                                 \
    template <class T, access A = access::sample> struct name {                     \
        static_assert(msl_::never<T>, what " are not supported in custom kernels"); \
    };
MSL_UNSUPPORTED(texture1d, "textures")
MSL_UNSUPPORTED(texture1d_array, "textures")
MSL_UNSUPPORTED(texture2d, "textures")
MSL_UNSUPPORTED(texture2d_array, "textures")
MSL_UNSUPPORTED(texture2d_ms, "textures")
MSL_UNSUPPORTED(texture3d, "textures")
MSL_UNSUPPORTED(texturecube, "textures")
MSL_UNSUPPORTED(texturecube_array, "textures")
MSL_UNSUPPORTED(texture_buffer, "textures")
MSL_UNSUPPORTED(depth2d, "textures")
MSL_UNSUPPORTED(depth2d_array, "textures")
MSL_UNSUPPORTED(depthcube, "textures")
MSL_UNSUPPORTED(visible_function_table, "function tables")
MSL_UNSUPPORTED_TYPE(sampler, "samplers")
MSL_UNSUPPORTED_TYPE(command_buffer, "indirect command buffers")
MSL_UNSUPPORTED_TYPE(render_command, "indirect command buffers")
MSL_UNSUPPORTED_TYPE(compute_command, "indirect command buffers")
namespace raytracing {
template <class... A> struct intersector {
    static_assert(sizeof...(A) > 99, "ray tracing is not supported in custom kernels");
};
template <class... A> struct acceleration_structure {
    static_assert(sizeof...(A) > 99, "ray tracing is not supported in custom kernels");
};
template <class... A> struct intersection_function_table {
    static_assert(sizeof...(A) > 99, "ray tracing is not supported in custom kernels");
};
MSL_UNSUPPORTED_TYPE(ray, "ray tracing types")
} // namespace raytracing
template <class... A> struct tensor {
    static_assert(sizeof...(A) > 99, "tensors are not supported in custom kernels");
};
namespace tensor_ops {
struct matmul2d_descriptor {
    template <class... A> constexpr matmul2d_descriptor(A...) {
        static_assert(sizeof...(A) > 99, "tensor operations are not supported in custom kernels");
    }
};
} // namespace tensor_ops
namespace msl_ {
struct function_constant {
    template <class T> operator T() const {
        static_assert(never<T>,
                      "function constants are not supported in custom kernels, to which MLX gives none: use a "
                      "template argument");
        return T();
    }
};
} // namespace msl_
#define is_function_constant_defined(name) (::metal::msl_::function_constant())
#undef MSL_UNSUPPORTED
#undef MSL_UNSUPPORTED_TYPE

} // namespace metal
