# The header that compiled Metal kernels have before them: its parts, in this order, go into the library as text.
set(METALLOID_MSL_PARTS
    abi_cpu.h
    runtime_cpu.h
    runtime_cuda.h
    types.h
    vectors.h
    math.h
    functions.h
    matrix.h
    simd_types.h
    atomic.h
    simdgroup.h
    lockstep_cpu.h
    simdgroup_matrix.h
    mlx.h
    unsupported.h
)

set(msl_dir ${PROJECT_SOURCE_DIR}/src/kernel/msl)
set(msl_source ${PROJECT_BINARY_DIR}/msl_parts.c)
list(TRANSFORM METALLOID_MSL_PARTS PREPEND ${msl_dir}/ OUTPUT_VARIABLE msl_files)
add_custom_command(OUTPUT ${msl_source}
    COMMAND ${CMAKE_COMMAND} -D "PARTS=${METALLOID_MSL_PARTS}" -D DIRECTORY=${msl_dir} -D OUTPUT=${msl_source}
            -P ${PROJECT_SOURCE_DIR}/cmake/embed.cmake
    DEPENDS ${msl_files} ${PROJECT_SOURCE_DIR}/cmake/embed.cmake
    COMMENT "Metal header" VERBATIM)
