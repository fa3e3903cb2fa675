"""docs/sweep.md: what `calibrate` does with every language model of transformers that a tiny configuration can build.

`python -m benchmarks.sweep [CLASS ...]`. Classes: those of transformers' mappings for causal language models and for
models of images and text. Each model is random, with two layers and outliers in the norms, and its sizes come from one
table (SIZES), not from a list of architectures. It is smoothed with alpha 0.5 and calibrated, each in a process of its
own, as a user would do it; text alone is given. The smoothed model is loaded again and compared with the original.

    exact      the logits change by at most BOUND of the largest when the smoothed model is written and read again
    refused    one line before anything is written
    WRONG      a checkpoint that computes something else, or an error without a line that says what to do

The last line printed is JSON.
"""

import argparse
import inspect
import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from benchmarks.architectures import share
from benchmarks.machine import describe
from calibration.pipeline import calibrate, smooth
from calibration.running.modules import plain_kernels
from calibration.running.products import make_linear
from tests.helpers import tiny_architectures, tiny_checkpoints
from vllm_smoothquant.format.errors import SmoothQuantError

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "sweep.json"
OUTPUT = ROOT / "docs" / "sweep.md"
TIMEOUT_S = 180
BOUND = 1e-4
MAPPINGS = ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES")

# Name of a configuration's field -> a small value. Names of the usual sizes in all architectures.
SIZES: dict[str, Any] = tiny_architectures.COMMON | {
    "d_model": 128, "n_embd": 128, "dim": 128, "embed_dim": 64, "word_embed_proj_dim": 128, "embedding_size": 128,
    "n_layer": 2, "n_layers": 2, "num_layers": 2, "depth": 2, "decoder_layers": 2, "encoder_layers": 2,
    "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4, "encoder_attention_heads": 4,
    "ffn_dim": 192, "decoder_ffn_dim": 192, "encoder_ffn_dim": 192, "n_inner": 192, "d_ff": 192, "ffn_hidden_size": 192,
    "n_positions": 256, "max_seq_len": 256, "n_ctx": 256, "max_sequence_length": 256,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "shared_intermediate_size": 64,
    "expert_ffn_hidden_size": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "moe_topk": 2, "moe_k": 2, "top_k": 2, "n_group": 1, "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_num_shared_experts": 1,
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32, "v_head_dim": 64,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_num_heads": 4,
    "mamba_head_dim": 64, "mamba_dt_rank": 16, "ssm_state_size": 16, "state_size": 16, "mamba_d_ssm": 256,
    "n_mamba_heads": 4, "chunk_size": 16, "mamba_chunk_size": 16, "n_groups": 1, "time_step_rank": 8,
    "lru_width": 128, "attention_hidden_size": 128, "sliding_window": 64, "query_pre_attn_scalar": 32,
    "image_size": 28, "patch_size": 14, "out_hidden_size": 128, "projection_dim": 128, "spatial_merge_size": 2,
    "num_position_embeddings": 16, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "layer_types": None, "head_dim": 32,
    "max_window_layers": 1, "is_decoder": True, "rotary_dim": 16,
}  # fmt: skip
# Tried in this order until one builds a model that runs.
VARIANTS: tuple[dict[str, Any], ...] = (
    {}, {"head_dim": None}, {"num_key_value_heads": None, "head_dim": None}, {"num_key_value_heads": 4},
    {"num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 64},
)  # fmt: skip

HEADER = """# Every language model of transformers

Written by `python -m benchmarks.sweep`; not by hand. {machine} Tiny random models, built from the configurations of
transformers by one table of sizes. *Exact*: smoothed with alpha 0.5, written, read again. *Change*: the largest one of
a logit, relative to the largest logit; factors are powers of two, so that it may be none. *INT8*: share of the weights
of linear layers, without the output head, that `calibrate` stores as integers. {summary}

| class | result | change | INT8 | in floating point, or why it is refused |
|---|---|---|---|---|
"""


def tiny_config(config_class: type[PreTrainedConfig], variant: dict[str, Any]) -> PreTrainedConfig:
    """A configuration with the sizes of SIZES; the parts of a model that has parts get them as well."""
    names = set(inspect.signature(config_class.__init__).parameters) | set(config_class.attribute_map)
    values = {key: value for key, value in (SIZES | variant).items() if key in names and value is not None}
    aliases = config_class.attribute_map
    values = {key: value for key, value in values.items() if aliases.get(key) not in values}
    default = config_class()
    for part in config_class.sub_configs:
        if isinstance(sub := getattr(default, part, None), PreTrainedConfig):
            values[part] = tiny_config(type(sub), variant)
    return config_class(**values)


def build(name: str) -> PreTrainedModel:
    """The tiny model of class `name`; raises the last variant's error."""
    architecture = getattr(transformers, name)
    error: Exception | None = None
    for variant in VARIANTS:
        try:
            config = tiny_config(architecture.config_class, variant)
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = architecture(config).eval()
            tiny_architectures.add_outliers(model, torch.Generator().manual_seed(0))
            with torch.no_grad(), plain_kernels(model):
                logits = model(input_ids=tiny_architectures.tokens(1), use_cache=False).logits
            assert logits.isfinite().all(), "the random model's logits are not finite"
            return model
        except Exception as caught:  # of any kind: a configuration that does not fit
            error = error or caught
    assert error is not None
    raise error


def examine(name: str, folder: Path) -> dict[str, Any]:
    """The row of class `name`."""
    try:
        model = build(name)
        model.save_pretrained(folder / "model")
        tiny_checkpoints.tokenizer().save_pretrained(folder / "model")
        before = type(model).from_pretrained(folder / "model").eval()
    except Exception as error:  # of any kind
        return {"result": "not built", "why": reason(error)}
    text = tiny_checkpoints.save_text(folder / "text.jsonl")
    options: dict[str, Any] = {"dataset": str(text), "samples": 8, "seq_len": 32, "quiet": True}
    ids = tiny_architectures.tokens(5)
    try:
        smooth(str(folder / "model"), folder / "smoothed", alpha=0.5, **options)
        record = calibrate(str(folder / "model"), folder / "int8", rotation="none", **options)
    except SmoothQuantError as error:
        left = [
            path.name
            for path in folder.iterdir()
            if path.name not in ("model", "text.jsonl", "smoothed", "answer.json")
        ]
        return {"result": "refused" if not left else f"WRONG: left {left}", "why": reason(error)}
    except Exception as error:  # of any kind: not a refusal
        return {"result": "WRONG", "why": reason(error)}
    with torch.no_grad():
        a = before(input_ids=ids, use_cache=False).logits
        b = type(model).from_pretrained(folder / "smoothed").eval()(input_ids=ids, use_cache=False).logits
    change = float((a - b).abs().max() / a.abs().max())
    make_linear(model)
    kept = Counter(why for layer, why in record["kept"].items() if why != "language-model head")
    return {
        "result": "exact" if change <= BOUND else "WRONG", "change": change, "int8": share(model, record["quantized"]),
        "why": "; ".join(f"{count} x {why}" for why, count in kept.items()),
    }  # fmt: skip


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    prefix = "" if isinstance(error, SmoothQuantError) else f"{type(error).__name__}: "
    return " ".join((prefix + lines[0].strip()).replace("|", "/").split())[:200]


def classes() -> list[str]:
    names: dict[str, None] = {}
    for mapping in MAPPINGS:
        for value in getattr(modeling_auto, mapping).values():
            names |= dict.fromkeys(value if isinstance(value, tuple) else (value,))
    return sorted(names)


def page(figures: dict[str, Any]) -> str:
    rows = figures["rows"]
    counts = Counter(row["result"].partition(":")[0] for row in rows.values())
    summary = ", ".join(f"{count} {result}" for result, count in counts.most_common()) + "."
    text = HEADER.format(machine=figures["machine"], summary=summary)
    order = {"WRONG": 0, "exact": 1, "refused": 2, "not built": 3}
    for name, row in sorted(rows.items(), key=lambda item: (order[item[1]["result"].partition(":")[0]], item[0])):
        change = f"{row['change']:.0e}" if "change" in row else ""
        part = f"{row['int8']:.1%}" if "int8" in row else ""
        text += f"| {name} | {row['result']} | {change} | {part} | {row['why']} |\n"
    return text


def row_of(name: str) -> dict[str, Any]:
    """`examine` in a forked process, so that a crash is a row and nothing is imported twice."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        process = multiprocessing.get_context("fork").Process(target=_child, args=(name, Path(folder), answer))
        process.start()
        process.join(TIMEOUT_S)
        if process.is_alive():
            process.kill()
            return {"result": "not built", "why": f"no answer after {TIMEOUT_S} s"}
        if not answer.exists():
            return {"result": "WRONG", "why": f"its process ended with {process.exitcode}"}
        return json.loads(answer.read_text())


def _child(name: str, folder: Path, answer: Path) -> None:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    answer.write_text(json.dumps(examine(name, folder)))


def main() -> None:
    """Examine the classes named on the command line, or all; write figures and page; exit 1 if one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("classes", nargs="*", metavar="CLASS", default=[])
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"rows": {}}
    figures["machine"] = describe()
    for name in args.classes or classes():
        row = row_of(name)
        figures["rows"][name] = row
        print(f"{name:50} {row['result']:10} {row.get('change', '')} {row['why'][:100]}", file=sys.stderr, flush=True)
        FIGURES.write_text(json.dumps(figures, indent=1, sort_keys=True) + "\n")
        OUTPUT.write_text(page(figures))
    wrong = [name for name, row in figures["rows"].items() if row["result"].startswith("WRONG")]
    print(json.dumps({"classes": len(figures["rows"]), "wrong": wrong}))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
