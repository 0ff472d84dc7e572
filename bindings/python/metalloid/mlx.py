"""Metalloid's operations on MLX arrays, and MLX programs on Linux that call ``mlx.core.fast`` and get Metalloid.

>>> import mlx.core as mx
>>> import metalloid.mlx
>>> with metalloid.mlx.installed():
...     mx.fast.rms_norm(mx.array([[3.0, 4.0]]), None, 0.0)
array([[0.848528, 1.13137]], dtype=float32)

An operation enters MLX's graph as a primitive and runs when MLX evaluates it: lazily, under ``mx.compile`` too, on
arrays as they lie in memory, with results that MLX allocates. MLX has no stable binary interface, so the primitive is
C++ source in this package, which ``install()`` (or ``build()``) compiles once for the MLX that is installed, in
seconds, where there are a C++ compiler, Python's headers and the package ``nanobind``; it is kept in the user's cache
folder. Where it cannot be had, a call evaluates its arguments and runs at once.

Gradients, ``vmap`` and ``jvp`` are those of MLX's own operation, or of a plain formula where MLX has none. What only
the values show, such as a target beyond the vocabulary, is an exception when the array is evaluated.
"""

import contextlib
import functools
import hashlib
import importlib.machinery
import importlib.util
import logging
import os
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, SupportsFloat, SupportsIndex

import numpy as np

try:
    import mlx.core as mx
except ImportError as error:
    raise ImportError(f"metalloid.mlx needs MLX with a back-end, pip install 'mlx[cpu]': {error}") from error

from metalloid import _formulas as formulas
from metalloid import _kernel, _native, _operations

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "build",
    "cross_entropy",
    "gated_delta_update",
    "geglu",
    "install",
    "installed",
    "kv_cache_sdpa_update",
    "layer_norm",
    "mode",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "scaled_dot_product_attention",
    "swiglu",
    "uninstall",
]

_log = logging.getLogger(__name__)

_plain: Any = formulas  # called with lists of arrays, whose length no type tells
_NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = _native.operation_names()
_FAST = ("cross_entropy", "gated_delta_update", "layer_norm", "rms_norm", "rope", "scaled_dot_product_attention")
_own = {name: getattr(mx.fast, name) for name in _FAST}  # MLX's, whatever is installed later
_own_compile = mx.compile
_own_is_available: Any = getattr(mx, "is_available", None)  # since 0.27
_own_device_info: Any = getattr(mx, "device_info", None)  # since 0.30
_default_device = mx.default_device
_VERSION: str = vars(mx)["__version__"]

_DTYPES = {
    getattr(mx, name + "_" if name == "bool" else name): name
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "bfloat16", "float32", "float64", "complex64"),
    )
}
_DTYPE_OF = {name: dtype for dtype, name in _DTYPES.items()}


# ---- the primitive


