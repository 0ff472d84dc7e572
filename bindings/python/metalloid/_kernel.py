"""A caller's own kernels, in the Metal Shading Language, in CUDA C++ or compiled, on arrays of any library."""

import functools
import importlib.util
import math
import operator
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np

from metalloid import _native

_ON_CUDA = (2, 13)  # DLPack's device types of it, managed memory too
_HAVE_MEMORY = ("numpy", "torch", "mlx", "cupy")  # libraries of which every array has some, and can be made
_MOST_AXES = 64
_MATH_MODES = {"safe": 0, "relaxed": 1, "fast": 2}

# Inputs, outputs, grid, threadgroup, template arguments, initial value: what the extension's Kernel takes.
_Three = tuple[int, int, int]
_Arguments = tuple[tuple[Any, ...], tuple[Any, ...], _Three, _Three, tuple[tuple[str, int | str], ...], float | None]


class CompileOptions(TypedDict, total=False):
    math_mode: Literal["safe", "relaxed", "fast"]


class DebugOptions(TypedDict, total=False):
    debug: bool
    address_sanitizer: bool
    max_iterations: int


@functools.cache
def _dtype_name(dtype: Any) -> str:
    """``float32`` for that dtype of any library."""
    if dtype is None:  # float64 to NumPy
        raise ValueError("metal_kernel: None is no dtype")
    if isinstance(dtype, type) and dtype in (bool, int, float, complex):
        raise ValueError(f"metal_kernel: {dtype.__name__} is no dtype of an array library")
    if type(dtype).__module__.partition(".")[0] in ("torch", "mlx"):
        return str(dtype).rpartition(".")[2]
    try:
        return np.dtype(dtype).name
    except TypeError:
        raise ValueError(f"metal_kernel: {_shown(dtype)} is no dtype") from None


def _name_of(what: str, dtype: Any) -> str:
    is_number = isinstance(dtype, (int, float, complex, np.generic)) or type(dtype).__name__ in ("array", "Tensor")
    try:
        if is_number:
            raise TypeError
        return _dtype_name(dtype)
    except TypeError:  # or not hashable
        reason = f"{_shown(dtype)} is no dtype"
    except ValueError as error:
        reason = str(error).removeprefix("metal_kernel: ")
    raise ValueError(f"metal_kernel: {what}: {reason}") from None


def _shown(value: Any) -> str:
    """For a message: one short line, whatever the value is."""
    try:
        return f"{' '.join(repr(value).split()):.60}"
    except Exception:  # an int of thousands of digits
        return type(value).__name__


def _check_list(what: str, given: Any, of: str = "", maker: str = "metal_kernel") -> None:
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes, bytearray, memoryview)):
        raise TypeError(f"{maker}: {what} must be a list{of}, got {type(given).__name__}")


def _check_string(maker: str, what: str, given: Any) -> None:
    if not isinstance(given, str):
        raise TypeError(f"{maker}: {what} must be a string, got {type(given).__name__}")
    if "\0" in given:
        raise ValueError(f"{maker}: {what} must not contain NUL")
    try:
        given.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{maker}: {what} must be text, got a lone surrogate") from None


def _flag(maker: str, what: str, given: Any) -> bool:
    if not isinstance(given, (bool, np.bool_)):
        raise TypeError(f"{maker}: {what} must be True or False, got {type(given).__name__}")
    return bool(given)


def _size(maker: str, what: str, given: Any, below: int) -> int:
    try:
        size = operator.index(given)
    except TypeError:
        raise TypeError(f"{maker}: {what} must be an integer, got {type(given).__name__}") from None
    if not 0 <= size < below:
        raise ValueError(f"{maker}: {what} must not be negative, or {below:#x} or more, got {_shown(size)}")
    return size


