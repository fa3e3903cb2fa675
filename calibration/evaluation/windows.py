"""The text of an evaluation as token ids, the same for every model that is compared."""

from collections.abc import Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_smoothquant.format.errors import SmoothQuantError

from ..inputs.text import load_samples


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder or hub id. SmoothQuantError if there is none."""
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise SmoothQuantError(model, "a model with its tokenizer", error, "check the path") from error


def token_windows(
    models: Sequence[str], source: str, *, text_column: str, samples: int, seq_len: int, seed: int
) -> tuple[list[list[int]], dict[str, Any]]:
    """`samples` windows of `seq_len` token ids from `source` for all of `models`, and a description of the text.

    A window starts with the tokenizer's own first token (BOS), if it has one. Errors (SmoothQuantError): models whose
    tokenizers differ, windows without a token to score, too little text.
    """
    tokenizers = [load_tokenizer(model) for model in models]
    for model, tokenizer in zip(models, tokenizers, strict=True):
        if tokenizer.get_vocab() != tokenizers[0].get_vocab():
            fix = "evaluate them one at a time: perplexities of different tokens do not compare"
            raise SmoothQuantError(model, f"the tokenizer of {models[0]}", "another one", fix)
    prefix = leading_tokens(tokenizers[0])
    if seq_len < len(prefix) + 2:
        raise SmoothQuantError("--seq-len", f"at least {len(prefix) + 2}", str(seq_len), "use longer windows")
    sampled = load_samples(
        source, tokenizers[0], text_column=text_column, samples=samples, seq_len=seq_len - len(prefix), seed=seed
    )
    # A window at the start of a document already has the prefix from the tokenizer.
    windows = [ids if ids[: len(prefix)] == prefix else prefix + ids for ids in sampled.input_ids.tolist()]
    text = {"source": source, "windows": len(windows), "seq_len": seq_len, "seed": seed}
    return windows, text | {"tokens_sha256": sampled.sha256}


def leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that this tokenizer puts before a text: BOS for Llama, none for SmolLM2."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)]
