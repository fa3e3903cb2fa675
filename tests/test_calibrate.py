"""From a model folder to a checkpoint, on tiny models: the files, their values, and errors for invalid input."""

import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from calibration import __main__ as cli
from calibration.checkpoint import export
from calibration.checkpoint.verify import verify
from calibration.checkpoint.write import write_checkpoint
from calibration.observation import absmax
from calibration.options import Options
from calibration.pipeline import calibrate, check_gate, observe_model, smooth
from calibration.smoothing.plan import make_plan
from tests.helpers import tiny_architectures, tiny_checkpoints
from tests.helpers.reference import load_reference
from vllm_smoothquant.format.config import CheckpointConfig
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "opt", "bloom")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_checkpoints.save_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """get(name) -> the folder of the model `name`, written by its first call."""
    root = tmp_path_factory.mktemp("models")
    return functools.cache(lambda name: tiny_checkpoints.save(name, root / name))


def run(model, output, text, **options):
    size = {"samples": tiny_checkpoints.SAMPLES, "seq_len": tiny_checkpoints.SEQ_LEN, "rotation": "none"}
    return calibrate(str(model), output, **({"dataset": str(text), "quiet": True} | size | options))


def tensors(folder):
    return {k: v for f in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(f).items()}


def token_ids():
    return torch.randint(3, tiny_architectures.VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))


def relative_error(logits, original):
    return float((logits - original).norm() / original.norm())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_tensor_is_as_the_format_defines(name, models, text, tmp_path):
    manifest = run(models(name), tmp_path / "out", text, activations="static")
    stored, source = tensors(tmp_path / "out"), tensors(models(name))
    config = CheckpointConfig.from_dict(json.loads((tmp_path / "out/config.json").read_text())["quantization_config"])
    expected = {k: (t.dtype, tuple(t.shape)) for k, t in source.items()}
    for layer in manifest["quantized"]:
        prefix = next(p for p in (layer, layer.removeprefix("transformer.")) if f"{p}.weight" in source)
        specs = config.scheme(layer).tensors(*source[f"{prefix}.weight"].shape)
        expected |= {f"{prefix}.{suffix}": spec for suffix, spec in specs.items()}
    assert {k: (t.dtype, tuple(t.shape)) for k, t in stored.items()} == expected
    assert manifest["files"] == export.file_hashes(tmp_path / "out")


@pytest.mark.parametrize("name", FAMILIES)
def test_smoothing_reduces_the_error_of_the_checkpoint(name, models, text, tmp_path):
    original = AutoModelForCausalLM.from_pretrained(models(name), dtype=torch.float32).eval()
    with torch.no_grad():
        expected = original(token_ids()).logits
        errors = {}
        for smoothing in (True, False):
            run(models(name), tmp_path / str(smoothing), text, no_smoothing=not smoothing)
            errors[smoothing] = relative_error(load_reference(tmp_path / str(smoothing))(token_ids()).logits, expected)
    assert errors[True] < errors[False]


def test_static_scale_is_the_range_of_the_smoothed_activation(models, text, tmp_path):
    """Calibration computes it from the original's ranges and the factors; here the smoothed model is observed."""
    options = Options(
        model=str(models("llama")), output=str(tmp_path / "out"), dataset=str(text), level="O3", weights="channel",
        samples=tiny_checkpoints.SAMPLES, seq_len=tiny_checkpoints.SEQ_LEN, rotation="none", quiet=True,
    )  # fmt: skip
    observation = observe_model(options)
    plan = make_plan(observation, options)
    write_checkpoint(observation, plan, check_gate(observation, plan.smoothing), options)
    stored = tensors(tmp_path / "out")
    plan.smoothing.apply_()
    smoothed = absmax.observe_absmax(observation.model, observation.layers, observation.samples.input_ids)
    for name, channels in smoothed.items():
        # rtol, because the smoothed model rounds W * s and x / s in float32, layer after layer.
        torch.testing.assert_close(stored[f"{name}.input_scale"][0], channels.max() / 127, rtol=1e-4, atol=0)