def _template(argument: Any) -> tuple[str, int | str]:
    if not isinstance(argument, (tuple, list)) or len(argument) != 2 or not isinstance(argument[0], str):
        raise TypeError(f"metal_kernel: template must consist of pairs (name, value), got {_shown(argument)}")
    name, value = argument
    _check_string("metal_kernel", "the name of a template argument", name)
    if isinstance(value, (bool, np.bool_)):
        return name, bool(value)
    if isinstance(value, (int, np.integer)):
        if not -(2**31) <= value < 2**31:
            raise ValueError(f"metal_kernel: template argument {name} must fit in 32 bits, got {int(value):#x}"[:200])
        return name, int(value)
    return name, _name_of(f"template argument {name} must be an int, a bool or a dtype", value)


@functools.cache
def _numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _library(array: Any) -> str:
    """Of the array's class, or of the one that it is derived from."""
    kind: Any = type(array)  # mypy takes no class for hashable
    return _library_of(kind)


@functools.lru_cache(maxsize=64)
def _library_of(kind: type) -> str:
    libraries = [of.__module__.partition(".")[0] for of in kind.__mro__]
    known = ("numpy", "torch", "cupy", "jaxlib", "jax", "mlx")
    return next((name for name in libraries if name in known), libraries[0])


def _scalar(value: Any, place: int) -> Any:
    """A Python scalar as an array of rank 0, with the dtype that MLX gives it; anything else as it is."""
    if isinstance(value, bool):
        return np.array(value)
    if isinstance(value, int):
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"metal_kernel: inputs[{place}] must fit in 64 bits, got {value:#x}"[:200])
        return np.array(value, np.int32 if -(2**31) <= value < 2**31 else np.int64)
    if isinstance(value, float):
        return np.array(value, np.float32)
    if isinstance(value, np.generic):
        return np.asarray(value)
    return value


def _allocate(library: str, like: Any, shape: tuple[int, ...], dtype: Any, name: str) -> Any:
    """Memory for one output that the kernel can write to, in the library of the arrays where that library has such."""
    if library == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, name), device=None if like is None else like.device)
    if library == "mlx":
        mx = sys.modules["mlx.core"]
        memory = mx.zeros(shape, getattr(mx, "bool_" if name == "bool" else name))
        mx.eval(memory)
        return memory
    if library == "cupy":
        with like.device:
            return sys.modules["cupy"].empty(shape, _numpy_dtype(name))
    if like is not None and library != "numpy" and like.__dlpack_device__()[0] in _ON_CUDA:
        raise RuntimeError(
            "metal_kernel: outputs on a CUDA device are allocated as PyTorch's and CuPy's arrays, not as those of "
            f"{library}"
        )
    return np.empty(shape, _numpy_dtype(name))


def _deliver(library: str, like: Any, memory: Any) -> Any:
    """The output as an array of the library."""
    if not isinstance(memory, np.ndarray) or library == "numpy":
        return memory
    namespace = like.__array_namespace__()
    return namespace.asarray(memory)


def _check_memory(array: Any, place: int) -> None:
    """That it has memory, which a tracer of JAX's or a deleted array has not."""
    try:
        array.__dlpack_device__()
    except Exception as error:
        raise ValueError(
            f"metal_kernel: the memory of inputs[{place}] ({type(array).__name__}) cannot be shared: "
            f"{' '.join(str(error).split()):.200}"
        ) from error


def _leads(array: Any) -> bool:
    """Whether the outputs go where this array is: scalars of the host's may stand beside it."""
    return bool(getattr(array, "is_cuda", False)) or _library(array) == "cupy"


def _three(value: Sequence[int], what: str) -> tuple[int, int, int]:
    try:
        x, y, z = (operator.index(n) for n in value)
    except (TypeError, ValueError):
        raise ValueError(f"metal_kernel: {what} must be three integers, got {_shown(value)}") from None
    return x, y, z


