#!/bin/bash
# Installs the library to a folder of its own, moves that, and builds one program against it in every supported way: pkg-config and
# CMake, shared and static, C and C++.
set -euo pipefail
cmake=$1 build=$2 work=$3
here=$(cd "$(dirname "$0")" && pwd)

rm -rf "$work"
mkdir -p "$work"
"$cmake" --install "$build" --prefix "$work/first" >"$work/install.log"
mv "$work/first" "$work/prefix"
pc=$(find "$work/prefix" -name metalloid.pc)
lib=$(dirname "$(dirname "$pc")")
export PKG_CONFIG_PATH=${pc%/*} LD_LIBRARY_PATH=$lib

says_five() { # the program prints the first element of an rms_norm of {3, 4}
    local got
    got=$("$@")
    [ "$got" = "0.848528" ] || { echo "$*: printed '$got'"; exit 1; }
}

cd "$work"
warn="-Wall -Wextra -Wpedantic -Werror"
cc -std=c11 $warn "$here/consumer/consumer.c" $(pkg-config --cflags --libs metalloid) -o by_pkg_config
c++ -std=c++11 $warn -x c++ "$here/consumer/consumer.c" -x none $(pkg-config --cflags --libs metalloid) -o by_pkg_config_cxx
cc -std=c11 $warn -DMETALLOID_STATIC "$here/consumer/consumer.c" $(pkg-config --cflags metalloid) "$lib/libmetalloid.a" \
    $(pkg-config --static --libs-only-other metalloid) -lm -o by_pkg_config_static
says_five ./by_pkg_config
says_five ./by_pkg_config_cxx
LD_LIBRARY_PATH= says_five ./by_pkg_config_static
objdump -p by_pkg_config | grep -q 'NEEDED *libmetalloid.so.0$'

"$cmake" -S "$here/consumer" -B cmake -DCMAKE_PREFIX_PATH="$work/prefix" >cmake.log
"$cmake" --build cmake >>cmake.log
says_five cmake/consumer_shared
LD_LIBRARY_PATH= says_five cmake/consumer_static

# The C examples of the README and of the page on C, word for word, shared and static.
for page in README.md docs/quickstart/c.md; do
    awk '/^```c$/ { on = 1; next } on && /^```/ { exit } on' "$here/../../$page" >example.c
    cc $warn example.c $(pkg-config --cflags --libs metalloid) -o example
    [ "$(./example)" = "ok: 0.8485 1.1314" ] || { ./example; exit 1; }
    grep -Fq 'LD_LIBRARY_PATH=$HOME/.local/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}' "$here/../../$page"
    grep -Fq 'metalloid) $HOME/.local/lib/libmetalloid.a -pthread -lm' <<<"$(tr '\n' ' ' <"$here/../../$page")"
    cc $warn example.c $(pkg-config --cflags metalloid) "$lib/libmetalloid.a" -pthread -lm -o example
    [ "$(LD_LIBRARY_PATH= ./example)" = "ok: 0.8485 1.1314" ] || { ./example; exit 1; }
done

[ "$(LD_LIBRARY_PATH= prefix/bin/metalloid --version)" = "metalloid $(pkg-config --modversion metalloid)" ]
echo "installed package: pkg-config and CMake, shared and static, C and C++"
