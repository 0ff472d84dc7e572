"""metalloid.torch: the operators of torch.ops.metalloid under autograd, torch.compile, autocast and others."""

import doctest
import subprocess
import sys

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
    total = 0
    for part in several(out):
        weight = torch.linspace(0.3, 1.7, part.numel(), dtype=torch.float64).to(part.dtype).view(part.shape)
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
    """PyTorch's own test of an operator: schema, fake, autograd, and AOTAutograd with symbolic shapes."""
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


@every_case
def test_the_way_around_the_dispatcher_gives_the_same_bits(case):
    call, leaves, _ = sample(case)
    recorded = several(call(*leaves))
    with torch.no_grad():
        straight = several(call(*leaves))

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Watch():
        dispatched = several(call(*leaves))
    for a, b, c in zip(recorded, straight, dispatched, strict=True):
        assert a.requires_grad
        assert c.requires_grad
        assert not b.requires_grad
        assert torch.equal(a, b)
        assert torch.equal(b, c)


@pytest.mark.parametrize(
    "case",
    [
        "rms_norm",
        "add_layer_norm",
        "geglu by tanh",
        "rope traditional, offsets",
        "qk_norm_rope",
        "cross_entropy ignoring",
        "gated_delta_update by channel, state, mask",
        "attention everything",
        "attention logsumexp",
    ],
)
def test_compiles_as_one_graph(case):
    torch._dynamo.reset()
    call, leaves, _ = sample(case)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for out, want in zip(several(compiled(*leaves)), several(call(*leaves)), strict=True):
        assert torch.equal(out, want)
    gradients = torch.autograd.grad(loss(compiled(*leaves)), leaves)
    for gradient, want in zip(gradients, torch.autograd.grad(loss(call(*leaves)), leaves), strict=True):
        torch.testing.assert_close(gradient, want)


def test_inductor_compiles_a_block():
    """What a transformer's layer does, by the default backend, forward and backward, for two lengths."""
    torch._dynamo.reset()
    s = Samples()
    weight = s.normal(16)

    def block(x, weight):
        total, normal = mt.add_rms_norm(x, x, weight, 1e-5)
        heads = normal.view(*x.shape[:2], 4, 4)
        q, k = mt.qk_norm_rope(heads, heads, None, None, 1e-5, 4, **{**ROTATION, "time_axis": 1})
        q, k, v = (part.transpose(1, 2) for part in (q, k, heads))
        out = mt.scaled_dot_product_attention(q, k, v, scale=0.5, mask="causal").transpose(1, 2).reshape(x.shape)
        return mt.swiglu(out, total) + mt.RMSNorm(16, elementwise_affine=False)(out)

    compiled = torch.compile(block, fullgraph=True)
    for length in (5, 6):
        x = s.normal(2, length, 16)
        out, want = compiled(x, weight), block(x, weight)
        torch.testing.assert_close(out, want)
        gradients = torch.autograd.grad(out.sum(), (x, weight))
        for gradient, exact in zip(gradients, torch.autograd.grad(want.sum(), (x, weight)), strict=True):
            torch.testing.assert_close(gradient, exact)


# ---- the cache


def cache_step(dtype=torch.float32, queries=1, gradient=False):
    s = Samples(dtype)
    q, new_k, new_v = (s.normal(2, queries, heads, 8, gradient=gradient) for heads in (4, 2, 2))
    caches = [s.normal(2, 6, 2, 8, gradient=False) for _ in range(2)]
    return q, new_k, new_v, *caches, 3, torch.tensor([[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]]), 0.5


@pytest.mark.parametrize("queries", [1, 2])
def test_cache_update_is_recorded(queries):
    def call(q, new_k, new_v, k_cache, v_cache):
        *_, offset, key_mask, scale = cache_step()
        return mt.kv_cache_sdpa_update(q, new_k, new_v, k_cache.clone(), v_cache.clone(), offset, key_mask, scale)

    *tensors, _, _, _ = cache_step(torch.float64, queries)
    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in tensors])


def test_cache_update_by_every_way():
    arguments = cache_step()
    results = []
    for function in (
        mt.kv_cache_sdpa_update,
        torch.compile(mt.kv_cache_sdpa_update, fullgraph=True, backend="aot_eager"),
        lambda *a: ops.kv_cache_sdpa_update(*a[:5], 0, torch.tensor(a[5]), *a[6:]),
    ):
        fresh = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        before = fresh[3]._version
        results.append((function(*fresh), fresh[3], fresh[4]))
        assert fresh[3]._version > before
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert torch.equal(results[0][1][:, 3:4], arguments[1])