def _cache_folder() -> Path:
    """A folder of the user's own: code is loaded from it."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    given = os.environ.get("METALLOID_CACHE")
    folder = Path(given or os.path.join(base, "metalloid"))
    if given and not folder.is_absolute():
        raise RuntimeError(f"METALLOID_CACHE={given} must be an absolute path")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise RuntimeError(f"the cache folder {folder} (METALLOID_CACHE) cannot be made: {error.strerror}") from error
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise RuntimeError(f"{folder} can be written by others: nothing is loaded from it")
    return folder


def _sources() -> tuple[Path, Path]:
    here = Path(__file__).parent
    return here / "_mlx_primitive.cpp", here / "operations.h"


def _primitive_path() -> Path:
    """Where the primitive for this MLX, this Python and this package is, or will be."""
    content = b"".join(path.read_bytes() for path in _sources())
    content += "\0".join((_VERSION, str(Path(mx.__file__).parent), sys.version)).encode()
    digest = hashlib.sha256(content).hexdigest()[:16]
    return _cache_folder() / f"mlx-{_VERSION}-{digest}{sysconfig.get_config_var('EXT_SUFFIX')}"


def _load(path: Path) -> ModuleType:
    name = "metalloid._mlx_primitive"
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    # What MLX's types are to nanobind depends on its version: a first call shows whether both agree.
    x = mx.array([3.0, 4.0])
    (y,) = module.apply("rms_norm", 1, [0.0], [], [x], [[2]], [mx.float32], lambda arrays: arrays, stream=mx.cpu)
    if [round(value, 3) for value in y.tolist()] != [0.849, 1.131]:
        raise RuntimeError(f"the primitive in {path} computes something else")
    return module


def build() -> Path:
    """Compiles the primitive for the MLX that is installed, unless it is there, and uses it from now on.

    Returns:
        The compiled file, in ``METALLOID_CACHE``, else in a folder ``metalloid`` of ``XDG_CACHE_HOME`` or ``~/.cache``.

    Raises:
        RuntimeError: no C++ compiler (``CXX``, c++, g++ or clang++), no Python headers, no ``nanobind``, or one that
            does not fit MLX's.
    """
    global _primitive  # noqa: PLW0603 (one a process)
    path = _primitive_path()
    if not path.exists():
        _compile(path)
    if _primitive is None:
        try:
            _primitive = _load(path)
        except Exception as error:
            path.unlink(missing_ok=True)
            raise RuntimeError(f"the primitive does not fit MLX {_VERSION}: {error}") from error
    return path


def _compile(path: Path) -> None:
    names = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    compiler = next((name for name in names if name and shutil.which(shlex.split(name)[0])), None)
    if compiler is None:
        raise RuntimeError("there is no C++ compiler")
    headers = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(headers, "Python.h")):
        raise RuntimeError("Python's headers are not installed")
    try:
        import nanobind
    except ImportError:
        raise RuntimeError("the package nanobind is not installed") from None
    mlx, bindings = Path(mx.__file__).parent, Path(nanobind.__file__).parent
    source, operations = _sources()
    includes = [headers, mlx / "include", bindings / "include", bindings / "ext" / "robin_map" / "include"]
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        result = Path(folder) / path.name
        command = [
            *shlex.split(compiler),
            *("-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"),
            *("-DNB_DOMAIN=mlx", "-DMETALLOID_MODULE=_mlx_primitive"),  # the types of MLX, and no other's
            *(f"-I{operations.parent}" for _ in range(1)),
            *(argument for include in includes for argument in ("-isystem", str(include))),
            *(str(source), str(bindings / "src" / "nb_combined.cpp")),
            *(f"-L{mlx / 'lib'}", "-lmlx", f"-Wl,-rpath,{mlx / 'lib'}", "-o", str(result)),
        ]
        _log.info("compiling the primitive for MLX %s", _VERSION)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"the primitive does not compile for MLX {_VERSION}:\n{done.stderr[:4000]}")
        os.replace(result, path)


_primitive: ModuleType | None = None
with contextlib.suppress(Exception):  # a cache that cannot be read is none
    if _primitive_path().exists():
        _primitive = _load(_primitive_path())


def mode() -> str:
    """How calls run: "primitive", lazily in MLX's graph, or "evaluating", at once.

    >>> mode() in ("primitive", "evaluating")
    True
    """
    return "evaluating" if _primitive is None else "primitive"


# ---- an operation by MLX's own means


class _Call(NamedTuple):
    """What is static of a call. `given` says which of the operation's inputs are there, one bit for each."""

    operation: str
    given: int
    reals: tuple[float, ...]
    integers: tuple[int, ...]
    results: int


def _scan(step: Callable[..., Any], state: mx.array, arrays: tuple[mx.array, ...]) -> tuple[mx.array, mx.array]:
    outputs = []
    for t in range(arrays[0].shape[0]):
        state, output = step(state, tuple(a[t] for a in arrays))
        outputs.append(output)
    if not outputs:
        _, output = step(state, tuple(mx.zeros(a.shape[1:], a.dtype) for a in arrays))
        return state, mx.zeros((0, *output.shape), output.dtype)
    return state, mx.stack(outputs)


def _update_at(array: mx.array, update: mx.array, at: Any) -> mx.array:
    start = at if isinstance(at, mx.array) else mx.array(at)
    return mx.slice_update(array, update, start.reshape(1), axes=(1,))


_ns = formulas.Namespace(
    xp=mx, erf=mx.erf, sigmoid=mx.sigmoid, stop_gradient=mx.stop_gradient, scan=_scan, update_at=_update_at
)


