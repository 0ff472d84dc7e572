"""RMSNorm and LayerNorm as modules, drop-in for those of torch.nn: same parameters, names and state."""

import torch
from torch import Tensor

from metalloid.torch._norm import layer_norm, rms_norm


def _last_axis(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) == 1:
        return x
    if x.shape[-len(shape) :] != shape:
        raise ValueError(f"input must end with the axes {list(shape)}, got {list(x.shape)}")
    return x.flatten(-len(shape))


class RMSNorm(torch.nn.RMSNorm):
    """torch.nn.RMSNorm by metalloid.torch.rms_norm; the result has x's and the weight's dtype promoted.

    >>> RMSNorm(2, eps=0.0)(torch.tensor([[3.0, 4.0]]))
    tensor([[0.8485, 1.1314]], grad_fn=<...>)
    """

    def forward(self, x: Tensor) -> Tensor:
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        weight = None if self.weight is None else self.weight.flatten()
        return rms_norm(_last_axis(x, self.normalized_shape), weight, eps).view(x.shape)


class LayerNorm(torch.nn.LayerNorm):
    """torch.nn.LayerNorm by metalloid.torch.layer_norm; the result has x's, the weight's and the bias's dtype promoted.

    >>> LayerNorm(2, eps=0.0, elementwise_affine=False)(torch.tensor([[1.0, 3.0]]))
    tensor([[-1.,  1.]])
    """

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.flatten()
        bias = None if self.bias is None else self.bias.flatten()
        return layer_norm(_last_axis(input, self.normalized_shape), weight, bias, self.eps).view(input.shape)
