from collections.abc import Callable
from typing import Any, Literal, Protocol, SupportsFloat, SupportsIndex, TypeVar, overload, type_check_only

from numpy.typing import NDArray

@type_check_only
class Array(Protocol):
    """An array of any library that speaks DLPack."""

    @property
    def shape(self) -> Any: ...
    @property
    def __dlpack__(self) -> Callable[..., Any]: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

_A = TypeVar("_A", bound=Array)
_Out = TypeVar("_Out", bound=Array)
_B = TypeVar("_B", bound=Array)
_OutB = TypeVar("_OutB", bound=Array)

__version__: str
KERNEL_DTYPES: tuple[str, ...]

class Kernel:
    def __new__(
        cls,
        name: str,
        input_names: tuple[str, ...],
        output_names: tuple[str, ...],
        source: str | bytes,
        header: str = "",
        ensure_row_contiguous: bool = True,
        atomic_outputs: bool = False,
        math_mode: int = 0,
        fallback_compiler: str | None = None,
        debug: bool = False,
        address_sanitizer: bool = False,
        most_iterations: int = 0,
        language: int = 0,
        shared_memory: int = 0,
    ) -> Kernel: ...
    def launch(
        self,
        inputs: tuple[Array, ...],
        outputs: tuple[Array, ...],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: tuple[tuple[str, int | bool | str], ...],
        init_value: float | None,
        scalars: tuple[int | float, ...] = (),
        /,
    ) -> None: ...
    def source(
        self,
        inputs: tuple[Array, ...],
        outputs: tuple[Array, ...],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: tuple[tuple[str, int | bool | str], ...],
        init_value: float | None,
        translated: bool = False,
        /,
    ) -> str: ...
    def prepare(
        self,
        inputs: tuple[tuple[tuple[int, ...], str], ...],
        outputs: tuple[tuple[tuple[int, ...], str], ...],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
        template: tuple[tuple[str, int | bool | str], ...],
        init_value: float | None,
        compile: bool = True,
        /,
    ) -> tuple[object, str]: ...

