"""What the case tables of tests/python cannot see: streams, graphs, models' sizes, repeated bits, errors."""

import concurrent.futures
import ctypes

import numpy as np
import pytest
import torch
from benchmark import run, seconds, view
from library import (
    CrossEntropyOptions,
    attention_options,
    call,
    check,
    context,
    kernel,
    kernel_call,
    library,
    rope_options,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cuda").to(dtype)


def poisoned(*shape, dtype):
    return torch.full(shape, torch.nan, device="cuda", dtype=dtype)


def close(out, ref, bound):
    scale = ref.abs() + ref.abs().amax(-1, keepdim=True)
    error = ((out.double() - ref) / scale).abs().max().item()
    assert error <= bound, error  # NaN fails


def reference_norm(x, weight, bias, eps):
    x = x.double()
    if bias is not None:
        x = x - x.mean(-1, keepdim=True)
    y = x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [64, 1024, 4096, 5120, 8192, 14336, 32768, 65536, 4100, 4097])
@pytest.mark.parametrize("rows", [7, 4096])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm"])
def test_norms_of_every_length(op, rows, length, dtype):
    x, weight, bias = randn(rows, length, dtype=dtype), randn(length, dtype=dtype), randn(length, dtype=dtype)
    out = poisoned(rows, length, dtype=dtype)
    vectors = [weight] if op == "rms_norm" else [weight, bias]
    run(op, x, *vectors, 1e-5, out)
    close(out, reference_norm(x, weight, None if op == "rms_norm" else bias, 1e-5), ROUNDING[dtype])


