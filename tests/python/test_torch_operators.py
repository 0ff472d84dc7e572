"""metalloid.torch: the operators of torch.ops.metalloid under autograd, torch.compile, autocast and transforms of PyTorch."""

import metalloid
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import metalloid.torch as mt  # noqa: E402

ops = torch.ops.metalloid


class Samples:
    """Arguments of one operator, of one dtype: tensors that have a gradient and others."""

    def __init__(self, dtype=torch.float32, seed=0):
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape, gradient=True):
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.dtype)
        return values.requires_grad_(gradient)

    def uniform(self, *shape):
        values = 0.1 + 0.8 * torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return values.to(self.dtype).requires_grad_(True)

    def integers(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator)


ROTATION = {"traditional": False, "base": 100.0, "scale": 1.0, "offset": 3}
CASES = {  # name: (function, arguments)
    "rms_norm": lambda s: (mt.rms_norm, (s.normal(2, 3, 8), s.normal(8), 1e-3), {}),
    "rms_norm without weight": lambda s: (mt.rms_norm, (s.normal(8), None, 1e-3), {}),
    "layer_norm": lambda s: (mt.layer_norm, (s.normal(2, 3, 8), s.normal(8), s.normal(8), 1e-3), {}),
    "layer_norm with bias alone": lambda s: (mt.layer_norm, (s.normal(3, 8), None, s.normal(8), 1e-3), {}),
    "add_rms_norm": lambda s: (mt.add_rms_norm, (s.normal(3, 8), s.normal(3, 8), s.normal(8), 1e-3), {}),
    "add_layer_norm": lambda s: (
        mt.add_layer_norm,
        (s.normal(3, 8), s.normal(3, 8), s.normal(8), s.normal(8), 1e-3),
        {},
    ),
    "swiglu": lambda s: (mt.swiglu, (s.normal(3, 5), s.normal(3, 5)), {}),
    "geglu": lambda s: (mt.geglu, (s.normal(3, 5), s.normal(3, 5)), {}),
    "geglu by tanh": lambda s: (mt.geglu, (s.normal(3, 5), s.normal(3, 5)), {"approximate": "tanh"}),
    "rope": lambda s: (mt.rope, (s.normal(2, 3, 4, 6), 4), ROTATION),
    "rope traditional, offsets": lambda s: (
        mt.rope,
        (s.normal(2, 4, 3, 6), 6),
        {**ROTATION, "traditional": True, "offset": torch.tensor([5, 0]), "time_axis": 1, "scale": 0.5},
    ),
    "rope by freqs, position_ids": lambda s: (
        mt.rope,
        (s.normal(2, 3, 4, 6), 6),
        {
            **ROTATION,
            "base": None,
            "freqs": torch.tensor([1.0, 7.0, 50.0]),
            "offset": 0,
            "position_ids": s.integers(100, 2, 4),
        },
    ),
    "qk_norm_rope": lambda s: (
        mt.qk_norm_rope,
        (s.normal(2, 4, 3, 6), s.normal(2, 2, 3, 6), s.normal(6), s.normal(6), 1e-3, 4),
        ROTATION,
    ),
    "qk_norm_rope at axis 1": lambda s: (
        mt.qk_norm_rope,
        (s.normal(2, 3, 4, 6), s.normal(2, 3, 2, 6), None, s.normal(6), 1e-3, 6),
        {**ROTATION, "time_axis": 1},
    ),
    "cross_entropy": lambda s: (mt.cross_entropy, (s.normal(2, 3, 7), s.integers(7, 2, 3)), {}),
    "cross_entropy ignoring": lambda s: (
        mt.cross_entropy,
        (s.normal(3, 7), torch.tensor([2, -100, 6])),
        {"ignore_index": -100},
    ),
    "gated_delta_update": lambda s: (
        mt.gated_delta_update,
        (s.normal(1, 5, 2, 3), s.normal(1, 5, 2, 3), s.normal(1, 5, 4, 2), s.uniform(1, 5, 4), s.uniform(1, 5, 4)),
        {},
    ),
    "gated_delta_update by channel, state, mask": lambda s: (
        mt.gated_delta_update,
        (
            s.normal(2, 5, 1, 3),
            s.normal(2, 5, 1, 3),
            s.normal(2, 5, 2, 2),
            s.uniform(2, 5, 2, 3),
            s.uniform(2, 5, 2),
            s.normal(2, 2, 2, 3),
            torch.tensor([[1, 1, 0, 1, 1], [0, 1, 1, 1, 0]]),
        ),
        {},
    ),
}


def attention(**options):
    def case(s):
        made = {name: value(s) if callable(value) else value for name, value in options.items()}
        q, k, v = s.normal(2, 4, 3, 5), s.normal(2, 2, 6, 5), s.normal(2, 2, 6, 4)
        return mt.scaled_dot_product_attention, (q, k, v), {"scale": 0.5, **made}

    return case


