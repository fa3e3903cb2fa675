"""`footprint`: kinds, layers and bytes by config.json and headers alone equal those of loaded and written models."""

import json
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from calibration import __main__ as cli
from calibration import footprint as module
from calibration.discovery.discover import discover
from calibration.discovery.linears import choose_layers
from calibration.footprint import footprint
from calibration.inputs.model import load
from calibration.pipeline import calibrate
from calibration.running.modules import weight_shape
from calibration.running.progress import PeakMemory
from tests.helpers import tiny_architectures, tiny_checkpoints, tiny_vision
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import read_headers

# Model -> its kinds.
KINDS = {
    "llama-tied": ["dense"], "gpt2": ["dense"], "opt-350m": ["dense"], "mixtral": ["experts"],
    "deepseek-v3": ["experts"], "gpt-oss": ["stacked experts"], "granite-moe": ["stacked experts"],
    "lfm2": ["hybrid"], "nemotron-h": ["hybrid"], "jamba": ["experts", "hybrid"], "qwen3-next": ["experts", "hybrid"],
    "mamba2": ["hybrid"], "gemma3-vl": ["towers"], "llava": ["towers"], "qwen3-vl": ["towers"],
    "idefics3": ["towers"],
}  # fmt: skip


def save(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> str:
    if name in tiny_vision.FAMILIES:
        return str(tiny_vision.save(name, folder))
    return str(tiny_checkpoints.save(name, folder, dtype))


@pytest.mark.parametrize("name", KINDS)
def test_kinds_and_layers_are_those_of_the_loaded_model(name, tmp_path):
    """`choose_layers` sees which layers text reaches, and which matrices are experts, by running the model."""
    size = footprint(save(name, tmp_path / "M"))
    model = load(str(tmp_path / "M")).model
    layers, _ = choose_layers(model, discover(model, tiny_architectures.tokens()), frozenset())
    assert size["kinds"] == KINDS[name]
    assert size["layers"] == len(layers)
    assert size["linear_parameters"] == sum(prod(weight_shape(model.get_submodule(layer))) for layer in layers)
    parameters = {id(p): p.numel() for p in model.parameters()}
    experts = {"mixtral", "deepseek-v3", "jamba", "qwen3-next"}  # there a parameter is a view, counted once
    assert size["parameters"] == sum(parameters.values()) or name in experts


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "gpt-oss", "lfm2", "llava"])
def test_bytes_are_those_of_written_checkpoints(name, tmp_path):
    """To the byte, without a rotation, which would untie the head."""
    source, text = save(name, tmp_path / "M", torch.bfloat16), str(tiny_checkpoints.save_text(tmp_path / "text.jsonl"))
    size = footprint(source)["weight_bytes"]
    assert size["stored"] == _tensor_bytes(tmp_path / "M")
    assert size["bf16"] == (size["stored"] // 2 if name == "llava" else size["stored"])  # llava is saved in float32
    common = {"dataset": text, "samples": 4, "seq_len": 32, "quiet": True, "rotation": "none"}
    calibrate(source, tmp_path / "OUT", **common)
    assert size["int8"] == _tensor_bytes(tmp_path / "OUT")
    if name != "gpt2":  # none of its layers can have 4 bits
        calibrate(source, tmp_path / "OUT4", bits=4, rounding="nearest", **common)
        assert size["int4"] == _tensor_bytes(tmp_path / "OUT4")
        assert size["int4"] < size["int8"]


def test_a_model_without_a_head_has_the_layers_of_its_body(tmp_path):
    """Such as one for embeddings: the module with the embeddings is the model itself."""
    tiny_architectures.build("qwen3").model.save_pretrained(tmp_path / "M")
    tiny_checkpoints.tokenizer().save_pretrained(tmp_path / "M")
    size = footprint(str(tmp_path / "M"))
    assert json.loads((tmp_path / "M/config.json").read_text())["architectures"] == ["Qwen3Model"]
    assert (size["kinds"], size["layers"]) == (["dense"], 14)


def test_a_tied_head_that_the_file_repeats_is_counted_once(tmp_path):
    folder = save("llama-tied", tmp_path / "M")
    size = footprint(folder)
    tensors = load_file(tmp_path / "M/model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "M/model.safetensors", metadata={"format": "pt"})
    assert footprint(folder) == size


def _tensor_bytes(folder: Path) -> int:
    return sum(module._bytes(read_headers(folder).values()))


@pytest.mark.parametrize("name", ["llama", "falcon-7b", "gemma3", "lfm2", "bamba", "gpt-bigcode", "mamba2"])
def test_the_cache_is_what_transformers_keeps(name, tmp_path):
    """For each token; a layer with a window keeps no more than the window. transformers keeps float32 here: 4 bytes."""
    size = footprint(save(name, tmp_path / "M"))["cache"]
    model = tiny_architectures.build(name)
    ids = tiny_architectures.tokens(batch=1, length=16)
    with torch.no_grad():
        cache = model(ids, use_cache=True)
    layers = getattr(cache, "past_key_values", getattr(cache, "cache_params", None)).layers
    kept = [layer for layer in layers if getattr(layer, "keys", None) is not None]
    per_token = sum(layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in kept)
    assert size == {"tokens": size["tokens"], "bytes": 2 * per_token * size["tokens"]}


def test_a_window_bounds_the_cache(tmp_path):
    model = tiny_architectures.config("gemma3")
    model.sliding_window = 64
    model.save_pretrained(tmp_path)
    assert module._cache(model)["bytes"] * 4 == module._cache(tiny_architectures.config("gemma3"))["bytes"]


def test_a_large_model_takes_no_memory(tmp_path):
    """Llama 3.1 8B's sizes in a file of 16 GB that has no content: 6.98e9 weights in linear layers (docs/cuda.md)."""
    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131_072, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end := end + 2 * prod(shape)]}
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    with PeakMemory() as memory:
        size = footprint(str(tmp_path))
    assert size["linear_parameters"] == 6_979_321_856
    assert size["weight_bytes"]["bf16"] == size["weight_bytes"]["stored"] == end
    assert size["cache"] == {"tokens": 32_768, "bytes": 2 * 2 * 8 * 128 * 32 * 32_768}
    assert memory.bytes < end / 4