def test_cache_update_as_an_operator_has_no_silent_gradient():
    q, new_k, new_v, k_cache, v_cache, offset, key_mask, scale = cache_step(gradient=True)
    with pytest.raises(NotImplementedError, match="kv_cache_sdpa_update cannot be differentiated"):
        ops.kv_cache_sdpa_update(q, new_k, new_v, k_cache, v_cache, offset, None, key_mask, scale)
    with pytest.raises(ValueError, match=r"^kv_cache_sdpa_update: offset must be 0 to 5, got 6"):
        mt.kv_cache_sdpa_update(q, new_k, new_v, k_cache, v_cache, 6, key_mask, scale)
    torch.library.opcheck(
        ops.kv_cache_sdpa_update.default,
        (q.detach(), new_k.detach(), new_v.detach(), k_cache, v_cache, offset, None, key_mask, scale),
    )


# ---- autocast


def test_autocast_lowers_attention_and_nothing_else():
    s = Samples()
    q = s.normal(1, 2, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attend = mt.scaled_dot_product_attention
        assert attend(q, q, q, scale=1.0, mask=torch.zeros(3, 3), sinks=torch.zeros(2)).dtype == torch.bfloat16
        assert attend(q.double(), q.double(), q.double(), scale=1.0).dtype == torch.float64
        assert mt.rms_norm(q, None, 1e-5).dtype == torch.float32
        assert mt.rms_norm(q.bfloat16(), torch.ones(4), 1e-5).dtype == torch.float32
        assert mt.swiglu(q.bfloat16(), q.bfloat16()).dtype == torch.bfloat16
        out, state = mt.gated_delta_update(q, q, q, q[..., 0], q[..., 0])
        assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
        assert mt.kv_cache_sdpa_update(*cache_step()).dtype == torch.float32  # the caches keep their dtype
        linear = torch.nn.Linear(4, 4)
        norm = mt.RMSNorm(4)
        norm(linear(q)).sum().backward()
        gradient = torch.autograd.grad(attend(q, q, q, scale=1.0).sum(), q)[0]
    assert norm.weight.grad.dtype == torch.float32
    assert gradient.dtype == torch.float32
    want = mt.scaled_dot_product_attention(*3 * (q.bfloat16(),), scale=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mt.scaled_dot_product_attention(q, q, q, scale=1.0), want)


# ---- modules


@pytest.mark.parametrize("shape", [(8,), (3, 8)], ids=str)
def test_modules_are_those_of_torch(shape):
    x = Samples().normal(2, 3, 8)
    for mine, theirs in (
        (mt.RMSNorm(shape), torch.nn.RMSNorm(shape)),
        (mt.RMSNorm(shape, eps=1e-3, elementwise_affine=False), torch.nn.RMSNorm(shape, 1e-3, False)),
        (mt.LayerNorm(shape), torch.nn.LayerNorm(shape)),
        (mt.LayerNorm(shape, bias=False), torch.nn.LayerNorm(shape, bias=False)),
        (mt.LayerNorm(shape, elementwise_affine=False), torch.nn.LayerNorm(shape, elementwise_affine=False)),
    ):
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter)
        mine.load_state_dict(theirs.state_dict())
        assert isinstance(mine, type(theirs))
        torch.testing.assert_close(mine(x), theirs(x))
        gradients = (
            torch.autograd.grad(module(x).square().sum(), (x, *module.parameters())) for module in (mine, theirs)
        )
        for gradient, want in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, want)
    with pytest.raises(ValueError, match="must end with the axes"):
        mt.LayerNorm((2, 8))(x)


# ---- dtypes, refusals


def test_dtypes_are_promoted_and_asked_for():
    half, brain = torch.ones(2, 4, dtype=torch.float16), torch.ones(4, dtype=torch.bfloat16)
    for weight, dtype, want in (
        (brain, None, torch.float32),
        (None, None, torch.float16),
        (brain, torch.bfloat16, torch.bfloat16),
    ):
        with torch.no_grad():
            assert mt.rms_norm(half, weight, 1e-5, dtype=dtype).dtype == want
        meta = [None if x is None else x.to("meta") for x in (half, weight)]
        assert mt.rms_norm(*meta, 1e-5, dtype=dtype).dtype == want
    q, k = mt.qk_norm_rope(*2 * (half[None, None],), brain, brain, 1e-5, 4, **ROTATION, dtype=torch.float16)
    assert q.dtype == k.dtype == torch.float16


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        lambda x: mt.rms_norm(x[0, 0, 0, 0], None, 1e-5),
        lambda x: mt.rms_norm(x, None, -1.0),
        lambda x: mt.rms_norm(x, torch.ones(4, dtype=torch.complex64), 1e-5),
        lambda x: mt.rms_norm(x, torch.ones(4).to(torch.float8_e4m3fn), 1e-5),
        lambda x: mt.rope(x, 3, **ROTATION),
        lambda x: mt.swiglu(x, x[:1]),
        lambda x: mt.scaled_dot_product_attention(x, x, x, scale=1.0, mask="lower"),
        lambda x: mt.scaled_dot_product_attention(x, x, x, scale=1.0, window=0),
        lambda x: mt.cross_entropy(x, torch.full((2, 2, 3), 4)),
        lambda x: mt.gated_delta_update(x, x, x, x, x),
    ],
)
def test_refusals_reach_the_caller(call, recorded):
    x = torch.ones(2, 2, 3, 4, requires_grad=recorded)
    with pytest.raises(ValueError, match=r"^(rms_norm|rope|swiglu|scaled_dot\w+|cross_entropy|gated_delta_update): "):
        call(x)


