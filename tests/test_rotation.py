"""Rotations: found from the graph, exact on each architecture or refused with the reason, kept in the checkpoint."""

import json
from functools import cache, partial

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from calibration.checkpoint import transforms
from calibration.checkpoint.adapter import adapt
from calibration.checkpoint.verify import verify
from calibration.discovery.rotations import RotationGraph, find_rotations
from calibration.inputs.model import untie_head
from calibration.rotation.orthogonal import hadamard, rotation_matrix
from calibration.rotation.rotation import Rotation
from calibration.smoothing.choose_rotation import rotation_of
from calibration.smoothing.rotation_gate import BOUND, check_rotation
from tests.helpers import tiny_architectures, tiny_checkpoints, toy_block
from tests.helpers.lora import merged, save_adapter
from tests.helpers.reference import load_reference
from vllm_smoothquant.format.config import STREAM
from vllm_smoothquant.format.errors import SmoothQuantError

# What stands in the way of the hidden states' rotation, read from the code of each architecture.
POST_NORM, ROUTED, NORM_ON_STREAM = "a sum with the output of a norm", "a sum with what is not rotated", "no vector"
NOT_ROTATED = {
    "opt-350m": POST_NORM, "bloom": NORM_ON_STREAM, "bloom-tied": NORM_ON_STREAM, "bloom-postln": NORM_ON_STREAM,
    "gemma2": POST_NORM, "gemma2-tied": POST_NORM, "gemma3": POST_NORM, "glm4": POST_NORM, "olmo2": POST_NORM,
    "olmo3": POST_NORM, "exaone4": POST_NORM, "olmo": "native_layer_norm", "olmo-clip": "native_layer_norm",
    "mixtral": ROUTED, "qwen2-moe": ROUTED, "qwen3-moe": ROUTED, "glm4-moe": ROUTED, "olmoe": ROUTED,
    "granite-moe": ROUTED, "phimoe": ROUTED, "gpt-oss": ROUTED, "deepseek-v2": ROUTED, "deepseek-v3": ROUTED,
    "qwen3-next": ROUTED, "jamba": ROUTED, "olmo-hybrid": POST_NORM,
}  # fmt: skip

# Heads that stay as they are: a norm before o_proj, a product with a gate, a clamp of the values, no attention.
NO_HEADS = {"bitnet", "diffllama", "qwen3-next", "qwen3.5", "olmo-clip", "mamba2"}


@cache
def graph_of(name: str) -> RotationGraph:
    return find_rotations(tiny_architectures.build(name), tiny_architectures.tokens())


def rotated(name: str, kind: str = "hadamard") -> tuple[nn.Module, Rotation]:
    model = tiny_architectures.build(name)
    untie_head(name, model)
    return model, rotation_of(graph_of(name), model, kind)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_architectures.tokens(9), use_cache=False).logits


def relative_error(other: torch.Tensor, original: torch.Tensor) -> float:
    """The largest difference, relative to the largest value."""
    return float((other - original).abs().max() / original.abs().max())


@pytest.mark.parametrize("n", [1, 2, 12, 20, 28, 36, 64, 96, 112, 576, 896, 1536])
def test_a_hadamard_matrix_has_orthogonal_rows_of_ones(n: int) -> None:
    matrix = hadamard(n)
    assert matrix is not None
    assert (matrix.abs() == 1).all()
    assert torch.equal(matrix @ matrix.t(), n * torch.eye(n, dtype=torch.int64))