def _shape(value: Sequence[int] | int) -> tuple[int, ...]:
    try:
        shape = tuple(operator.index(n) for n in (value if isinstance(value, (Sequence, np.ndarray)) else (value,)))
    except TypeError:
        raise ValueError(f"metal_kernel: output_shapes must consist of integers, got {_shown(value)}") from None
    if any(not 0 <= extent < 2**63 for extent in shape):
        raise ValueError(f"metal_kernel: output_shapes must lie in 0..2^63 - 1, got {_shown(value)}")
    if (
        len(shape) > _MOST_AXES or math.prod(extent or 1 for extent in shape) >= 2**60
    ):  # of 8 bytes, as NumPy counts them
        raise ValueError(f"metal_kernel: output_shapes must have at most {_MOST_AXES} axes and 2^60 - 1 elements")
    return shape


def _initial(value: Any) -> float | None:
    try:
        if isinstance(value, (str, bytes, bytearray)):  # which float() reads
            raise TypeError
        return None if value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"metal_kernel: init_value must be a number, got {_shown(value)}") from None


def _fallback_compiler() -> str | None:
    """The compiler of the PyPI package ziglang, which the extra ``metalloid[kernels]`` brings."""
    spec = importlib.util.find_spec("ziglang")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = os.path.join(folder, "zig")
        if os.access(path, os.X_OK):
            return f"{path} c++"
    return None


