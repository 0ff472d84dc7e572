# The worker of `metalloid bench`: every operation opens and is timed, the memory traffic of some is moved, and a request that makes no sense is answered with an error.
cmake_minimum_required(VERSION 3.25)
set(shapes
    "rms_norm rows=1 length=64 by=bare" "rms_norm rows=3 length=64 dtype=bfloat16 copies=3" "layer_norm rows=1 length=64 by=bare"
    "layer_norm rows=3 length=64" "add_rms_norm rows=1 length=64 by=bare" "add_rms_norm rows=3 length=64 dtype=float64"
    "add_layer_norm rows=3 length=64" "swiglu rows=1 length=64 by=bare" "swiglu rows=3 length=64" "geglu rows=3 length=64"
    "rope heads=2 time=5 dim=16" "qk_norm_rope heads=4 kv_heads=2 time=5 dim=16"
    "attention heads=4 kv_heads=2 q_len=5 kv_len=9 dim=16 causal=1 window=4 mask=1 dtype=float16"
    "cross_entropy rows=3 classes=50" "gated_delta_update batch=1 time=3 k_heads=1 v_heads=2 dim=16 by=plain"
    "read bytes=1048576" "copy bytes=1048576 stores=0" "copy bytes=1048576 stores=1" "copy bytes=1048576 stores=2"
    "arithmetic dtype=float32" "arithmetic dtype=float64")
set(nonsense
    "open" "open no_such_operation" "open rms_norm" "open rms_norm rows=0 length=4" "open rms_norm rows=x length=4"
    "open rms_norm rows=1 length=64 dtype=int8" "open rms_norm rows=1 length=64 copies=0" "open rope heads=1 time=2 dim=7"
    "open geglu rows=1 length=64 by=bare" "open rms_norm rows=2 length=64 by=bare" "open read bytes=1" "open copy bytes=65536 stores=3"
    "open arithmetic dtype=float16" "time 3" "traffic 3 1" "no-such-request")

set(moved "rms_norm rows=3 length=640" "add_rms_norm rows=3 length=640 copies=2" "swiglu rows=3 length=640"
    "qk_norm_rope heads=4 kv_heads=2 time=5 dim=64" "attention heads=4 kv_heads=2 q_len=1 kv_len=64 dim=16" "cross_entropy rows=3 classes=500")
set(moved_bytes 15360 30720 15360 15360 16640 5888)
set(moved_how 1 0 2 1 read read)

set(requests "")
foreach(shape ${shapes})
    string(APPEND requests "open ${shape}\ntime 2\nclose\n")
endforeach()
foreach(shape how IN ZIP_LISTS moved moved_how)
    string(APPEND requests "open ${shape}\ntraffic 2 ${how}\nclose\n")
endforeach()
foreach(request ${nonsense})
    string(APPEND requests "${request}\n")
endforeach()
file(WRITE ${REQUESTS} "info\n${requests}")
execute_process(COMMAND ${COMMAND} bench --worker INPUT_FILE ${REQUESTS} RESULT_VARIABLE result OUTPUT_VARIABLE out ERROR_VARIABLE err)
if(NOT result EQUAL 0 OR NOT err STREQUAL "")
    message(FATAL_ERROR "exit code ${result}\n${out}${err}")
endif()
string(REPLACE "\n" ";" answers "${out}")
list(POP_FRONT answers information)
string(JSON threads GET "${information}" threads)
foreach(shape ${shapes})
    list(POP_FRONT answers opened timed closed)
    string(JSON seconds ERROR_VARIABLE problem GET "${timed}" seconds)
    if(problem OR NOT seconds GREATER 0)
        message(FATAL_ERROR "${shape}: ${opened} ${timed}")
    endif()
endforeach()
foreach(shape wanted IN ZIP_LISTS moved moved_bytes)
    list(POP_FRONT answers opened timed closed)
    string(JSON bytes ERROR_VARIABLE problem GET "${timed}" bytes)
    if(problem OR NOT bytes EQUAL wanted)
        message(FATAL_ERROR "${shape}: ${timed} instead of ${wanted} bytes")
    endif()
endforeach()
foreach(request ${nonsense})
    list(POP_FRONT answers answer)
    string(JSON error ERROR_VARIABLE problem GET "${answer}" error)
    if(problem)
        message(FATAL_ERROR "'${request}' was answered with ${answer}")
    endif()
endforeach()
if(NOT answers STREQUAL "")
    message(FATAL_ERROR "more answers than requests: ${answers}")
endif()
