"""A model that accelerate keeps on disk, or on the CPU beside an accelerator, calibrates as it does on the CPU."""

import functools
import json
from pathlib import Path

import accelerate
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from calibration import __main__ as cli
from calibration.checkpoint.verify import verify
from calibration.inputs import model as inputs
from calibration.inputs.model import empty_model, load
from calibration.observation.processes import Processes
from calibration.options import Options
from calibration.pipeline import calibrate, observe_model, smooth
from calibration.recipe import RECIPE, dump_recipe, read_recipe
from calibration.running import offload, precision
from calibration.running.modules import block_of, own_parameters
from calibration.smoothing.plan import make_plan
from tests.helpers import tiny_architectures, tiny_checkpoints
from vllm_smoothquant.format.errors import SmoothQuantError

ALL = {"": "disk"}
# Every module by name, as accelerate's documentation writes a map; and two maps in which keys contain each other.
NAMED = {
    "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
    "lm_head": "disk",
}  # fmt: skip
MAPS = {
    "llama": [ALL, NAMED, {"": "disk", "model.layers.0": "cpu", "model.layers.0.mlp.up_proj": "disk"}],
    "llama-tied": [ALL, NAMED, {"model": "disk", "lm_head": "cpu"}],
    "opt": [ALL, {"": "cpu", "model.decoder.layers.1": "disk"}],
    "mixtral": [ALL, NAMED],
}
CASES = [
    pytest.param(name, device_map, id=f"{name}-{i}") for name, maps in MAPS.items() for i, device_map in enumerate(maps)
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_checkpoints.save_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """get(name) -> the folder of the model `name`, written by its first call."""
    root = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: tiny_checkpoints.save(name, root / name))


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder


def options(model, output, text, **changes):
    size = {"samples": tiny_checkpoints.SAMPLES, "seq_len": tiny_checkpoints.SEQ_LEN}
    return {"model": str(model), "output": str(output), "dataset": str(text), "quiet": True} | size | changes


def files(folder):
    """Name -> bytes of every file except the recipe, which has the device map."""
    paths = (path for path in sorted(Path(folder).rglob("*")) if path.is_file() and path.name != RECIPE)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def shared(model):
    """The sets of names that one parameter has."""
    names = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, set()).add(name)
    return list(names.values())


def mapped_file(tensor):
    """The file that is mapped where `tensor` lies in memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        addresses, *_, path = line.split(maxsplit=5)
        begin, end = (int(address, 16) for address in addresses.split("-"))
        if begin <= tensor.data_ptr() < end:
            return path if path.startswith("/") else ""
    return ""


def assert_same_model(model, expected):
    state, expected_state = model.state_dict(), expected.state_dict()
    assert list(state) == list(expected_state)
    for name, tensor in state.items():
        assert (tensor.dtype, tensor.device) == (expected_state[name].dtype, torch.device("cpu")), name
        assert torch.equal(tensor, expected_state[name]), name
    assert shared(model) == shared(expected)
    with torch.no_grad():
        logits, expected_logits = (m(tiny_architectures.tokens()).logits for m in (model, expected))
    assert torch.equal(logits, expected_logits)


# --- disk ---


@pytest.mark.parametrize(("name", "device_map"), CASES)
def test_the_loaded_model_is_the_one_on_the_cpu(name, device_map, models, temporary):
    before = files(models(name))
    model = load(str(models(name)), device_map).model
    assert_same_model(model, load(str(models(name)), "cpu").model)
    assert not any(hasattr(module, "_hf_hook") for module in model.modules())
    assert not hasattr(model, "hf_device_map")  # with which save_pretrained looks for offloaded weights
    assert not list(temporary.iterdir())
    assert files(models(name)) == before


@pytest.mark.parametrize("name", MAPS)
def test_weights_on_disk_are_mapped_files(name, models, temporary):
    """Also stacked experts, which no file of the model has. They begin a page, as new tensors begin a cache line."""
    for key, parameter in load(str(models(name)), ALL).model.named_parameters():
        file = mapped_file(parameter)
        assert file, key
        if str(models(name)) not in file:
            assert "experts" in key
            assert parameter.data_ptr() % 4096 == 0


def test_parameters_that_stay_in_float32_do_so_on_disk(tmp_path, temporary):
    """accelerate's index has the dtype of the others for them."""
    folder = tiny_checkpoints.save("gpt-oss", tmp_path / "model", torch.float16)
    model = load(str(folder), ALL).model
    assert_same_model(model, load(str(folder), "cpu").model)
    assert model.model.norm.weight.dtype == torch.float32
    assert mapped_file(model.model.norm.weight)