@pytest.mark.parametrize("n", [3, 10, 18, 92])  # 92 exists, but not by the constructions here
def test_where_there_is_no_hadamard_matrix_the_rotation_is_another(n: int) -> None:
    assert hadamard(n) is None
    matrix = rotation_matrix(n, 0)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_centred_rotation_leaves_the_ones_where_they_are() -> None:
    matrix, ones = rotation_matrix(100, 0, centred=True), torch.ones(100, dtype=torch.float64)
    torch.testing.assert_close(matrix @ matrix.t(), torch.eye(100, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(ones @ matrix, ones, rtol=0, atol=1e-12)
    assert not torch.equal(matrix, rotation_matrix(100, 1, centred=True))


@pytest.mark.parametrize("name", tiny_architectures.ZOO)
def test_each_architecture_is_rotated_exactly_or_the_reason_is_known(name: str) -> None:
    graph = graph_of(name)
    assert (STREAM in graph.sizes) == (name not in NOT_ROTATED)
    if name in NOT_ROTATED:
        assert NOT_ROTATED[name] in "; ".join(map(str, graph.refusals)), graph.refusals
    assert any(size != STREAM for size in graph.sizes) == (name not in NO_HEADS)
    if not graph.sizes:
        return
    model, rotation = rotated(name)
    expected = logits(model)
    report = check_rotation(rotation, [tiny_architectures.tokens(1)])
    assert report["logits"] < BOUND / 5  # the bound is for models with massive activations
    undo = rotation.apply_()
    assert 0 < relative_error(logits(model), expected) < BOUND / 5
    undo()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma"])
@pytest.mark.parametrize("side", ["inputs", "outputs", "norms", "embeddings"])
def test_each_part_that_is_forgotten_is_caught(name: str, side: str) -> None:
    model, rotation = rotated(name)
    forgotten = next(iter(getattr(rotation.graph, side)))
    parameters = rotation.parameters
    rotation.parameters = lambda module: (  # type: ignore[method-assign]
        {k: p.float() for k, p in model.get_submodule(module).named_parameters()}
        if module == forgotten
        else parameters(module)
    )
    if side == "embeddings":
        object.__setattr__(rotation.graph, "embeddings", ())
    try:
        with pytest.raises(SmoothQuantError, match="the same function"):
            check_rotation(rotation, [tiny_architectures.tokens(1)])
    finally:
        graph_of.cache_clear()


def other_reader(block: toy_block.Block, normed: torch.Tensor) -> torch.Tensor:
    return normed.max(dim=-1, keepdim=True).values


def part_of_a_vector(block: toy_block.Block, normed: torch.Tensor) -> torch.Tensor:
    return block.spare(normed[..., :16].flip(-1))


def elementwise(block: toy_block.Block, normed: torch.Tensor) -> torch.Tensor:
    return block.spare(normed * torch.arange(16.0))


def relu_of_the_norm(block: toy_block.Block, normed: torch.Tensor) -> torch.Tensor:
    return block.spare(torch.relu(normed))


def constant(block: toy_block.Block, normed: torch.Tensor) -> torch.Tensor:
    return torch.ones(16)


def itself(block: toy_block.Block, normed: torch.Tensor) -> torch.Tensor:
    return normed


@pytest.mark.parametrize(
    "extra", [other_reader, part_of_a_vector, elementwise, relu_of_the_norm, constant, itself], ids=lambda e: e.__name__
)
def test_whatever_else_reads_or_writes_the_stream_forbids_it(extra) -> None:
    assert STREAM not in find_rotations(toy_block.Toy(extra), toy_block.tokens()).sizes


def a_row_factor(block: toy_block.Block, normed: torch.Tensor) -> torch.Tensor:
    return block.spare(normed * torch.linspace(1, 2, normed.shape[1])[:, None])


def tokens_mixed(block: toy_block.Block, normed: torch.Tensor) -> torch.Tensor:
    weights = torch.ones(normed.shape[1], normed.shape[1]).tril() / normed.shape[1]
    return block.spare(weights @ normed)


@pytest.mark.parametrize("extra", [toy_block.nothing, a_row_factor, tokens_mixed], ids=lambda e: e.__name__)
def test_what_treats_all_channels_alike_carries_a_rotation(extra) -> None:
    model = toy_block.Toy(extra)
    graph = find_rotations(model, toy_block.tokens())
    assert graph.centred  # a LayerNorm subtracts the mean
    check_rotation(rotation_of(graph, model), [toy_block.tokens(1)])


def test_a_rotation_that_moves_the_ones_is_caught_by_the_gate() -> None:
    model = toy_block.Toy()
    graph = find_rotations(model, toy_block.tokens())
    rotation = Rotation(model, graph, {STREAM: rotation_matrix(16, 0)})
    with pytest.raises(SmoothQuantError, match="the same function"):
        check_rotation(rotation, [toy_block.tokens(1)])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    return tiny_checkpoints.checkpoints(tmp_path_factory.mktemp("rotated"), rotation="always")


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "phi", "qwen2"])
def test_a_checkpoint_is_its_rotated_source(name: str, checkpoints) -> None:
    folder = checkpoints(name)
    source = tiny_checkpoints.source(folder)
    verdict = verify(folder, str(source))
    assert not verdict.faults, verdict.faults
    config = json.loads((folder / "config.json").read_text())
    assert STREAM in config["quantization_config"]["transforms"]["rotation"]
    assert not config["tie_word_embeddings"]
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    assert relative_error(logits(load_reference(folder)), logits(model)) < 0.1  # each layer adds about a percent