def _formula(call: _Call, arrays: list[mx.array]) -> list[mx.array]:
    """The results by MLX's own operation, or by a plain formula where it has none."""
    present = iter(arrays)
    inputs = [next(present) if call.given >> i & 1 else None for i in range(len(_NAMES[call.operation][0]))]
    results = _own_formula(call, inputs)
    return list(results) if isinstance(results, (tuple, list)) else [results]


def _own_formula(call: _Call, inputs: list[Any]) -> Any:
    match call.operation:
        case "rms_norm" | "layer_norm":
            return _own[call.operation](*inputs, *call.reals)
        case "add_rms_norm" | "add_layer_norm":
            return getattr(_plain, call.operation)(_ns, *inputs, *call.reals)
        case "rope":
            given = _rope_arguments(call, inputs[1:])
            if given.position_ids is None and given.inv_freqs is None and given.time_axis == -2:
                return _own["rope"](
                    inputs[0],
                    given.dims,
                    traditional=given.traditional,
                    base=given.base,
                    scale=given.scale,
                    offset=given.offset,
                    freqs=given.freqs,
                )
            return _plain.rope(_ns, inputs[0], given)
        case "qk_norm_rope":
            return _plain.qk_norm_rope(_ns, *inputs[:4], eps=call.reals[2], arguments=_rope_arguments(call, inputs[4:]))
        case "swiglu":
            return _plain.swiglu(_ns, *inputs)
        case "geglu":
            return _plain.geglu(_ns, *inputs, tanh=bool(call.integers[0]))
        case "scaled_dot_product_attention":
            return _own_attention(call, inputs)
        case "cross_entropy":
            if call.integers[0]:
                return _plain.cross_entropy(_ns, *inputs, ignore_index=call.integers[1])
            return _own["cross_entropy"](*inputs)
        case "gated_delta_update":
            return _plain.gated_delta_update(_ns, *inputs)
    raise AssertionError(call.operation)


def _rope_arguments(call: _Call, inputs: list[Any]) -> formulas.Rope:
    offsets, freqs, position_ids, inv_freqs = inputs
    dims, traditional, offset, time_axis = call.integers
    return formulas.Rope(
        dims=dims,
        traditional=bool(traditional),
        base=call.reals[0] or None,
        scale=call.reals[1],
        offset=offset if offsets is None else offsets,
        freqs=freqs,
        position_ids=position_ids,
        inv_freqs=inv_freqs,
        time_axis=1 if time_axis == 1 else -2,
    )


def _own_attention(call: _Call, inputs: list[Any]) -> Any:
    q, k, v, mask, sinks, key_mask = inputs
    (scale, softcap), (causal, causal_offset, window) = call.reals, call.integers
    lower_right = causal_offset == _operations.CAUSAL_OFFSET_DEFAULT
    extras = key_mask is not None or softcap or window or call.results == 2 or (causal and not lower_right)
    # A query that a mask leaves without a key, or a causal one before the first, is something else to MLX.
    if mask is None and not extras and k.shape[2] >= q.shape[2]:
        return _own["scaled_dot_product_attention"](
            q, k, v, scale=scale, mask="causal" if causal else None, sinks=sinks
        )
    offset = k.shape[2] - q.shape[2] if lower_right else causal_offset
    options = formulas.Attention(scale, bool(causal), offset, window or None, softcap or None)
    return list(_plain.attention(_ns, *inputs, given=options)[: call.results])


# ---- without a primitive: evaluate, and call


@functools.lru_cache(maxsize=1024)
def _evaluating(call: _Call) -> Callable[..., Any]:
    formula = functools.partial(_formula, call)

    def run(*arrays: mx.array) -> list[mx.array]:
        try:
            mx.eval(*arrays)
        except (RuntimeError, ValueError):
            return formula(list(arrays))  # MLX is tracing: nothing has values now
        described = _described(call, arrays)
        shapes = _checked(call, described)
        results = [mx.zeros(shape, _DTYPE_OF[dtype]) for shape, dtype in shapes]
        mx.eval(*results)
        _native.run_operation(call.operation, call.given, arrays, tuple(results), call.reals, call.integers)
        return results

    function = mx.custom_function(run)

    @function.vjp
    def vjp(primals: Any, cotangents: Any, _: Any) -> list[mx.array]:
        return _vjp(formula, _list(primals), _list(cotangents))

    @function.jvp
    def jvp(primals: Any, tangents: Any) -> list[mx.array]:
        primals, tangents = _list(primals), _list(tangents)
        moving = [i for i, tangent in enumerate(tangents) if tangent is not None]

        def some(*arrays: mx.array) -> list[mx.array]:
            whole = [*primals]
            for i, array in zip(moving, arrays, strict=True):
                whole[i] = array
            return formula(whole)

        return mx.jvp(some, [primals[i] for i in moving], [tangents[i] for i in moving])[1]

    @function.vmap
    def vmap(inputs: Any, axes: Any) -> tuple[list[mx.array], list[int]]:
        every: Any = lambda *arrays: formula(list(arrays))  # noqa: E731
        results: Any = mx.vmap(every, in_axes=tuple(_list(axes)))(*_list(inputs))
        return results, [0] * call.results

    return function


