"""The whole way: a model folder, calibration, vLLM, and the plain reference on the same files."""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from calibration.checkpoint.write import write_checkpoint
from calibration.options import Options
from calibration.pipeline import check_gate, observe_model
from calibration.smoothing.plan import make_plan
from tests.helpers import engine
from tests.helpers.reference import load_reference

SCHEMES = list(product(("channel", "tensor"), ("token", "tensor", "static")))

# One prompt: dynamic per-tensor scales couple the prompts of a batch, and the reference would have to batch alike.
TEXT = "The capital of France is Paris, and the capital of Italy is Rome. Water boils at a temperature of 100 degrees."


def logprobs(model, prompts):
    """Log-probabilities over the vocabulary at every position but the last, one [n - 1, vocabulary] a prompt."""
    with torch.no_grad():
        return [model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1) for ids in prompts]


def mean_distance(a, b):
    return float((a - b).abs().mean())


@pytest.mark.slow
def test_small_models_are_served_as_the_reference_computes(tmp_path):
    """The paper's families and others that share their shape; benchmarks/served.py says how near is near enough."""
    names = ["opt", "bloom-tied", "llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2"]
    output = tmp_path / "served.json"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.served", *names, "--output", str(output)],
        check=False, stdout=subprocess.PIPE, text=True, timeout=1200, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    said = json.loads(output.read_text())
    assert set(said) == set(names), done.stdout
    assert all(answer.startswith("yes") for answer in said.values()), said


@pytest.mark.slow
def test_every_scheme_of_a_real_model_is_served_as_the_reference_computes(smollm2, calibration_file, tmp_path):
    """In float32 around the integers; tests/test_plugin.py compares layer by layer, to the last bit or so.

    Through thirty layers that cannot hold: norms and attention are summed in another order, so an activation may lie on
    a rounding tie and fall to the other side, and one flip moves all that follows. Then the two are two roundings of
    one model with independent errors, sqrt(2) times as far from each other as from the floating-point model; without a
    flip they agree to 1e-5. And both must be equally far from floating point, which a scheme mistaken for another is
    not: static is several times as far as per-token. A mean over 49152 words at some twenty places: a quarter of slack.
    """
    model = {"model": str(smollm2), "dataset": str(calibration_file), "samples": 4, "seq_len": 128, "quiet": True}
    observation = observe_model(Options(**model))
    folders, gate_report = [], None
    for weights, activations in SCHEMES:
        folders.append(tmp_path / f"{weights}-{activations}")
        options = Options(**model, output=str(folders[-1]), weights=weights, activations=activations)
        plan = make_plan(observation, options)
        gate_report = gate_report or check_gate(observation, plan.smoothing)  # the same factors for all: alpha 0.5
        write_checkpoint(observation, plan, gate_report, options)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(TEXT)["input_ids"]]
    served = engine.logprobs_of(folders, prompts, vocabulary=True)
    exact = torch.cat(logprobs(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval(), prompts))
    for folder, answer in zip(folders, served, strict=True):
        reference = torch.cat(logprobs(load_reference(folder), prompts))
        rounding = mean_distance(reference, exact)
        apart = mean_distance(torch.cat(answer), reference)
        ratio = mean_distance(torch.cat(answer), exact) / rounding
        print(f"{folder.name}: apart {apart:.2e}; to floating point {rounding:.2e}, times {ratio:.2f} as served")
        assert apart < 1.25 * 2**0.5 * rounding, folder.name
        assert 0.75 < ratio < 1.33, folder.name
