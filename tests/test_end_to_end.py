"""End to end: calibrate a model folder, serve it with vLLM, and compare with the reference on the same files."""

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
# One prompt, because dynamic per-tensor scales couple the prompts of a batch, and the reference forms no such batches.
TEXT = "The capital of France is Paris, and the capital of Italy is Rome. Water boils at a temperature of 100 degrees."


def logprobs(model, prompts):
    """Log-probabilities over the vocabulary at every position except the last: [n - 1, vocabulary] for each prompt."""
    with torch.no_grad():
        return [model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1) for ids in prompts]


def mean_distance(a, b):
    return float((a - b).abs().mean())


@pytest.mark.slow
def test_small_models_are_served_as_the_reference_computes(tmp_path):
    """The paper's families and others of similar structure; benchmarks/served.py has the tolerance."""
    names = ["opt", "bloom-tied", "llama", "mistral", "qwen2", "qwen3", "phi3", "gpt2"]
    output = tmp_path / "served.json"
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.served", *names, "--output", str(output)],
        check=False, stdout=subprocess.PIPE, text=True, timeout=1200, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    answers = json.loads(output.read_text())
    assert set(answers) == set(names), process.stdout
    assert all(answer.startswith("yes") for answer in answers.values()), answers


@pytest.mark.slow
def test_every_scheme_of_a_real_model_is_served_as_the_reference_computes(smollm2, calibration_file, tmp_path):
    """In float32 around the integers; tests/test_linear.py compares single layers, to about the last bit.

    Thirty layers cannot agree that closely. Norms and attention are summed in another order, so an activation near a
    rounding tie may be rounded to the other side, and one such flip changes all later values. Then served model and
    reference are two roundings of one model with independent errors: their distance is sqrt(2) times the distance of
    each to the floating-point model. Without a flip they agree to 1e-5. Both must also be equally far from floating
    point; a wrong scheme is not: static is several times as far as per-token. The tolerance is a quarter, because the
    distance is a mean over 49152 words at about twenty positions.
    """
    model = {
        "model": str(smollm2), "dataset": str(calibration_file), "samples": 4, "seq_len": 128, "quiet": True,
        "rotation": "always", "alpha": 0.5,
    }  # fmt: skip
    observation = observe_model(Options(**model))
    folders, gate_report = [], None
    for weights, activations in SCHEMES:
        folders.append(tmp_path / f"{weights}-{activations}")
        # O3 is static everywhere; without it, some kinds of layers would keep scales per token.
        scheme = {"level": "O3"} if activations == "static" else {"activations": activations}
        options = Options(**model, output=str(folders[-1]), weights=weights, **scheme)
        plan = make_plan(observation, options)
        gate_report = gate_report or check_gate(observation, plan.smoothing)  # alpha 0.5 for all
        write_checkpoint(observation, plan, gate_report, options)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompts = [tokenizer(TEXT)["input_ids"]]
    served = engine.logprobs_of(folders, prompts, vocabulary=True)
    exact = torch.cat(logprobs(AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval(), prompts))
    for folder, answer in zip(folders, served, strict=True):
        reference = torch.cat(logprobs(load_reference(folder), prompts))
        rounding = mean_distance(reference, exact)
        distance = mean_distance(torch.cat(answer), reference)
        ratio = mean_distance(torch.cat(answer), exact) / rounding
        print(f"{folder.name}: distance {distance:.2e}; to floating point {rounding:.2e}, times {ratio:.2f} as served")
        assert distance < 1.25 * 2**0.5 * rounding, folder.name
        assert 0.75 < ratio < 1.33, folder.name
