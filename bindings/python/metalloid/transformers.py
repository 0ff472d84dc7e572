"""Metalloid in the models of Hugging Face's transformers.

Importing this module registers the attention implementation "metalloid" with transformers, for every model that takes
its attention from the registry; `patch` swaps what stands around it in the models that it knows.

    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="metalloid")
    print(metalloid.transformers.patch(model))
"""

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_rope_utils import dynamic_rope_update
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from metalloid.torch import geglu, qk_norm_rope, rms_norm, rope, scaled_dot_product_attention, swiglu

__all__ = ["Patched", "attention", "patch"]

# ---- attention


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention implementation "metalloid": metalloid.torch.scaled_dot_product_attention as transformers calls it.

    query: {B, N_q, T_q, D}. key: {B, N_kv, T_kv, D}. value: {B, N_kv, T_kv, D_v}. attention_mask: what the registered
    mask function made of padding, windows and caches (bool, {B, 1, T_q, T_kv}), a floating mask of the caller's, or
    None: causal then, as far as the module is. softcap, s_aux (sinks) and position_bias are those of the models that
    have them.
    Returns ({B, T_q, N_q, D_v}, None).

    Raises ValueError for a dropout other than 0.
    """
    if dropout:
        raise ValueError(f"attention: dropout must be 0 with attn_implementation='metalloid', got {dropout}")
    queries = query.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    mask = attention_mask
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    # A mask says all about visibility. Without one queries stand at the first keys: those of a static cache come later.
    causal = bool(is_causal) and queries > 1 and mask is None
    if position_bias is not None:
        bias = position_bias.to(query.dtype)
        if mask is not None:
            bias = torch.where(mask, bias, -torch.inf) if mask.dtype == torch.bool else bias + mask
        mask = bias
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        mask=mask,
        sinks=None if s_aux is None else s_aux.to(query.dtype),
        causal=causal,
        causal_offset=0 if causal else None,
        softcap=softcap,
    )
    return out.transpose(1, 2), None


AttentionInterface.register("metalloid", attention)
AttentionMaskInterface.register("metalloid", sdpa_mask)

# ---- forward methods of the modules that patch swaps


def _rms_norm(self: Any, hidden_states: Tensor) -> Tensor:
    return rms_norm(hidden_states, self.weight, self.variance_epsilon)


def _gemma_weight(module: Any) -> Tensor:
    return 1.0 + module.weight.float()


def _gemma_rms_norm(self: Any, x: Tensor) -> Tensor:
    return rms_norm(x, _gemma_weight(self), self.eps, dtype=x.dtype)


def _silu_mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


def _gelu_mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x)))


def _gelu_tanh_mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(geglu(self.gate_proj(x), self.up_proj(x), approximate="tanh"))


_MLPS = {
    "silu": _silu_mlp,
    "swish": _silu_mlp,
    "gelu": _gelu_mlp,
    "gelu_pytorch_tanh": _gelu_tanh_mlp,
}


@dynamic_rope_update  # the frequencies of some kinds depend on the length
def _rotary_embedding(self: Any, x: Tensor, position_ids: Tensor, layer_type: str | None = None) -> tuple:
    """Instead of cosines and sines what they are made from."""
    prefix = "" if layer_type is None else f"{layer_type}_"
    inv_freqs = getattr(self, f"{prefix}inv_freq").to(device=x.device, dtype=torch.float)
    return position_ids, inv_freqs, getattr(self, f"{prefix}attention_scaling")


def _attention_forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: Any = None,
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The projections, q_norm and k_norm where the model has them, rotation, cache, attention, projection."""
    batch, time = hidden_states.shape[:2]
    q, k, v = (
        projection(hidden_states).view(batch, time, -1, self.head_dim)
        for projection in (self.q_proj, self.k_proj, self.v_proj)
    )
    position_ids, inv_freqs, magnitude = position_embeddings
    rotation = {
        "traditional": False,
        "base": None,
        "scale": 1.0,
        "offset": 0,
        "inv_freqs": inv_freqs,
        "position_ids": position_ids.expand(batch, -1),
        "time_axis": 1,
    }
    dims = 2 * inv_freqs.shape[0]
    if not hasattr(self, "q_norm"):
        q, k = rope(q, dims, **rotation), rope(k, dims, **rotation)
    elif _is_gemma(self):
        weights = _gemma_weight(self.q_norm), _gemma_weight(self.k_norm)
        q, k = qk_norm_rope(q, k, *weights, self.q_norm.eps, dims, **rotation, dtype=hidden_states.dtype)
    else:
        weights = self.q_norm.weight, self.k_norm.weight
        q, k = qk_norm_rope(q, k, *weights, self.q_norm.variance_epsilon, dims, **rotation)
    if magnitude != 1.0:
        q, k = q * magnitude, k * magnitude
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    cache = kwargs.pop("past_key_values", cache)  # its older name
    if cache is not None:
        k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
    if type(self).__name__ == "Gemma2Attention":  # Gemma 3 has the attribute and leaves it unused
        kwargs["softcap"] = self.attn_logit_softcapping
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(
        self.config._attn_implementation, sys.modules[type(self).__module__].eager_attention_forward
    )
    out, weights = attend(
        self,
        q,
        k,
        v,
        attention_mask,
        dropout=self.attention_dropout if self.training else 0.0,
        scaling=self.scaling,
        sliding_window=getattr(self, "sliding_window", getattr(self.config, "sliding_window", None)),
        **kwargs,
    )
    return self.o_proj(out.reshape(batch, time, -1)), weights


