"""Registration of the plugin, the supported versions of vLLM, and the configuration that vLLM holds."""

import logging
import pickle
import sys
from pathlib import Path

import pytest

import vllm_smoothquant
from tests.helpers import handmade_checkpoint
from vllm_smoothquant.config import SmoothQuantVllmConfig
from vllm_smoothquant.format.errors import SmoothQuantError

vllm = pytest.importorskip("vllm", reason="the plugin needs vLLM; `make venv` installs it")


def test_registering_twice_has_the_effect_of_once() -> None:
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, get_quantization_config

    vllm_smoothquant.register()
    vllm_smoothquant.register()
    assert QUANTIZATION_METHODS.count("smoothquant") == 1
    assert get_quantization_config("smoothquant") is SmoothQuantVllmConfig


@pytest.mark.parametrize("version", ["0.25.1", "0.34.0", "1.0"])
def test_another_vllm_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    monkeypatch.setattr("vllm.version.__version__", version)
    vllm_smoothquant.register()
    try:
        method = get_quantization_config("smoothquant")
        for use in (method, lambda: method.from_config({})):
            with pytest.raises(SmoothQuantError, match=rf"vllm: expected a version >=0.26,<0.34, got {version}"):
                use()
        # vLLM calls this for every model and every method, so it must work.
        assert method.override_quantization_method({"quant_method": "gptq"}, None) is None
    finally:
        monkeypatch.undo()
        vllm_smoothquant.register()


def test_registration_in_an_unknown_vllm_only_warns(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    logger = logging.getLogger("vllm.smoothquant")
    monkeypatch.setattr(logger, "warning", lambda text, *values: lines.append(text % values))
    monkeypatch.setattr("vllm.version.__version__", "9.0")
    monkeypatch.setitem(sys.modules, "vllm.model_executor.layers.quantization", None)
    vllm_smoothquant.register()
    assert lines[0] == "vllm-smoothquant is for vLLM >=0.26,<0.34, this is 9.0: SmoothQuant checkpoints are refused"
    assert len(lines) == 2


@pytest.mark.parametrize("version", ["0.26.0", "0.32.0+cpu", "0.33.1.dev12+gabcdef", "dev"])
def test_supported_versions_are_accepted(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    monkeypatch.setattr("vllm.version.__version__", version)
    vllm_smoothquant.register()
    assert get_quantization_config("smoothquant") is SmoothQuantVllmConfig


def test_names_follow_the_models_mapper() -> None:
    from vllm.model_executor.models.utils import WeightsMapper

    config = SmoothQuantVllmConfig(handmade_checkpoint.config("channel", "token"))
    config.tensors = frozenset(["model.layers.1.mlp.down_proj.weight"])
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model."}))
    assert config.config is not None
    assert set(config.config.overrides) == {"language_model.layers.1.mlp.down_proj"}
    assert "language_model.layers.0.mlp.down_proj" in config.config.smoothed
    assert config.config.ignore == {"lm_head", "language_model.layers.1.self_attn.o_proj"}
    assert config.tensors == {"language_model.layers.1.mlp.down_proj.weight"}


def test_the_config_reaches_workers_by_pickle() -> None:
    config = SmoothQuantVllmConfig.from_config(handmade_checkpoint.config("channel", "static").to_dict())
    assert pickle.loads(pickle.dumps(config)).config == config.config


def test_a_broken_file_is_refused_before_a_worker_starts(tmp_path: Path) -> None:
    quantization = handmade_checkpoint.config("channel", "token")
    tensors = handmade_checkpoint.tensors(quantization)
    del tensors["model.layers.0.self_attn.q_proj.weight_scale"]
    folder = handmade_checkpoint.write(tmp_path / "broken", quantization, tensors)
    config = SmoothQuantVllmConfig(quantization)
    with pytest.raises(SmoothQuantError, match=r"q_proj\.weight_scale: expected F32 \[256, 1\], got no such tensor"):
        config.maybe_update_config(str(folder))
