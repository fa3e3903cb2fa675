"""transformers' from_pretrained reads our checkpoints correctly with our import, and refuses them without it."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import calibration.from_pretrained  # noqa: F401 (registers the quantiser)
from tests.helpers import tiny_architectures, tiny_checkpoints
from tests.helpers.reference import load_reference
from vllm_smoothquant.format.config import TRANSFORMERS_WEIGHTS
from vllm_smoothquant.format.errors import SmoothQuantError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> a checkpoint of that model with every kind of tensor, made on first use."""
    options = {"activations": "static", "alpha": "auto", "max_fallback": 0.2}
    return tiny_checkpoints.checkpoints(tmp_path_factory.mktemp("checkpoints"), **options)


@pytest.fixture
def copy(checkpoints, tmp_path):
    return Path(shutil.copytree(checkpoints("llama"), tmp_path / "copy"))


def test_transformers_refuses_a_checkpoint_without_our_import_and_loads_it_with_it(checkpoints):
    """In a separate process, which imports only what this code imports."""
    code = """if True:
        import sys
        from transformers import AutoModelForCausalLM
        try:
            AutoModelForCausalLM.from_pretrained(sys.argv[1])
        except ValueError as error:
            print(error)
        assert "calibration" not in sys.modules
        import calibration.from_pretrained
        print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__)
    """
    process = subprocess.run(
        [sys.executable, "-c", code, str(checkpoints("llama"))], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    refusal, layer_class = process.stdout.splitlines()
    assert refusal.startswith("The transformers file in the config seems to be incorrect")
    assert TRANSFORMERS_WEIGHTS in refusal
    assert layer_class == "QuantizedLinear"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {}),
        ("llama", {"activations": "token", "weights": "tensor"}),
        ("llama", {"activations": "tensor"}),
        ("llama-tied", {}),
        ("llama-tied", {"quantize_lm_head": True}),
        ("gpt2", {}),
        ("opt", {"alpha": 0.5}),
        ("olmo2", {}),
        ("mixtral", {}),
    ],
    ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())) or "static",
)
def test_the_model_computes_the_same_as_the_reference(name, options, dtype, checkpoints):
    """Equal to the last bit, because both use the same arithmetic in the same order."""
    folder = checkpoints(name, **options)
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    ids = torch.randint(3, tiny_architectures.VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_reference(folder, dtype)(ids).logits)


def test_scales_stay_float32_if_the_model_changes_its_dtype(checkpoints):
    folder = checkpoints("llama")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    scales = {name: tensor.clone() for name, tensor in model.named_buffers() if name.endswith("scale")}
    model.to(torch.bfloat16)
    assert scales
    for name, tensor in model.named_buffers():
        assert name not in scales or torch.equal(tensor, scales[name])
    assert model.model.norm.weight.dtype == torch.bfloat16


def edit(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


UP = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[f"{UP}.weight_scale"][3].fill_(float("nan")), f"{UP}.weight_scale: expected finite values above"),
        (lambda s: s.pop(f"{UP}.weight_scale"), f"{UP}.weight_scale: expected F32"),
        (lambda s: s.pop("model.norm.weight"), "model.norm.weight: expected a tensor in the checkpoint"),
        (lambda s: s.update(extra=torch.ones(2)), "extra: expected a tensor of this architecture"),
        (lambda s: s.update({f"{UP}.weight": s[f"{UP}.weight"].float()}), f"{UP}.weight: expected int8"),
    ],
    ids=["NaN", "missing scale", "missing norm", "extra tensor", "not int8"],
)
def test_faults_that_transformers_only_warns_about_are_refused(change, message, copy):
    edit(copy, change)
    with pytest.raises(SmoothQuantError, match=message.replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(copy)


def test_an_index_cannot_name_files_outside_the_folder(copy, tmp_path):
    outside = tmp_path / "outside.safetensors"
    (copy / "model.safetensors").rename(outside)
    for name in ("../outside.safetensors", str(outside)):
        weight_map = dict.fromkeys(load_file(outside), name)
        (copy / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        with pytest.raises(SmoothQuantError, match=r"outside\.safetensors: expected a file in this folder"):
            AutoModelForCausalLM.from_pretrained(copy)


def test_a_floating_point_model_is_not_quantised_while_loading(tmp_path):
    from calibration.from_pretrained import SmoothQuantHfConfig
    from vllm_smoothquant.format.config import CheckpointConfig

    folder = tiny_checkpoints.save("llama", tmp_path / "model")
    with pytest.raises(SmoothQuantError, match="run `smoothquant calibrate MODEL -o OUT`"):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=SmoothQuantHfConfig(CheckpointConfig()))
