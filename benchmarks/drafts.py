"""docs/drafts.md: drafts that read hidden states, made for the source model, on its quantised checkpoint.

`python -m benchmarks.drafts`. Two pairs are trained here, in .cache/ and once: an EAGLE draft for the dense Qwen3 of
mixture.py, and a mixture in the shape of ERNIE 4.5 with an MTP layer in its own files. A draft learns the model's
distribution of the token after the next from the embedding of the next token and the hidden state, on the calibration
articles; the model stays as it is. Both are served by vLLM's CPU backend in float32, greedily, on prompts from other
articles. A second table has tiny random models with an MTP layer (tests/helpers/tiny_drafts.py), to see what loads.
The last line printed is JSON.
"""

import json
import re
import statistics
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from benchmarks import mixture, small_opt, training
from benchmarks.machine import describe
from calibration.evaluation.columns import standard_error
from calibration.evaluation.windows import token_windows
from calibration.pipeline import calibrate
from demo import assets
from tests.helpers import draft_engine, tiny_checkpoints, tiny_drafts
from tests.helpers.engine import EngineFailedError

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "drafts.json"
OUTPUT = ROOT / "docs" / "drafts.md"
STEPS, BATCH, LENGTH, LEARNING_RATE = 600, 8, 128, 2e-3
PROMPTS, PROMPT, NEW = 32, 24, 48
NONE = "floating point"
ARMS: dict[str, dict[str, Any]] = {
    "INT8 (default)": {"rotation": "none"},
    "INT8, alpha auto": {"rotation": "none", "alpha": "auto"},
    "INT8, static": {"rotation": "none", "activations": "static"},
    "4 bits": {"rotation": "none", "bits": 4},
}
MIXTURE = transformers.Ernie4_5_MoeConfig(
    **{key: value for key, value in mixture.SHAPE.items() if key != "head_dim"}, intermediate_size=512,
    moe_intermediate_size=256, moe_num_experts=8, moe_k=2, moe_num_shared_experts=0, moe_layer_start_index=1,
)  # fmt: skip
HEADER = """# Drafts that read hidden states

Written by `python -m benchmarks.drafts`; not by hand. {machine}

Speculative decoding with a draft of the source model. Calibrated with `--rotation none`, because a rotation of the
hidden states would change what the draft reads. Trained here: an EAGLE draft for a dense Qwen3 of 4 layers (two guesses
a step), and an ERNIE 4.5 mixture with an MTP layer in its files (one guess). {prompts} prompts of {prompt} tokens of
articles that no training saw, {new} new tokens each, greedy, float32 around the integers. Accepted: the share of
guesses, ± its standard error over the prompts. Same text: prompts with the same tokens with and without the draft.

| draft | model | accepted | tokens a step | same text |
|---|---|---|---|---|
"""
SECOND = """
## What loads

Tiny random models with an MTP layer whose guesses are nearly always right (`tests/helpers/tiny_drafts.py`): accepted by
the source in floating point, by its INT8 checkpoint and by one with an INT8 head.

| architecture | source | INT8 | INT8 head |
|---|---|---|---|
"""


# vLLM's complaint about a scale that its model of the draft, or of the target, does not read.
MISSING = re.compile(r".*named '([^']+)' in (\w+)\. .*")


class Draft(nn.Module):
    """As vLLM computes it: a Llama block over a mixture of the next token's embedding and the hidden state.

    norms: whether both are normalised first, and the block's input again (MTP); an EAGLE draft has none of the three.
    """

    def __init__(self, config: Any, *, norms: bool) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.norms = norms
        self.embedding_norm = LlamaRMSNorm(size, eps) if norms else nn.Identity()
        self.hidden_norm = LlamaRMSNorm(size, eps) if norms else nn.Identity()
        self.mix = nn.Linear(2 * size, size, bias=False)
        self.block = LlamaDecoderLayer(config, 0)
        if not norms:
            self.block.input_layernorm = nn.Identity()
        self.rotary = LlamaRotaryEmbedding(config)

    def forward(self, embeddings: Tensor, hidden: Tensor) -> Tensor:
        """embeddings [batch, tokens, channels]: of the tokens that follow; hidden: of the tokens."""
        positions = torch.arange(hidden.shape[1])[None]
        if self.norms:
            embeddings = embeddings * (positions[..., None] > 0)  # vLLM's MTP layers see none at the first position
        x = self.mix(torch.cat([self.embedding_norm(embeddings), self.hidden_norm(hidden)], dim=-1))
        length = x.shape[1]
        mask = torch.full((length, length), -torch.inf).triu(1)[None, None]
        return self.block(x, attention_mask=mask, position_embeddings=self.rotary(x, positions))