@pytest.mark.parametrize(("name", "device_map"), CASES)
def test_the_checkpoint_is_that_of_the_cpu(name, device_map, models, text, tmp_path, temporary):
    changes = {"activations": "static", "alpha": "auto"}
    calibrate(**options(models(name), tmp_path / "cpu", text, device_map="cpu", **changes))
    calibrate(**options(models(name), tmp_path / "out", text, device_map=device_map, **changes))
    assert files(tmp_path / "out") == files(tmp_path / "cpu")
    assert not list(temporary.iterdir())


def test_a_tied_head_on_disk_can_be_int8(models, text, tmp_path):
    for out, device_map in (("cpu", "cpu"), ("out", ALL)):
        changes = {"quantize_lm_head": True, "level": "O1", "device_map": device_map}
        calibrate(**options(models("llama-tied"), tmp_path / out, text, **changes))
    assert files(tmp_path / "out") == files(tmp_path / "cpu")


@pytest.mark.parametrize("name", ["llama", "opt", "mixtral"])
def test_smooth_writes_the_same_model_and_leaves_the_source(name, models, text, tmp_path, temporary):
    before = files(models(name))
    for out, device_map in (("cpu", "cpu"), ("out", ALL)):
        smooth(**options(models(name), tmp_path / out, text, device_map=device_map))
    assert files(tmp_path / "out") == files(tmp_path / "cpu")
    assert files(models(name)) == before
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_bin_files_are_mapped_too(name, models, text, tmp_path, temporary):
    """A .bin file has both names of a tied parameter, which transformers does not tie if both are on disk."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for file in models(name).iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(models(name) / "model.safetensors")
    if name == "llama-tied":
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    model = load(str(folder), ALL).model
    assert all(mapped_file(parameter) for parameter in model.parameters())
    assert_same_model(model, load(str(models(name)), "cpu").model)
    assert not list(temporary.iterdir())


def test_auto_uses_the_disk_for_what_memory_cannot_hold(models, text, tmp_path, monkeypatch, temporary):
    """Also for verify --source, which has no option for it."""
    placed = []

    def take_over(model, folder):
        placed.append(set(model.hf_device_map.values()))
        offload.take_over(model, folder)

    calibrate(**options(models("llama"), tmp_path / "cpu", text, device_map="cpu"))
    monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda *_: {"cpu": 900_000})
    monkeypatch.setattr(inputs, "take_over", take_over)
    calibrate(**options(models("llama"), tmp_path / "out", text))
    verdict = verify(str(tmp_path / "out"), str(models("llama")))
    assert (verdict.faults, bool(verdict.layers)) == ([], True)
    assert files(tmp_path / "out") == files(tmp_path / "cpu")
    assert placed == [{"cpu", "disk"}] * 2


def test_each_process_of_several_has_a_device_of_its_own(monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_device_index", lambda: 1)
    for available, device_map in ((True, {"": 1}), (False, "cpu")):
        monkeypatch.setattr("torch.accelerator.is_available", lambda available=available: available)
        assert Processes(1, 2).placement("auto") == device_map
        assert Processes(0, 1).placement("auto") == "auto", "one process uses all that there is"
        assert Processes(1, 2).placement(ALL) == ALL


def test_a_parameter_that_is_nowhere_is_named(models, temporary):
    folder = offload.offload_folder()
    model = AutoModelForCausalLM.from_pretrained(models("llama"), device_map=ALL, offload_folder=folder.name)
    model.model.norm._hf_hook.weights_map.dataset.index.pop("model.norm.weight")
    with pytest.raises(SmoothQuantError, match=r"model\.norm\.weight: expected values"):
        offload.take_over(model, Path(folder.name))


def test_a_tensor_of_another_shape_is_named(models, tmp_path, temporary):
    """transformers does not look at the shapes of what stays on disk."""
    folder = tmp_path / "model"
    AutoModelForCausalLM.from_pretrained(models("llama")).save_pretrained(folder)
    tiny_checkpoints.tokenizer().save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"model.norm.weight": torch.ones(64)}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SmoothQuantError, match=r"model\.norm\.weight: expected shape \[128\], got \[64\]"):
        load(str(folder), ALL)
    assert not list(temporary.iterdir())


@pytest.mark.parametrize("writer", ["transformers.integrations.accelerate.save_file", "tempfile.NamedTemporaryFile"])
def test_a_full_disk_is_an_error_with_the_way_out(writer, models, monkeypatch, temporary):
    def full(*_, **__):
        raise SafetensorError("IoError: No space left on device") if "save" in writer else OSError(28, "No space left")

    monkeypatch.setattr(writer, full)
    with pytest.raises(SmoothQuantError, match=r"No space left.*; set TMPDIR to a folder with more room"):
        load(str(models("mixtral")), ALL)
    assert not list(temporary.iterdir())


# --- an accelerator ---


@pytest.fixture
def small_accelerator(monkeypatch):
    """An accelerator that holds no weight: device "cpu:0", to which every tensor must be copied.

    accelerate and offload.py do for it what they do for "cuda:0", because it is not the device "cpu".
    """
    dispatch = functools.partial(accelerate.big_modeling.dispatch_model, main_device="cpu:0")
    monkeypatch.setattr("transformers.integrations.accelerate.dispatch_model", dispatch)


MIXED = {"": "cpu", "model.layers.1": "disk"}


def offloaded(folder):
    """(model, parameter -> (its address on the CPU, its values))."""
    model = load(str(folder), MIXED).model
    return model, {parameter: (parameter.data_ptr(), parameter.clone()) for parameter in model.parameters()}


def at_home(memory):
    return all(p.data_ptr() == address and torch.equal(p, values) for p, (address, values) in memory.items())


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mixtral", "bamba"])
def test_parameters_are_on_the_device_while_they_are_used(name, models, small_accelerator):
    """Hooks find those of their module or block there. Between uses they are on the CPU, the same with the same bits.

    The mixers of bamba read the weights of a convolution that they do not call.
    """
    model, memory = offloaded(models(name))
    seen = set()

    def hook(parameters, *_):
        assert all(parameter.data_ptr() != memory[parameter][0] for parameter in parameters)
        seen.update(parameters)

    for path, module in model.named_modules():
        block = block_of(path)
        parameters = list(model.get_submodule(block).parameters() if block else own_parameters(module).values())
        module.register_forward_pre_hook(functools.partial(hook, parameters))
        module.register_forward_hook(functools.partial(hook, parameters))
    with torch.no_grad():
        logits = model(tiny_architectures.tokens()).logits
    assert seen == set(memory) == set(model.parameters())
    assert at_home(memory)
    expected = load(str(models(name)), "cpu").model
    assert shared(model) == shared(expected)
    with torch.no_grad():  # a product of matrices at other addresses may add in another order
        torch.testing.assert_close(logits, expected(tiny_architectures.tokens()).logits, rtol=1e-5, atol=1e-5)


def test_a_module_that_runs_alone_returns_to_the_device_of_its_input(models, small_accelerator, monkeypatch):
    """Discovery runs norms with inputs on the device of their parameters, and compares outputs with tensors there."""
    model, memory = offloaded(models("llama"))
    devices = []
    send = accelerate.hooks.send_to_device

    def recorded(value, device, **keys):
        devices.append(str(device))
        return send(value, device, **keys)

    monkeypatch.setattr("accelerate.hooks.send_to_device", recorded)
    model.model.norm(torch.ones(1, 2, 128))
    assert devices == ["cpu:0", "cpu:0", "cpu"], "the arguments, the keyword arguments, the output"
    assert at_home(memory)


def test_parameters_return_after_an_error(models, small_accelerator):
    model, memory = offloaded(models("llama"))

    def fail(*_):
        raise KeyboardInterrupt

    model.model.layers[1].mlp.down_proj.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(tiny_architectures.tokens())
    assert at_home(memory)


def test_a_bypassed_block_does_not_move(models, small_accelerator):
    """As blocks.py bypasses all blocks but one: moving them would copy the whole model for each block."""
    model, memory = offloaded(models("llama"))
    stayed = []

    def bypass(hidden_states, **_):
        stayed.append(at_home(memory))
        return hidden_states

    model.model.layers[0].forward = bypass
    with torch.no_grad():
        model(tiny_architectures.tokens())
    assert stayed == [True]


class HomeReads(TorchDispatchMode):
    """Fails if an operation reads the CPU's data of a parameter while `model` runs: on a GPU, devices would differ."""

    def __init__(self, model):
        super().__init__()
        self.home = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
        self.running = 0
        for module in (model, model.base_model):
            module.register_forward_pre_hook(lambda *_: self.count(1))
            module.register_forward_hook(lambda *_: self.count(-1))

    def count(self, step):
        self.running += step

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)) if self.running else ():
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                assert tensor.data_ptr() not in self.home, f"{func} reads {self.home[tensor.data_ptr()]}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": "auto", "level": "O1", "quantize_lm_head": True},
        {"activations": "static", "max_fallback": 0.5, "budget_ppl": 1.0},
    ],
)
def test_searches_find_all_weights_on_the_device(changes, models, text, tmp_path, small_accelerator):
    """Their hooks read the weights of other modules of the block."""
    chosen = Options(**options(models("llama"), tmp_path / "out", text, device_map=MIXED, **changes))
    observation = observe_model(chosen)
    with HomeReads(observation.model):
        make_plan(observation, chosen)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "opt", "mixtral"])