@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm"])
@pytest.mark.parametrize("length", [128, 2048, 4096, 16384, 4100])
@pytest.mark.parametrize("outlier", [1e4, -300.0, 5.0])
@pytest.mark.parametrize("size", [1, 1e-24])
def test_layer_norm_whose_first_element_lies_far_out(size, outlier, length, op):
    x, weight = randn(64, length), torch.ones(length, device="cuda")
    x[:, 0] = outlier
    x *= size
    weight[0] = 1e-3  # or the bound, a share of the row's largest, is too wide to see what is wrong with the others
    zero, out = torch.zeros_like(weight), poisoned(64, length, dtype=x.dtype)
    added = [] if op == "layer_norm" else [torch.zeros_like(x)]
    sums = [] if op == "layer_norm" else [torch.empty_like(x)]
    run(op, x, *added, weight, zero, 1e-5, *sums, out)
    close(out, reference_norm(x, weight, zero, 1e-5), ROUNDING[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [8, 24, 64, 136, 520, 896, 1000, 1024, 1536, 2560, 4096, 5120, 7168, 20480])
@pytest.mark.parametrize("rows", [37, 3001])
@pytest.mark.parametrize("op", ["rms_norm", "layer_norm", "add_rms_norm", "add_layer_norm"])
def test_rows_that_share_a_block_go_their_own_ways(op, rows, length, dtype):
    """Plain ones, of a large mean, equal elements, tiny, huge, with NaN and infinity; weights of each dtype."""
    added, layer = op.startswith("add"), "layer" in op
    kind = torch.arange(rows, device="cuda") * 5 % 9
    mean = torch.zeros(rows, device="cuda")
    mean[kind == 1], mean[kind == 2] = 300, -7
    size = torch.ones(rows, device="cuda")
    size[kind == 3], size[kind == 4] = 0, 1e-3 if dtype == torch.float16 else 1e-30
    size[kind == 5] = 1e3 if dtype == torch.float16 else 1e30
    mean[kind == 3] = torch.randn(int((kind == 3).sum()), device="cuda") * 100
    x = (randn(rows, length) * size[:, None] + mean[:, None]).to(dtype)
    x[kind == 6, length // 2], x[kind == 7, length - 1] = torch.nan, torch.inf
    residual, total = torch.zeros_like(x), torch.empty_like(x)
    for weight_dtype in (dtype, *DTYPES):
        weight, bias = randn(length, dtype=weight_dtype), randn(length, dtype=weight_dtype, seed=1)
        for w, b in ((weight, bias), (weight, None), (None, None)):
            out = poisoned(rows, length, dtype=dtype)
            arguments = [x, residual] if added else [x]
            run(op, *arguments, w, *([b] if layer else []), 1e-12, *([total] if added else []), out)
            ones = torch.ones(length, device="cuda")
            shift = torch.zeros_like(ones) if b is None else b
            ref = reference_norm(x, ones if w is None else w, shift if layer else None, 1e-12)
            odd, equal = (kind == 6) | (kind == 7), layer & (x == x[:, :1]).all(-1)
            close(out[~odd & ~equal], ref[~odd & ~equal], ROUNDING[dtype])
            assert torch.equal(out[equal], shift.to(dtype).expand_as(out[equal]))
            assert torch.equal(out[odd].isnan(), ref[odd].isnan())


@pytest.mark.parametrize("where", ["x", "residual", "both"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [2048, 8192])
def test_the_sum_may_lie_where_an_input_was(length, dtype, where):
    """Many rows of several warps, whose first elements lie far out: all warps have to use the same pivot."""
    x, residual, weight = randn(3000, length, dtype=dtype), randn(3000, length, dtype=dtype, seed=1), randn(length)
    x[:, 0], residual[:, 0] = 40, -300
    ref_sum = x.double() + residual.double()
    ref = reference_norm(ref_sum, weight, torch.zeros_like(weight), 1e-5)
    total = residual if where == "residual" else x
    out = residual if where == "both" else poisoned(3000, length, dtype=dtype)
    run("add_layer_norm", x, residual, weight, None, 1e-5, total, out)
    close(out, ref, ROUNDING[dtype])
    close(total, ref_sum, ROUNDING[dtype])


def reference_rope(x, dims, freqs, time_axis, traditional, offset=0, scale=1.0):
    x, time = x.double(), x.shape[time_axis]
    angle = (torch.arange(time, device="cuda", dtype=torch.float64) + offset)[:, None] * scale * freqs
    if time_axis == 1:
        angle = angle[:, None]
    turned, rest = x[..., :dims], x[..., dims:]
    x1, x2 = (turned[..., ::2], turned[..., 1::2]) if traditional else turned.chunk(2, -1)
    y1, y2 = x1 * angle.cos() - x2 * angle.sin(), x1 * angle.sin() + x2 * angle.cos()
    return torch.cat((torch.stack((y1, y2), -1).flatten(-2) if traditional else torch.cat((y1, y2), -1), rest), -1)


def inverse_frequencies(dims, base):
    return base ** (-torch.arange(0, dims, 2, device="cuda", dtype=torch.float64) / dims)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("traditional", [False, True])
@pytest.mark.parametrize(
    ("shape", "dims"),
    [
        ((2, 9, 2100, 256), 256),  # so much that a thread has two heads, the last group not full
        ((1, 1, 5000, 128), 64),
        ((3, 33, 7, 96), 96),
        ((70000, 2, 1, 32), 32),  # more batches than a grid's axis
        ((1, 70000, 3, 1, 32), 32),  # more groups of heads
    ],
)
def test_rope_of_many_shapes(shape, dims, traditional, dtype):
    x = randn(*shape[:-3], shape[-3] + 1, *shape[-2:], dtype=dtype)[..., :-1, :, :]  # the axes before do not merge
    out = poisoned(*shape, dtype=dtype)
    run("rope", x, dims, rope_options(traditional=traditional, base=1e4, offset=1000), out)
    close(out, reference_rope(x, dims, inverse_frequencies(dims, 1e4), -2, traditional, 1000), ROUNDING[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(12, 3), (1, 7)])
@pytest.mark.parametrize("time", [1, 5, 4100])
def test_qk_norm_rope_of_many_shapes(time, heads, dtype):
    sides = [randn(3, time, n, 128, dtype=dtype, seed=n) for n in heads]
    weight, outs = randn(128, dtype=dtype), [poisoned(*x.shape, dtype=dtype) for x in sides]
    options = rope_options(traditional=False, base=1e6, time_axis=1)
    run("qk_norm_rope", *sides, weight, weight, 1e-6, 128, options, *outs)
    for x, out in zip(sides, outs, strict=True):
        normed = reference_norm(x, weight, None, 1e-6)
        close(out, reference_rope(normed, 128, inverse_frequencies(128, 1e6), 1, False), ROUNDING[dtype])


@pytest.mark.parametrize("traditional", [False, True])
def test_rope_by_far_angles_and_by_none(traditional):
    freqs = torch.cat((0.5 ** torch.arange(15, device="cuda"), torch.zeros(1, device="cuda")))  # exact angles
    x = randn(2, 3, 40, 32)
    unrotated = [30, 31] if traditional else [15, 31]
    x[..., unrotated[0]] = torch.inf
    out = poisoned(*x.shape, dtype=x.dtype)
    options = rope_options(traditional=traditional, base=None, scale=1e10, offset=7, inv_freqs=view(freqs))
    run("rope", x, 32, options, out)
    assert torch.equal(out[..., unrotated], x[..., unrotated])
    ref = reference_rope(x, 32, freqs.double(), -2, traditional, 7, 1e10)
    out[..., unrotated], ref[..., unrotated] = 0, 0
    close(out, ref, ROUNDING[torch.float32])


@pytest.mark.parametrize("dim", [64, 6])
def test_an_offset_s_positions_are_each_inside_int32_or_nan(dim):
    offsets = torch.tensor([-(2**31) - 1, 2**31 - 2, -(2**63), 2**63 - 1], device="cuda")
    x, freqs = randn(4, 3, 2, dim), 0.5 ** torch.arange(dim // 2, device="cuda")
    out, time = poisoned(*x.shape, dtype=x.dtype), torch.arange(3, device="cuda")
    options = rope_options(traditional=False, base=None, offset=view(offsets), inv_freqs=view(freqs), time_axis=1)
    run("rope", x, dim, options, out)
    for row, inside in enumerate([time > 0, time < 2, time < 0, time < 0]):
        assert out[row, ~inside].isnan().all()
        if inside.any():
            ref = reference_rope(x, dim, freqs.double(), 1, False, offsets[row].item())
            close(out[row, inside], ref[row, inside], ROUNDING[x.dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", [16, 9])
@pytest.mark.parametrize("op", ["swiglu", "geglu", "geglu_tanh"])
def test_an_infinite_factor_of_a_gate_stays_infinite(op, length, dtype):
    """Of a gate far below 0 too, whose share is below float's range."""
    gate = torch.tensor([-1e4, -200.0, -22.75, -15.0, -1e-7, 1e-7, 3.0, 1e4, 0.0], device="cuda")
    gate = torch.nn.functional.pad(gate, (0, length - 9)).to(dtype)
    for up in (torch.inf, -torch.inf):
        ups, out = torch.full_like(gate, up), torch.zeros_like(gate)
        run(op.split("_")[0], gate, ups, *([] if op == "swiglu" else [int(op == "geglu_tanh")]), out)
        assert torch.equal(out[:8].float(), gate[:8].sign().float() * up)
        assert out[8:].isnan().all()


def reference_attention(
    q, k, v, *, causal=False, mask=None, window=None, causal_offset=None, sinks=None, softcap=None, key_mask=None
):
    q, k, v = q.double(), k.double(), v.double()
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = q @ k.mT / q.shape[-1] ** 0.5
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    queries, keys = scores.shape[-2:]
    offset = keys - queries if causal_offset is None else causal_offset
    at = torch.arange(queries, device="cuda")[:, None] + offset
    key = torch.arange(keys, device="cuda")
    if causal:
        scores = scores.masked_fill(key > at, -torch.inf)
    if window:
        scores = scores.masked_fill((key > at) | (key <= at - window), -torch.inf)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None], -torch.inf)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    if sinks is not None:
        scores = torch.cat((scores, sinks.double()[:, None, None].expand(*scores.shape[:3], 1)), -1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def attend(q, k, v, **options):
    out = poisoned(*q.shape[:3], v.shape[3], dtype=q.dtype)
    log = poisoned(*q.shape[:3], dtype=torch.float32)
    views = {name: view(x) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    given = attention_options(logsumexp=view(log), **views)
    run("scaled_dot_product_attention", q, k, v, q.shape[-1] ** -0.5, given, out)
    return out, log


SIXTEEN = {torch.float16: 2e-3, torch.bfloat16: 2e-2}


def assert_attends(q, k, v, **options):
    """As in float64, within what 16 bits allow. Returns what came out."""
    out, log = attend(q, k, v, **options)
    ref, ref_log = reference_attention(q, k, v, **options)
    error = ((out.double() - ref).abs() / (ref.abs() + v.double().abs().max())).max().item()
    assert error <= SIXTEEN[q.dtype], error
    assert (log.double() - ref_log).abs().max().item() <= 1e-4
    return out


# Whole blocks, blocks with ends, one query, a few: with split keys and without, items of blocks dealt out in rounds, a
# long stream of keys to each block.
LENGTHS = [
    ((4, 4), 384, 384),
    ((8, 2), 333, 1001),
    ((8, 2), 1, 8192),
    ((4, 1), 5, 700),
    ((40, 8), 520, 1000),
    ((40, 8), 300, 1001),
    ((4, 2), 200, 2500),
    ((140, 70), 2, 1100),
]


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize(("heads", "queries", "keys"), LENGTHS)
@pytest.mark.parametrize("form", ["full", "causal", "window", "mask"])
def test_attention_on_tensor_cores(form, heads, queries, keys, dims, dtype):
    q = randn(2, heads[0], queries, dims[0], dtype=dtype)
    k = randn(2, heads[1], keys, dims[0], dtype=dtype, seed=1)
    v = randn(2, heads[1], keys, dims[1], dtype=dtype, seed=2)
    options = {"causal": {"causal": True}, "window": {"window": 100}}.get(form, {})
    if form == "mask":
        options["mask"] = randn(2, heads[0], queries, keys, seed=3) < 1
    assert_attends(q, k, v, **options)


def options_of(form, batch, heads, queries, keys, dtype):
    """One form of attention; what it hides is another key for every query and head."""
    where = torch.arange(keys, device="cuda")
    return {
        "full": {},
        "causal": {"causal": True},
        "window": {"causal": True, "window": 100},
        "mask": {"mask": randn(batch, heads, queries, keys, seed=3) < 1},
        "added": {"mask": randn(1, heads, queries, keys, seed=3).to(dtype)},
        "key_mask": {"key_mask": (randn(batch, keys, seed=3) < 1) & (where < keys - 90) & (where > 200)},
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": randn(heads, dtype=dtype, seed=6) + 3, "causal": True},
    }[form]


FORMS = ["full", "causal", "window", "mask", "added", "key_mask", "softcap", "sinks"]


# As many items of 64 rows as an H100 has multiprocessors, with ends too; two on each under causal; items of 128 rows.
@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("dims", [(64, 64), (88, 96), (128, 120)])
@pytest.mark.parametrize(
    ("heads", "queries", "keys"),
    [((66, 66), 64, 64), ((33, 11), 65, 77), ((22, 11), 321, 321), ((2, 1), 127, 900), ((67, 1), 129, 130)],
)
@pytest.mark.parametrize("form", FORMS)
def test_attention_of_few_rows(form, heads, queries, keys, dims, dtype):
    q = randn(2, heads[0], queries, dims[0], dtype=dtype)
    k = randn(2, heads[1], keys, dims[0], dtype=dtype, seed=1)
    v = randn(2, heads[1], keys, dims[1], dtype=dtype, seed=2)
    options = options_of(form, 2, heads[0], queries, keys, dtype)
    if form == "key_mask":
        options["key_mask"] = randn(2, keys, seed=3) < 1
    assert_attends(q, k, v, **options)


@pytest.mark.parametrize("dtype", SIXTEEN)
@pytest.mark.parametrize("dim", [64, 96, 128, 256])
@pytest.mark.parametrize("queries", [200, 1100])
@pytest.mark.parametrize("layout", ["time first", "odd rows", "odd start", "every other"])
def test_attention_into_any_layout(layout, queries, dim, dtype):
    q, k, v = (randn(1, 16, queries, dim, dtype=dtype, seed=seed) for seed in range(3))
    whole = torch.full((16 * queries * (2 * dim + 1) + 1,), 7, device="cuda", dtype=dtype)
    shape, row = (1, 16, queries, dim), {"odd rows": dim + 1, "every other": 2 * dim}.get(layout, dim)
    out = whole[layout == "odd start" :].as_strided(shape, (0, queries * row, row, 1 + (layout == "every other")))
    if layout == "time first":
        out = whole.as_strided(shape, (0, dim, 16 * dim, 1))
    run("scaled_dot_product_attention", q, k, v, dim**-0.5, attention_options(), out)
    ref, _ = reference_attention(q, k, v)
    assert ((out.double() - ref).abs() / (ref.abs() + v.double().abs().max())).max().item() <= SIXTEEN[dtype]
    out.fill_(7)
    assert (whole == 7).all()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("queries", [64, 256, 1024])
def test_attention_overlaps_only_with_what_it_may(queries, dim):
    """Each call reads what the one before writes, and writes what it reads."""
    k, v, weight = (randn(1, 32, queries, dim, dtype=torch.bfloat16, seed=seed) for seed in range(3))
    weight = weight[0, 0, 0]

    def chain(between):
        x = randn(1, 32, queries, dim, dtype=torch.bfloat16, seed=4)
        y = torch.zeros_like(x)
        for _ in range(20):
            for from_, to in ((x, y), (y, x), (x, y)):
                run("scaled_dot_product_attention", from_, k, v, dim**-0.5, attention_options(causal=True), to)
                between()
            run("rms_norm", y, weight, 1e-6, x)
            between()
        return x

    assert torch.equal(chain(lambda: None), chain(torch.cuda.synchronize))


@pytest.mark.parametrize("dims", [(264, 264), (320, 512), (512, 512), (576, 512)])
@pytest.mark.parametrize(("heads", "queries", "keys"), LENGTHS)
@pytest.mark.parametrize("form", FORMS)
def test_attention_of_wide_heads(form, heads, queries, keys, dims):
    dtype = torch.float16 if queries % 2 else torch.bfloat16
    q = randn(2, heads[0], queries, dims[0], dtype=dtype)
    k = randn(2, heads[1], keys, dims[0], dtype=dtype, seed=1)
    v = randn(2, heads[1], keys, dims[1], dtype=dtype, seed=2)
    options = options_of(form, 2, heads[0], queries, keys, dtype)
    out = assert_attends(q, k, v, **options)
    assert torch.equal(out, attend(q, k, v, **options)[0])


@pytest.mark.parametrize("dims", [(64, 64), (80, 96), (128, 128), (96, 33), (256, 256), (192, 128), (7, 200)])
@pytest.mark.parametrize(("heads", "queries", "keys"), LENGTHS)
@pytest.mark.parametrize("form", FORMS)
def test_attention_in_float32(form, heads, queries, keys, dims):
    q = randn(2, heads[0], queries, dims[0])
    k, v = randn(2, heads[1], keys, dims[0], seed=1), randn(2, heads[1], keys, dims[1], seed=2)
    options = options_of(form, 2, heads[0], queries, keys, torch.float32)
    out, log = attend(q, k, v, **options)
    ref, ref_log = reference_attention(q, k, v, **options)
    error = ((out.double() - ref).abs() / (ref.abs() + v.double().abs().max())).max().item()
    assert error <= 2e-6, error  # the contract allows 1e-5
    assert (log.double() - ref_log).abs().max().item() <= 1e-5
    assert torch.equal(out, attend(q, k, v, **options)[0])


@pytest.mark.parametrize("queries", [1, 200])
def test_attention_of_any_dtypes_and_strides_is_exact(queries):
    q = randn(2, queries, 8, 100, dtype=torch.bfloat16)[..., 3:67].transpose(1, 2)
    k = randn(2, 4, 64, 900, dtype=torch.float16, seed=1).mT
    v = randn(2, 1, 900, 48, seed=2).expand(2, 4, 900, 48)
    out = poisoned(2, 8, 50, queries, dtype=torch.float32).mT[..., 1:49]
    run("scaled_dot_product_attention", q, k, v, 0.125, attention_options(causal=True), out)
    ref, _ = reference_attention(q, k, v, causal=True)
    error = ((out.double() - ref).abs() / (ref.abs() + v.double().abs().max())).max().item()
    assert error <= 2e-6, error


def test_a_long_row_of_float32_loses_nothing():
    q, k = torch.zeros(1, 32, 1024, 64, device="cuda"), randn(1, 32, 32768, 64)
    out, log = attend(q, k, torch.full_like(k, 1.1))
    assert (out.double() / torch.tensor(1.1).double() - 1).abs().max().item() <= 1e-5
    assert (log - np.log(32768)).abs().max().item() <= 2e-5


@pytest.mark.parametrize("queries", [1, 200])
@pytest.mark.parametrize("dims", [64, 512])
def test_an_infinite_value_that_is_seen_shows(dims, queries):
    dtype = torch.float32 if dims == 64 else torch.bfloat16
    q, k = randn(1, 8, queries, dims, dtype=dtype), randn(1, 2, 1000, dims, dtype=dtype, seed=1)
    v = k.clone()
    v[:, :, 77, 5] = torch.inf
    out, _ = attend(q, k, v)
    assert (out[..., 5] == torch.inf).all()
    assert out[..., 6:].isfinite().all()


@pytest.mark.parametrize(("heads", "queries", "keys"), [(2, 70, 300), (16, 700, 300), (8, 1, 300), (1, 1, 20000)])
@pytest.mark.parametrize("dim", [64, 128, 256, 512])
def test_a_row_of_the_lowest_masks_is_a_mean(dim, heads, queries, keys):
    q, k = (randn(1, heads, n, dim, dtype=torch.bfloat16, seed=n) for n in (queries, keys))
    mask = torch.full((queries, keys), torch.finfo(torch.bfloat16).min, device="cuda", dtype=torch.bfloat16)
    out, _ = attend(q, k, k, mask=mask)
    torch.testing.assert_close(out.double(), k.double().mean(2, keepdim=True).expand(out.shape), rtol=2e-2, atol=2e-2)


# How a mask lies in memory: every axis that may be broadcast, rows that begin anywhere, other strides. One hides whole
# tiles.
LAYOUTS = {
    "own": lambda make, b, h, q, k: make(b, h, q, k),
    "all heads alike": lambda make, b, h, q, k: make(b, 1, q, k),
    "all batches alike": lambda make, b, h, q, k: make(h, q, k),
    "all rows alike": lambda make, b, h, q, k: make(b, 1, 1, k),
    "one row of odd length": lambda make, b, h, q, k: make(b, h, 1, k + 1)[..., 1:],
    "odd rows": lambda make, b, h, q, k: make(q, k + 1)[..., 1:],
    "transposed": lambda make, b, h, q, k: make(b, 1, k, q).mT,
    "whole tiles": lambda make, b, h, q, k: make(b, h, q, k, hidden=(slice(128, 400), slice(100, 300))),
}


@pytest.mark.parametrize("rest", ["alone", "causal", "key_mask", "softcap", "all"])
@pytest.mark.parametrize("kind", ["boolean", "added", "integer"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dims", [(64, 64), (80, 72), (128, 128), (192, 128), (256, 256)])
def test_masks_of_every_layout(dims, layout, kind, rest):
    dtype = torch.float16 if len(layout) % 2 else torch.bfloat16
    batch, heads, queries, keys = 2, 8, 700, 1000
    group = 2 if rest == "all" else 1
    q = randn(batch, heads, queries, dims[0], dtype=dtype)
    k = randn(batch, heads // group, keys, dims[0], dtype=dtype, seed=1)
    v = randn(batch, heads // group, keys, dims[1], dtype=dtype, seed=2)

    def make(*shape, hidden=None):
        x = randn(*shape, seed=3)
        if kind == "integer":
            return x.to(torch.int32)
        if hidden:
            x[..., hidden[0]] = torch.inf
            x[..., hidden[1], :] = torch.inf
        return x < 0.7 if kind == "boolean" else x.to(dtype).masked_fill(x > 1.5, -torch.inf)

    options = {"mask": LAYOUTS[layout](make, batch, heads, queries, keys)}
    if rest in ("causal", "all"):
        options["causal"] = True
    if rest in ("key_mask", "all"):
        where = torch.arange(keys, device="cuda")
        options["key_mask"] = (randn(batch, keys, seed=4) < 1) & ((where < 512) | (where > 700))
    if rest in ("softcap", "all"):
        options["softcap"] = 3.0
    if rest == "all":
        options["sinks"] = randn(heads, dtype=dtype, seed=6)
    out, log = attend(q, k, v, **options)
    ref, ref_log = reference_attention(q, k, v, **options)
    ref = ref.nan_to_num(0)  # of rows that see nothing
    error = ((out.double() - ref).abs() / (ref.abs() + v.double().abs().max())).max().item()
    assert error <= SIXTEEN[dtype], error
    some = ref_log.isfinite()
    assert torch.equal(some, log.isfinite())
    assert (log.double() - ref_log)[some].abs().max().item() <= 1e-4


@pytest.mark.parametrize("softcap", [1e-300, 1e-3, 1e3, 1e5, 1e10, 1e300])
@pytest.mark.parametrize(
    ("queries", "dim", "dtype"),
    [(1, 128, torch.float16), (700, 128, torch.float16), (700, 64, torch.float32), (70, 512, torch.bfloat16)],
)
def test_caps_of_every_size(queries, dim, dtype, softcap):
    q, k = randn(2, 16, queries, dim, dtype=dtype), randn(2, 16, 900, dim, dtype=dtype, seed=1)
    out, log = attend(q, k, k, softcap=softcap)
    ref, ref_log = reference_attention(q, k, k, softcap=softcap)
    bound = {**SIXTEEN, torch.float32: 1e-5}[dtype]
    assert ((out.double() - ref).abs() / (ref.abs() + k.double().abs().max())).max().item() <= bound
    assert (log.double() - ref_log).abs().max().item() <= 1e-3


@pytest.mark.parametrize("queries", [1, 700])
def test_the_same_call_gives_the_same_bits(queries):
    q, k = randn(1, 32, queries, 128, dtype=torch.bfloat16), randn(1, 8, 4096, 128, dtype=torch.bfloat16, seed=1)
    first = attend(q, k, k, causal=True)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, attend(q, k, k, causal=True), strict=True))


@pytest.mark.parametrize("queries", [1, 300])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
@pytest.mark.parametrize("dim", [64, 512])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("by", ["key_mask", "mask"])
def test_a_hidden_key_never_shows(by, dtype, dim, poison, queries):
    if dtype == torch.float32 and dim == 512:
        dim = 128
    q, k = randn(2, 8, queries, dim, dtype=dtype), randn(2, 2, 2048, dim, dtype=dtype, seed=1)
    v = k.clone()
    visible = torch.ones(2, 2048, device="cuda", dtype=torch.bool)
    visible[:, 100:150] = False
    options = {"key_mask": visible} if by == "key_mask" else {"mask": visible[:, None, None]}
    clean = attend(q, k, v, **options)
    k[:, :, 100:150] = poison
    v[:, :, 100:150] = poison
    for a, b in zip(clean, attend(q, k, v, **options), strict=True):
        assert not b.isnan().any()
        if dtype == torch.float32:
            assert torch.equal(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("form", ["full", "causal", "key_mask", "added"])
@pytest.mark.parametrize(
    ("queries", "dim", "dtype"),
    [
        (1, 128, torch.bfloat16),
        (700, 128, torch.bfloat16),
        (70, 64, torch.float16),
        (70, 512, torch.bfloat16),
        (1, 128, torch.float32),
        (70, 64, torch.float32),
    ],
)
def test_a_visible_nan_shows(queries, dim, dtype, form):
    """In the rows that see it, all of them, and in no other; beside an additive mask's -infinity it is hidden."""
    q, k = randn(2, 16, queries, dim, dtype=dtype), randn(2, 16, 900, dim, dtype=dtype, seed=1)
    k[0, 3, 850] = torch.nan
    if queries > 1:
        q[1, 5, 7, 3] = torch.nan
    options = options_of(form, 2, 16, queries, 900, dtype)
    seen = torch.zeros(2, 16, queries, device="cuda", dtype=torch.bool)
    seen[0, 3] = True
    if form == "causal":
        seen[0, 3] = torch.arange(queries, device="cuda") + 900 - queries >= 850
    if form == "key_mask":
        options["key_mask"][0, 850] = False
        seen[0, 3] = False
    if form == "added":
        options["mask"][0, 3, :, 850] = -torch.inf
        seen[0, 3] = False
    if queries > 1:
        seen[1, 5, 7] = True
    out, log = attend(q, k, k.nan_to_num(0), **options)
    assert torch.equal(log.isnan(), seen)
    assert torch.equal(out.isnan(), seen[..., None].expand_as(out))


@pytest.mark.parametrize("dims", [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256), (512, 512)])
@pytest.mark.parametrize(
    "form", ["plain", "key_mask", "causal", "window", "sinks", "mask", "alike", "added", "integer", "softcap"]
)
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys"),
    [
        (1, (32, 8), 1, 8192),
        (2, (8, 4), 1, 30000),
        (3, (8, 1), 2, 20000),
        (80, (8, 4), 1, 777),
        (2, (12, 4), 7, 1000),
        (1, (1, 1), 1, 65536),
    ],
)
def test_decoding(batch, heads, queries, keys, form, dims):
    q = randn(batch, heads[0], queries, dims[0], dtype=torch.bfloat16)
    k = randn(batch, heads[1], keys, dims[0], dtype=torch.bfloat16, seed=1)
    v = randn(batch, heads[1], keys, dims[1], dtype=torch.bfloat16, seed=2)
    options = {"causal": {"causal": True}, "window": {"window": 100}, "softcap": {"softcap": 2.0}}.get(form, {})
    if form == "mask":
        options["mask"] = randn(batch, heads[0], queries, keys, seed=3) < 1
    if form == "alike":  # for all heads and queries
        options["mask"] = (randn(batch, 2 * keys, seed=3) < 1)[:, None, None, ::2]
    if form == "added":
        options["mask"] = randn(1, heads[0], queries, keys, seed=3).to(q.dtype)
    if form == "integer":
        options["mask"] = randn(batch, 1, 1, keys + 1, seed=3)[..., 1:].to(torch.int8)
    reference = dict(options)
    if form == "key_mask":
        lengths = torch.randint(1, keys, (batch, 1), device="cuda")
        visible = (torch.arange(keys, device="cuda") < lengths) & (randn(batch, keys, seed=5) < 2)
        visible[:, 0] = True  # softmax of nothing, in the reference, is NaN
        options["key_mask"] = visible
        reference["mask"] = visible[:, None, None]
    if form == "sinks":
        options["sinks"] = reference["sinks"] = randn(heads[0], dtype=torch.bfloat16, seed=6) + 3
    out, log = attend(q, k, v, **options)
    ref, ref_log = reference_attention(q, k, v, **reference)
    error = ((out.double() - ref).abs() / (ref.abs() + v.double().abs().max())).max().item()
    assert error <= SIXTEEN[torch.bfloat16] / 4, error
    assert (log.double() - ref_log).abs().max().item() <= 1e-4
    again, _ = attend(q, k, v, **options)
    assert torch.equal(out, again)


def test_decoding_many_long_heads_by_a_key_mask():
    q, k = randn(140, 2, 1, 64, dtype=torch.bfloat16), randn(140, 1, 33000, 64, dtype=torch.bfloat16, seed=1)
    visible = randn(140, 33000, seed=2) < 1
    visible[3, 64:] = False
    out, _ = attend(q, k, k, key_mask=visible)
    for i in (0, 3, 139):
        ref, _ = reference_attention(q[i : i + 1], k[i : i + 1], k[i : i + 1], mask=visible[i, None, None, None])
        assert ((out[i].double() - ref[0]).abs() / (ref[0].abs() + 5)).max().item() <= SIXTEEN[torch.bfloat16] / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("batch", "heads"), [(70000, 1), (300, 300)])
def test_many_heads(batch, heads, dtype):
    q, k = randn(batch, heads, 3, 16, dtype=dtype), randn(batch, heads, 5, 16, dtype=dtype, seed=1)
    out, _ = attend(q, k, k, causal=True)
    ref, _ = reference_attention(q, k, k, causal=True)
    bound = 2e-6 if dtype == torch.float32 else SIXTEEN[dtype]
    assert ((out.double() - ref).abs() / (ref.abs() + k.double().abs().max())).max().item() <= bound


def reference_delta(q, k, v, gamma, beta, state, mask=None):
    q, k, v, gamma, beta, state = (x.double() for x in (q, k, v, gamma, beta, state))
    group, outs = v.shape[2] // k.shape[2], []
    q, k = q.repeat_interleave(group, 2), k.repeat_interleave(group, 2)
    for t in range(q.shape[1]):
        after = state * gamma[:, t, :, None, None]
        delta = beta[:, t, :, None] * (v[:, t] - (after @ k[:, t, :, :, None])[..., 0])
        after = after + delta[..., None] * k[:, t, :, None]
        out = (after @ q[:, t, :, :, None])[..., 0]
        live = None if mask is None else mask[:, t, None, None, None]
        state = after if live is None else torch.where(live, after, state)
        outs.append(out if live is None else torch.where(live[..., 0], out, 0))
    return torch.stack(outs, 1), state


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (128, 40), (64, 33)])
@pytest.mark.parametrize(
    "case", ["model", "mask", "tail", "long keys", "zero decay", "growing decay", "nan", "v's type"]
)
def test_gated_delta_in_chunks(case, dims, dtype):
    batch, time, heads = 2, 1024 if case == "model" else 300, (2, 4)
    q, k = (randn(batch, time, heads[0], dims[0], seed=i) for i in (1, 2))
    k = k if case == "long keys" else k / k.norm(dim=-1, keepdim=True)
    v = randn(batch, time, heads[1], dims[1], seed=3)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    gamma = torch.rand(batch, time, heads[1], device="cuda") * 0.2 + 0.8
    beta = torch.rand(batch, time, heads[1], device="cuda") * (0.01 if case == "long keys" else 1)
    state, mask = randn(batch, heads[1], dims[1], dims[0], seed=4), None
    if case == "zero decay":
        gamma[:, ::7] = 0
    if case == "growing decay":
        gamma[:, 100:110] = 1.5
    if case == "mask":
        mask = randn(batch, time, seed=5) < 0.5
        q[~mask], k[~mask], v[~mask] = torch.nan, torch.nan, torch.nan
    if case == "nan":
        v[:, 200, 1, 3] = torch.inf
    if case == "v's type":
        v = v.to(torch.float16 if dtype == torch.float32 else torch.float32)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)) if case == "tail" else (q, k, v)
    out, after = poisoned(*v.shape, dtype=dtype), state.clone()
    run("gated_delta_update", q, k, v, gamma, beta, after, mask, out, after)
    ref, ref_after = reference_delta(q, k, v, gamma, beta, state, mask)
    bound = {torch.float32: 1e-4, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for got, want, rtol in ((out, ref, bound), (after, ref_after, 1e-4)):
        finite = want.isfinite()
        assert torch.equal(got.double()[~finite].isnan(), want[~finite].isnan())
        assert case != "nan" or finite.sum() > 0.3 * finite.numel()
        scale = want[finite].abs() + want[finite].abs().max()
        error = ((got.double()[finite] - want[finite]).abs() / scale).max().item()
        assert error <= rtol, error


def test_calls_are_captured_in_a_graph():
    x, weight, out = randn(64, 4096), randn(4096, seed=1), torch.empty(64, 4096, device="cuda")
    q, k = randn(1, 32, 1, 128, dtype=torch.bfloat16), randn(1, 8, 4096, 128, dtype=torch.bfloat16, seed=1)
    attended = torch.empty_like(q)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        run("rms_norm", x, weight, 1e-5, out)
        run("scaled_dot_product_attention", q, k, k, 0.1, None, attended)  # split keys: with workspace
    x.copy_(randn(64, 4096, seed=5))
    graph.replay()
    torch.cuda.synchronize()
    close(out, reference_norm(x, weight, None, 1e-5), ROUNDING[torch.float32])
    want = torch.empty_like(attended)
    run("scaled_dot_product_attention", q, k, k, 0.1, None, want)
    assert torch.equal(attended, want)


def test_work_is_queued_on_the_context_s_stream():
    x, weight = torch.zeros(4096, 4096, device="cuda"), torch.ones(4096, device="cuda")
    out, stream = torch.empty_like(x), torch.cuda.Stream()
    run("rms_norm", x.fill_(0), weight, 1e-5, out)  # loads the kernels, which takes a while on a busy machine
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)  # half a second
        x.fill_(3)  # behind the sleep: a call elsewhere would still see zeros
        run("rms_norm", x, weight, 1e-5, out)
    assert not stream.query()  # and the call did not wait
    stream.synchronize()
    torch.testing.assert_close(out, torch.ones_like(x), rtol=1e-4, atol=0)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs several GPUs")
def test_several_gpus():
    """A thread to a GPU, all at once; then all from one thread, whichever GPU is current."""
    doubled = kernel("y[thread_position_in_grid.x] = 2 * x[thread_position_in_grid.x];", ["x"], ["y"])

    shapes = (512, 4096), (4096,), (2, 8, 1, 128), (2, 8, 8192, 128)
    given = [randn(*shape, dtype=torch.bfloat16).cpu() for shape in shapes]

    def work(device, rounds):
        x, weight, q, k = (tensor.to(device) for tensor in given)
        for _ in range(rounds):
            out, attended, many = torch.empty_like(x), torch.empty_like(q), torch.empty_like(k[:, :, :640])
            twice = torch.empty_like(weight)
            of_kernel = kernel_call([view(weight)], [view(twice)], (4096, 1, 1), (128, 1, 1))
            check(library.metalloid_kernel_launch(run.contexts[0], doubled, ctypes.byref(of_kernel)))
            run("rms_norm", x, weight, 1e-5, out)
            run("scaled_dot_product_attention", q, k, k, 128**-0.5, None, attended)
            run("scaled_dot_product_attention", k[:, :, :640], k, k, 128**-0.5, attention_options(causal=True), many)
        torch.cuda.synchronize(device)
        assert torch.equal(twice, 2 * weight)
        x, q, k = x.double(), q.double(), k.double()
        close(out.cpu(), reference_norm(x, weight, None, 1e-5).cpu(), ROUNDING[torch.bfloat16])
        want = (q @ k.mT * 128**-0.5).softmax(-1) @ k
        assert (attended.double() - want).abs().max().item() <= SIXTEEN[torch.bfloat16]
        return out.cpu(), attended.cpu(), many.cpu()

    def by_thread(device):
        with torch.cuda.device(device):
            return work(torch.device("cuda", device), 20)

    devices = range(torch.cuda.device_count())
    with concurrent.futures.ThreadPoolExecutor(len(devices)) as pool:
        results = list(pool.map(by_thread, devices))
    results += [work(torch.device("cuda", device), 2) for device in devices]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    library.metalloid_kernel_destroy(doubled)


def launch(made, inputs, outputs, grid, threadgroup):
    described = kernel_call([view(x) for x in inputs], [view(x) for x in outputs], grid, threadgroup)
    check(library.metalloid_kernel_launch(context(None), made, ctypes.byref(described)))


@pytest.mark.parametrize("barrier", ["", "threadgroup_barrier(mem_flags::mem_threadgroup);"])
@pytest.mark.parametrize(
    ("grid", "threadgroup"),
    [
        *(([1, 1, 256], [1, 1, 128]), ([1, 1, 5000], [1, 1, 1024]), ([2, 70, 90], [1, 2, 65]), ([7, 5, 3], [4, 4, 4])),
        *(([3, 100000, 1], [1, 1, 1]), ([2, 2, 70000], [2, 2, 1]), ([1025, 1, 65], [1, 1, 65])),
    ],
)
def test_threadgroups_of_every_shape(grid, threadgroup, barrier):
    made = kernel(
        barrier + "uint3 p = thread_position_in_grid, g = threads_per_grid, q = thread_position_in_threadgroup;"
        "uint3 t = threadgroup_position_in_grid * dispatch_threads_per_threadgroup + q;"
        "out[(p.z * g.y + p.y) * g.x + p.x] = int(t.x == p.x && t.y == p.y && t.z == p.z);",
        [],
        ["out"],
    )
    out = torch.zeros(grid[0] * grid[1] * grid[2], device="cuda", dtype=torch.int32)
    launch(made, [], [out], grid, threadgroup)
    assert (out == 1).all()
    library.metalloid_kernel_destroy(made)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32, torch.int64], ids=str)
