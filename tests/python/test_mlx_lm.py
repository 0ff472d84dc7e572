"""mlx-lm, unchanged: a Llama with random weights generates the same tokens with Metalloid under it."""

import shutil
import warnings
from importlib.util import find_spec

import pytest

mx = pytest.importorskip("mlx.core")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    llama = pytest.importorskip("mlx_lm.models.llama")
    generate = pytest.importorskip("mlx_lm.generate")

import metalloid.mlx as mm  # noqa: E402
from mlx.utils import tree_map  # noqa: E402


def model_of(dtype, seed=0):
    mx.random.seed(seed)
    arguments = llama.ModelArgs(
        model_type="llama",
        hidden_size=96,
        num_hidden_layers=3,
        intermediate_size=192,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        vocab_size=512,
        tie_word_embeddings=False,
    )
    model = llama.Model(arguments)
    model.update(tree_map(lambda p: p.astype(dtype), model.parameters()))
    return model


def tokens_of(model, prompt, count=40):
    return [int(token) for token, _ in generate.generate_step(prompt, model, max_tokens=count)]


@pytest.mark.parametrize("way", ["primitive", "evaluating"])
def test_llama_generates_the_same_tokens(way, monkeypatch):
    if way == "evaluating":
        monkeypatch.setattr(mm, "_primitive", None)
    elif shutil.which("c++") is None or find_spec("nanobind") is None:
        pytest.skip("no C++ compiler or no nanobind")
    model = model_of(mx.float32)
    prompt = mx.random.randint(0, 512, (70,))
    own = tokens_of(model, prompt)
    calls = []
    counted = mm._functions.scaled_dot_product_attention
    monkeypatch.setattr(
        mm._functions,
        "scaled_dot_product_attention",
        lambda *args, **keywords: calls.append(args[0].shape) or counted(*args, **keywords),
    )
    with mm.installed(primitive=way == "primitive"):
        assert mm.mode() == way
        assert tokens_of(model, prompt) == own
    assert len(set(own)) > 8, "a model that repeats itself shows nothing"
    assert len(calls) > 100


def test_llama_in_bfloat16_is_no_further_from_float32():
    """Tokens of 16-bit logits hang on the last bit, so their distance from the model in float32 is compared."""
    prompt = mx.random.randint(0, 512, (2, 70), key=mx.random.key(4))
    model = model_of(mx.bfloat16)
    own = model(prompt).astype(mx.float32)
    with mm.installed():
        ours = model(prompt).astype(mx.float32)
    model.update(tree_map(lambda p: p.astype(mx.float32), model.parameters()))
    exact = model(prompt)

    def distance(logits):
        return mx.sqrt(mx.mean((logits - exact) ** 2)).item()

    assert 0 < distance(ours) <= 1.05 * distance(own)


def test_a_batch_of_prompts():
    model = model_of(mx.float32, seed=3)
    prompts = [[5, 9, 200, 11], [7, 300], [1, 2, 3, 4, 5, 6, 7]]

    def run():
        return generate.BatchGenerator(model, max_tokens=12)

    def all_tokens():
        batch = run()
        ids = batch.insert(prompts)
        tokens = {i: [] for i in ids}
        while responses := batch.next_generated():
            for response in responses:
                tokens[response.uid].append(int(response.token))
        return list(tokens.values())

    own = all_tokens()
    with mm.installed():
        assert all_tokens() == own