def test_the_checkpoint_is_the_same_beside_an_accelerator(name, native, text, tmp_path, monkeypatch, small_accelerator):
    """In bfloat16, which the gate, and a CPU that has no such products, runs in float32."""
    monkeypatch.setitem(precision._NATIVE_ON_CPU, torch.bfloat16, lambda: native)
    folder = tiny_checkpoints.save(name, tmp_path / "model", torch.bfloat16)
    last = "model.decoder.layers.1" if name == "opt" else "model.layers.1"
    for out, device_map in (("cpu", "cpu"), ("out", {"": "cpu", last: "disk"})):
        calibrate(**options(folder, tmp_path / out, text, device_map=device_map, quantize_lm_head="tied" in name))
    assert files(tmp_path / "out") == files(tmp_path / "cpu")


# --- the option ---


def test_one_key_for_each_tensor(models):
    """Tied parameters are one tensor, so they are in one place."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_architectures.config("llama-tied"))
    complete = offload.complete_map(model, {"": 0, "model.layers.1": "disk", "model.layers.1.mlp": "cpu", "lm_head": 1})
    assert complete == {
        "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1.self_attn": "disk", "model.layers.1.mlp": "cpu",
        "model.layers.1.input_layernorm": "disk", "model.layers.1.post_attention_layernorm": "disk", "model.norm": 0,
        "model.rotary_emb": 0, "lm_head": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [
        ({"model.layer.1": "disk"}, r"model.layer.1: expected a module such as model.layers.1, got none"),
        ({"model": "disk"}, "expected a device for lm_head.weight, got none"),
        ({"": "cuda:7"}, "expected a device of this machine: cpu, disk, got cuda:7"),
        ({"": 0}, "expected a device of this machine: cpu, disk, got 0"),
        ("cuda", "expected a device of this machine: cpu, disk, got cuda"),
        ("atuo", "expected a device of this machine: cpu, disk, got atuo"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_before_weights_are_read(device_map, expected, models, monkeypatch):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda: None)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 0)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    with pytest.raises(SmoothQuantError, match=expected):
        load(str(models("llama")), device_map)


@pytest.mark.parametrize(
    "value",
    [
        "", "{", '{"": }', "{}", '{"": "cpu", "": "disk"}', '{"": -1}', '{"": true}', '{"": null}', '{"": {"a": 0}}',
        -1, None, {1: "cpu"}, '{"":' * 100_000,
    ],
    ids=lambda value: str(value)[:20],
)  # fmt: skip
def test_what_is_no_map_is_refused(value):
    with pytest.raises(SmoothQuantError, match=r"^--device-map: expected auto, .*, got "):
        Options(model="m", device_map=value)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("auto", "auto"), ("cuda:1", "cuda:1"), ("1", {"": 1}), (1, {"": 1}), ("disk", {"": "disk"}), (NAMED, NAMED),
        (json.dumps(NAMED), NAMED), (' {"": 0}', {"": 0}),
    ],
)  # fmt: skip
def test_a_recipe_keeps_the_map(value, expected, tmp_path):
    chosen = Options(model="m", device_map=value)
    assert chosen.device_map == expected
    recipe = tmp_path / RECIPE
    recipe.write_text(dump_recipe(vars(chosen)))
    assert Options(**read_recipe(str(recipe))).device_map == expected


def test_the_command_line_takes_a_map(models, text, tmp_path, capsys):
    size = ["--samples", str(tiny_checkpoints.SAMPLES), "--seq-len", str(tiny_checkpoints.SEQ_LEN)]
    command = ["calibrate", str(models("llama")), "-o", str(tmp_path / "out"), "--dataset", str(text), *size]
    assert cli.main([*command, "--device-map", '{"": "cpu", "model.layers.1" "disk"}']) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out.state").exists()
    assert cli.main([*command, "--device-map", json.dumps(NAMED)]) == 0
    assert read_recipe(str(tmp_path / "out" / RECIPE))["device_map"] == NAMED


def test_the_model_that_a_map_is_completed_for_takes_no_memory(models):
    assert all(tensor.is_meta for tensor in empty_model(models("llama")).state_dict().values())