def _list(given: Any) -> list[Any]:
    """MLX hands the only one of something over as it is."""
    return list(given) if isinstance(given, (tuple, list)) else [given]


def _vjp(formula: Callable, primals: list[mx.array], cotangents: list[mx.array]) -> list[mx.array]:
    """Gradients of what is floating, zeros for the rest."""
    floating = [i for i, primal in enumerate(primals) if mx.issubdtype(primal.dtype, mx.floating)]

    def some(*arrays: mx.array) -> list[mx.array]:
        whole = list(primals)
        for i, array in zip(floating, arrays, strict=True):
            whole[i] = array
        return formula(whole)

    gradients = iter(mx.vjp(some, [primals[i] for i in floating], cotangents)[1])
    return [next(gradients) if i in floating else mx.zeros_like(primal) for i, primal in enumerate(primals)]


# ---- the functions


def _described(call: _Call, arrays: tuple[mx.array, ...] | list[mx.array]) -> tuple[_operations.Described | None, ...]:
    present = iter(arrays)
    return tuple(
        ((array := next(present)).shape, _DTYPES[array.dtype]) if call.given >> i & 1 else None
        for i in range(len(_NAMES[call.operation][0]))
    )


@functools.lru_cache(maxsize=4096)
def _checked(call: _Call, inputs: tuple[_operations.Described | None, ...]) -> tuple[_operations.Described, ...]:
    """Shapes and dtypes of the results, or ValueError."""
    results = _operations.results_of(call.operation, inputs, call.results)
    _native.check_operation(call.operation, inputs, results, call.reals, call.integers)
    return results


@functools.lru_cache(maxsize=4096)
def _prepared(
    call: _Call, inputs: tuple[_operations.Described | None, ...]
) -> tuple[list[tuple[int, ...]], list[mx.Dtype], Callable[[list[mx.array]], list[mx.array]]]:
    results = _checked(call, inputs)
    shapes, dtypes = [shape for shape, _ in results], [_DTYPE_OF[dtype] for _, dtype in results]

    def formula(arrays: list[mx.array]) -> list[mx.array]:
        return [y.astype(dtype) for y, dtype in zip(_formula(call, arrays), dtypes, strict=True)]

    return shapes, dtypes, formula


def _array(op: str, name: str, array: Any) -> mx.array:
    if isinstance(array, mx.array):
        return array
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{op}: {name} must be an array of MLX or NumPy, got {type(array).__name__}")
    _operations.check_unmasked(op, name, array)
    if array.dtype.kind not in "fiubV":
        raise ValueError(f"{op}: {name} has the dtype {array.dtype}, which no operation takes")
    return mx.array(array)


