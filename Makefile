# Shortcuts. CMake does the building (see CMakePresets.json), tools/setup brings what is missing.
PREFIX ?= /usr/local
FUZZ_SECONDS ?= 60
ARGS ?=
CMAKE_ARGS ?=

# The kernels are compiled for the tests, for the Python package and for the wheel; with ccache once. Looked for after the set-up.
# scikit-build-core would call Python's compiler, gcc, by another name.
test docs wheel sanitize: export CC := $(CC)
test docs wheel sanitize: export CMAKE_C_COMPILER_LAUNCHER = $(shell command -v ccache 2>/dev/null)

all:
	@tools/setup build
	cmake --preset release $(CMAKE_ARGS)
	cmake --build --preset release

install: all
	cmake --install build/release --prefix $(PREFIX)

# A language model answers a prompt; make demo ARGS='--prompt "Why is the sky blue?" --compare'
demo:
	@tools/setup demo
	@tools/install_python
	@.venv/bin/python examples/generate $(ARGS)

test:
	@tools/setup test
	@tools/install_python
	cmake --preset test
	cmake --build --preset test
	ctest --preset test
	cmake --preset aarch64
	cmake --build --preset aarch64
	ctest --preset aarch64
	ctest --preset aarch64-no-bf16
	METALLOID_COMMAND=build/test/metalloid .venv/bin/python -m pytest -n auto --maxprocesses=4 --dist=worksteal tests/python
	@tools/test_elixir
	@tools/test_cuda

# The tests of a GPU machine alone: builds the CUDA kernels where nvcc is, and needs no set-up beyond PyTorch.
test-cuda:
	@tools/test_cuda

# Against the machine's ceilings and PyTorch, MLX, onnxruntime; make bench ARGS='--quick --plot bench.png'
bench: all
	@tools/setup bench
	@tools/install_python
	@METALLOID_PYTHON=.venv/bin/python build/release/metalloid bench $(ARGS)

sanitize:
	@tools/setup sanitize
	@tools/sanitize

fuzz:
	@tools/setup fuzz
	@tools/fuzz $(FUZZ_SECONDS)

C_FILES = $(shell find include src cli bindings tests -name '*.[ch]')

lint:
	@tools/setup lint
	.venv/bin/clang-format --dry-run --Werror $(C_FILES)
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	@tools/format_elixir --check-formatted
	tools/check_types
	cmake --preset debug
	cmake --build --preset debug
	run-clang-tidy -quiet -p build/debug '/(src|cli)/.*\.c$$' 2>/dev/null
	cppcheck --quiet --error-exitcode=1 --suppressions-list=.cppcheck -Iinclude -Isrc src cli

format:
	@tools/setup lint
	.venv/bin/clang-format -i $(C_FILES)
	.venv/bin/ruff format
	.venv/bin/ruff check --fix
	@tools/format_elixir

# The site, into build/docs/html; a reference or link within it that leads nowhere is an error.
docs:
	@tools/setup docs
	@tools/install_python
	@mkdir -p build/docs/doxygen
	doxygen docs/Doxyfile
	.venv/bin/python -m sphinx --fail-on-warning --keep-going --nitpicky -q -b html docs build/docs/html

# A manylinux wheel without CUDA kernels, into build/wheel, tried where there is no compiler.
wheel:
	@tools/setup wheel
	@tools/wheel

clean:
	rm -rf build

.PHONY: all install demo test test-cuda bench sanitize fuzz lint format docs wheel clean
.NOTPARALLEL:
