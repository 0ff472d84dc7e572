"""metalloid.fast beside mlx.core.fast itself, on MLX's CPU backend: signatures, random inputs, refusals, examples.

MLX is the reference of the interface, not of values: those it computes in the arrays' own dtype in places, and
differences that operations.md wants are tested as such at the end."""

import ast
import importlib.util
import inspect
import pathlib
import re
import textwrap

import ml_dtypes
import numpy as np
import pytest
from metalloid import fast

mx = pytest.importorskip("mlx.core", reason="MLX is not installed")

STUB = pathlib.Path(importlib.util.find_spec("mlx").submodule_search_locations[0]) / "core" / "fast.pyi"
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# What MLX may be off by, of the row's largest value: it rounds intermediates to the arrays' dtype.
TOLERANCE = {"float32": 2e-5, "float16": 1e-2, "bfloat16": 6e-2}
SEEDS = range(25)


def mlx_functions():
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


FUNCTIONS = {name: node for name, node in mlx_functions().items() if not name.endswith("_kernel")}


def to_mlx(value):
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == ml_dtypes.bfloat16:
        return mx.array(value.view(np.uint16)).view(mx.bfloat16)
    return mx.array(value)


def to_numpy(array):
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16)).view(ml_dtypes.bfloat16)
    return np.array(array)


def both(name, *arguments, **keywords):
    """Results of Metalloid and of MLX, as lists of NumPy arrays."""
    mine = getattr(fast, name)(*arguments, **keywords)
    theirs = getattr(mx.fast, name)(
        *map(to_mlx, arguments), **{key: to_mlx(value) for key, value in keywords.items()}, stream=mx.cpu
    )
    several = isinstance(theirs, (list, tuple))
    assert type(mine) is (type(theirs) if several else np.ndarray)
    return (list(mine) if several else [mine]), [to_numpy(a) for a in (theirs if several else [theirs])]


