"""README.md of a checkpoint: the hub's model card, metadata first, so that `hf upload` alone publishes the checkpoint.

The card says what made the checkpoint and what calibration measured, without folder names of this machine. verify does
not check the card, because its publisher may rewrite it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from vllm_smoothquant.format.config import STREAM

CARD = "README.md"
# Metadata that is copied from the source model's card.
INHERITED = ("license", "license_name", "license_link", "language")
TAGS = ["vllm", "smoothquant", "w8a8", "int8", "quantized"]


def write(folder: Path, manifest: Mapping[str, Any], source: str | Path) -> None:
    """Write README.md into the checkpoint `folder` that `manifest` describes. The same manifest gives the same card.

    source: the folder or hub id whose card names the licence.
    """
    hub_name = _hub_name(str(manifest["source"]["model"]))
    inherited = _source_metadata(str(source))
    dataset = str(manifest["calibration"]["dataset"])
    data = ModelCardData(
        base_model=hub_name,
        # The hub rejects base_model_relation without base_model.
        base_model_relation="quantized" if hub_name else None,
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=TAGS,
        datasets=[dataset.partition("@")[0].partition(":")[0]] if _hub_name(dataset.partition("@")[0]) else None,
        **inherited,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(manifest, inherited)}")
    (folder / CARD).write_text(str(card).rstrip("\n") + "\n", encoding="utf-8")


def rotated_parts(manifest: Mapping[str, Any]) -> str:
    """What the rotation of a manifest changed, in words; "" if there is none."""
    matrices = dict(dict(manifest.get("rotation", {})).get("matrices", {}))
    words = ["hidden states"] if STREAM in matrices else []
    return ", ".join([*words, *(f"heads of {int(shape[0])}" for name, shape in matrices.items() if name != STREAM)])


def size_in_words(manifest: Mapping[str, Any]) -> str:
    """What the weights of the linear layers of a manifest take, and may take; "" if there was no budget."""
    if not (size := manifest.get("size")):
        return ""
    weights, whole, budget = (int(size[key]) for key in ("weights", "in_16_bits", "budget"))
    return f"{weights / 1e6:,.2f} MB of at most {budget / 1e6:,.2f} MB, {weights / whole:.2%} of 16 bits"


def _body(manifest: Mapping[str, Any], inherited: Mapping[str, Any]) -> str:
    calibration, config = manifest["calibration"], manifest["quantization_config"]
    compressed = config["quant_method"] != "smoothquant"
    name = _plain(Path(str(manifest["source"]["model"])).name)
    dataset = str(calibration["dataset"])
    if not _hub_name(dataset.partition("@")[0]):
        dataset = Path(dataset).name
    alphas = sorted({a for a in manifest.get("alphas", {}).values() if a is not None})
    alpha = " to ".join(f"{a:g}" for a in dict.fromkeys((alphas[0], alphas[-1]))) if alphas else "none"
    if manifest.get("learned", {}).get("taken"):
        alpha += ", then learned"
    smoothed = sum(bool(group["smoothed"]) for group in manifest["groups"])
    fallbacks = manifest.get("fallen_back", {})
    perplexities = manifest.get("simulated_perplexity", {})
    eight = {*manifest.get("eight_bits", {}), *(name for name, to in fallbacks.items() if to == "8 bits")}
    bits, kind = _arguments(config, "weights")["num_bits"], _kind(config)
    rows = [
        ("weights", f"INT{bits}, one scale per {_strategy(config, 'weights')}"),
        ("activations", _activations(config)),
        (f"linear layers in INT{bits}", str(len(manifest["quantized"]) - len(eight))),
        *([("linear layers in INT8", str(len(eight)))] if eight else []),
        ("kept in floating point", str(len(manifest["kept"]))),
        *([("fell back", f"{len(fallbacks)} layers")] if fallbacks else []),
        *([("weights of the linear layers", size)] if (size := size_in_words(manifest)) else []),
        ("smoothing", f"{smoothed} groups, alpha {alpha}" if smoothed else "none"),
        *([("rotated", what)] if (what := rotated_parts(manifest)) else []),
        ("calibrated on", f"{calibration['samples']} x {calibration['seq_len']} tokens of {_plain(dataset)}"),
        ("change of the logits by smoothing alone", f"{manifest['gate']['logits']['change']:.1e}"),
        *((f"perplexity on calibration text, simulated, {_plain(k)}", f"{v:.3f}") for k, v in perplexities.items()),
    ]
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
    versions = ", ".join(f"{_plain(k)} {_plain(v)}" for k, v in manifest["versions"].items())
    serve = (
        "    vllm serve THIS_MODEL\n\nIt is in compressed-tensors' format: vLLM needs no plugin."
        if compressed
        else "    vllm serve THIS_MODEL --quantization smoothquant\n\n"
        "with the plugin vllm-smoothquant installed beside vLLM. transformers by itself refuses this format."
    )
    licence = "" if "license" in inherited else "\nThe source model's card names no licence; ask its authors.\n"
    arithmetic = ", for INT8 arithmetic on GPUs and CPUs" if kind == "W8A8 INT8" else ""
    return f"""# {name}, SmoothQuant {kind}

