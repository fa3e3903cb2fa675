"""docs/mixture.md: what INT8 experts cost a mixture that was trained, beside a dense model of its active size.

`python -m benchmarks.mixture`. Two small models are trained here on the calibration articles, in .cache/ and once: a
mixture in the shape of Qwen3-MoE and a dense Qwen3 whose MLP is as large as the experts of one token. Both are
calibrated with the same recipes and scored on other articles; KL from floating point is measured by simulate.py, whose
integers are those that vLLM serves. The last line printed is JSON.
"""

import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig
from transformers import Qwen3MoeForCausalLM as Mixture

from benchmarks import small_opt
from benchmarks.machine import describe
from calibration.evaluation.columns import standard_error
from calibration.evaluation.windows import token_windows
from calibration.observation.observation import Observation
from calibration.options import Options
from calibration.pipeline import observe_model
from calibration.running.products import expert_blocks, expert_layers
from calibration.smoothing import simulate
from calibration.smoothing.plan import make_plan
from demo import assets

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "mixture.json"
OUTPUT = ROOT / "docs" / "mixture.md"
STEPS, SAMPLES, WINDOWS = 800, 64, 32
EXPERTS, CHOICES, INNER = 8, 2, 256
SHAPE: dict[str, Any] = {
    "vocab_size": small_opt.VOCABULARY, "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": small_opt.POSITIONS, "bos_token_id": 0,
    "eos_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
    "mixture": (
        Mixture,
        Qwen3MoeConfig(
            **SHAPE, intermediate_size=CHOICES * INNER, moe_intermediate_size=INNER, num_experts=EXPERTS,
            num_experts_per_tok=CHOICES, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        ),
    ),
    "dense": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, intermediate_size=CHOICES * INNER)),
}  # fmt: skip
UNSMOOTHED = "smoothing 0.5, experts left out"
RECIPES: dict[str, dict[str, Any]] = {
    "no smoothing": {"no_smoothing": True},
    UNSMOOTHED: {"rotation": "none", "alpha": 0.5},
    "smoothing 0.5": {"rotation": "none", "alpha": 0.5},
    "smoothing auto": {"rotation": "none", "alpha": "auto"},
    "rotated, auto": {"rotation": "always"},
}
HEADER = """# A mixture of experts that was trained

Written by `python -m benchmarks.mixture`; not by hand. {machine}

Both models were trained here for {steps} steps on Wikipedia articles: a Qwen3-MoE of 4 layers with {experts} experts,
{choices} for each token, and a dense Qwen3 whose MLP has the size of those {choices}. Calibrated on {samples} x
{length} tokens of the same articles, scored on {windows} x {length} tokens of others; weights per channel, activations
per token. KL: hundred-thousandths of a nat per token from floating point, ± its standard error over the windows;
simulated, with the integers that vLLM serves.

| recipe | mixture | dense |
|---|---|---|
"""


def model_dir(name: str) -> Path:
    """The folder of the trained model `name`."""
    target = assets.CACHE / f"Qwen3-{name}-{STEPS}"
    if not target.is_dir():
        with assets.made(target) as folder:
            small_opt.save_trained(*MODELS[name], folder, STEPS)
    return target


def without_experts(observation: Observation) -> Observation:
    """`observation` without the groups that an expert reads or that divide an expert's rows."""
    experts = expert_layers(observation.model)
    groups = tuple(
        group
        for group in observation.graph.groups
        if not experts & {group.source, *(reader.name for reader in group.readers)}
    )
    return replace(observation, graph=replace(observation.graph, groups=groups))


def measure(name: str) -> dict[str, list[float]]:
    """Recipe -> [KL, its standard error]."""
    options = Options(
        model=str(model_dir(name)), dataset=str(assets.calibration_text()), samples=SAMPLES, seq_len=small_opt.LENGTH,
        quiet=True,
    )  # fmt: skip
    rows, _ = token_windows(
        [options.model], str(assets.evaluation_text()), text_column="text", samples=WINDOWS, seq_len=small_opt.LENGTH,
        seed=0,
    )  # fmt: skip
    windows, figures = torch.tensor(rows), {}
    plain = observe_model(replace(options, rotation="none"))
    exact = simulate.log_probabilities(plain.model, windows, {})
    for recipe, changes in RECIPES.items():
        if recipe == UNSMOOTHED and not expert_blocks(plain.model):
            continue
        row_options = replace(options, **changes)
        observation = plain if row_options.rotation != "always" else observe_model(row_options)
        if recipe == UNSMOOTHED:
            observation = without_experts(observation)
        layers = make_plan(observation, row_options).layers()
        found = simulate.divergences(exact, simulate.log_probabilities(observation.model, windows, layers))
        figures[recipe] = [statistics.fmean(found), standard_error(found)]
        print(name, recipe, figures[recipe], file=sys.stderr, flush=True)
    return figures


def page(figures: dict[str, dict[str, list[float]]]) -> str:
    text = HEADER.format(
        machine=describe(), steps=STEPS, experts=EXPERTS, choices=CHOICES, samples=SAMPLES, length=small_opt.LENGTH,
        windows=WINDOWS,
    )  # fmt: skip
    for recipe in RECIPES:
        cells = [
            f"{1e5 * found[recipe][0]:.1f} ± {1e5 * found[recipe][1]:.1f}" if recipe in found else ""
            for found in figures.values()
        ]
        text += f"| {recipe} | {' | '.join(cells)} |\n"
    return text


def main() -> None:
    figures = {name: measure(name) for name in MODELS}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    OUTPUT.write_text(page(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