def test_a_tied_head_gets_its_own_weight_in_int8(models, text, tmp_path):
    source = models("llama-tied")
    assert json.loads((source / "config.json").read_text())["tie_word_embeddings"]
    manifest = run(source, tmp_path / "out", text, quantize_lm_head=True, alpha="auto")
    assert "lm_head" in manifest["quantized"]
    assert "lm_head" not in manifest["quantization_config"]["ignore"]
    assert not json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    stored, original_tensors = tensors(tmp_path / "out"), tensors(source)
    assert stored["lm_head.weight"].dtype == torch.int8
    assert torch.equal(stored["model.embed_tokens.weight"], original_tensors["model.embed_tokens.weight"])
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        logits, expected = (m(token_ids()).logits for m in (load_reference(tmp_path / "out"), original))
    assert relative_error(logits, expected) < 0.1  # each layer of 8 bits adds about a percent


def test_smooth_changes_weights_and_no_bit_of_the_logits(models, text, tmp_path):
    size = {"samples": tiny_checkpoints.SAMPLES, "seq_len": tiny_checkpoints.SEQ_LEN}
    smooth(str(models("opt")), tmp_path / "out", dataset=str(text), **size)
    with torch.no_grad():
        a, b = (AutoModelForCausalLM.from_pretrained(f)(token_ids()).logits for f in (models("opt"), tmp_path / "out"))
    assert torch.equal(a, b)
    source, smoothed = tensors(models("opt")), tensors(tmp_path / "out")
    changed = {k for k in source if not torch.equal(source[k], smoothed[k])}
    assert "model.decoder.layers.0.self_attn.q_proj.weight" in changed


def test_the_same_inputs_give_the_same_bytes(models, text, tmp_path):
    for out in ("a", "b"):
        run(models("llama"), tmp_path / out, text)
    for file in sorted(path for path in (tmp_path / "a").rglob("*") if path.is_file()):
        name = file.relative_to(tmp_path / "a")
        assert file.read_bytes() == (tmp_path / "b" / name).read_bytes(), name


def test_bfloat16_stays_bfloat16(text, tmp_path):
    tiny_checkpoints.save("llama", tmp_path / "model", torch.bfloat16)
    run(tmp_path / "model", tmp_path / "out", text)
    stored = tensors(tmp_path / "out")
    assert {t.dtype for k, t in stored.items() if "norm" in k or "embed" in k} == {torch.bfloat16}
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


def test_tied_embeddings_stay_tied(text, tmp_path):
    tiny_checkpoints.save("llama-tied", tmp_path / "model")
    run(tmp_path / "model", tmp_path / "out", text)
    assert "lm_head.weight" not in tensors(tmp_path / "out")


def test_ignored_layers_stay_in_floating_point(models, text, tmp_path):
    name = "model.layers.1.mlp.down_proj"
    manifest = run(models("llama"), tmp_path / "out", text, ignore=frozenset({name}))
    stored = tensors(tmp_path / "out")
    assert stored[f"{name}.weight"].dtype == torch.float32
    assert f"{name}.weight_scale" not in stored
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", name]
    assert manifest["kept"][name] == "asked for by --ignore"


def test_shards_and_index(tmp_path):
    named = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    export.write_tensors(tmp_path, named.items(), max_shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 200
    assert len(set(index["weight_map"].values())) == 3
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / file, "pt") as shard:
            assert torch.equal(shard.get_tensor(name), named[name])


def test_a_tensor_twice_is_an_error(tmp_path):
    with pytest.raises(SmoothQuantError, match="each tensor once"):
        export.write_tensors(tmp_path, [("a", torch.ones(1)), ("a", torch.ones(1))])


class Idle(torch.nn.Module):
    """A model of two linear layers of which one never runs."""

    def __init__(self):
        super().__init__()
        self.used, self.idle = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, input_ids, use_cache):
        return self.used(input_ids.float())


def test_absmax_is_per_input_channel():
    ids = torch.tensor([[[1, -5, 0, 2], [3, 4, 0, -2]]])
    assert absmax.observe_absmax(Idle(), ["used"], ids)["used"].tolist() == [3, 5, 0, 2]


def test_a_layer_that_no_sample_reaches_is_an_error():
    with pytest.raises(SmoothQuantError, match="idle: expected calibration text that reaches every"):
        absmax.observe_absmax(Idle(), ["used", "idle"], torch.ones(1, 2, 4))


# --- invalid input: an error in one line, exit code 1, no file left ---


def broken_model(models, tmp_path, change) -> Path:
    folder = tmp_path / "broken"
    model = AutoModelForCausalLM.from_pretrained(models("llama"))
    change(model)
    model.save_pretrained(folder)
    tiny_checkpoints.tokenizer().save_pretrained(folder)
    return folder