class _Operations(_operations.Operations[mx.array]):
    def _call(
        self,
        operation: str,
        inputs: tuple[Any, ...],
        reals: tuple[float, ...] = (),
        integers: tuple[int, ...] = (),
        results: int = 1,
    ) -> tuple[mx.array, ...]:
        present, arrays = 0, []
        for place, array in enumerate(inputs):
            if array is None and place > 0:
                continue
            present |= 1 << place
            if not isinstance(array, mx.array):
                array = _array(operation, _NAMES[operation][0][place], array)
            arrays.append(array)
        call = _Call(operation, present, reals, integers, results)
        shapes, dtypes, formula = _prepared(call, _described(call, arrays))
        if _primitive is None:
            return tuple(_evaluating(call)(*arrays))
        stream = None if _default_device().type == mx.cpu else mx.cpu
        return tuple(
            _primitive.apply(operation, present, reals, integers, arrays, shapes, dtypes, formula, stream=stream)
        )

    def _broadcast(self, array: Any, shape: tuple[int, ...]) -> mx.array:
        return mx.broadcast_to(mx.array(array) if isinstance(array, np.ndarray) else array, shape)

    def _int32(self, value: Any) -> mx.array:
        return mx.array(value, mx.int32).reshape(())

    def kv_cache_sdpa_update(
        self,
        q: mx.array,
        new_k: mx.array,
        new_v: mx.array,
        k_cache: mx.array,
        v_cache: mx.array,
        offset: SupportsIndex | mx.array,
        key_mask: mx.array | None,
        scale: SupportsFloat,
    ) -> tuple[mx.array, mx.array, mx.array]:
        op = "kv_cache_sdpa_update"
        given = {"q": q, "new_k": new_k, "new_v": new_v, "k_cache": k_cache, "v_cache": v_cache, "key_mask": key_mask}
        arrays = [_array(op, name, array) for name, array in given.items() if array is not None or name != "key_mask"]
        call = _Call(op, 0b1111111 if len(arrays) == 6 else 0b0111111, (_operations.real(op, "scale", scale),), (), 3)
        _checked(call, _described(call, [*arrays[:5], self._int32(0), *arrays[5:]]))
        try:
            start = self._start(op, offset)
        except RuntimeError:  # MLX is tracing, and the offset has no value
            return _plain.kv_cache_sdpa_update(
                _ns,
                *arrays[:5],
                offset=self._int32(offset),
                key_mask=arrays[5] if len(arrays) == 6 else None,
                scale=call.reals[0],
            )
        _operations.check_start(op, start, arrays[0], arrays[3])
        # MLX writes into a cache in place where nobody else holds it; attention then reads the caches as they lie.
        q, new_k, new_v = arrays[:3]
        k_cache, v_cache = _update_at(arrays[3], new_k, start), _update_at(arrays[4], new_v, start)
        out = self.scaled_dot_product_attention(
            *(mx.swapaxes(a, 1, 2) for a in (q, k_cache, v_cache)),
            scale=call.reals[0],
            key_mask=arrays[5] if len(arrays) == 6 else None,
            causal=q.shape[1] > 1,
            causal_offset=start,
        )
        return out, k_cache, v_cache

    @staticmethod
    def _start(op: str, offset: Any) -> int:
        if not _operations.is_array(offset):
            return _operations.integer(op, "offset", offset)
        _operations.check_unmasked(op, "offset", offset)
        if offset.shape not in ((), (1,)) or "int" not in str(offset.dtype):
            raise ValueError(f"{op}: offset must be an integer or an integer array {{}} or {{1}}")
        return int(offset.item())


_functions = _Operations()
add_layer_norm = _functions.add_layer_norm
add_rms_norm = _functions.add_rms_norm
cross_entropy = _functions.cross_entropy
gated_delta_update = _functions.gated_delta_update
geglu = _functions.geglu
kv_cache_sdpa_update = _functions.kv_cache_sdpa_update
layer_norm = _functions.layer_norm
qk_norm_rope = _functions.qk_norm_rope
rms_norm = _functions.rms_norm
rope = _functions.rope
scaled_dot_product_attention = _functions.scaled_dot_product_attention
swiglu = _functions.swiglu


# ---- MLX programs


def _replacement(name: str) -> Callable[..., Any]:
    ours, own = getattr(_functions, name), _own[name]

    @functools.wraps(own)
    def function(*args: Any, stream: Any = None, **keywords: Any) -> Any:
        if _default_device().type != mx.cpu:
            return own(*args, stream=stream, **keywords)
        try:
            if stream is None:
                return ours(*args, **keywords)
            with mx.stream(stream):
                return ours(*args, **keywords)
        except (TypeError, ValueError):
            return own(*args, stream=stream, **keywords)  # takes it, or refuses it in its own words

    return function


class _Traced(ValueError):
    """A kernel has to run, and MLX is tracing: there are no values."""


