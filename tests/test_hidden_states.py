"""Rotated hidden states: what reads or writes them from outside the model is refused, all else is not."""

from types import SimpleNamespace

import pytest

from vllm_smoothquant import hidden_states
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.hidden_states import check_readers


@pytest.fixture(autouse=True)
def llama(monkeypatch):
    """vLLM's class of the model; the settings below have no architecture."""
    from vllm.model_executor.models.llama import LlamaForCausalLM

    monkeypatch.setattr(hidden_states, "get_model_architecture", lambda config: (LlamaForCausalLM, ""))


def settings(method: str | None = None, *, embeddings: bool = False) -> SimpleNamespace:
    speculative = None if method is None else SimpleNamespace(method=method)
    return SimpleNamespace(
        model_config=SimpleNamespace(enable_prompt_embeds=embeddings), speculative_config=speculative
    )


@pytest.mark.parametrize("method", [None, "ngram", "suffix", "draft_model"])
def test_drafts_that_see_only_tokens_are_served(method):
    check_readers(settings(method), "OUT")


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp", "medusa", "extract_hidden_states"])
def test_drafts_that_read_hidden_states_are_refused(method):
    with pytest.raises(SmoothQuantError, match=rf"OUT rotates .* got {method}.*--rotation none"):
        check_readers(settings(method), "OUT")


def test_a_model_whose_head_is_the_embeddings_is_refused(monkeypatch):
    from vllm.model_executor.models.commandr import CohereForCausalLM

    monkeypatch.setattr(hidden_states, "get_model_architecture", lambda config: (CohereForCausalLM, ""))
    with pytest.raises(SmoothQuantError, match=r"CohereForCausalLM, which has none.*--rotation none"):
        check_readers(settings(), "OUT")


def test_prompt_embeddings_are_refused():
    with pytest.raises(SmoothQuantError, match=r"--enable-prompt-embeds.*--rotation none"):
        check_readers(settings(embeddings=True), "OUT")


def test_the_settings_have_vllms_names():
    """A renamed field would make the checks above pass in silence."""
    from typing import get_args

    from vllm.config import ModelConfig, SpeculativeConfig
    from vllm.config.speculative import SpeculativeMethod

    from vllm_smoothquant.hidden_states import TOKEN_DRAFTS

    def words(annotation: object) -> set[str]:
        return {word for part in get_args(annotation) for word in (words(part) or {part})}

    assert "enable_prompt_embeds" in ModelConfig.__dataclass_fields__
    assert "method" in SpeculativeConfig.__dataclass_fields__
    assert words(SpeculativeMethod) >= TOKEN_DRAFTS
