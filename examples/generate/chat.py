"""From a prompt to tokens and back, by the vocabulary, merges and chat template that stand in the GGUF file."""

from __future__ import annotations

from typing import Any

from checkpoint import CheckpointError
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

CONTROL, USER_DEFINED = 3, 4  # token types of the GGUF format

# How text is cut before byte pairs merge, by the name in tokenizer.ggml.pre.
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE_TOKENIZERS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "default": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), BYTES],
}


class Chat:
    def __init__(self, metadata: dict[str, Any]):
        model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
        if model != "gpt2" or pre not in PRE_TOKENIZERS:
            raise CheckpointError(f"the tokenizer {model}/{pre} is not supported, only gpt2 with {', '.join(PRE_TOKENIZERS)}")
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
        self.tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
        self.tokenizer.decoder = decoders.ByteLevel()
        self.tokenizer.add_tokens(
            [AddedToken(token, special=kind == CONTROL) for token, kind in zip(tokens, types) if kind in (CONTROL, USER_DEFINED)]
        )
        self._tokens, self._template = tokens, metadata.get("tokenizer.chat_template")
        self._bos = metadata.get("tokenizer.ggml.bos_token_id")
        ends = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")}
        ends |= {i for i, token in enumerate(tokens) if token in ("<|im_end|>", "<|endoftext|>", "<|eot_id|>")}
        self.ends = ends - {None}

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a conversation of which `prompt` is the first message, up to where the answer starts."""
        if self._template is None:
            return self.tokenizer.encode(prompt).ids
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        try:
            text = environment.from_string(self._template).render(
                messages=[{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                bos_token="" if self._bos is None else self._tokens[self._bos],
            )
        except TemplateError as error:
            raise CheckpointError(f"the chat template fails: {error}") from None
        return self.tokenizer.encode(text).ids

    def stream(self) -> decoders.DecodeStream:
        """Gives the text of token after token; a character that spans several comes with its last."""
        return decoders.DecodeStream(skip_special_tokens=True)
