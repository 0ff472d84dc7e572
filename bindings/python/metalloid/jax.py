"""Metalloid's operations on JAX arrays: functions that work under ``jit``, ``grad``, ``vmap`` and ``shard_map``.

Each runs as a foreign function of XLA (``jax.ffi``) on the CPU, and on CUDA where the package was built with CUDA
kernels. Names, parameters and results are those of ``metalloid``'s functions, which call these when they get JAX
arrays; there is no ``out=``, since JAX arrays do not change, and ``kv_cache_sdpa_update`` returns the new caches.

Gradients are reverse-mode (``jax.grad``, ``jax.vjp``) and come from plain ``jax.numpy`` formulas, that of ``rope``
from rope itself. Arguments are checked while JAX traces: ValueError for a dtype, rank or shape that is refused. What
only the values show, such as a target beyond the vocabulary, is a ``jax.errors.JaxRuntimeError`` when the call runs on
the CPU, NaN on CUDA.

>>> import jax, jax.numpy as jnp
>>> import metalloid.jax
>>> x = jnp.array([[2.0, 2.0]])
>>> jax.jit(lambda x: metalloid.jax.rms_norm(x, None, 0.0))(x)
Array([[1., 1.]], dtype=float32)
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from metalloid import _formulas as formulas
from metalloid import _native, _operations

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "cross_entropy",
    "gated_delta_update",
    "geglu",
    "kv_cache_sdpa_update",
    "layer_norm",
    "qk_norm_rope",
    "rms_norm",
    "rope",
    "scaled_dot_product_attention",
    "swiglu",
]

_plain: Any = formulas  # called with lists of arrays, whose length no type tells
_NAMES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = _native.operation_names()

for _name, _platform, _handler in _native.xla_handlers():
    jax.ffi.register_ffi_target(f"metalloid_{_name}", _handler, platform=_platform)


class _Call(NamedTuple):
    """What is static of a call. `given` says which of the operation's inputs are there, one bit for each."""

    operation: str
    given: int
    reals: tuple[float, ...]
    integers: tuple[int, ...]
    results: int

    def placed(self, arrays: tuple[jax.Array, ...]) -> list[Any]:
        """The arrays in the places of the operation's inputs."""
        present = iter(arrays)
        return [next(present) if self.given >> i & 1 else None for i in range(len(_NAMES[self.operation][0]))]


# ---- what an operation gives, and its formula


