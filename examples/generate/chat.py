"""From a prompt to tokens and back, by the vocabulary, merges and chat template that stand in the GGUF file."""

from __future__ import annotations

from typing import Any

from checkpoint import CheckpointError
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

CONTROL, USER_DEFINED = 3, 4  # token types of the GGUF format

# How text is cut before byte pairs merge, by the name in tokenizer.ggml.pre.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PRE_TOKENIZERS = {
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "default": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA_3), "isolated"), BYTES],
}


def raise_exception(message: str) -> None:
    """What chat templates call to refuse a conversation."""
    raise TemplateError(message)


class Chat:
    def __init__(self, metadata: dict[str, Any]):
        model, pre = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
        if model != "gpt2" or pre not in PRE_TOKENIZERS:
            raise CheckpointError(
                f"the tokenizer {model}/{pre} is not supported, only gpt2 with {', '.join(PRE_TOKENIZERS)}"
            )
        tokens, types = metadata.get("tokenizer.ggml.tokens"), metadata.get("tokenizer.ggml.token_type")
        try:
            merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
            vocabulary = {token: i for i, token in enumerate(tokens)}
            # Llama 3's rule: what is a token as a whole is not merged up to it
            self.tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=pre == "llama-bpe"))
            if len(types) != len(tokens):
                raise ValueError("as many token types as tokens are needed")
        except Exception as error:  # tokenizers raises plain Exception for a merge that leads to no token
            raise CheckpointError(f"the tokenizer's vocabulary is damaged ({type(error).__name__}: {error})") from None
        self.tokenizer.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
        self.tokenizer.decoder = decoders.ByteLevel()
        self.tokenizer.add_tokens(
            [
                AddedToken(token, special=kind == CONTROL)
                for token, kind in zip(tokens, types, strict=True)
                if kind in (CONTROL, USER_DEFINED)
            ]
        )
        self._tokens, self._template = tokens, metadata.get("tokenizer.chat_template")
        ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "eot")}
        for name, token in ids.items():
            if token is not None and not (isinstance(token, int) and 0 <= token < len(tokens)):
                raise CheckpointError(f"tokenizer.ggml.{name}_token_id is {token!r}, not one of {len(tokens)} tokens")
        self._bos = ids["bos"]
        self._starts_with_bos = self._bos is not None and metadata.get(
            "tokenizer.ggml.add_bos_token", pre == "llama-bpe"
        )
        ends = {ids["eos"], ids["eot"]}
        ends |= {i for i, token in enumerate(tokens) if token in ("<|im_end|>", "<|endoftext|>", "<|eot_id|>")}
        self.ends = ends - {None}

    def encode(self, prompt: str) -> list[int]:
        """The tokens of a conversation of which `prompt` is the first message, up to where the answer starts."""
        try:
            prompt.encode()
        except UnicodeEncodeError:
            raise CheckpointError("the prompt is not valid UTF-8") from None
        tokens = self.tokenizer.encode(prompt if self._template is None else self._rendered(prompt)).ids
        if self._starts_with_bos and tokens[:1] != [self._bos]:
            tokens.insert(0, self._bos)
        if not tokens:
            raise CheckpointError("the prompt is empty")
        return tokens

    def _rendered(self, prompt: str) -> str:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = raise_exception
        try:
            return environment.from_string(self._template).render(
                messages=[{"role": "user", "content": prompt}],
                add_generation_prompt=True,
                bos_token="" if self._bos is None else self._tokens[self._bos],
            )
        except Exception as error:  # a template is a program
            raise CheckpointError(f"the chat template fails: {error}") from None

    def stream(self) -> decoders.DecodeStream:
        """Gives the text of token after token; a character that spans several comes with its last."""
        return decoders.DecodeStream(skip_special_tokens=True)