def test_a_model_in_16_bits_is_rotated_once_rounded_and_verified(tmp_path) -> None:
    """Rotated weights are rounded to bfloat16; computed again from the source, they have the same bits."""
    folder = tiny_checkpoints.checkpoints(tmp_path, torch.bfloat16, rotation="always")("llama-tied")
    verdict = verify(folder, str(tiny_checkpoints.source(folder)))
    assert not verdict.faults, verdict.faults


def test_the_same_inputs_give_the_same_bytes(tmp_path) -> None:
    folders = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        folders.append(tiny_checkpoints.checkpoints(tmp_path / name, rotation="always")("llama-tied"))
    files = [{path.relative_to(f): path.read_bytes() for path in f.rglob("*") if path.is_file()} for f in folders]
    assert files[0] == files[1]


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_an_adapter_gives_on_the_rotated_model_what_it_gave_on_the_source(name: str, checkpoints, tmp_path) -> None:
    """The rotated model in floating point, smoothed by nothing, so that only the rotation is between the two."""
    folder = checkpoints(name, no_smoothing=True)
    model, source = (AutoModelForCausalLM.from_pretrained(tiny_checkpoints.source(folder)).eval() for _ in range(2))
    adapter = save_adapter(tmp_path / "adapter", model)
    adapt(adapter, folder, tmp_path / "adapted")
    expected = logits(merged(source, adapter))
    untie_head(name, model)
    Rotation(model, graph_of(name), transforms.read(folder).matrices).apply_()
    assert relative_error(logits(merged(model, tmp_path / "adapted")), expected) < 1e-4


def test_auto_keeps_the_model_as_it_is_where_a_rotation_does_not_pay(monkeypatch, tmp_path) -> None:
    from calibration.smoothing import choose_rotation

    monkeypatch.setattr(choose_rotation, "MARGIN", 0.99)
    get = tiny_checkpoints.checkpoints(tmp_path)
    auto, none = (get("llama-tied", rotation=rotation) for rotation in ("auto", "none"))
    manifest = json.loads((auto / "smoothquant.json").read_text())
    assert not manifest["rotation"]["rotated"]
    assert manifest["rotation"]["simulated_kl"].keys() == {"as it is", "rotated"}
    for name in ("model.safetensors", "config.json"):
        assert (auto / name).read_bytes() == (none / name).read_bytes()


def test_rotation_asked_for_and_not_possible_names_the_reader(tmp_path) -> None:
    get = tiny_checkpoints.checkpoints(tmp_path)
    with pytest.raises(SmoothQuantError, match=r"--rotation always.*output of a norm"):
        get("gemma2", rotation="always")
    assert [path.name for path in tmp_path.iterdir() if "source" not in path.name] == ["text.jsonl"]


@pytest.mark.parametrize("damage", ["matrix", "channels", "scale"])
def test_a_damaged_rotation_is_refused(damage: str, checkpoints, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    folder = checkpoints("llama-tied")
    tensors = load_file(folder / "transforms/smoothing.safetensors")
    layer = "model.layers.0.self_attn.q_proj"
    change = {
        "matrix": partial(tensors["rotation.stream"].mul_, 1.01),
        "channels": partial(tensors[f"{layer}.input_stream"].fill_, 3),
        "scale": partial(tensors[f"{layer}.norm_scale"].fill_, float("nan")),
    }
    change[damage]()
    (tmp_path / "transforms").mkdir()
    save_file(tensors, tmp_path / "transforms/smoothing.safetensors")
    with pytest.raises(SmoothQuantError, match="copy the checkpoint again"):
        transforms.read(tmp_path)
