"""How results on arrays of NumPy are typed: read by tools/check_types, never run."""

import metalloid
import metalloid.fast
import numpy as np
from numpy.typing import NDArray

x: NDArray[np.float32] = np.ones((2, 3, 4, 8), np.float32)
y: NDArray[np.float32] = metalloid.rms_norm(x, None, 1e-5)
pair: tuple[NDArray[np.float32], NDArray[np.float32]] = metalloid.add_rms_norm(x, x, None, 1e-5)
rotated: NDArray[np.float32] = metalloid.fast.rope(
    x, 8, traditional=False, base=1e4, scale=1.0, offset=np.array([1, 2])
)
out: NDArray[np.float32] = metalloid.fast.scaled_dot_product_attention(x, x, x, scale=0.5, mask="causal")
both: tuple[NDArray[np.float32], NDArray[np.float32]] = metalloid.scaled_dot_product_attention(
    x, x, x, scale=np.float32(0.5), return_logsumexp=True
)
states: list[NDArray[np.float32]] = metalloid.fast.gated_delta_update(x, x, x, x[..., 0], x[..., 0])
isa: str = metalloid.cpu_isa()
