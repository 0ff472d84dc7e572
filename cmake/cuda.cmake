# The CUDA backend: each src/cuda/<op>.cu becomes an image of machine code, which src/cuda/images.c puts into the library. Nothing of
# CUDA is linked, and CMake's own CUDA language, which would link its runtime, is not used.
#   METALLOID_CUDA                 ON, OFF, or AUTO: where nvcc is found
#   METALLOID_CUDA_ARCHITECTURES   real architectures; PTX for the last plain one serves newer GPUs
set(METALLOID_CUDA OFF CACHE STRING "Build the CUDA kernels: ON, OFF, or AUTO (where nvcc is found)")
set(METALLOID_CUDA_ARCHITECTURES "80;90a" CACHE STRING "Compute capabilities that get machine code of their own")

file(GLOB CUDA_SOURCES CONFIGURE_DEPENDS src/cuda/*.c)
file(GLOB CUDA_KERNELS CONFIGURE_DEPENDS src/cuda/*.cu)
file(GLOB CUDA_HEADERS CONFIGURE_DEPENDS src/cuda/*.cuh src/cuda/*.inc src/cuda/arguments.h)

set(METALLOID_WITH_CUDA 0)
if(METALLOID_CUDA)
    find_program(METALLOID_NVCC nvcc HINTS /usr/local/cuda/bin ENV CUDA_HOME PATH_SUFFIXES bin)
    if(METALLOID_NVCC)
        set(METALLOID_WITH_CUDA 1)
    elseif(NOT METALLOID_CUDA STREQUAL "AUTO")
        message(FATAL_ERROR "METALLOID_CUDA is ${METALLOID_CUDA}, but there is no nvcc")
    endif()
endif()
if(METALLOID_WITH_CUDA)
    message(STATUS "CUDA kernels: ${METALLOID_NVCC}, for ${METALLOID_CUDA_ARCHITECTURES}")
else()
    message(STATUS "CUDA kernels: left out (METALLOID_CUDA is ${METALLOID_CUDA})")
    return()
endif()

set(nvcc_targets "")
foreach(architecture IN LISTS METALLOID_CUDA_ARCHITECTURES)
    list(APPEND nvcc_targets -gencode=arch=compute_${architecture},code=sm_${architecture})
endforeach()
if("80" IN_LIST METALLOID_CUDA_ARCHITECTURES)
    list(APPEND nvcc_targets -gencode=arch=compute_80,code=compute_80)
endif()

# cuda.h, for the driver's types; and libcuda is opened at run time.
get_filename_component(cuda_bin ${METALLOID_NVCC} REALPATH)
get_filename_component(cuda_bin ${cuda_bin} DIRECTORY)
find_path(METALLOID_CUDA_INCLUDE_DIR cuda.h HINTS ${cuda_bin}/../include ${cuda_bin}/../targets/x86_64-linux/include REQUIRED)

set(image_dir ${PROJECT_BINARY_DIR}/cuda)
file(MAKE_DIRECTORY ${image_dir})
set(cuda_images "")
foreach(source IN LISTS CUDA_KERNELS)
    get_filename_component(name ${source} NAME_WE)
    set(image ${image_dir}/${name}.fatbin)
    add_custom_command(OUTPUT ${image} # compressed to a fifth; the driver opens it
        COMMAND ${METALLOID_NVCC} -fatbin -Xfatbin=-compress-all -std=c++17 -O3 -I${PROJECT_SOURCE_DIR}/src ${nvcc_targets} -o ${image} ${source}
        DEPENDS ${source} ${CUDA_HEADERS}
        COMMENT "CUDA kernels ${name}" VERBATIM)
    list(APPEND cuda_images ${image})
endforeach()
set_source_files_properties(src/cuda/images.c PROPERTIES
    COMPILE_DEFINITIONS "MTL_CUDA_IMAGE_DIR=\"${image_dir}\"" OBJECT_DEPENDS "${cuda_images}")
if(NOT "90a" IN_LIST METALLOID_CUDA_ARCHITECTURES)
    set_source_files_properties(src/cuda/driver.c PROPERTIES COMPILE_DEFINITIONS MTL_CUDA_WITHOUT_HOPPER)
endif()