def _scan(step: Callable, state: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
    return jax.lax.scan(step, state, arrays)


_ns = formulas.Namespace(
    xp=jnp,
    erf=jax.scipy.special.erf,
    sigmoid=jax.nn.sigmoid,
    stop_gradient=jax.lax.stop_gradient,
    scan=_scan,
    update_at=lambda array, update, at: jax.lax.dynamic_update_slice_in_dim(array, update, at, axis=1),
)


@jax.default_matmul_precision("highest")  # on a GPU float32 products are rounded to 10 bits otherwise
def _formula(call: _Call, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """The results by plain jax.numpy."""
    inputs = call.placed(arrays)
    match call.operation:
        case "rms_norm" | "layer_norm" | "add_rms_norm" | "add_layer_norm":
            results = getattr(_plain, call.operation)(_ns, *inputs, *call.reals)
        case "rope":
            results = _plain.rope(_ns, inputs[0], _rope_arguments(call, inputs[1:]))
        case "qk_norm_rope":
            arguments = _rope_arguments(call, inputs[4:])
            results = _plain.qk_norm_rope(_ns, *inputs[:4], eps=call.reals[2], arguments=arguments)
        case "swiglu":
            results = _plain.swiglu(_ns, *inputs)
        case "geglu":
            results = _plain.geglu(_ns, *inputs, tanh=bool(call.integers[0]))
        case "scaled_dot_product_attention":
            causal, causal_offset, window = call.integers
            if causal_offset == _operations.CAUSAL_OFFSET_DEFAULT:
                causal_offset = inputs[1].shape[2] - inputs[0].shape[2]
            options = formulas.Attention(
                call.reals[0], bool(causal), causal_offset, window or None, call.reals[1] or None
            )
            results = _plain.attention(_ns, *inputs, given=options)[: call.results]
        case "kv_cache_sdpa_update":
            results = _plain.kv_cache_sdpa_update(_ns, *inputs, scale=call.reals[0])
        case "cross_entropy":
            results = _plain.cross_entropy(_ns, *inputs, ignore_index=call.integers[1] if call.integers[0] else None)
        case "gated_delta_update":
            results = _plain.gated_delta_update(_ns, *inputs)
        case _:
            raise AssertionError(call.operation)
    return tuple(results) if isinstance(results, tuple) else (results,)


def _rope_arguments(call: _Call, inputs: list[jax.Array | None]) -> formulas.Rope:
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


# ---- the foreign function


def _described(array: Any) -> tuple[tuple[int, ...], str]:
    return tuple(array.shape), str(array.dtype)


def _run(call: _Call, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    inputs = call.placed(arrays)
    described = tuple(None if a is None else _described(a) for a in inputs)
    shapes = _operations.results_of(call.operation, described, call.results)
    _native.check_operation(call.operation, described, shapes, call.reals, call.integers)
    if call.operation == "kv_cache_sdpa_update" and jax.default_backend() != "cpu":
        return _formula(call, arrays)  # the handler cannot look at the offset there
    _, reals, integers = _NAMES[call.operation]
    attributes: dict[str, Any] = dict(zip(reals, map(np.float64, call.reals), strict=True))
    attributes |= zip(integers, map(np.int64, call.integers), strict=True)
    # In a shard_map results vary over the mesh axes that any argument varies over.
    axes = frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))
    arrays = tuple(_varying(a, axes) for a in arrays)
    results = jax.ffi.ffi_call(
        f"metalloid_{call.operation}",
        [jax.ShapeDtypeStruct(shape, jnp.dtype(dtype)) for shape, dtype in shapes],
        input_output_aliases={3: 1, 4: 2} if call.operation == "kv_cache_sdpa_update" else None,
    )(*arrays, given=np.int64(call.given), **attributes)
    return tuple(_varying(r, axes) for r in results)


def _varying(array: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - jax.typeof(array).manual_axis_type.varying))
    return jax.lax.pcast(array, missing, to="varying") if missing else array


# ---- vmap: a batch axis joins the leading axes where the operation has any, else the calls come one after the other

# How an input takes a batch axis: in front of its axes (any rank will do), folded into its first axis, or not at all.
_FRONT = {
    "rms_norm": 1,
    "layer_norm": 1,
    "add_rms_norm": 2,
    "add_layer_norm": 2,
    "swiglu": 2,
    "geglu": 2,
    "cross_entropy": 2,
}
_FOLDED = {
    "rope": {0, 1, 3},
    "qk_norm_rope": {0, 1, 4, 6},
    "scaled_dot_product_attention": {0, 1, 2, 3, 5},
    "kv_cache_sdpa_update": {0, 1, 2, 3, 4, 6},
    "gated_delta_update": {0, 1, 2, 3, 4, 5, 6},
}
_MASK = ("scaled_dot_product_attention", 3)  # whose first extent may be 1, for all rows


