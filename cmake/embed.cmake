# Writes a C file that holds text files: cmake -D PARTS=a.h;b.h -D DIRECTORY=... -D OUTPUT=... -P embed.cmake
set(arrays "")
set(table "")
foreach(part IN LISTS PARTS)
    file(READ ${DIRECTORY}/${part} bytes HEX)
    string(REGEX REPLACE "(..)" "0x\\1," bytes "${bytes}")
    string(MAKE_C_IDENTIFIER ${part} name)
    string(APPEND arrays "static const char ${name}[] = {${bytes}0};\n")
    string(APPEND table "    {\"${part}\", ${name}, sizeof ${name} - 1},\n")
endforeach()
file(WRITE ${OUTPUT} "#include \"kernel/msl.h\"\n\n${arrays}
const mtl_msl_part mtl_msl_parts[] = {\n${table}};
const int mtl_msl_part_count = sizeof mtl_msl_parts / sizeof mtl_msl_parts[0];\n")