def _compiled(
    fun: Callable[..., Any], inputs: object = None, outputs: object = None, shapeless: bool = False
) -> Callable[..., Any]:
    """``mx.compile``; a function that calls a custom kernel runs as it is."""
    compiled = _own_compile(fun, inputs, outputs, shapeless)
    if inputs is not None or outputs is not None:  # what it captures has been traced by the time that it calls a kernel
        return compiled
    plain = False

    @functools.wraps(fun)
    def call(*args: Any, **keywords: Any) -> Any:
        nonlocal plain
        if not plain:
            try:
                return compiled(*args, **keywords)
            except _Traced:
                plain = True
        return fun(*args, **keywords)

    return call


def _input(value: Any, place: int) -> mx.array:
    if isinstance(value, mx.array):
        return value
    _operations.check_unmasked("metal_kernel", f"inputs[{place}]", value)
    array = _kernel._scalar(value, place)
    if isinstance(array, np.ndarray) and array.dtype.kind not in "fiubcV":
        raise ValueError(f"metal_kernel: inputs[{place}] has the dtype {array.dtype}, which kernels do not have")
    try:
        return mx.array(array)
    except Exception:
        raise TypeError(
            f"metal_kernel: inputs[{place}] must be an array or a number, got {type(value).__name__}"
        ) from None


def _check_for_mlx(output_shapes: Any, stream: Any) -> None:
    for place, shape in enumerate(output_shapes if isinstance(output_shapes, (list, tuple)) else ()):
        if any(extent >= 2**31 for extent in _kernel._shape(shape)):
            raise ValueError(f"metal_kernel: output_shapes[{place}] must lie below 2^31 in MLX, got {shape!r:.60}")
    kinds = [getattr(mx, kind, None) for kind in ("Stream", "ThreadLocalStream", "Device", "DeviceType")]
    if stream is not None and not isinstance(stream, tuple(kind for kind in kinds if kind)):
        raise TypeError(f"metal_kernel: stream must be a stream or a device of MLX, got {type(stream).__name__}")


def _metal_kernel(*args: Any, **keywords: Any) -> Callable[..., Any]:
    from metalloid import fast

    kernel: Any = fast.metal_kernel(*args, **keywords)

    @functools.lru_cache(maxsize=256)
    def prepared(told_apart: object, *arguments: Any) -> Any:
        return kernel._native.prepare(*arguments)[0]

    def call(
        *,
        inputs: list[Any],
        output_shapes: list[Any],
        output_dtypes: list[Any],
        grid: Any,
        threadgroup: Any,
        template: Any = None,
        init_value: float | None = None,
        verbose: bool = False,
        stream: Any = None,
    ) -> list[mx.array]:
        _check_for_mlx(output_shapes, stream)
        if _primitive is None:
            how = {
                "output_shapes": output_shapes,
                "output_dtypes": output_dtypes,
                "grid": grid,
                "threadgroup": threadgroup,
                "template": template,
                "init_value": init_value,
                "verbose": verbose,
            }
            return _evaluated(kernel, inputs, how)
        shapes, names, sizes, values = kernel._checked(
            inputs, output_shapes, output_dtypes, grid, threadgroup, template
        )
        arrays = [_input(value, place) for place, value in enumerate(inputs)]
        described = tuple((array.shape, _DTYPES[array.dtype]) for array in arrays)
        results = tuple(zip(shapes, names, strict=True))
        initial = _kernel._initial(init_value)
        told_apart = tuple(type(value) for _, value in values), str(initial)  # True and 1, 0.0 and -0.0
        arguments = (described, results, *sizes, values, initial)
        if verbose:
            source = kernel._native.prepare(*arguments, False)[1]
            print(f"Generated source code for `{kernel._name}`:\n```\n{source}\n```")
        # Compiled here: what raises when MLX evaluates leaves arrays that count as evaluated.
        launch = prepared(told_apart, *arguments)
        if stream is None and _default_device().type != mx.cpu:
            stream = mx.cpu
        dtypes = [_DTYPE_OF[name] for name in names]
        return list(_primitive.launch(launch, arrays, shapes, dtypes, stream=stream))

    return call


