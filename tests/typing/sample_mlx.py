"""How results on arrays of MLX are typed: read by tools/check_types, never run."""

import metalloid.mlx as mm
import mlx.core as mx
from typing_extensions import assert_type

x = mx.ones((2, 3, 4, 8))
Pair = tuple[mx.array, mx.array]

assert_type(mm.rms_norm(x, None, 1e-5), mx.array)
assert_type(mm.layer_norm(x, x, None, 1e-5), mx.array)
assert_type(mm.add_rms_norm(x, x, None, 1e-5), Pair)
assert_type(mm.rope(x, 8, traditional=True, base=None, scale=1.0, offset=x, freqs=x), mx.array)
assert_type(mm.geglu(x, x, approximate="tanh"), mx.array)
assert_type(mm.scaled_dot_product_attention(x, x, x, scale=1.0, mask="causal"), mx.array)
assert_type(mm.scaled_dot_product_attention(x, x, x, scale=1.0, return_logsumexp=True), Pair)
assert_type(mm.kv_cache_sdpa_update(x, x, x, x, x, 0, None, 1.0), tuple[mx.array, mx.array, mx.array])
assert_type(mm.gated_delta_update(x, x, x, x, x), list[mx.array])
