"""The operations' signatures for libraries whose arrays are values: JAX and MLX. Arguments are read and settled here,
once for both; what runs a call is each library's own."""

import operator
from abc import ABC, abstractmethod
from typing import Any, Generic, Literal, SupportsFloat, SupportsIndex, TypeVar, overload

import numpy as np

A = TypeVar("A")  # an array of the library

Described = tuple[tuple[int, ...], str]  # shape, name of the dtype

CAUSAL_OFFSET_DEFAULT = -(2**63)  # T_kv - T_q

NAMES = (
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
)


# ---- shapes and dtypes of results


def promote(*arrays: Described | None) -> str:
    """The dtype that arithmetic on all of them gives: float16 with bfloat16 gives float32."""
    dtypes = {array[1] for array in arrays if array is not None}
    if len(dtypes) == 1:
        return dtypes.pop()
    return "float64" if "float64" in dtypes else "float32"


def results_of(operation: str, inputs: tuple[Described | None, ...], results: int) -> tuple[Described, ...]:
    """Shapes that make no sense give something, which the operation's checks refuse."""
    first = inputs[0]
    assert first is not None
    shape = first[0]
    double = any(a is not None and a[1] == "float64" for a in inputs)
    match operation:
        case "rms_norm" | "swiglu" | "geglu":
            return ((shape, promote(*inputs[:2])),)
        case "layer_norm":
            return ((shape, promote(*inputs) if inputs[1] else promote(first)),)
        case "add_rms_norm" | "add_layer_norm":
            total = promote(*inputs[:2])
            return ((shape, total), (shape, promote(*inputs) if inputs[2] else total))
        case "rope":
            return (first,)
        case "qk_norm_rope":
            _, k, q_weight, k_weight = inputs[:4]
            assert k is not None
            return ((shape, promote(first, q_weight)), (k[0], promote(k, k_weight)))
        case "scaled_dot_product_attention":
            q, k, v = inputs[:3]
            assert v is not None
            out = (*shape[:3], *v[0][3:])
            dtype = promote(q, k, v)
            logsumexp = (shape[:3], "float64" if dtype == "float64" else "float32")
            return ((out, dtype), logsumexp)[:results]
        case "kv_cache_sdpa_update":
            k_cache, v_cache = inputs[3:5]
            assert k_cache is not None
            assert v_cache is not None
            out = (shape[0], shape[2], shape[1], v_cache[0][3]) if len(shape) == len(v_cache[0]) == 4 else shape
            return ((out, promote(first, k_cache, v_cache)), k_cache, v_cache)
        case "cross_entropy":
            assert inputs[1] is not None
            return ((inputs[1][0], "float32"),)
        case "gated_delta_update":
            q, k, v = inputs[:3]
            assert v is not None
            state = (v[0][0], *v[0][2:4], shape[3]) if len(shape) == len(v[0]) == 4 else ()
            return ((v[0], promote(q, k)), (state, "float64" if double else "float32"))
    raise AssertionError(operation)


# ---- numbers


def real(op: str, name: str, value: SupportsFloat) -> float:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise TypeError(f"{op}: {name} must be a real number, got {type(value).__name__}")
    return float(value)


def integer(op: str, name: str, value: SupportsIndex) -> int:
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__index__"):
        raise TypeError(f"{op}: {name} must be an integer, got {type(value).__name__}")
    number = operator.index(value)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{op}: {name} must fit in 64 bits, got {number}")
    return number


def flag(op: str, name: str, value: bool) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{op}: {name} must be True or False, got {type(value).__name__}")
    return bool(value)


def is_array(value: object) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, np.generic)


def check_unmasked(op: str, name: str, array: Any) -> None:
    if type(array) is not np.ndarray and isinstance(array, np.ma.MaskedArray):
        raise TypeError(
            f"{op}: {name} is a masked array, whose mask would be lost: pass {name}.filled(value) or {name}.data"
        )


def check_start(op: str, start: int, q: Any, k_cache: Any) -> None:
    """Where the new keys go, once it is known."""
    if is_array(k_cache) and is_array(q) and len(k_cache.shape) == len(q.shape) == 4:
        most = k_cache.shape[1] - q.shape[1]
        if most >= 0 and not 0 <= start <= most:
            raise ValueError(f"{op}: offset must lie in [0, {most}], so that the new keys fit the cache, got {start}")


