"""What reads or writes hidden states from outside the model, and is refused if they are rotated.

    x -> x Q        Q: rotation.stream in the checkpoint's TRANSFORMS_FILE

The head of such a model is a matrix of its own, which vLLM must load. The model gives the source's tokens, but prompt
embeddings of the source would be read as other vectors, and drafts that were trained on the source's hidden states
would guess at random: the text stays right, but no guess is accepted. Drafts that see only tokens are not affected.
"""

import sys
from typing import Any

from vllm.model_executor.model_loader import get_model_architecture

from .format.config import TRANSFORMS_FILE
from .format.errors import SmoothQuantError

HEAD = "ParallelLMHead"  # vLLM's class of a head that is not the embeddings
TOKEN_DRAFTS = frozenset({"ngram", "ngram_gpu", "suffix", "draft_model"})


def check_readers(vllm_config: Any, checkpoint: str) -> None:
    """SmoothQuantError: vLLM's configuration has a reader or writer of hidden states beside the model `checkpoint`."""
    if vllm_config.model_config is None:
        return  # a layer that is built without a model
    fix = "calibrate the model again with --rotation none"
    expected = f"none, because {TRANSFORMS_FILE} of {checkpoint} rotates the hidden states"
    if vllm_config.model_config.enable_prompt_embeds:
        raise SmoothQuantError("--enable-prompt-embeds", expected, "prompt embeddings", fix)
    model_class, _ = get_model_architecture(vllm_config.model_config)
    if not any(HEAD in vars(sys.modules[base.__module__]) for base in model_class.__mro__):
        expected = f"a model with a {HEAD}, because a rotation separates head and embeddings"
        raise SmoothQuantError(checkpoint, expected, f"{model_class.__name__}, which has none", fix)
    method = getattr(vllm_config.speculative_config, "method", None)
    if method is not None and method not in TOKEN_DRAFTS:
        raise SmoothQuantError("--speculative-config", expected, f"{method}, which reads them", fix)