KEYS = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
CASES |= {
    "attention": attention(),
    "attention causal": attention(mask="causal"),
    "attention causal, shifted": attention(causal=True, causal_offset=-1),  # a query sees nothing
    "attention boolean mask": attention(mask=lambda s: s.normal(2, 1, 3, 6) > -0.5),
    "attention additive mask": attention(mask=lambda s: s.normal(4, 3, 6)),
    "attention additive mask, broadcast": attention(mask=lambda s: s.normal(2, 1, 1, 6)),
    "attention additive mask with -inf": attention(
        mask=lambda s: torch.where(KEYS[:, None, None] != 0, 0.0, -torch.inf).to(s.dtype)
    ),
    "attention integer mask": attention(mask=lambda s: s.integers(3, 3, 6)),
    "attention key mask": attention(key_mask=KEYS, causal=True),
    "attention window": attention(window=2),
    "attention softcap": attention(softcap=1.5, causal=True),
    "attention sinks": attention(sinks=lambda s: s.normal(4), causal=True, causal_offset=-1),
    "attention everything": attention(
        mask=lambda s: s.normal(3, 6), sinks=lambda s: s.normal(4), key_mask=KEYS, causal=True, window=4, softcap=2.0
    ),
    "attention logsumexp": attention(return_logsumexp=True, sinks=lambda s: s.normal(4), softcap=2.0),
    "attention logsumexp, rows without keys": attention(return_logsumexp=True, causal=True, causal_offset=0),
}
every_case = pytest.mark.parametrize("case", CASES)


def sample(case, dtype=torch.float32, seed=0):
    """(function of the tensors that have gradients, those tensors, the call's arguments)"""
    function, arguments, keywords = CASES[case](Samples(dtype, seed))
    places = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.requires_grad]
    names = [n for n, a in keywords.items() if isinstance(a, torch.Tensor) and a.requires_grad]
    leaves = [*(arguments[i] for i in places), *(keywords[n] for n in names)]

    def call(*tensors):
        given, named = list(arguments), dict(keywords)
        for place, tensor in zip(places, tensors, strict=False):
            given[place] = tensor
        for name, tensor in zip(names, tensors[len(places) :], strict=True):
            named[name] = tensor
        out = function(*given, **named)
        return tuple(out) if isinstance(out, list) else out

    return call, leaves, (arguments, keywords)


def several(out):
    return out if isinstance(out, (tuple, list)) else (out,)


def loss(out):
    weights = torch.Generator().manual_seed(7)
    total = 0
    for part in several(out):
        weight = torch.rand(part.shape, generator=weights, dtype=torch.float64).to(part.dtype)
        total = total + (torch.where(part.isfinite(), part, 0) * weight).sum()
    return total


@every_case
def test_gradients_are_those_of_differences(case):
    if case.startswith("cross_entropy"):
        pytest.skip("its loss is float32: test_cross_entropy_gradient compares it with PyTorch's")
    call, leaves, _ = sample(case, torch.float64)

    def finite(*tensors):  # log-sum-exp of nothing is -inf, whose difference is NaN
        return tuple(torch.where(part.isfinite(), part, 0) for part in several(call(*tensors)))

    assert torch.autograd.gradcheck(finite, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_cross_entropy_gradient_is_that_of_torch():
    logits, targets = Samples(torch.float64).normal(4, 5, 9), Samples().integers(9, 4, 5)
    targets[0, :2] = -100
    g = torch.rand(4, 5)
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-7)):
        x = logits.detach().to(dtype).requires_grad_()
        (mine,) = torch.autograd.grad(mt.cross_entropy(x, targets, ignore_index=-100), x, g)
        exact = x.detach().double().requires_grad_()
        want = torch.nn.functional.cross_entropy(exact.transpose(1, 2), targets, reduction="none", ignore_index=-100)
        (want,) = torch.autograd.grad(want, exact, g.double())
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), want, rtol=rtol, atol=rtol * 0.1)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_lower_precision(case, dtype):
    """Within rounding of float64's, each of its tensor's dtype."""
    call, leaves, _ = sample(case, dtype)
    gradients = torch.autograd.grad(loss(call(*leaves)), leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = torch.autograd.grad(loss(sample(case, torch.float64)[0](*wide)), wide)
    rtol = {torch.float32: 2e-5, torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    for leaf, gradient, want in zip(leaves, gradients, exact, strict=True):
        assert gradient.dtype == dtype
        assert gradient.shape == leaf.shape
        torch.testing.assert_close(gradient.double(), want, rtol=rtol, atol=rtol * float(want.abs().max() + 1))


@every_case
def test_operators_pass_opcheck(case):
    """PyTorch's own test of an operator: its schema, its fake, its autograd, and it under AOTAutograd with symbolic shapes."""
    call, leaves, _ = sample(case)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "metalloid":
                seen.append((func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    with Watch():
        loss(call(*leaves)).backward()
    assert seen
    for op, args, kwargs in seen:
        fresh = [a.detach().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a for a in args]
        if "backward" in str(op):
            fresh = [a.detach() if isinstance(a, torch.Tensor) else a for a in fresh]
        torch.library.opcheck(op, tuple(fresh), kwargs)