@overload
def rms_norm(
    x: NDArray[Any], weight: Array | None, eps: SupportsFloat, *, out: None = None, stream: object = None
) -> NDArray[Any]: ...
@overload
def rms_norm(x: _A, weight: Array | None, eps: SupportsFloat, *, out: None = None, stream: object = None) -> _A: ...
@overload
def rms_norm(x: Array, weight: Array | None, eps: SupportsFloat, *, out: _Out, stream: object = None) -> _Out: ...
@overload
def layer_norm(
    x: NDArray[Any],
    weight: Array | None,
    bias: Array | None,
    eps: SupportsFloat,
    *,
    out: None = None,
    stream: object = None,
) -> NDArray[Any]: ...
@overload
def layer_norm(
    x: _A, weight: Array | None, bias: Array | None, eps: SupportsFloat, *, out: None = None, stream: object = None
) -> _A: ...
@overload
def layer_norm(
    x: Array, weight: Array | None, bias: Array | None, eps: SupportsFloat, *, out: _Out, stream: object = None
) -> _Out: ...
@overload
def add_rms_norm(
    x: NDArray[Any], residual: Array, weight: Array | None, eps: SupportsFloat, *, out: None = None
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def add_rms_norm(
    x: _A, residual: Array, weight: Array | None, eps: SupportsFloat, *, out: None = None
) -> tuple[_A, _A]: ...
@overload
def add_rms_norm(
    x: Array, residual: Array, weight: Array | None, eps: SupportsFloat, *, out: tuple[_Out, _OutB]
) -> tuple[_Out, _OutB]: ...
@overload
def add_layer_norm(
    x: NDArray[Any], residual: Array, weight: Array | None, bias: Array | None, eps: SupportsFloat, *, out: None = None
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def add_layer_norm(
    x: _A, residual: Array, weight: Array | None, bias: Array | None, eps: SupportsFloat, *, out: None = None
) -> tuple[_A, _A]: ...
@overload
def add_layer_norm(
    x: Array, residual: Array, weight: Array | None, bias: Array | None, eps: SupportsFloat, *, out: tuple[_Out, _OutB]
) -> tuple[_Out, _OutB]: ...
@overload
def rope(
    a: NDArray[Any],
    dims: SupportsIndex,
    *,
    traditional: bool,
    base: SupportsFloat | None,
    scale: SupportsFloat,
    offset: SupportsIndex | Array,
    freqs: Array | None = None,
    position_ids: Array | None = None,
    inv_freqs: Array | None = None,
    time_axis: SupportsIndex = -2,
    out: None = None,
    stream: object = None,
) -> NDArray[Any]: ...
@overload
def rope(
    a: _A,
    dims: SupportsIndex,
    *,
    traditional: bool,
    base: SupportsFloat | None,
    scale: SupportsFloat,
    offset: SupportsIndex | Array,
    freqs: Array | None = None,
    position_ids: Array | None = None,
    inv_freqs: Array | None = None,
    time_axis: SupportsIndex = -2,
    out: None = None,
    stream: object = None,
) -> _A: ...
@overload
def rope(
    a: Array,
    dims: SupportsIndex,
    *,
    traditional: bool,
    base: SupportsFloat | None,
    scale: SupportsFloat,
    offset: SupportsIndex | Array,
    freqs: Array | None = None,
    position_ids: Array | None = None,
    inv_freqs: Array | None = None,
    time_axis: SupportsIndex = -2,
    out: _Out,
    stream: object = None,
) -> _Out: ...
@overload
def qk_norm_rope(
    q: NDArray[Any],
    k: NDArray[Any],
    q_weight: Array | None,
    k_weight: Array | None,
    eps: SupportsFloat,
    dims: SupportsIndex,
    *,
    traditional: bool,
    base: SupportsFloat | None,
    scale: SupportsFloat,
    offset: SupportsIndex | Array,
    freqs: Array | None = None,
    position_ids: Array | None = None,
    inv_freqs: Array | None = None,
    time_axis: SupportsIndex = -2,
    out: None = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def qk_norm_rope(
    q: _A,
    k: _B,
    q_weight: Array | None,
    k_weight: Array | None,
    eps: SupportsFloat,
    dims: SupportsIndex,
    *,
    traditional: bool,
    base: SupportsFloat | None,
    scale: SupportsFloat,
    offset: SupportsIndex | Array,
    freqs: Array | None = None,
    position_ids: Array | None = None,
    inv_freqs: Array | None = None,
    time_axis: SupportsIndex = -2,
    out: None = None,
) -> tuple[_A, _B]: ...
@overload
def qk_norm_rope(
    q: Array,
    k: Array,
    q_weight: Array | None,
    k_weight: Array | None,
    eps: SupportsFloat,
    dims: SupportsIndex,
    *,
    traditional: bool,
    base: SupportsFloat | None,
    scale: SupportsFloat,
    offset: SupportsIndex | Array,
    freqs: Array | None = None,
    position_ids: Array | None = None,
    inv_freqs: Array | None = None,
    time_axis: SupportsIndex = -2,
    out: tuple[_Out, _OutB],
) -> tuple[_Out, _OutB]: ...
@overload
def swiglu(gate: NDArray[Any], up: Array, *, out: None = None) -> NDArray[Any]: ...
@overload
def swiglu(gate: _A, up: Array, *, out: None = None) -> _A: ...
@overload
def swiglu(gate: Array, up: Array, *, out: _Out) -> _Out: ...
@overload
def geglu(
    gate: NDArray[Any], up: Array, *, approximate: Literal["none", "tanh"] = "none", out: None = None
) -> NDArray[Any]: ...
@overload
def geglu(gate: _A, up: Array, *, approximate: Literal["none", "tanh"] = "none", out: None = None) -> _A: ...
@overload
def geglu(gate: Array, up: Array, *, approximate: Literal["none", "tanh"] = "none", out: _Out) -> _Out: ...
@overload
def scaled_dot_product_attention(
    q: NDArray[Any],
    k: Array,
    v: Array,
    *,
    scale: SupportsFloat,
    mask: Array | str | None = None,
    sinks: Array | None = None,
    force_fused: bool = False,
    causal: bool = False,
    key_mask: Array | None = None,
    window: SupportsIndex | None = None,
    softcap: SupportsFloat | None = None,
    causal_offset: SupportsIndex | None = None,
    return_logsumexp: Literal[False] = False,
    out: None = None,
    stream: object = None,
) -> NDArray[Any]: ...
@overload
def scaled_dot_product_attention(
    q: _A,
    k: Array,
    v: Array,
    *,
    scale: SupportsFloat,
    mask: Array | str | None = None,
    sinks: Array | None = None,
    force_fused: bool = False,
    causal: bool = False,
    key_mask: Array | None = None,
    window: SupportsIndex | None = None,
    softcap: SupportsFloat | None = None,
    causal_offset: SupportsIndex | None = None,
    return_logsumexp: Literal[False] = False,
    out: None = None,
    stream: object = None,
) -> _A: ...
@overload
def scaled_dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: SupportsFloat,
    mask: Array | str | None = None,
    sinks: Array | None = None,
    force_fused: bool = False,
    causal: bool = False,
    key_mask: Array | None = None,
    window: SupportsIndex | None = None,
    softcap: SupportsFloat | None = None,
    causal_offset: SupportsIndex | None = None,
    return_logsumexp: Literal[False] = False,
    out: _Out,
    stream: object = None,
) -> _Out: ...
@overload
def scaled_dot_product_attention(
    q: NDArray[Any],
    k: Array,
    v: Array,
    *,
    scale: SupportsFloat,
    mask: Array | str | None = None,
    sinks: Array | None = None,
    force_fused: bool = False,
    causal: bool = False,
    key_mask: Array | None = None,
    window: SupportsIndex | None = None,
    softcap: SupportsFloat | None = None,
    causal_offset: SupportsIndex | None = None,
    return_logsumexp: Literal[True],
    out: None = None,
    stream: object = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def scaled_dot_product_attention(
    q: _A,
    k: Array,
    v: Array,
    *,
    scale: SupportsFloat,
    mask: Array | str | None = None,
    sinks: Array | None = None,
    force_fused: bool = False,
    causal: bool = False,
    key_mask: Array | None = None,
    window: SupportsIndex | None = None,
    softcap: SupportsFloat | None = None,
    causal_offset: SupportsIndex | None = None,
    return_logsumexp: Literal[True],
    out: None = None,
    stream: object = None,
) -> tuple[_A, _A]: ...
@overload
def scaled_dot_product_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    scale: SupportsFloat,
    mask: Array | str | None = None,
    sinks: Array | None = None,
    force_fused: bool = False,
    causal: bool = False,
    key_mask: Array | None = None,
    window: SupportsIndex | None = None,
    softcap: SupportsFloat | None = None,
    causal_offset: SupportsIndex | None = None,
    return_logsumexp: Literal[True],
    out: tuple[_Out, _OutB],
    stream: object = None,
) -> tuple[_Out, _OutB]: ...
@overload
def kv_cache_sdpa_update(
    q: NDArray[Any],
    new_k: Array,
    new_v: Array,
    k_cache: Array,
    v_cache: Array,
    offset: SupportsIndex | Array,
    key_mask: Array | None,
    scale: SupportsFloat,
    *,
    out: None = None,
) -> NDArray[Any]: ...
@overload
def kv_cache_sdpa_update(
    q: _A,
    new_k: Array,
    new_v: Array,
    k_cache: Array,
    v_cache: Array,
    offset: SupportsIndex | Array,
    key_mask: Array | None,
    scale: SupportsFloat,
    *,
    out: None = None,
) -> _A: ...
@overload
def kv_cache_sdpa_update(
    q: Array,
    new_k: Array,
    new_v: Array,
    k_cache: Array,
    v_cache: Array,
    offset: SupportsIndex | Array,
    key_mask: Array | None,
    scale: SupportsFloat,
    *,
    out: _Out,
) -> _Out: ...
@overload
def cross_entropy(
    logits: NDArray[Any],
    targets: Array,
    *,
    ignore_index: SupportsIndex | None = None,
    out: None = None,
    stream: object = None,
) -> NDArray[Any]: ...
@overload
def cross_entropy(
    logits: _A, targets: Array, *, ignore_index: SupportsIndex | None = None, out: None = None, stream: object = None
) -> _A: ...
@overload
def cross_entropy(
    logits: Array, targets: Array, *, ignore_index: SupportsIndex | None = None, out: _Out, stream: object = None
) -> _Out: ...
@overload
def gated_delta_update(
    q: NDArray[Any],
    k: Array,
    v: Array,
    gamma: Array,
    beta: Array,
    initial_state: Array | None = None,
    mask: Array | None = None,
    stream: object = None,
    *,
    out: None = None,
) -> list[NDArray[Any]]: ...
@overload
def gated_delta_update(
    q: _A,
    k: Array,
    v: Array,
    gamma: Array,
    beta: Array,
    initial_state: Array | None = None,
    mask: Array | None = None,
    stream: object = None,
    *,
    out: None = None,
) -> list[_A]: ...
@overload
def gated_delta_update(
    q: Array,
    k: Array,
    v: Array,
    gamma: Array,
    beta: Array,
    initial_state: Array | None = None,
    mask: Array | None = None,
    stream: object = None,
    *,
    out: tuple[_Out, _Out],
) -> list[_Out]: ...
def set_num_threads(threads: SupportsIndex, /) -> None: ...
def get_num_threads() -> int: ...
def cpu_isa() -> str: ...

# What metalloid.jax and metalloid.mlx are made of.
operations: object

def operation_names() -> dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]]: ...
def xla_handlers() -> list[tuple[str, str, object]]: ...
def check_operation(
    name: str,
    inputs: tuple[tuple[tuple[int, ...], str] | None, ...],
    results: tuple[tuple[tuple[int, ...], str], ...],
    reals: tuple[float, ...],
    integers: tuple[int, ...],
    /,
) -> None: ...
def run_operation(
    name: str,
    given: int,
    inputs: tuple[Any, ...],
    results: tuple[Any, ...],
    reals: tuple[float, ...],
    integers: tuple[int, ...],
    /,
) -> None: ...