def train(draft: Draft, folder: Path) -> None:
    """Teach `draft` the distribution that the model in `folder` has for the token after the next."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [json.loads(line)["text"] for line in assets.calibration_text().read_text().splitlines()]
    ids = torch.tensor([token for text in texts for token in [0, *tokenizer(text).input_ids]])
    draw = torch.Generator().manual_seed(1)

    def losses() -> Iterator[Tensor]:
        while True:
            starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=draw)
            batch = torch.stack([ids[start : start + LENGTH] for start in starts])
            with torch.no_grad():
                hidden = model.model(input_ids=batch).last_hidden_state
                target = model.lm_head(hidden[:, 1:]).log_softmax(-1)
                embeddings = model.get_input_embeddings()(batch[:, 1:])
            guess = draft(embeddings, hidden[:, :-1])
            divergence = nn.functional.kl_div(
                model.lm_head(guess).log_softmax(-1), target, log_target=True, reduction="none"
            )
            # The next guess reads what this one computed in place of the hidden state.
            yield divergence.sum(-1).mean() + nn.functional.smooth_l1_loss(guess, hidden[:, 1:])

    training.fit(draft.parameters(), losses(), STEPS, LEARNING_RATE, weight_decay=0.01)


def eagle_dirs() -> tuple[Path, Path]:
    """The folders of the model and of its EAGLE draft."""
    model, target = mixture.model_dir("dense"), assets.CACHE / f"Qwen3-dense-EAGLE-{STEPS}"
    if not target.is_dir():
        torch.manual_seed(0)
        config = tiny_drafts.eagle_config(transformers.AutoConfig.from_pretrained(model))
        config._attn_implementation = "eager"
        draft = Draft(config, norms=False)
        train(draft, model)
        with assets.made(target) as folder:
            tiny_drafts.save_eagle_weights(folder, config, draft.block.state_dict(), draft.mix.weight.detach())
    return model, target


def mtp_dir() -> Path:
    """The folder of the mixture, with its MTP layer."""
    target = assets.CACHE / f"ERNIE-mixture-MTP-{STEPS}"
    if not target.is_dir():
        with assets.made(target) as folder:
            small_opt.save_trained(transformers.Ernie4_5_MoeForCausalLM, MIXTURE, folder, mixture.STEPS)
            config = transformers.LlamaConfig(**mixture.SHAPE | {"rms_norm_eps": MIXTURE.rms_norm_eps})
            config.intermediate_size, config._attn_implementation = MIXTURE.intermediate_size, "eager"
            config.rope_parameters = dict(MIXTURE.rope_parameters)
            torch.manual_seed(0)
            draft = Draft(config, norms=True)
            train(draft, folder)
            tensors = load_file(folder / "model.safetensors")
            tensors |= {f"model.mtp_block.0.{key}": value for key, value in draft.block.state_dict().items()}
            parts = {"emb_norm": draft.embedding_norm, "hidden_norm": draft.hidden_norm, "linear_proj": draft.mix}
            tensors |= {f"model.mtp_{name}.0.weight": part.weight.detach() for name, part in parts.items()}
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
            path = folder / "config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | {"num_nextn_predict_layers": 1}))
    return target


@dataclass(frozen=True)
class Pair:
    model: Path
    speculative: dict[str, Any]


def pairs() -> dict[str, Pair]:
    model, draft = eagle_dirs()
    return {
        "EAGLE": Pair(model, {"method": "eagle", "model": str(draft), "num_speculative_tokens": 2}),
        "MTP": Pair(mtp_dir(), {"method": "mtp", "num_speculative_tokens": 1}),
    }


def rate(spoken: draft_engine.Spoken) -> list[float]:
    """Accepted guesses of each prompt as a share, its standard error, and tokens a step."""
    shares = [accepted / guessed for _, guessed, accepted in spoken]
    tokens = sum(len(new) for new, _, _ in spoken)
    accepted = sum(accepted for _, _, accepted in spoken)
    return [statistics.fmean(shares), standard_error(shares), tokens / (tokens - accepted)]


def measure(pair: Pair) -> dict[str, list[float]]:
    """Arm -> [accepted, its standard error, tokens a step, share of prompts with the same text]."""
    rows, _ = token_windows(
        [str(pair.model)], str(assets.evaluation_text()), text_column="text", samples=PROMPTS, seq_len=PROMPT, seed=0
    )
    figures, common = {}, {"prompts": rows, "new": NEW}
    with tempfile.TemporaryDirectory() as temporary:
        for arm, options in {NONE: {}, **ARMS}.items():
            folder = pair.model if arm == NONE else Path(temporary, arm.replace(" ", "-"))
            if arm != NONE:
                calibrate(
                    str(pair.model), folder, dataset=str(assets.calibration_text()), samples=64, seq_len=LENGTH,
                    quiet=True, **options,
                )  # fmt: skip
            request = {"model": str(folder), **common}
            plain, spoken = draft_engine.speak([request, request | {"speculative_config": pair.speculative}])
            same = statistics.fmean(float(a[0] == b[0]) for a, b in zip(plain, spoken, strict=True))
            figures[arm] = [*rate(spoken), same]
            print(arm, figures[arm], file=sys.stderr, flush=True)
    return figures


def loads(name: str) -> list[str]:
    """The cells of the second table for the tiny model `name`."""
    dtype = torch.bfloat16 if "linear_attention" in str(tiny_drafts.config_of(name, 2)) else torch.float32
    prompts = [[5, 6, 7, 8], [100, 50, 25], [200, 201, 7, 9, 11]]
    common = {"prompts": prompts, "new": 24, "dtype": str(dtype).removeprefix("torch.")}
    common["speculative_config"] = {"method": "mtp", "num_speculative_tokens": 1}
    cells = []
    with tempfile.TemporaryDirectory() as temporary:
        source = tiny_drafts.save_mtp(name, Path(temporary, "source"), dtype)
        text = tiny_checkpoints.save_text(Path(temporary, "text.jsonl"))
        for arm, options in {"": None, "int8": {}, "head": {"quantize_lm_head": True}}.items():
            folder = Path(temporary, arm) if arm else source
            try:
                if options is not None:
                    calibrate(
                        str(source), folder, dataset=str(text), samples=8, seq_len=32, quiet=True, rotation="none",
                        **options,
                    )  # fmt: skip
                (spoken,) = draft_engine.speak([{"model": str(folder), **common}])
                cells.append(f"{rate(spoken)[0]:.0%}")
            except EngineFailedError as error:
                lines = [line for line in str(error).splitlines() if "Error: " in line]
                cells.append(lines[-1].strip()[-160:] if lines else "failed")
                break
            print(name, arm, cells, file=sys.stderr, flush=True)
    return cells


def page(figures: dict[str, Any]) -> str:
    text = HEADER.format(machine=figures["machine"], prompts=PROMPTS, prompt=PROMPT, new=NEW)
    for pair, arms in figures["pairs"].items():
        for arm, (accepted, error, tokens, same) in arms.items():
            text += f"| {pair} | {arm} | {accepted:.1%} ± {error:.1%} | {tokens:.2f} | {same:.0%} |\n"
    text += SECOND
    for name, cells in figures["loads"].items():
        words = [MISSING.sub(r"vLLM refuses: no `\1` in its \2", cell) for cell in cells]
        text += f"| {name} | {' | '.join([*words, '', ''][:3])} |\n"
    return text


def main() -> None:
    figures: dict[str, Any] = {"machine": describe()}
    figures["pairs"] = {name: measure(pair) for name, pair in pairs().items()}
    figures["loads"] = {name: loads(name) for name in tiny_drafts.MTP}
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    OUTPUT.write_text(page(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