class Operations(ABC, Generic[A]):
    """The twelve functions. A library says how one is called, and how an array is reshaped."""

    @abstractmethod
    def _call(
        self,
        operation: str,
        inputs: tuple[Any, ...],
        reals: tuple[float, ...] = (),
        integers: tuple[int, ...] = (),
        results: int = 1,
    ) -> tuple[A, ...]: ...

    @abstractmethod
    def _broadcast(self, array: Any, shape: tuple[int, ...]) -> A: ...

    @abstractmethod
    def _int32(self, value: Any) -> A:
        """An integer, or an array of one integer, as an array {}."""

    # ---- norms

    def rms_norm(self, x: A, weight: A | None, eps: SupportsFloat, *, stream: object = None) -> A:
        """Root mean square norm over the last axis: ``x / sqrt(mean(x**2) + eps) * weight``.

        Args:
            x: floating, rank 1 or more.
            weight: floating, {length of the last axis}, or None.
            eps: finite, not negative.
            stream: ignored.

        Returns:
            An array of x's shape, x and weight promoted.

        Raises:
            ValueError: a dtype, rank, shape or value that is refused.
            TypeError: an argument that is no array or number.

        >>> import numpy as np
        >>> np.asarray(rms_norm(np.array([[2.0, 2.0]], np.float32), None, 0.0)).tolist()
        [[1.0, 1.0]]
        """
        return self._call("rms_norm", (x, weight), (real("rms_norm", "eps", eps),))[0]

    def layer_norm(self, x: A, weight: A | None, bias: A | None, eps: SupportsFloat, *, stream: object = None) -> A:
        """Layer norm over the last axis: ``(x - mean) / sqrt(variance + eps) * weight + bias``, the variance biased.

        Args:
            x: floating, rank 1 or more.
            weight: floating, {length of the last axis}, or None.
            bias: as weight.
            eps: finite, not negative.
            stream: ignored.

        Returns:
            An array of x's shape; x, weight and, where there is a weight, bias promoted.

        Raises:
            ValueError: a dtype, rank, shape or value that is refused.
            TypeError: an argument that is no array or number.

        >>> import numpy as np
        >>> np.asarray(layer_norm(np.array([[1.0, 3.0]], np.float32), None, None, 0.0)).tolist()
        [[-1.0, 1.0]]
        """
        return self._call("layer_norm", (x, weight, bias), (real("layer_norm", "eps", eps),))[0]

    def add_rms_norm(self, x: A, residual: A, weight: A | None, eps: SupportsFloat) -> tuple[A, A]:
        """``x + residual`` and its rms_norm, in one pass; the norm is taken from the unrounded sum.

        Args:
            x: floating, rank 1 or more.
            residual: floating, of x's shape.
            weight: floating, {length of the last axis}, or None.
            eps: finite, not negative.

        Returns:
            ``(sum, norm)``, the sum of x's and residual's dtypes promoted, the norm with weight's too.

        Raises:
            ValueError: a dtype, rank, shape or value that is refused.
            TypeError: an argument that is no array or number.

        >>> import numpy as np
        >>> total, norm = add_rms_norm(np.ones(2, np.float32), np.array([2, 3], np.float32), None, 0.0)
        >>> np.asarray(total).tolist()
        [3.0, 4.0]
        """
        total, norm = self._call("add_rms_norm", (x, residual, weight), (real("add_rms_norm", "eps", eps),), results=2)
        return total, norm

    def add_layer_norm(self, x: A, residual: A, weight: A | None, bias: A | None, eps: SupportsFloat) -> tuple[A, A]:
        """``x + residual`` and its layer_norm, in one pass; the norm is taken from the unrounded sum.

        Args:
            x: floating, rank 1 or more.
            residual: floating, of x's shape.
            weight: floating, {length of the last axis}, or None.
            bias: as weight.
            eps: finite, not negative.

        Returns:
            ``(sum, norm)``, the sum of x's and residual's dtypes promoted, the norm as layer_norm does from there.

        Raises:
            ValueError: a dtype, rank, shape or value that is refused.
            TypeError: an argument that is no array or number.

        >>> import numpy as np
        >>> total, norm = add_layer_norm(np.ones(2, np.float32), np.array([0, 2], np.float32), None, None, 0.0)
        >>> np.asarray(total).tolist(), np.asarray(norm).tolist()
        ([1.0, 3.0], [-1.0, 1.0])
        """
        reals = (real("add_layer_norm", "eps", eps),)
        total, norm = self._call("add_layer_norm", (x, residual, weight, bias), reals, results=2)
        return total, norm

    # ---- rotary position embedding

    def _rope(
        self, op: str, first: Any, dims: SupportsIndex, given: dict[str, Any]
    ) -> tuple[tuple[Any, ...], tuple[float, float], tuple[int, int, int, int]]:
        """(the four optional arrays, (base, scale), (dims, traditional, offset, time_axis))"""
        base, offset, freqs, inv_freqs = given["base"], given["offset"], given["freqs"], given["inv_freqs"]
        sources = sum(source is not None for source in (base, freqs, inv_freqs))
        if sources != 1:
            raise ValueError(
                f"{op}: exactly one of base, freqs and inv_freqs must be given, the others be None, got {sources}"
            )
        number = 0.0 if base is None else real(op, "base", base)
        if base is not None and number == 0:
            raise ValueError(f"{op}: base must be finite and positive, got 0")
        offsets, start = None, 0
        if is_array(offset):
            check_unmasked(op, "offset", offset)
            offsets = offset
            if offset.shape in ((), (1,)) and is_array(first) and len(first.shape) > 0:
                offsets = self._broadcast(offset, (first.shape[0],))
        else:
            start = integer(op, "offset", offset)
        if given["position_ids"] is not None and (offsets is not None or start != 0):
            raise ValueError(f"{op}: offset must be 0 where position_ids are given")
        axis = integer(op, "time_axis", given["time_axis"])
        rank = len(first.shape) if is_array(first) else 0
        if axis in (1, 1 - rank) and axis not in (-2, rank - 2):
            axis = 1
        elif axis in (-2, rank - 2):
            axis = 0
        else:
            raise ValueError(f"{op}: time_axis must be -2, the second to last, or 1, got {axis}")
        arrays = (offsets, freqs, given["position_ids"], inv_freqs)
        traditional = flag(op, "traditional", given["traditional"])
        return (
            arrays,
            (number, real(op, "scale", given["scale"])),
            (integer(op, "dims", dims), traditional, start, axis),
        )

    def rope(
        self,
        a: A,
        dims: SupportsIndex,
        *,
        traditional: bool,
        base: SupportsFloat | None,
        scale: SupportsFloat,
        offset: SupportsIndex | A,
        freqs: A | None = None,
        position_ids: A | None = None,
        inv_freqs: A | None = None,
        time_axis: SupportsIndex = -2,
        stream: object = None,
    ) -> A:
        """Rotary position embedding: pair i of the first `dims` features turns by ``position * scale * inv_freq[i]``.

        Args:
            a: floating, rank 3 or more, batch first.
            dims: even, 2 to the length of the last axis; further features pass through.
            traditional: pairs (x[2i], x[2i+1]) instead of (x[i], x[i + dims/2]).
            base: of the inverse frequencies ``base**(-2i/dims)``, finite and positive; None with freqs or inv_freqs.
            scale: multiplies positions.
            offset: position of the first time step: an integer, or an integer array {}, {1} or {B}; 0 with
                position_ids.
            freqs: real, {dims/2}, inverse frequencies are 1/freqs.
            position_ids: integer, {B, T}, a position for each token in any order.
            inv_freqs: real, {dims/2}, used as given.
            time_axis: where time stands, -2 ({B, ..., T, D}) or 1 ({B, T, ..., D}).
            stream: ignored.

        Returns:
            An array of a's shape and dtype. Angles are float64 inside, so that large positions stay exact.

        Raises:
            ValueError: a dtype, rank, shape or value that is refused.
            TypeError: an argument that is no array or number.

        >>> import numpy as np
        >>> x = np.ones((1, 2, 2), np.float32)
        >>> np.asarray(rope(x, 2, traditional=False, base=10000.0, scale=1.0, offset=0)).round(2).tolist()[0][0]
        [1.0, 1.0]
        """
        given = {
            "traditional": traditional,
            "base": base,
            "scale": scale,
            "offset": offset,
            "freqs": freqs,
            "position_ids": position_ids,
            "inv_freqs": inv_freqs,
            "time_axis": time_axis,
        }
        arrays, reals, integers = self._rope("rope", a, dims, given)
        return self._call("rope", (a, *arrays), reals, integers)[0]

    def qk_norm_rope(
        self,
        q: A,
        k: A,
        q_weight: A | None,
        k_weight: A | None,
        eps: SupportsFloat,
        dims: SupportsIndex,
        *,
        traditional: bool,
        base: SupportsFloat | None,
        scale: SupportsFloat,
        offset: SupportsIndex | A,
        freqs: A | None = None,
        position_ids: A | None = None,
        inv_freqs: A | None = None,
        time_axis: SupportsIndex = -2,
    ) -> tuple[A, A]:
        """rms_norm of each head of q and k, then rope, in one pass (as in Qwen3).

        Args:
            q: floating, {B, N_q, T, D}, or {B, T, N_q, D} with time_axis=1.
            k: floating, {B, N_kv, T, D}, or {B, T, N_kv, D}.
            q_weight: floating, {D}, or None.
            k_weight: floating, {D}, or None.
            eps: finite, not negative.
            dims: even, 2 to D; it and what follows are rope's.

        Returns:
            ``(q, k)``, each promoted with its weight.

        Raises:
            ValueError: a dtype, rank, shape or value that is refused.
            TypeError: an argument that is no array or number.

        >>> import numpy as np
        >>> q, k = np.full((1, 2, 1, 2), 3, np.float32), np.full((1, 1, 1, 2), 5, np.float32)
        >>> q, k = qk_norm_rope(q, k, None, None, 0.0, 2, traditional=False, base=10000.0, scale=1.0, offset=0)
        >>> np.asarray(q).ravel().tolist()
        [1.0, 1.0, 1.0, 1.0]
        """
        given = {
            "traditional": traditional,
            "base": base,
            "scale": scale,
            "offset": offset,
            "freqs": freqs,
            "position_ids": position_ids,
            "inv_freqs": inv_freqs,
            "time_axis": time_axis,
        }
        arrays, reals, integers = self._rope("qk_norm_rope", q, dims, given)
        numbers = (*reals, real("qk_norm_rope", "eps", eps))
        first, second = self._call("qk_norm_rope", (q, k, q_weight, k_weight, *arrays), numbers, integers, 2)
        return first, second

    # ---- gated activations

    def swiglu(self, gate: A, up: A) -> A:
        """``silu(gate) * up``, where ``silu(x) = x / (1 + exp(-x))``.

        Args:
            gate: floating, any rank.
            up: floating, of gate's shape.

        Returns:
            An array of that shape, both promoted.

        Raises:
            ValueError: a dtype or shape that is refused.
            TypeError: an argument that is no array.

        >>> import numpy as np
        >>> np.asarray(swiglu(np.zeros(2, np.float32), np.ones(2, np.float32))).tolist()
        [0.0, 0.0]
        """
        return self._call("swiglu", (gate, up))[0]

    def geglu(self, gate: A, up: A, *, approximate: Literal["none", "tanh"] = "none") -> A:
        """``gelu(gate) * up``; ``gelu(x)`` is ``x/2 (1 + erf(x / sqrt 2))``, or with approximate="tanh" that of tanh.

        Args:
            gate: floating, any rank.
            up: floating, of gate's shape.
            approximate: "none" or "tanh".

        Returns:
            An array of that shape, both promoted.

        Raises:
            ValueError: a dtype, shape or word that is refused.
            TypeError: an argument that is no array.

        >>> import numpy as np
        >>> np.asarray(geglu(np.zeros(2, np.float32), np.ones(2, np.float32))).tolist()
        [0.0, 0.0]
        """
        if not isinstance(approximate, str):
            raise TypeError(f"geglu: approximate must be 'none' or 'tanh', got {type(approximate).__name__}")
        if approximate not in ("none", "tanh"):
            raise ValueError(f"geglu: approximate must be 'none' or 'tanh', got {approximate!r}")
        return self._call("geglu", (gate, up), integers=(int(approximate == "tanh"),))[0]

    # ---- attention

    @overload
    def scaled_dot_product_attention(
        self,
        q: A,
        k: A,
        v: A,
        *,
        scale: SupportsFloat,
        mask: A | str | None = None,
        sinks: A | None = None,
        force_fused: bool = False,
        causal: bool = False,
        key_mask: A | None = None,
        window: SupportsIndex | None = None,
        softcap: SupportsFloat | None = None,
        causal_offset: SupportsIndex | None = None,
        return_logsumexp: Literal[False] = False,
        stream: object = None,
    ) -> A: ...
    @overload
    def scaled_dot_product_attention(
        self,
        q: A,
        k: A,
        v: A,
        *,
        scale: SupportsFloat,
        mask: A | str | None = None,
        sinks: A | None = None,
        force_fused: bool = False,
        causal: bool = False,
        key_mask: A | None = None,
        window: SupportsIndex | None = None,
        softcap: SupportsFloat | None = None,
        causal_offset: SupportsIndex | None = None,
        return_logsumexp: Literal[True],
        stream: object = None,
    ) -> tuple[A, A]: ...
    def scaled_dot_product_attention(
        self,
        q: A,
        k: A,
        v: A,
        *,
        scale: SupportsFloat,
        mask: A | str | None = None,
        sinks: A | None = None,
        force_fused: bool = False,
        causal: bool = False,
        key_mask: A | None = None,
        window: SupportsIndex | None = None,
        softcap: SupportsFloat | None = None,
        causal_offset: SupportsIndex | None = None,
        return_logsumexp: bool = False,
        stream: object = None,
    ) -> A | tuple[A, A]:
        """``softmax(scale * q @ k.T + mask) @ v``, without storing the scores.

        Args:
            q: floating, {B, N_q, T_q, D}.
            k: floating, {B, N_kv, T_kv, D}; N_q is a multiple of N_kv.
            v: floating, {B, N_kv, T_kv, D_v}.
            scale: finite, multiplies the scores.
            mask: None, "causal" (as causal=True), or an array that broadcasts to {B, N_q, T_q, T_kv}: bool, where False
                hides, or real, added to the scores.
            sinks: floating, {N_q}, a logit a head without a value.
            force_fused: changes nothing.
            causal: query i sees key j when ``j <= i + causal_offset``.
            key_mask: bool or integer, {B, T_kv}, 0 hides.
            window: query i sees only the last `window` keys up to ``i + causal_offset``.
            softcap: scores become ``softcap * tanh(scores / softcap)`` before the mask.
            causal_offset: T_kv - T_q where not given.
            return_logsumexp: whether to return ``(out, logsumexp)``.
            stream: ignored.

        Returns:
            {B, N_q, T_q, D_v}, q, k and v promoted; the logsumexp is {B, N_q, T_q}, float32 (float64 for float64). What
            hides keys combines freely; a query that sees none gives zeros and a logsumexp of -inf.

        Raises:
            ValueError: a dtype, rank, shape or value that is refused.
            TypeError: an argument that is no array, number or flag.

        >>> import numpy as np
        >>> q = k = np.zeros((1, 1, 2, 4), np.float32)
        >>> v = np.array([[[[1.0], [3.0]]]], np.float32)
        >>> np.asarray(scaled_dot_product_attention(q, k, v, scale=0.5, mask="causal")).ravel().tolist()
        [1.0, 2.0]
        """
        op = "scaled_dot_product_attention"
        hides_later = flag(op, "causal", causal)
        if isinstance(mask, str):
            if mask != "causal":
                raise ValueError(f"{op}: mask must be 'causal', an array or None, got {mask!r}")
            mask, hides_later = None, True
        flag(op, "force_fused", force_fused)
        width = 0 if window is None else integer(op, "window", window)
        cap = 0.0 if softcap is None else real(op, "softcap", softcap)
        if window is not None and width == 0:
            raise ValueError(f"{op}: window must be 1 or more, got 0")
        if softcap is not None and cap == 0:
            raise ValueError(f"{op}: softcap must be finite and positive, got 0")
        offset = CAUSAL_OFFSET_DEFAULT if causal_offset is None else integer(op, "causal_offset", causal_offset)
        given: Any = mask
        check_unmasked(op, "mask", given)
        if is_array(given) and len(given.shape) < 4:
            mask = self._broadcast(given, (1,) * (4 - len(given.shape)) + tuple(given.shape))
        results = self._call(
            op,
            (q, k, v, mask, sinks, key_mask),
            (real(op, "scale", scale), cap),
            (int(hides_later), offset, width),
            results=2 if flag(op, "return_logsumexp", return_logsumexp) else 1,
        )
        return (results[0], results[1]) if return_logsumexp else results[0]

    def kv_cache_sdpa_update(
        self,
        q: A,
        new_k: A,
        new_v: A,
        k_cache: A,
        v_cache: A,
        offset: SupportsIndex | A,
        key_mask: A | None,
        scale: SupportsFloat,
    ) -> tuple[A, A, A]:
        """A decode step: new_k and new_v enter the caches at time `offset`, then q attends over the caches.

        Args:
            q: floating, {B, T_q, N_q, D}.
            new_k: {B, T_q, N_kv, D}, of k_cache's dtype.
            new_v: {B, T_q, N_kv, D_v}, of v_cache's dtype.
            k_cache: floating, {B, T_max, N_kv, D}.
            v_cache: floating, {B, T_max, N_kv, D_v}.
            offset: 0 to T_max - T_q, an integer or an integer array {} or {1}.
            key_mask: bool or integer, {B, T_max}, 0 hides; None hides nothing, not even what is not filled yet. With
                more than one query each sees the keys up to its own only.
            scale: finite, multiplies the scores.

        Returns:
            ``(out, k_cache, v_cache)``, out {B, N_q, T_q, D_v}, q and the caches promoted, and the new caches, which
            take the memory of the old ones where nobody else holds it.

        Raises:
            ValueError: a dtype, rank, shape or value that is refused.
            TypeError: an argument that is no array or number.

        >>> import numpy as np
        >>> q = new_k = np.zeros((1, 1, 1, 2), np.float32)
        >>> caches = np.zeros((1, 4, 1, 2), np.float32), np.full((1, 4, 1, 2), 3, np.float32)
        >>> out, k_cache, v_cache = kv_cache_sdpa_update(q, new_k, np.full_like(q, 5), *caches, 1, None, 1.0)
        >>> np.asarray(v_cache)[0, :, 0, 0].tolist()
        [3.0, 5.0, 3.0, 3.0]
        """
        op = "kv_cache_sdpa_update"
        at: Any = offset
        check_unmasked(op, "offset", at)
        if not is_array(at):
            check_start(op, integer(op, "offset", at), q, k_cache)
        elif at.shape not in ((), (1,)) or "int" not in str(at.dtype):
            raise ValueError(f"{op}: offset must be an integer or an integer array {{}} or {{1}}")
        inputs = (q, new_k, new_v, k_cache, v_cache, self._int32(offset), key_mask)
        out, k_cache, v_cache = self._call(op, inputs, (real(op, "scale", scale),), results=3)
        return out, k_cache, v_cache

    # ---- loss, gated delta rule

    def cross_entropy(
        self, logits: A, targets: A, *, ignore_index: SupportsIndex | None = None, stream: object = None
    ) -> A:
        """``logsumexp(logits, last axis) - logits[..., target]``, reading the logits once.

        Args:
            logits: floating, {..., V}, rank 1 or more.
            targets: integer, {...}, each 0 to V - 1, or ignore_index.
            ignore_index: rows of this target have loss 0.
            stream: ignored.

        Returns:
            float32 of the shape of targets, whatever the logits' dtype.

        Raises:
            ValueError: a dtype, rank or shape that is refused.
            TypeError: an argument that is no array or number.

        >>> import numpy as np
        >>> loss = cross_entropy(np.zeros((2, 4), np.float32), np.array([3, -100], np.int32), ignore_index=-100)
        >>> [round(float(one), 4) for one in np.asarray(loss)]
        [1.3863, 0.0]
        """
        ignored = 0 if ignore_index is None else integer("cross_entropy", "ignore_index", ignore_index)
        return self._call("cross_entropy", (logits, targets), integers=(int(ignore_index is not None), ignored))[0]

    def gated_delta_update(
        self,
        q: A,
        k: A,
        v: A,
        gamma: A,
        beta: A,
        initial_state: A | None = None,
        mask: A | None = None,
        stream: object = None,
    ) -> list[A]:
        """The gated delta rule: at each step ``S = S * gamma; S = S + beta (v - S k) k.T``; the output is ``S q``.

        Args:
            q: floating, {B, T, H_k, D_k}.
            k: as q.
            v: floating, {B, T, H_v, D_v}, H_v a multiple of H_k.
            gamma: floating, the decay itself, {B, T, H_v}, or a channel's own, {B, T, H_v, D_k}.
            beta: floating, {B, T, H_v}.
            initial_state: floating, {B, H_v, D_v, D_k}, or None for zeros.
            mask: bool or integer, {B, T}; a step of mask 0 leaves the state as it was and gives 0.
            stream: ignored.

        Returns:
            ``[out, state]``, out {B, T, H_v, D_v}, q and k promoted, state {B, H_v, D_v, D_k}, float32 (float64 where
            an array is).

        Raises:
            ValueError: a dtype, rank or shape that is refused.
            TypeError: an argument that is no array.

        >>> import numpy as np
        >>> q = k = np.ones((1, 2, 1, 1), np.float32)
        >>> gamma = beta = np.full((1, 2, 1), 0.5, np.float32)
        >>> out, state = gated_delta_update(q, k, 4 * q, gamma, beta)
        >>> np.asarray(out).ravel().tolist(), np.asarray(state).ravel().tolist()
        ([2.0, 2.5], [2.5])
        """
        return list(self._call("gated_delta_update", (q, k, v, gamma, beta, initial_state, mask), results=2))
