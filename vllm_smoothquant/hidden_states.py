"""What reads or writes hidden states from outside the model, and is refused if they are rotated.

    x -> x Q        Q: rotation.stream in the checkpoint's TRANSFORMS_FILE

A model with rotated hidden states gives the source's tokens. Prompt embeddings of the source would be read as other
vectors, and drafts that were trained on the source's hidden states would guess at random: the text stays right, but no
guess is accepted. Drafts that see only tokens are not affected.
"""

from typing import Any

from .format.config import TRANSFORMS_FILE
from .format.errors import SmoothQuantError

TOKEN_DRAFTS = frozenset({"ngram", "ngram_gpu", "suffix", "draft_model"})


def check_readers(vllm_config: Any, checkpoint: str) -> None:
    """SmoothQuantError: vLLM's configuration has a reader or writer of hidden states beside the model `checkpoint`."""
    fix = "calibrate the model again with --rotation none"
    expected = f"none, because {TRANSFORMS_FILE} of {checkpoint} rotates the hidden states"
    if getattr(vllm_config.model_config, "enable_prompt_embeds", False):
        raise SmoothQuantError("--enable-prompt-embeds", expected, "prompt embeddings", fix)
    method = getattr(vllm_config.speculative_config, "method", None)
    if method is not None and method not in TOKEN_DRAFTS:
        raise SmoothQuantError("--speculative-config", expected, f"{method}, which reads them", fix)