def compare(name, *arguments, **keywords):
    mine, theirs = both(name, *arguments, **keywords)
    arrays = [a for a in (*arguments, *keywords.values()) if isinstance(a, np.ndarray)]
    used = [str(a.dtype) for a in arrays if str(a.dtype) in TOLERANCE]
    tolerance = max(TOLERANCE[dtype] for dtype in used)
    for a, b in zip(mine, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = a.astype(np.float64), b.astype(np.float64)
        size = np.abs(b).max(axis=-1, keepdims=True, initial=0) if b.ndim else np.abs(b)
        assert (np.abs(a - b) <= tolerance * (size + 1e-3)).all(), f"off by {(np.abs(a - b) / (size + 1e-3)).max():.2g}"


class Random:
    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.dtypes = list(DTYPES) if seed % 5 == 0 else [list(DTYPES)[seed % 3]]  # mixed every fifth time

    def normal(self, *shape, dtype=None):
        return self.rng.standard_normal(shape).astype(dtype or DTYPES[str(self.rng.choice(self.dtypes))])

    def uniform(self, *shape):
        return self.rng.uniform(0.1, 0.9, shape).astype(DTYPES[str(self.rng.choice(self.dtypes))])

    def integer(self, low, high):
        return int(self.rng.integers(low, high, endpoint=True))

    def chance(self):
        return bool(self.rng.random() < 0.5)

    def shape(self, least=1):
        return [self.integer(1, 5) for _ in range(self.integer(least - 1, 3))]


# ---- the interface


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signature_is_that_of_the_stub(name):
    """Every parameter by the same name, in the same place, with the same default; what is added is keyword-only."""
    stub = FUNCTIONS[name].args
    mine = inspect.signature(getattr(fast, name)).parameters
    positional = [p.name for p in mine.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == [argument.arg for argument in stub.args]
    without = inspect.Parameter.empty
    defaults = [without] * (len(stub.args) - len(stub.defaults)) + [ast.literal_eval(d) for d in stub.defaults]
    defaults += [without if d is None else ast.literal_eval(d) for d in stub.kw_defaults]
    for argument, default in zip([*stub.args, *stub.kwonlyargs], defaults, strict=True):
        assert mine[argument.arg].default == default, argument.arg
    added = set(mine) - {argument.arg for argument in [*stub.args, *stub.kwonlyargs]}
    assert all(mine[extra].kind is inspect.Parameter.KEYWORD_ONLY for extra in added)
    assert all(mine[extra].default is not without for extra in added)


def examples():
    for name, node in FUNCTIONS.items():
        text = ast.get_docstring(node) or ""
        for block in re.findall(r"\.\. code-block:: python\n\n((?:[ \t]+.*\n?|\n)+)", text):
            yield pytest.param(textwrap.dedent(block), id=name)


@pytest.mark.parametrize("example", list(examples()))
def test_example_of_mlx_documentation_runs_with_the_import_changed(example):
    results = {}
    smaller = example.replace("N_q = N_kv = 32", "N_q = N_kv = 4").replace("T_q = T_kv = 1000", "T_q = T_kv = 200")
    for which in ("mx.fast", "fast"):
        mx.random.seed(0)
        names = {"mx": mx, "fast": fast}
        exec(smaller.replace("mx.fast.", f"{which}."), names)
        results[which] = names["out"]
    assert type(results["fast"]) is mx.array
    np.testing.assert_allclose(np.array(results["fast"]), np.array(results["mx.fast"]), rtol=1e-5, atol=1e-5)


# ---- results


@pytest.mark.parametrize("seed", SEEDS)
def test_norms(seed):
    r = Random(seed)
    x = r.normal(*r.shape(), r.integer(1, 70))
    weight, bias = (r.normal(x.shape[-1]) if r.chance() else None for _ in range(2))
    compare("rms_norm", x, weight, 1e-5)
    compare("layer_norm", x, weight, bias, 1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_rope(seed):
    r = Random(seed)
    dims, batch, time = 2 * r.integer(1, 16), r.integer(1, 4), r.integer(1, 7)
    x = r.normal(batch, *([r.integer(1, 3)] if r.chance() else []), time, dims + r.integer(0, 5))
    offset = r.integer(0, 300)
    if r.chance():
        offset = np.array(offset, np.int32)
    elif r.chance():
        offset = r.rng.integers(0, 300, batch).astype(np.int32)
    frequencies = {"base": 10000.0}
    if r.chance():
        frequencies = {"base": None, "freqs": (1 + 1000 * r.rng.random(dims // 2)).astype(np.float32)}
    tables = {"traditional": r.chance(), "scale": r.integer(1, 4) / 2, "offset": offset, **frequencies}
    mine, theirs = both("rope", x, dims, **tables)
    # Their angles are float32: off by what a position times 2**-24 is.
    tolerance = TOLERANCE[str(x.dtype)] + 1e-4
    a, b = mine[0].astype(np.float64), theirs[0].astype(np.float64)
    assert mine[0].dtype == theirs[0].dtype == x.dtype
    assert (np.abs(a - b) <= tolerance * np.abs(x.astype(np.float64)).max(initial=0)).all()


@pytest.mark.parametrize("seed", range(60))
def test_attention(seed):
    r = Random(seed)
    batch, kv_heads, group = r.integer(1, 3), r.integer(1, 3), r.integer(1, 3)
    heads, dim, value_dim = kv_heads * group, r.integer(1, 40), r.integer(1, 40)
    keys = r.integer(1, 20)
    queries = r.integer(1, keys)
    q, k, v = (
        r.normal(batch, n, t, d)
        for n, t, d in ((heads, queries, dim), (kv_heads, keys, dim), (kv_heads, keys, value_dim))
    )
    shape = [extent if r.chance() else 1 for extent in (batch, heads, queries)][-r.integer(0, 3) or 3 :]
    masks = [None, "causal"]
    visible = r.rng.random((*shape, keys)) < 0.7
    visible[..., 0] = True  # a row that sees nothing is another matter
    masks += [visible, r.normal(*shape, keys, dtype=np.float16 if q.dtype != ml_dtypes.bfloat16 else q.dtype)]
    for mask in masks:
        if (
            isinstance(mask, np.ndarray)
            and mask.dtype != bool
            and {str(x.dtype) for x in (q, k, v)} != {str(mask.dtype)}
        ):
            mask = mask.astype(np.result_type(np.float32)) if "float32" in {str(x.dtype) for x in (q, k, v)} else None
        sinks = r.normal(heads, dtype=q.dtype) if r.chance() else None
        compare("scaled_dot_product_attention", q, k, v, scale=dim**-0.5, mask=mask, sinks=sinks)


@pytest.mark.parametrize("seed", SEEDS)
def test_cross_entropy(seed):
    r = Random(seed)
    logits = 3 * r.normal(*r.shape(), r.integer(1, 200))
    targets = r.rng.integers(0, logits.shape[-1], logits.shape[:-1])
    mine, theirs = both("cross_entropy", logits, targets.astype(np.int32))
    assert mine[0].dtype == theirs[0].dtype == np.float32
    np.testing.assert_allclose(
        mine[0], theirs[0], atol=5 * TOLERANCE[str(logits.dtype)], rtol=TOLERANCE[str(logits.dtype)]
    )


@pytest.mark.parametrize("seed", SEEDS)
def test_gated_delta_update(seed):
    r = Random(3 * seed)  # MLX's CPU asks for float32
    batch, time, k_heads, key_dim, value_dim = (r.integer(1, n) for n in (2, 9, 2, 12, 12))
    heads = k_heads * r.integer(1, 3)
    f32 = np.float32
    q, k = r.normal(batch, time, k_heads, key_dim, dtype=f32), 0.3 * r.normal(batch, time, k_heads, key_dim, dtype=f32)
    v = r.normal(batch, time, heads, value_dim, dtype=f32)
    gamma, beta = (r.rng.uniform(0.1, 0.9, (batch, time, heads)).astype(f32) for _ in range(2))
    state = r.normal(batch, heads, value_dim, key_dim, dtype=f32) if r.chance() else None
    compare("gated_delta_update", q, k, v, gamma, beta, state)


# ---- refusals

X = np.ones((2, 3, 4, 8), np.float32)
ROTATION = {"traditional": False, "base": 100.0, "scale": 1.0, "offset": 0}
REFUSED = [
    ("rms_norm", (np.float32(1) * np.ones(()), None, 1e-5), {}),
    ("rms_norm", (X, np.ones(7, np.float32), 1e-5), {}),
    ("rms_norm", (X, np.ones((1, 8), np.float32), 1e-5), {}),
    ("layer_norm", (X, None, np.ones(7, np.float32), 1e-5), {}),
    ("rope", (X[0, 0], 8), ROTATION),
    ("rope", (X, 8), {**ROTATION, "base": None}),
    ("rope", (X, 8), {**ROTATION, "freqs": np.ones(4, np.float32)}),
    ("rope", (X, 8), {**ROTATION, "base": None, "freqs": np.ones(3, np.float32)}),
    ("rope", (X, 8), {**ROTATION, "offset": np.ones(3, np.int32)}),
    ("rope", (X.astype(np.int32), 8), ROTATION),
    ("scaled_dot_product_attention", (X[0], X, X), {"scale": 1.0}),
    ("scaled_dot_product_attention", (X, X[:1], X), {"scale": 1.0}),
    ("scaled_dot_product_attention", (X, X[..., :7], X), {"scale": 1.0}),
    ("scaled_dot_product_attention", (X, X[:, :2], X[:, :2]), {"scale": 1.0}),
    ("scaled_dot_product_attention", (X, X, X), {"scale": 1.0, "mask": "lower"}),
    ("scaled_dot_product_attention", (X, X, X), {"scale": 1.0, "mask": np.ones((5, 4), bool)}),
    ("scaled_dot_product_attention", (X.astype(np.float16),) * 3, {"scale": 1.0, "mask": X[0, 0, :, :4]}),
    ("scaled_dot_product_attention", (X, X, X), {"scale": 1.0, "sinks": np.ones(2, np.float32)}),
    ("cross_entropy", (X, np.zeros((2, 3), np.int32)), {}),
    ("cross_entropy", (X, np.zeros((2, 3, 4), np.float32)), {}),
    ("rms_norm", (X, None), {}),
    ("rms_norm", (X, None, 1e-5, None), {}),
    ("rms_norm", (X, None, "eps"), {}),
    ("rope", (X, 8), {"traditional": False}),
    ("scaled_dot_product_attention", (X, X, X), {"scale": 1.0, "nonsense": 1}),
]


@pytest.mark.parametrize(("name", "arguments", "keywords"), REFUSED)
def test_refused_as_mlx_refuses(name, arguments, keywords):
    """By an exception of the same class."""
    function = getattr(mx.fast, name)
    arrays, named = [to_mlx(a) for a in arguments], {key: to_mlx(value) for key, value in keywords.items()}
    with pytest.raises((ValueError, TypeError)) as theirs:
        mx.eval(function(*arrays, **named))
    with pytest.raises((ValueError, TypeError)) as mine:
        getattr(fast, name)(*arguments, **keywords)
    assert type(mine.value) is type(theirs.value), f"{mine.value!r}, and MLX {theirs.value!r}"


# ---- differences that are meant


def test_a_query_that_sees_nothing_gives_zeros():
    mine, theirs = both("scaled_dot_product_attention", X, X, X, scale=1.0, mask=np.zeros((4, 4), bool))
    assert (mine[0] == 0).all()
    assert not (theirs[0] == 0).all()  # the mean of v, or NaN


def test_rope_far_out_is_exact_here():
    x = np.zeros((1, 1, 1, 64), np.float32)
    x[..., :32] = 1
    position, base = 1_000_000, 10_000.0
    mine, theirs = both("rope", x, 64, traditional=False, base=base, scale=1.0, offset=position)
    exact = np.cos(position * base ** (-np.arange(32) / 32.0))
    assert np.abs(mine[0][0, 0, 0, :32] - exact).max() < 2e-6
    assert np.abs(theirs[0][0, 0, 0, :32] - exact).max() > 1e-3


def test_rms_norm_of_huge_values():
    """Squares beyond float32: what comes out is neither library's promise."""
    x = np.full((1, 8), 1e25, np.float32)
    for result in both("rms_norm", x, None, 1e-5):
        assert (np.isin(result[0], [0, 1]) | ~np.isfinite(result[0])).all()