def test_of_a_hub_id_the_headers_are_asked_for(tmp_path, monkeypatch):
    """As the hub's client returns them; nothing else of the files is."""

    class File:
        def __init__(self, headers):
            self.tensors = {name: type("T", (), {"dtype": d, "shape": list(s)}) for name, (d, s) in headers.items()}

    folder = save("llama", tmp_path / "M")
    monkeypatch.setattr(module, "check_source", lambda _, real=module.check_source: real(folder))
    monkeypatch.setattr(module, "empty_model", lambda _, real=module.empty_model: real(folder))
    answer = type("Metadata", (), {"files_metadata": {"model.safetensors": File(read_headers(folder))}})
    monkeypatch.setattr(module, "get_safetensors_metadata", lambda name: {"some/model": answer}[name])
    assert footprint("some/model") == footprint(folder)


def _drop(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _other_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))


def _pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_drop, "down_proj.weight: expected shape .*, got no such tensor"),
        (_other_shape, "_proj.weight: expected shape"),
        (_pickle, "convert its weights to safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\x00" * 20), "a safetensors file"),
        (lambda folder: (folder / "config.json").unlink(), "expected"),
    ],
)
def test_a_damaged_folder_is_one_line(damage, message, tmp_path, capsys):
    folder = save("llama", tmp_path / "M")
    damage(Path(folder))
    with pytest.raises(SmoothQuantError, match=message):
        footprint(folder)
    capsys.readouterr()  # what saving the model printed
    assert cli.main(["doctor", folder]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_the_command_prints_the_model_as_text_and_as_json(tmp_path, capsys):
    folder = save("mixtral", tmp_path / "M")
    assert cli.main(["doctor", folder, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["model"]
    size = footprint(folder)
    assert found["weight_bytes"] == size["weight_bytes"]
    assert found["fits"] == dict.fromkeys(("bf16", "int8", "int4"), True)
    assert cli.main(["doctor", folder]) == 0
    text = capsys.readouterr().out
    for part in (
        f"{size['weight_bytes']['int8']:,} bytes",
        f"{size['cache']['bytes']:,} bytes",
        "mixture of experts",
        f"smoothquant calibrate {folder} -o OUT",
        "one stream",
        "many streams",
        "long prompts",
        "docs/experts.md",
    ):
        assert part in text, part  # fmt: skip