{name} with linear layers in {bits}-bit integers{arithmetic}. Made with
[SmoothQuant](https://arxiv.org/abs/2211.10438), which moves the scale of activation outliers into the weights before
both are rounded.

## Serve

{serve}

## What it is

{table}

Quality and speed were not measured while making it: `smoothquant evaluate` does. What made it, to the byte, is in
`smoothquant.json`. Made with {versions}.
{licence}"""


def _arguments(config: Mapping[str, Any], key: str) -> dict[str, Any]:
    """`weights` or `input_activations` of a `quantization_config` in our format or in compressed-tensors'."""
    found = config[key] if key in config else list(config["config_groups"].values())[-1][key]
    return dict(found) if found else {"num_bits": 16}


def _kind(config: Mapping[str, Any]) -> str:
    """Such as "W8A8 INT8" or "W4A16"."""
    weights, activations = (_arguments(config, key)["num_bits"] for key in ("weights", "input_activations"))
    return f"W{weights}A{activations}" + (" INT8" if weights == activations == 8 else "")


def _activations(config: Mapping[str, Any]) -> str:
    if _arguments(config, "input_activations")["num_bits"] == 16:
        return "in 16 bits"
    return f"INT8, one scale per {_strategy(config, 'input_activations')}"


def _strategy(config: Mapping[str, Any], key: str) -> str:
    """What shares a scale, in words."""
    arguments = _arguments(config, key)
    strategy, group_size = arguments["strategy"], arguments.get("group_size")
    words = {
        "channel": "output channel",
        "token": "token, found while serving",
        "tensor": "tensor",
        "group": f"{group_size} inputs of an output channel",
    }[strategy]
    if key == "input_activations" and strategy == "tensor":
        words += ", found while serving" if arguments["dynamic"] else ", fixed by calibration"
    return words


def _plain(text: Any) -> str:
    """`text` without line breaks and markup, for a Markdown table."""
    return re.sub(r"[`|<>\[\]\\*_\s]+", lambda match: "_" if match[0] == "_" else " ", str(text)).strip()


def _hub_name(name: str) -> str | None:
    """`name` if it is a name on the hub; None for folders and files."""
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) or name.startswith("."):
        return None
    return name


def _source_metadata(source: str) -> dict[str, Any]:
    """The INHERITED metadata of the source model's card; empty if the card is missing or cannot be read."""
    try:
        path = Path(source) / CARD if Path(source).is_dir() else hf_hub_download(source, CARD)
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # the hub's errors are among them
        return {}  # a card that cannot be read must not end a calibration
    return {key: data[key] for key in INHERITED if data.get(key)}