class MetalKernel:
    """What :func:`metal_kernel` returns."""

    def __init__(self, native: _native.Kernel, name: str, inputs: int, outputs: int) -> None:
        self._native = native
        self._name = name
        self._inputs = inputs
        self._outputs = outputs

    def __repr__(self) -> str:
        return f"<metal_kernel {self._name}>"

    def _checked(
        self,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[Any],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, Any]] | None,
    ) -> tuple[list[tuple[int, ...]], list[str], tuple[_Three, _Three], tuple[tuple[str, int | str], ...]]:
        """What is refused without looking at arrays; shapes and dtypes of the outputs, sizes, template arguments."""
        for what, given, wanted in (
            ("inputs", inputs, self._inputs),
            ("output_shapes", output_shapes, self._outputs),
            ("output_dtypes", output_dtypes, self._outputs),
        ):
            _check_list(what, given)
            if len(given) != wanted:
                raise ValueError(f"metal_kernel: {what} must have {wanted} entries for {self._name}, got {len(given)}")
        if template is not None:
            _check_list("template", template, " of pairs (name, value)")
        values = [_template(argument) for argument in template or ()]
        names = [_name_of("output_dtypes", dtype) for dtype in output_dtypes]
        shapes = [_shape(shape) for shape in output_shapes]
        for name in names:
            if name not in _native.KERNEL_DTYPES:
                raise ValueError(f"metal_kernel: kernels have no dtype {name}")
        sizes = _three(grid, "grid"), _three(threadgroup, "threadgroup")
        if max(*sizes[0], *sizes[1]) >= 2**63:
            raise ValueError(
                f"metal_kernel: grid and threadgroup are too large: {_shown(grid)} and {_shown(threadgroup)}"
            )
        if min(sizes[0]) < 1 or min(sizes[1]) < 1:
            raise ValueError(
                f"metal_kernel: grid and threadgroup must be at least 1, got {_shown(grid)} and {_shown(threadgroup)}"
            )
        return shapes, names, sizes, tuple(values)

    def _prepare(
        self,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[Any],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, Any]] | None,
        init_value: float | None,
    ) -> tuple[_Arguments, str, Any]:
        shapes, names, sizes, values = self._checked(inputs, output_shapes, output_dtypes, grid, threadgroup, template)
        arrays, library, like = [], "numpy", None
        for place, value in enumerate(inputs):
            array = _scalar(value, place)
            if isinstance(array, type) or not hasattr(array, "__dlpack__"):
                raise TypeError(
                    f"metal_kernel: inputs[{place}] must be an array or a number, got {type(array).__name__}"
                )
            of = _library(array)
            if of not in _HAVE_MEMORY:
                _check_memory(array, place)
            if array is value and (like is None or (_leads(array) and not _leads(like))):
                like, library = array, of
            arrays.append(array)
        if like is None and output_dtypes and _library(output_dtypes[0]) in ("torch", "mlx"):
            library = _library(output_dtypes[0])
        if library not in _HAVE_MEMORY and not hasattr(like, "__array_namespace__"):
            raise ValueError(
                f"metal_kernel: outputs cannot be allocated as {type(like).__name__}, which has no __array_namespace__"
            )
        if library == "mlx":
            sys.modules["mlx.core"].eval([array for array in arrays if _library(array) == "mlx"])
        outputs = tuple(
            _allocate(library, like, shape, dtype, name)
            for shape, dtype, name in zip(shapes, output_dtypes, names, strict=True)
        )
        return (tuple(arrays), outputs, *sizes, values, _initial(init_value)), library, like

    def _run(self, arguments: _Arguments, library: str, like: Any, scalars: tuple[Any, ...] = ()) -> list[Any]:
        self._native.launch(*arguments, scalars)
        return [_deliver(library, like, output) for output in arguments[1]]

    def __call__(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[Any],
        grid: Sequence[int],
        threadgroup: Sequence[int],
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
    ) -> list[Any]:
        """Runs the kernel and returns its outputs, row contiguous, as a list.

        Args:
            inputs: arrays, or Python scalars, which the kernel sees as references.
            output_shapes, output_dtypes: of each output. A dtype is one of any array library's.
            grid: threads in all along x, y, z.
            threadgroup: threads of a threadgroup, at most 1024; cut to the grid. Those at the edges are smaller where
                the grid is no multiple.
            template: (name, value) pairs, template arguments of the kernel: ints, bools, dtypes.
            init_value: what the outputs hold before the kernel runs; without it, anything.
            verbose: prints the generated source.
            stream: accepted for MLX's sake; work on a GPU goes to the stream that the arrays' library has current.

        Raises:
            TypeError: an input that is no array and no number, or a masked one; what should be a list and is not.
            ValueError: arguments that do not fit. Nothing is compiled.
            RuntimeError: the kernel does not compile, with what the compiler said, its lines counted in ``source`` and
                ``header``; or it was stopped: a barrier that only part of a threadgroup reaches.
        """
        arguments, library, like = self._prepare(
            inputs, output_shapes, output_dtypes, grid, threadgroup, template, init_value
        )
        if verbose:
            print(f"Generated source code for `{self._name}`:\n```\n{self._native.source(*arguments)}\n```")
        return self._run(arguments, library, like)

    def source(
        self,
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[Any],
        grid: Sequence[int] = (1, 1, 1),
        threadgroup: Sequence[int] = (1, 1, 1),
        template: Sequence[tuple[str, Any]] | None = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: object = None,
        translated: bool = False,
    ) -> str:
        """The generated source of such a call, without running it: Metal's, or, ``translated``, the C++ that is
        compiled. The arguments are those of the call."""
        arguments, _, _ = self._prepare(inputs, output_shapes, output_dtypes, grid, threadgroup, template, init_value)
        return self._native.source(*arguments, translated)