@pytest.mark.parametrize(
    ("grid", "threadgroup"),
    [
        *(([6000000, 1, 1], [256, 1, 1]), ([5000011, 1, 1], [32, 1, 1]), ([4325376 - 1, 1, 1], [1000, 1, 1])),
        *(([2200001, 3, 2], [100, 3, 2]), ([2162689, 1, 3], [1, 1, 100])),
    ],
)
def test_several_positions_in_a_thread(dtype, grid, threadgroup):
    """Large grids whose kernels do not depend on the cut into threadgroups are cut otherwise: each position once."""
    made = kernel(
        "uint3 p = thread_position_in_grid, g = threads_per_grid; uint i = (p.z * g.y + p.y) * g.x + p.x;"
        "if (x[i] == 3) return; out[i] += x[i] + s[0];"
        "if (i == 0) { uint3 t = dispatch_threads_per_threadgroup, q = threadgroups_per_grid;"
        "cut[0] = t.x, cut[1] = t.y, cut[2] = t.z, cut[3] = q.x, cut[4] = q.y, cut[5] = q.z; }",
        ["x", "s"],
        ["out", "cut"],
    )
    x = torch.randint(0, 9, (grid[0] * grid[1] * grid[2],), device="cuda").to(dtype)
    x[0] = 0  # the first position describes the cut
    out, cut = torch.full_like(x, 20), torch.zeros(6, device="cuda", dtype=torch.int32)
    launch(made, [x, torch.ones(1, device="cuda", dtype=dtype)], [out, cut], grid, threadgroup)
    expected = torch.where(x == 3, 20, 21 + x)
    assert torch.equal(out, expected)
    threads = [min(t, g) for t, g in zip(threadgroup, grid, strict=True)]
    assert cut.tolist() == threads + [-(-g // t) for t, g in zip(threads, grid, strict=True)]
    library.metalloid_kernel_destroy(made)


@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("share", [4, 8])
@pytest.mark.parametrize("threads", [32, 64, 128, 1024])
@pytest.mark.parametrize("grid", [[9000, 1, 1], [1, 1000, 9], [3, 300, 10]])
def test_threadgroups_in_turn(threads, grid, share, leave):
    """Many threadgroups, each with `share` bytes a thread of two inputs, one of which is read backwards: they are
    prefetched, and a block does several threadgroups unless threads leave before others meet."""
    made = kernel(
        "uint3 g = threadgroup_position_in_grid, m = threadgroups_per_grid; threadgroup float shared[32];"
        "uint row = (g.z * m.y + g.y) * m.x + g.x, last = m.x * m.y * m.z - 1, lid = thread_position_in_threadgroup.x;"
        "uint n = threads_per_threadgroup.x, length = x_shape[1] + 0 * x_strides[0]; float sum = 0;"
        + leave
        * "n = 32; if (lid >= n) return;"
        + "for (uint i = lid; i < length; i += n) sum += x[row * length + i];"
        "sum = simd_sum(sum); if (thread_index_in_simdgroup == 0) shared[simdgroup_index_in_threadgroup] = sum;"
        "threadgroup_barrier(mem_flags::mem_threadgroup); sum = 0;"
        "for (uint i = 0; i < n / 32; i++) sum += shared[i];"
        "for (uint i = lid; i < length; i += n) out[row * length + i] = sum + y[(last - row) * length + i] + s;",
        ["s", "x", "y"],
        ["out"],
    )
    rows, length = grid[0] * grid[1] * grid[2], threads * share // 2
    x, y = (torch.randint(-2, 3, (rows, length), device="cuda").half() for _ in range(2))
    out, s = torch.empty_like(x), torch.full((), 5.0, device="cuda")
    launch(made, [s, x, y], [out], [grid[0] * threads, *grid[1:]], [threads, 1, 1])
    assert torch.equal(out, (x.float().sum(1, keepdim=True) + y.flip(0).float() + 5).half())
    library.metalloid_kernel_destroy(made)


def test_what_no_launch_can_have_fails_by_name():
    out = torch.zeros(8, device="cuda")
    made = kernel("out[threadIdx.z % 8] = 1;", [], ["out"], language=1)
    with pytest.raises(ValueError, match="threadgroup must have at most 64 threads along z, got 65"):
        launch(made, [], [out], [1, 1, 65], [1, 1, 65])
    with pytest.raises(ValueError, match="grid must have at most 65535 threadgroups along y, got 70000"):
        launch(made, [], [out], [1, 70000, 1], [1, 1, 1])
    assert (out == 0).all()
    library.metalloid_kernel_destroy(made)


def test_a_kernel_made_again_is_not_loaded_again():
    out = torch.zeros(8, device="cuda")

    def once():
        made = kernel("out[thread_position_in_grid.x] += 1;", [], ["out"])
        launch(made, [], [out], [8, 1, 1], [8, 1, 1])
        library.metalloid_kernel_destroy(made)

    def lost():
        torch.cuda.synchronize()
        free = torch.cuda.mem_get_info()[0]
        for _ in range(200):
            once()
        torch.cuda.synchronize()
        return free - torch.cuda.mem_get_info()[0]

    once()
    rounds = []  # what is loaded again is lost in every one; other processes' memory comes and goes in some
    while not rounds or (abs(rounds[-1]) >= 1 << 20 and len(rounds) < 10):
        rounds.append(lost())
    assert (out == 1 + 200 * len(rounds)).all()
    assert abs(rounds[-1]) < 1 << 20, rounds


def test_wide_floats_fail_by_name():
    x = torch.ones(2, 4, device="cuda", dtype=torch.float32)
    wide = view(x)
    wide.dtype.bits, wide.shape[1] = 64, 2
    with pytest.raises(ValueError, match="rms_norm: float64 is for tensors on the CPU"):
        call("rms_norm", context(None), wide, None, 1e-5, wide)


def test_tensors_of_two_devices_fail():
    x = torch.ones(2, 4, device="cuda")
    other = view(torch.empty_like(x))
    other.device.id = 7
    with pytest.raises(ValueError, match="rms_norm: out must be on the device of x"):
        call("rms_norm", context(None), view(x), None, 1e-5, other)


def test_values_that_the_cpu_refuses_give_nan():
    logits, loss = randn(3, 40), torch.empty(3, device="cuda")
    options = CrossEntropyOptions(ctypes.sizeof(CrossEntropyOptions), False, 0)
    run("cross_entropy", logits, torch.tensor([1, 40, -1], device="cuda"), options, loss)
    assert loss.isnan().tolist() == [False, True, True]
    x, out = randn(1, 1, 2, 8), torch.empty(1, 1, 2, 8, device="cuda")
    ids = torch.tensor([[2**31, 5]], device="cuda")
    run("rope", x, 4, rope_options(traditional=False, base=1e4, position_ids=view(ids)), out)
    assert out[0, 0, 0, :4].isnan().all()
    assert torch.equal(out[..., 4:], x[..., 4:])
    assert not out[0, 0, 1].isnan().any()


def test_timing_gives_a_plausible_rate():
    x = randn(1 << 26)
    y = torch.empty_like(x)
    rate = 2 * x.nbytes / seconds([lambda: y.copy_(x)])
    assert 1e10 < rate < 2e13
    assert np.isfinite(rate)