@functools.lru_cache(maxsize=4096)
def _with_vmap(call: _Call) -> Callable[..., tuple[jax.Array, ...]]:
    run = jax.custom_batching.custom_vmap(functools.partial(_run, call))

    @run.def_vmap
    def rule(size: int, batched: list[bool], *arrays: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[bool, ...]]:
        places = [i for i in range(len(_NAMES[call.operation][0])) if call.given >> i & 1]
        front = _FRONT.get(call.operation, 0)
        folds = _FOLDED.get(call.operation, set())
        if any(b and not (place < front or place in folds) for place, b in zip(places, batched, strict=True)):
            results = _one_by_one(call, batched, arrays)
        elif front:
            whole = [
                jnp.broadcast_to(a, (size, *a.shape)) if place < front and not b else a
                for place, b, a in zip(places, batched, arrays, strict=True)
            ]
            results = _apply(call, *whole)
        else:
            rows = arrays[0].shape[1 if batched[0] else 0]
            folded = [
                _fold(a, b, size, rows, (call.operation, place) == _MASK) if place in folds else a
                for place, b, a in zip(places, batched, arrays, strict=True)
            ]
            results = tuple(r.reshape(size, rows, *r.shape[1:]) for r in _apply(call, *folded))
        return results, (True,) * len(results)

    return run


def _fold(array: jax.Array, batched: bool, size: int, rows: int, broadcasts: bool) -> jax.Array:
    """{size, rows, ...} as {size * rows, ...}."""
    if not batched:
        if broadcasts and array.shape[0] == 1:
            return array
        array = array[None]
    whole = jnp.broadcast_to(array, (size, rows, *array.shape[2:]))
    return whole.reshape(size * rows, *whole.shape[2:])


def _one_by_one(call: _Call, batched: list[bool], arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    def one(mapped: list[jax.Array]) -> tuple[jax.Array, ...]:
        each = iter(mapped)
        return _apply(call, *[next(each) if b else a for b, a in zip(batched, arrays, strict=True)])

    return jax.lax.map(one, [a for b, a in zip(batched, arrays, strict=True) if b])


# ---- grad


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(call: _Call, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return _with_vmap(call)(*arrays)


def _forward(call: _Call, *arrays: jax.Array) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    return _with_vmap(call)(*arrays), arrays


def _backward(call: _Call, arrays: tuple[jax.Array, ...], cotangents: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    # Of plain formulas, until the C library has backward functions.
    _, pull = jax.vjp(lambda *a: _formula(call, a), *arrays)
    gradients = pull(cotangents)
    if call.operation == "rope":  # turns back by the same angles, as exact as they were
        base, scale = call.reals
        back = call._replace(reals=(base, -scale))
        gradients = (*_apply(back, cotangents[0], *arrays[1:]), *gradients[1:])
    return gradients


_differentiable.defvjp(_forward, _backward)
_apply = jax.jit(_differentiable, static_argnums=0, inline=True)


# ---- the functions


class _Operations(_operations.Operations[jax.Array]):
    def _call(
        self,
        operation: str,
        inputs: tuple[Any, ...],
        reals: tuple[float, ...] = (),
        integers: tuple[int, ...] = (),
        results: int = 1,
    ) -> tuple[jax.Array, ...]:
        present, arrays = 0, []
        names = _NAMES[operation][0]
        for place, (name, array) in enumerate(zip(names, inputs, strict=True)):
            if array is None and place > 0:
                continue
            if not isinstance(array, (jax.Array, np.ndarray)):
                raise TypeError(f"{operation}: {name} must be an array of JAX or NumPy, got {type(array).__name__}")
            _operations.check_unmasked(operation, name, array)
            if not isinstance(array, jax.Array) and array.dtype.kind not in "fiubV":
                raise ValueError(f"{operation}: {name} has the dtype {array.dtype}, which no operation takes")
            present |= 1 << place
            arrays.append(array)
        try:
            return _apply(_Call(operation, present, reals, integers, results), *arrays)
        except RuntimeError:
            for name, array in zip(names, inputs, strict=True):
                if isinstance(array, jax.Array) and not isinstance(array, Tracer) and array.is_deleted():
                    raise ValueError(f"{operation}: {name} has been deleted or donated") from None
            raise

    def _broadcast(self, array: Any, shape: tuple[int, ...]) -> jax.Array:
        return jnp.broadcast_to(array, shape)

    def _int32(self, value: Any) -> jax.Array:
        return jnp.asarray(value, jnp.int32).reshape(())


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