def _made(
    maker: str,
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str,
    **settings: Any,
) -> MetalKernel:
    for what, text in (("name", name), ("source", source), ("header", header)):
        _check_string(maker, what, text)
    for what, names in (("input_names", input_names), ("output_names", output_names)):
        if isinstance(names, str):
            raise ValueError(f"{maker}: {what} must be a list of strings, got one string")
        _check_list(what, names, " of strings", maker)
        for place, text in enumerate(names):
            _check_string(maker, f"{what}[{place}]", text)
    native = _native.Kernel(name, tuple(input_names), tuple(output_names), source, header, **settings)
    return MetalKernel(native, name, len(input_names), len(output_names))


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    atomic_outputs: bool = False,
    compile_options: CompileOptions | None = None,
    *,
    debug_options: DebugOptions | None = None,
) -> Callable[..., list[Any]]:
    """A kernel from the body of a function in the Metal Shading Language, as ``mlx.core.fast.metal_kernel`` makes it;
    it runs where there is no Metal.

    Args:
        name: of the kernel, an identifier.
        input_names, output_names: of the function's parameters.
        source: the function's body. The signature follows from the arguments of a call: ``const device T* name`` for an
            input (a reference where it has rank 0), ``device T* name`` for an output, ``name_shape``, ``name_strides``,
            ``name_ndim`` and Metal's attributes (``thread_position_in_grid``, ...) where the source mentions them.
        header: stands before the function.
        ensure_row_contiguous: copies inputs that are not; without it the kernel reads their strides.
        atomic_outputs: outputs are ``device atomic<T>*``.
        compile_options: ``{"math_mode": "safe" | "relaxed" | "fast"}``; safe keeps IEEE's special values.
        debug_options: on the CPU, ``"debug"`` keeps the sources beside a ``-g`` build for gdb; ``"address_sanitizer"``
            reports accesses out of bounds (preload the sanitizer's run-time); ``"max_iterations"`` stops a kernel one
            thread of which goes through more iterations of its loops.

    Raises:
        TypeError: a name or a source that is no string, names that are no list, a flag that is no bool.
        ValueError: a name that is no identifier, no output, an option that is not known. Nothing is compiled yet.

    >>> import numpy as np
    >>> kernel = metal_kernel(
    ...     name="double", input_names=["x"], output_names=["y"],
    ...     source="uint i = thread_position_in_grid.x; y[i] = 2 * x[i];")
    >>> x = np.array([1, 2, 3], np.float32)
    >>> kernel(inputs=[x], output_shapes=[x.shape], output_dtypes=[x.dtype], grid=(3, 1, 1), threadgroup=(3, 1, 1))
    [array([2., 4., 6.], dtype=float32)]
    """
    maker = "metal_kernel"
    for what, given in (("compile_options", compile_options), ("debug_options", debug_options)):
        if given is not None and not isinstance(given, Mapping):
            raise TypeError(f"{maker}: {what} must be a dict, got {type(given).__name__}")
    options: dict[str, Any] = dict(compile_options or {})
    debug: dict[str, Any] = dict(debug_options or {})
    mode = options.pop("math_mode", "safe")
    if not isinstance(mode, str) or mode not in _MATH_MODES:
        raise ValueError(f"{maker}: math_mode must be 'safe', 'relaxed' or 'fast', got {_shown(mode)}")
    settings: dict[str, Any] = {
        "debug": _flag(maker, "debug", debug.pop("debug", False)),
        "address_sanitizer": _flag(maker, "address_sanitizer", debug.pop("address_sanitizer", False)),
        "most_iterations": _size(maker, "max_iterations", debug.pop("max_iterations", 0), 2**63),
    }
    for unknown in (*options, *debug):
        raise ValueError(f"{maker}: there is no option {_shown(unknown)}")
    return _made(
        maker,
        name,
        input_names,
        output_names,
        source,
        header,
        ensure_row_contiguous=_flag(maker, "ensure_row_contiguous", ensure_row_contiguous),
        atomic_outputs=_flag(maker, "atomic_outputs", atomic_outputs),
        math_mode=_MATH_MODES[mode],
        fallback_compiler=_fallback_compiler(),
        **settings,
    )