@pytest.mark.parametrize("recorded", [False, True])
def test_a_meta_tensor_among_real_ones_is_refused(recorded):
    """PyTorch takes such a call for one without values: real results of it would be memory that nobody wrote."""
    x = torch.ones(2, 4, requires_grad=recorded)
    for call in (mt.rms_norm, torch.ops.metalloid.rms_norm):
        for arguments in ((x, torch.ones(4, device="meta")), (x.to("meta"), torch.ones(4))):
            with pytest.raises(ValueError, match=r"rms_norm: .*(x|weight).* meta"):
                call(*arguments, 1e-5)
        assert call(x.to("meta"), torch.ones(4, device="meta"), 1e-5).is_meta


def test_second_derivatives():
    s = Samples(torch.float64)
    x, weight = s.normal(3, 5), s.normal(5)
    for function in (lambda x, w: mt.rms_norm(x, w, 1e-3), lambda x, w: mt.layer_norm(x, w, w, 1e-3)):
        assert torch.autograd.gradgradcheck(function, (x, weight))
    for function in (mt.swiglu, mt.geglu, lambda x, y: mt.geglu(x, y, approximate="tanh")):
        assert torch.autograd.gradgradcheck(function, (x, s.normal(3, 5)))
    q = s.normal(1, 1, 2, 4)
    (first,) = torch.autograd.grad(mt.scaled_dot_product_attention(q, q, q, scale=1.0).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="cannot be differentiated"):
        first.sum().backward()


PEAK = """
import resource, torch, metalloid.torch as mt
q = torch.randn(1, 8, 4096, 16, requires_grad=True)
out = mt.scaled_dot_product_attention(q, q[:, :2], q[:, :2], scale=0.25, mask="causal")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
out.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("case", ["rms_norm", "rope", "cross_entropy", "attention everything", "gated_delta_update"])
def test_transforms_of_torch_func(case):
    """grad, and vmap of grad, which takes PyTorch's loop over the batch."""
    call, leaves, _ = sample(case)
    detached = [leaf.detach() for leaf in leaves]
    places = tuple(range(len(leaves)))
    gradients = torch.func.grad(lambda *tensors: loss(call(*tensors)), argnums=places)(*detached)
    for gradient, want in zip(gradients, torch.autograd.grad(loss(call(*leaves)), leaves), strict=True):
        torch.testing.assert_close(gradient, want)
    batched = [torch.stack([leaf, leaf / 2]) for leaf in detached]
    results = torch.func.vmap(torch.func.grad(lambda *tensors: loss(call(*tensors)), argnums=places))(*batched)
    halves = [(leaf / 2).detach().requires_grad_() for leaf in leaves]
    wanted = torch.autograd.grad(loss(call(*halves)), halves)
    for result, gradient, want in zip(results, gradients, wanted, strict=True):
        torch.testing.assert_close(result, torch.stack([gradient, want]))


def test_backward_of_attention_stores_no_score_matrix():
    """Of 4096 keys and queries, which is 512 MiB for 8 heads: the peak of a process of its own rises by less."""
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 300 * 1024


@pytest.mark.parametrize("name", mt.__all__)
def test_examples_of_the_documentation_run(name):
    examples = {"torch": torch, **{public: getattr(mt, public) for public in mt.__all__}}
    (test,) = [t for t in doctest.DocTestFinder().find(getattr(mt, name), name, globs=examples) if t.name == name]
    assert test.examples
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test).failed == 0


@pytest.mark.parametrize("call", [mt.swiglu, torch.ops.metalloid.swiglu])
def test_forward_mode_is_refused(call):
    """Rather than given tangents of zero."""
    x = torch.randn(2, 4)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones(2, 4))
        with pytest.raises(NotImplementedError, match="forward-mode"):
            call(dual, dual)
    with pytest.raises(NotImplementedError):
        torch.func.jvp(lambda a: call(a, a), (x,), (torch.ones(2, 4),))