def edit_config(models, tmp_path, **changes) -> Path:
    folder = broken_model(models, tmp_path, lambda m: None)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def drop_tensor(models, tmp_path) -> Path:
    from safetensors.torch import save_file

    folder = broken_model(models, tmp_path, lambda m: None)
    path = folder / "model.safetensors"
    state = load_file(path)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, path, metadata={"format": "pt"})
    return folder


def truncate(models, tmp_path) -> Path:
    folder = broken_model(models, tmp_path, lambda m: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    return folder


def poison(models, tmp_path) -> Path:
    return broken_model(models, tmp_path, lambda m: m.model.layers[1].mlp.up_proj.weight.data[3, 4].fill_(torch.nan))


def overflow(models, tmp_path) -> Path:
    return broken_model(models, tmp_path, lambda m: m.model.layers[0].mlp.up_proj.weight.data.fill_(3e38))


BAD_MODELS = {
    "missing": (lambda m, t: t / "nowhere", "a model folder or a hub id"),
    "no model in it": (lambda m, t: t, "a model folder or a hub id"),
    "unknown architecture": (lambda m, t: edit_config(m, t, model_type="nonesuch"), "a model folder or a hub id"),
    "no language model": (lambda m, t: edit_config(m, t, model_type="vit"), "a class for the model_type vit"),
    "already quantised": (
        lambda m, t: edit_config(m, t, quantization_config={"quant_method": "fp8"}), "already quantised by 'fp8'",
    ),
    "tensor missing": (drop_tensor, "model.layers.1.mlp.up_proj.weight: expected every tensor"),
    "truncated": (truncate, "a model of class LlamaForCausalLM"),
    "NaN in weights": (poison, "model.layers.1.mlp.up_proj.weight: expected finite weights"),
    "activations overflow": (overflow, "finite"),
}  # fmt: skip


def fails(argv, capsys, output, message):
    files = set(output.parent.iterdir())
    assert cli.main(argv) == 1
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert err.startswith("smoothquant: ")
    assert message in err
    assert "expected" in err
    assert "got" in err
    assert set(output.parent.iterdir()) == files, "the failed run left files"


@pytest.mark.parametrize(("make", "message"), BAD_MODELS.values(), ids=BAD_MODELS)
def test_bad_models(make, message, models, text, tmp_path, capsys):
    model, output = make(models, tmp_path), tmp_path / "results" / "out"
    output.parent.mkdir()
    argv = ["calibrate", str(model), "-o", str(output), "--dataset", str(text), "--samples", "4", "--seq-len", "32"]
    fails([*argv, "--quiet"], capsys, output, message)


BAD_OPTIONS = {
    "alpha above": (["--alpha", "1.5"], "--alpha: expected a number in [0, 1], auto or grid or learned, got 1.5"),
    "alpha below": (["--alpha", "-0.1"], "--alpha"),
    "alpha nan": (["--alpha", "nan"], "--alpha"),
    "fallback above": (["--max-fallback", "150%"], "--max-fallback: expected a share from 0 to 100 %"),
    "budget alone": (["--budget-ppl", "1.5%"], "--budget-ppl: expected layers that may fall back"),
    "level and activations": (["--level", "O3", "--activations", "token"], "--activations"),
    "data set missing": (["--dataset", "/nowhere.jsonl"], "/nowhere.jsonl: expected a readable file"),
    "column missing": (["--text-column", "note"], "a text column 'note'"),
    "too few samples": (["--samples", "5000"], "text for 5000 samples"),
    "too long": (["--seq-len", "100000"], "--seq-len"),
    "unknown layer": (["--ignore", "model.layers.9.mlp"], "--ignore model.layers.9.mlp: expected a linear layer"),
    "unwritable": (["-o", "/proc/out"], "a folder that can be written"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(options, message, models, text, tmp_path, capsys):
    argv = ["calibrate", str(models("llama")), "-o", str(tmp_path / "out"), "--dataset", str(text), "--quiet"]
    fails([*argv, "--samples", "4", "--seq-len", "32", *options], capsys, tmp_path / "out", message)


def test_an_output_that_exists_is_left_alone(models, text, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/precious").write_text("mine")
    fails(["calibrate", str(models("llama")), "-o", str(tmp_path / "out")], capsys, tmp_path / "out", "a new folder")
    assert (tmp_path / "out/precious").read_text() == "mine"


def test_our_own_checkpoint_is_refused_as_a_source(models, text, tmp_path):
    run(models("llama"), tmp_path / "out", text)
    with pytest.raises(SmoothQuantError, match="already quantised by 'smoothquant'"):
        run(tmp_path / "out", tmp_path / "again", text)


def test_levels_are_those_of_the_paper(models, text, tmp_path, capsys):
    expected = {"O1": ("token", True), "O2": ("tensor", True), "O3": ("tensor", False)}
    for level, (strategy, dynamic) in expected.items():
        argv = ["calibrate", str(models("llama")), "-o", str(tmp_path / level), "--dataset", str(text), "--json"]
        assert cli.main([*argv, "--samples", "4", "--seq-len", "32", "--level", level]) == 0
        config = json.loads(capsys.readouterr().out)["quantization_config"]
        assert config["weights"]["strategy"] == "tensor"
        assert config["input_activations"] == {"num_bits": 8, "strategy": strategy, "dynamic": dynamic}


def test_the_summary_has_the_counts_and_the_next_command(models, text, tmp_path, capsys):
    argv = ["calibrate", str(models("llama")), "-o", str(tmp_path / "out"), "--dataset", str(text)]
    assert cli.main([*argv, "--samples", "4", "--seq-len", "32", "--rotation", "none"]) == 0
    summary = capsys.readouterr().out
    assert "14 linear layers in INT8, 8 groups smoothed, logits moved" in summary
    assert f"vllm serve {tmp_path / 'out'} --quantization smoothquant" in summary


def test_json_errors_are_json(tmp_path, capsys):
    assert cli.main(["calibrate", str(tmp_path / "no"), "-o", str(tmp_path / "out"), "--json"]) == 1
    assert set(json.loads(capsys.readouterr().out)["error"]) == {"where", "expected", "got", "fix"}


def test_the_manifest_records_source_and_calibration(models, text, tmp_path):
    run(models("llama"), tmp_path / "out", text)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    files = [models("llama") / name for name in ("model.safetensors", "config.json")]
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert manifest["source"]["sha256"] == hashes
    assert manifest["calibration"]["samples"] == tiny_checkpoints.SAMPLES
    assert manifest["gate"]["logits"]["change"] <= manifest["gate"]["logits"]["allowed"]


def test_calibration_needs_no_vllm(models, text, tmp_path):
    code = (
        "import sys; sys.modules['vllm'] = None\n"  # importing it now raises ImportError
        "from calibration.__main__ import main\n"
        f"sys.exit(main(['calibrate', {str(models('llama'))!r}, '-o', {str(tmp_path / 'out')!r}, "
        f"'--dataset', {str(text)!r}, '--samples', '4', '--seq-len', '32', '--quiet']))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
    assert (tmp_path / "out/model.safetensors").is_file()


def test_activations_beyond_float16_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_architectures.build("llama")
    with torch.no_grad():  # the MLP's product becomes large, the output stays as it is
        model.model.layers[0].mlp.up_proj.weight *= 2e4
        model.model.layers[0].mlp.gate_proj.weight *= 10
        model.model.layers[0].mlp.down_proj.weight /= 2e5
    model.half().save_pretrained(tmp_path / "m")
    tiny_checkpoints.tokenizer().save_pretrained(tmp_path / "m")
    text = tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    calibrate(str(tmp_path / "m"), tmp_path / "out", dataset=str(text), samples=8, seq_len=32, quiet=True)
    said = capsys.readouterr().err
    assert "beyond float16's 65504" in said
    assert "model.layers.0.mlp." in said


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_gate_that_is_nearly_closed_writes_no_infinity(dtype: torch.dtype, tmp_path: Path) -> None:
    """One channel's gate is at -30: it is quiet in calibration, and eq. 4 alone would multiply its row by 50,000."""
    model = tiny_architectures.build("llama-bias")
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[7] = 0
        model.model.layers[1].mlp.gate_proj.bias[7] = -30
        model.model.layers[1].mlp.up_proj.bias[7] = 5
    model.to(dtype).save_pretrained(tmp_path / "m")
    tiny_checkpoints.tokenizer().save_pretrained(tmp_path / "m")
    text = tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    calibrate(str(tmp_path / "m"), tmp_path / "out", dataset=str(text), samples=8, seq_len=32, quiet=True)
    assert not verify(tmp_path / "out").faults
    stored = load_file(tmp_path / "out" / "model.safetensors")
    # The row, and so the output of the layer, may grow by little: 5 / s must be far from float16's largest number.
    assert float(stored["model.layers.1.mlp.up_proj.bias"].abs().max()) < 1000
