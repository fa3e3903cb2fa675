"""Registration of the plugin, the supported versions of vLLM, and the configuration that vLLM holds."""

import logging
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import vllm_smoothquant
from tests.helpers import handmade_checkpoint
from vllm_smoothquant.config import SmoothQuantVllmConfig
from vllm_smoothquant.format.config import CheckpointConfig
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


# --- Layers that vLLM builds in a way of its own ---


def quant_config(folder: Path, **config: object) -> SmoothQuantVllmConfig:
    """The configuration of a checkpoint whose files are in `folder`."""
    found = SmoothQuantVllmConfig(CheckpointConfig(**config))
    found.maybe_update_config(str(folder))
    return found


def save_tensors(folder: Path, *names: str, in_float: tuple[str, ...] = ()) -> Path:
    folder.mkdir(exist_ok=True)
    tensors = {}
    for name in names:
        tensors |= {f"{name}.weight": torch.ones(32, 32, dtype=torch.int8), f"{name}.weight_scale": torch.ones(32, 1)}
    tensors |= {f"{name}.weight": torch.ones(32, 32) for name in in_float}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return folder


def linear(config: SmoothQuantVllmConfig, prefix: str) -> Any:
    from vllm.model_executor.layers.linear import ColumnParallelLinear

    return ColumnParallelLinear(32, 32, bias=False, params_dtype=torch.float32, quant_config=config, prefix=prefix)


@pytest.mark.usefixtures("one_rank")
def test_a_shard_without_tensors_has_no_vote(tmp_path: Path) -> None:
    """Gemma 4 computes keys and values of one matrix: v_proj exists nowhere, and q and k are ignored."""
    folder = save_tensors(tmp_path / "m", in_float=("a.q_proj", "a.k_proj"))
    config = quant_config(folder, ignore=frozenset({"a.q_proj", "a.k_proj"}))
    config.packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}
    assert type(linear(config, "a.qkv_proj").quant_method).__name__ == "UnquantizedLinearMethod"


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("scheme", ["token", "static"])
def test_a_layer_that_attention_absorbs_must_be_in_floating_point(scheme: str) -> None:
    """vLLM's MLA casts its input to the weight's dtype, and multiplies an identity matrix by it."""
    config = SmoothQuantVllmConfig(CheckpointConfig(input_activations=handmade_checkpoint.ACTIVATIONS[scheme]))
    with pytest.raises(SmoothQuantError, match=r"kv_b_proj: expected a layer in floating point"):
        linear(config, "model.layers.0.self_attn.kv_b_proj")


@pytest.mark.usefixtures("one_rank")
def test_layers_that_vllm_does_not_load_are_not_measured_or_checked(tmp_path: Path) -> None:
    """It builds towers and heads that it does not need on the meta device, also under names of its own."""
    folder = save_tensors(tmp_path / "m", "lm_head", "model.layers.0.o_proj")
    config = quant_config(folder)
    with torch.device("meta"):
        layer = linear(config, "vision_tower.vision_model.encoder.layers.0.fc1")
    layer.quant_method.process_weights_after_loading(layer)
    assert type(layer.quant_method).__name__ == "UnquantizedLinearMethod"


@pytest.mark.usefixtures("one_rank")
def test_integers_that_no_layer_asks_for_are_an_error(tmp_path: Path) -> None:
    """vLLM builds some layers, such as routers, in floating point. It would load their integers as numbers."""
    folder = save_tensors(tmp_path / "m", "model.layers.0.mlp.gate", "model.layers.0.o_proj")
    config = quant_config(folder)
    linear(config, "model.layers.0.o_proj")
    with pytest.raises(SmoothQuantError, match=r"mlp\.gate.*--ignore model\.layers\.0\.mlp\.gate"):
        config.check_all_names_seen()


@pytest.mark.usefixtures("one_rank")
def test_a_head_below_a_part_of_the_model_is_ignored_by_its_own_name() -> None:
    """Gemma 3 with images: vLLM calls it language_model.lm_head, and its mapper renames only what is inside."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.models.utils import WeightsMapper

    config = SmoothQuantVllmConfig(CheckpointConfig(ignore=frozenset({"lm_head"})))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"lm_head.": "language_model.lm_head."}))
    head = ParallelLMHead(64, 32, params_dtype=torch.float32, quant_config=config, prefix="language_model.lm_head")
    assert type(head.quant_method).__name__ == "UnquantizedEmbeddingMethod"


def test_a_folder_without_weights_is_accepted(tmp_path: Path) -> None:
    """vLLM makes such a folder of s3:// and gs:// paths, whose weights are streamed."""
    (tmp_path / "config.json").write_text("{}")
    assert quant_config(tmp_path).tensors is None


def test_sharded_states_are_refused_by_their_name(tmp_path: Path) -> None:
    (tmp_path / "model-rank-0-part-0.safetensors").touch()
    with pytest.raises(SmoothQuantError, match="sharded_state"):
        quant_config(tmp_path)


def test_a_mappers_prefix_may_end_in_a_dot() -> None:
    """An INT8 head of a model that reads images: it would keep its name, and no layer would ask for it."""
    from vllm.model_executor.models.utils import WeightsMapper

    stored = CheckpointConfig(ignore=frozenset({"model.projector"}), smoothed=frozenset({"lm_head"}))
    config = SmoothQuantVllmConfig(stored)
    config.tensors, config.quantised = frozenset({"lm_head.weight", "lm_head.weight_scale"}), frozenset({"lm_head"})
    prefixes = {"lm_head.": "language_model.lm_head.", "model.projector.": "projector."}
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=prefixes))
    assert config.quantised == {"language_model.lm_head"}
    assert config.tensors == {"language_model.lm_head.weight", "language_model.lm_head.weight_scale"}
    assert config.config is not None
    assert (config.config.ignore, config.config.smoothed) == (
        {"model.projector", "projector"},
        {"language_model.lm_head"},
    )