def _evaluated(kernel: Callable[..., Any], inputs: list[Any], how: dict[str, Any]) -> list[mx.array]:
    """Without a primitive: at once. No gradient comes from a kernel: asked for one, it is an error, where MLX would see
    a constant."""
    if isinstance(inputs, (list, tuple)):
        inputs = [value if isinstance(value, (int, float)) else _input(value, i) for i, value in enumerate(inputs)]
    places = [i for i, value in enumerate(inputs) if isinstance(value, mx.array)]

    @mx.custom_function
    def run(*arrays: mx.array) -> list[mx.array]:
        whole = list(inputs)
        for i, array in zip(places, arrays, strict=True):
            whole[i] = array
        try:
            mx.eval(*arrays)
        except ValueError as error:
            if "transformations" in str(error):
                raise _Traced("a custom kernel is traced, and without a primitive it cannot be") from None
            raise
        return kernel(inputs=whole, **how)

    def refuse(*_: Any) -> Any:
        raise ValueError("a custom kernel has no gradient, jvp or vmap: give it one with mx.custom_function")

    run.vjp(refuse)
    run.jvp(refuse)
    run.vmap(refuse)
    return _list(run(*(inputs[i] for i in places)))


def _device_info(*args: Any) -> dict[str, Any]:
    """``mx.device_info`` with the memory that programs for Metal look for: the machine's, of which three quarters, what
    macOS recommends, are for one program."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    sizes = {
        "memory_size": memory,
        "max_buffer_length": memory // 2,
        "max_recommended_working_set_size": memory // 4 * 3,
    }
    return {**sizes, **_own_device_info(*args)}


_replaced: list[tuple[Any, str, Any]] = []


def _has_gpu() -> bool:
    return _own_is_available(mx.gpu) if _own_is_available else _default_device().type != mx.cpu


def install(*, primitive: bool | None = None) -> None:
    """Makes ``mlx.core.fast``'s functions run on Metalloid in this process, where MLX has no Metal. Call it before the
    program is imported: what was imported by name before stays MLX's.

    Where ``metalloid.fast`` has ``metal_kernel``, that of ``mlx.core.fast`` runs on it. Where MLX has no GPU ``mx.gpu``
    is then another name for ``mx.cpu``, so that ``mx.set_default_device(mx.gpu)``, ``with mx.stream(mx.gpu):`` and
    ``stream=mx.gpu`` do what a program for a Mac means by them; ``mx.metal.is_available()`` is True, and
    ``mx.device_info()`` also has the sizes of memory that it has on a Mac. Without the primitive, what ``mx.compile``
    makes of a function that calls a kernel runs without being compiled.

    Args:
        primitive: None to compile the primitive for this MLX if that is possible, True to insist on it, False to do
            with what is there.

    Raises:
        RuntimeError: the primitive cannot be had, and primitive is True.

    >>> install()
    >>> mx.fast.rms_norm(mx.array([[3.0, 4.0]]), None, 0.0)
    array([[0.848528, 1.13137]], dtype=float32)
    >>> uninstall()
    """
    from metalloid import fast

    if not _replaced and mx.metal.is_available():
        return
    if primitive is not False and _primitive is None:
        try:
            build()
        except (RuntimeError, OSError) as error:
            if primitive:
                raise
            _log.info("calls evaluate their arguments: %s", error)
    if _replaced:
        return
    changes: list[tuple[Any, str, Any]] = [(mx.fast, name, _replacement(name)) for name in _FAST]
    if hasattr(fast, "metal_kernel"):
        changes.append((mx.fast, "metal_kernel", _metal_kernel))
        if _primitive is None:
            changes.append((mx, "compile", _compiled))
        if not _has_gpu():
            changes.append((mx, "gpu", mx.cpu))
            changes.append((mx.metal, "is_available", lambda: True))
            if _own_device_info:
                changes.append((mx, "device_info", _device_info))
                changes.append((mx.metal, "device_info", _device_info))
    for owner, name, value in changes:
        _replaced.append((owner, name, getattr(owner, name)))
        setattr(owner, name, value)


def uninstall() -> None:
    """Gives ``mlx.core`` its own functions back; does nothing where they are there."""
    while _replaced:
        owner, name, value = _replaced.pop()
        setattr(owner, name, value)


@contextlib.contextmanager
def installed(*, primitive: bool | None = None) -> Iterator[None]:
    """``install()`` for the length of a with statement; where it is installed already, it stays so.

    >>> with installed():
    ...     mx.fast.rms_norm(mx.array([[3.0, 4.0]]), None, 0.0)
    array([[0.848528, 1.13137]], dtype=float32)
    """
    before = bool(_replaced)
    install(primitive=primitive)
    try:
        yield
    finally:
        if not before:
            uninstall()