# ---- patch

_ARCHITECTURES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Gemma3")
_PARTS = {"RMSNorm": "norms", "MLP": "MLPs", "Attention": "attentions", "RotaryEmbedding": "rotary embeddings"}


def _is_gemma(module: nn.Module) -> bool:
    return type(module).__name__.startswith("Gemma")


def _part(module: nn.Module) -> str | None:
    """What of a known model a module is; a class that derives from transformers' own is another one."""
    kind = type(module)
    for architecture in _ARCHITECTURES:
        name = architecture.lower()
        if kind.__module__ == f"transformers.models.{name}.modeling_{name}":
            return _PARTS.get(kind.__name__.removeprefix(architecture))
    return None


def _swap(module: nn.Module, forward: Callable[..., Any]) -> None:
    # Class, hooks, parameters and names stay. No bound method, which pickle would look for in the class.
    module.forward = functools.partial(forward, module)


@dataclass(frozen=True)
class Patched:
    """What `patch` swapped in a model, and what it left as it was, and why."""

    swapped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # kind: names of modules
    left: Mapping[str, str] = field(default_factory=dict)  # name of a module: reason

    def __str__(self) -> str:
        counts = [f"{len(names)} {kind}" for kind, names in self.swapped.items()]
        reasons = [f"{count} left: {reason}" for reason, count in Counter(self.left.values()).items()]
        return ", ".join(counts or ["nothing swapped"]) + "".join(f"; {reason}" for reason in reasons)


def patch(model: PreTrainedModel) -> Patched:
    """Swaps the norms, the rotary embedding (with the norms of queries and keys, in one pass) and the gated MLPs of a
    Llama, Qwen2, Qwen3, Mistral, Gemma 2 or Gemma 3 model for Metalloid's, in place, and says what it swapped.

    Parameters, names, hooks and classes stay; so does the attention implementation, which is chosen by
    `attn_implementation="metalloid"` or `model.set_attn_implementation("metalloid")`. Angles are more exact than
    transformers', which rounds cosines and sines to the model's dtype. To be called before torch.compile.

    Raises TypeError for what is no model of transformers, ValueError for one with nothing to swap.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=32, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    ...                      num_attention_heads=4, num_key_value_heads=2)
    >>> print(patch(LlamaForCausalLM(config)))
    5 norms, 1 rotary embeddings, 2 attentions, 2 MLPs
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"patch: model must be a transformers.PreTrainedModel, got {type(model).__name__}")
    swapped: dict[str, list[str]] = {kind: [] for kind in ("norms", "rotary embeddings", "attentions", "MLPs")}
    left: dict[str, str] = {}

    def swap(kind: str, name: str, module: nn.Module, forward: Callable[..., Any]) -> None:
        _swap(module, forward)
        swapped[kind].append(name)

    attentions = {}
    for name, module in model.named_modules():
        match _part(module):
            case "norms":
                swap("norms", name, module, _gemma_rms_norm if _is_gemma(module) else _rms_norm)
            case "MLPs":
                config = module.config
                activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
                if activation in _MLPS:
                    swap("MLPs", name, module, _MLPS[activation])
                else:
                    left[name] = f"the activation {activation!r}"
            case "attentions":
                attentions[name] = module
            case "rotary embeddings":
                # What it returns only the attention of the same model can read: both or neither.
                owner = name.rpartition(".")[0]
                inside = {at: m for at, m in model.named_modules() if at.startswith(f"{owner}.") or not owner}
                users = {at: m for at, m in inside.items() if _part(m) == "attentions"}
                reason = next((why for m in users.values() if (why := _unlike(m))), None)
                if reason is None:
                    swap("rotary embeddings", name, module, _rotary_embedding)
                    for at, user in users.items():
                        swap("attentions", at, user, _attention_forward)
                else:
                    left.update(dict.fromkeys((name, *users), reason))
    if not any(swapped.values()):
        raise ValueError(
            f"patch: {type(model).__name__} has no module of the models that are known: {', '.join(_ARCHITECTURES)}"
        )
    return Patched({kind: tuple(names) for kind, names in swapped.items() if names}, left)


def _unlike(module: nn.Module) -> str | None:
    """Why this release of transformers has another attention than the one that is known."""
    parameters = inspect.signature(type(module).forward).parameters
    if not {"hidden_states", "position_embeddings", "attention_mask"} <= set(parameters):
        return "an attention of another signature"
    wanted = ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "scaling", "attention_dropout", "layer_idx", "config")
    missing = [name for name in wanted if not hasattr(module, name)]
    return f"an attention without {missing[0]}" if missing else None
