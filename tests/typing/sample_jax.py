"""How results on arrays of JAX are typed: read by tools/check_types, never run."""

import jax
import jax.numpy as jnp
import metalloid.jax as mj
from typing_extensions import assert_type

x = jnp.ones((2, 3, 4, 8))
Pair = tuple[jax.Array, jax.Array]

assert_type(mj.rms_norm(x, None, 1e-5), jax.Array)
assert_type(mj.layer_norm(x, x, None, 1e-5), jax.Array)
assert_type(mj.add_rms_norm(x, x, None, 1e-5), Pair)
assert_type(mj.rope(x, 8, traditional=True, base=None, scale=1.0, offset=x, freqs=x), jax.Array)
assert_type(mj.geglu(x, x, approximate="tanh"), jax.Array)
assert_type(mj.scaled_dot_product_attention(x, x, x, scale=1.0, mask="causal"), jax.Array)
assert_type(mj.scaled_dot_product_attention(x, x, x, scale=1.0, return_logsumexp=True), Pair)
assert_type(mj.kv_cache_sdpa_update(x, x, x, x, x, 0, None, 1.0), tuple[jax.Array, jax.Array, jax.Array])
assert_type(mj.gated_delta_update(x, x, x, x, x), list[jax.Array])