def cuda_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    ensure_row_contiguous: bool = True,
    shared_memory: int = 0,
) -> Callable[..., list[Any]]:
    """A kernel from the body of a function in CUDA C++, as ``mlx.core.fast.cuda_kernel`` makes it, for arrays on NVIDIA
    GPUs.

    Args:
        name: of the kernel, an identifier.
        input_names, output_names: of the function's parameters.
        source: the function's body; ``const T* name`` for an input (a scalar too), ``T* name`` for an output, and
            ``name_shape``, ``name_strides``, ``name_ndim`` where the source mentions them. Blocks are whole: the body
            guards itself.
        header: stands before the function.
        ensure_row_contiguous: copies inputs that are not; without it the kernel reads their strides.
        shared_memory: bytes of dynamic shared memory of a block.

    Raises:
        ValueError: a name that is no identifier, no output, a negative size. Nothing is compiled yet.
    """
    return _made(
        "cuda_kernel",
        name,
        input_names,
        output_names,
        source,
        header,
        ensure_row_contiguous=_flag("cuda_kernel", "ensure_row_contiguous", ensure_row_contiguous),
        language=1,
        shared_memory=_size("cuda_kernel", "shared_memory", shared_memory, 2**31),
    )


@functools.cache  # for good, as is the code that the driver has loaded of it
def _precompiled(name: str, image: bytes, inputs: int, outputs: int, contiguous: bool, shared: int) -> MetalKernel:
    native = _native.Kernel(
        name,
        tuple(f"inputs_{i}" for i in range(inputs)),
        tuple(f"outputs_{i}" for i in range(outputs)),
        image,
        ensure_row_contiguous=contiguous,
        language=2,
        shared_memory=shared,
    )
    return MetalKernel(native, name, inputs, outputs)


def precompiled_cuda_kernel(
    *,
    name: str,
    compiled_source: bytes,
    inputs: Sequence[Any],
    output_shapes: Sequence[Sequence[int]],
    output_dtypes: Sequence[Any],
    scalars: Sequence[bool | int | float],
    grid: Sequence[int],
    threadgroup: Sequence[int],
    shared_memory: int = 0,
    init_value: float | None = None,
    ensure_row_contiguous: bool = False,
    stream: object = None,
) -> list[Any]:
    """Runs a kernel that is compiled already, as ``mlx.core.fast.precompiled_cuda_kernel`` does, on an NVIDIA GPU, and
    returns its outputs as a list.

    Args:
        name: the kernel's symbol.
        compiled_source: PTX or a cubin. It is loaded once a process and device.
        inputs, output_shapes, output_dtypes, grid, threadgroup, init_value, stream: as for a ``metal_kernel``; whole
            blocks run.
        scalars: the kernel's parameters behind the pointers of inputs and outputs: bools, ints, floats, each as wide as
            the parameter.
        shared_memory: bytes of dynamic shared memory of a block.
        ensure_row_contiguous: copies inputs that are not.

    Raises:
        ValueError: arguments that do not fit the kernel's parameters.
        RuntimeError: the driver does not take the image, or it has no such kernel; the arrays are in CPU memory.
    """
    maker = "precompiled_cuda_kernel"
    _check_string(maker, "name", name)
    if isinstance(compiled_source, str):
        raise ValueError(f"{maker}: compiled_source must be bytes, got a string")
    if not isinstance(compiled_source, (bytes, bytearray, memoryview)):
        raise TypeError(f"{maker}: compiled_source must be bytes, got {type(compiled_source).__name__}")
    for what, given in (("inputs", inputs), ("output_shapes", output_shapes), ("scalars", scalars)):
        _check_list(what, given, maker=maker)
    for place, value in enumerate(scalars):
        if not isinstance(value, (bool, int, float)):
            raise ValueError(
                f"precompiled_cuda_kernel: scalars[{place}] must be a bool, an int or a float, "
                f"got {type(value).__name__}"
            )
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{maker}: scalars[{place}] must fit in 64 bits, got {value:#x}"[:200])
    contiguous = _flag(maker, "ensure_row_contiguous", ensure_row_contiguous)
    shared, outputs = _size(maker, "shared_memory", shared_memory, 2**31), len(output_shapes)
    kernel = _precompiled(name, bytes(compiled_source), len(inputs), outputs, contiguous, shared)
    arguments, library, like = kernel._prepare(
        inputs, output_shapes, output_dtypes, grid, threadgroup, None, init_value
    )
    return kernel._run(arguments, library, like, tuple(scalars))
