"""README.md of a checkpoint: the hub's model card, metadata first, so that uploading it is one `hf upload`.

Says what made the checkpoint and what was measured while making it, and no more. The folder names of this machine stay
out of it. It is no part of what verify checks: whoever publishes a model may rewrite its card.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

CARD = "README.md"
# What is taken over from the source model's own card.
INHERITED = ("license", "license_name", "license_link", "language")
TAGS = ["vllm", "smoothquant", "w8a8", "int8", "quantized"]


def write(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write README.md into the checkpoint `folder` that `manifest` describes. The same manifest gives the same card."""
    source = str(manifest["source"]["model"])
    hub_name = _hub_name(source)
    inherited = _source_metadata(source)
    dataset = str(manifest["calibration"]["dataset"])
    data = ModelCardData(
        base_model=hub_name,
        # Without a model it is a relation to, the hub refuses the word.
        base_model_relation="quantized" if hub_name else None,
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=TAGS,
        datasets=[dataset.partition("@")[0].partition(":")[0]] if _hub_name(dataset.partition("@")[0]) else None,
        **inherited,
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(manifest, inherited)}")
    (folder / CARD).write_text(str(card).rstrip("\n") + "\n", encoding="utf-8")


def _body(manifest: Mapping[str, Any], inherited: Mapping[str, Any]) -> str:
    calibration, config = manifest["calibration"], manifest["quantization_config"]
    compressed = config["quant_method"] != "smoothquant"
    name = _plain(Path(str(manifest["source"]["model"])).name)
    dataset = str(calibration["dataset"])
    if not _hub_name(dataset.partition("@")[0]):
        dataset = Path(dataset).name
    alphas = sorted({a for a in manifest.get("alphas", {}).values() if a is not None})
    smoothed = sum(bool(group["smoothed"]) for group in manifest["groups"])
    fallen = manifest.get("fallen_back", {})
    perplexities = manifest.get("simulated_perplexity", {})
    rows = [
        ("weights", f"INT8, one scale per {_strategy(config, 'weights')}"),
        ("activations", f"INT8, one scale per {_strategy(config, 'input_activations')}"),
        ("linear layers in INT8", str(len(manifest["quantized"]))),
        ("kept in floating point", str(len(manifest["kept"]))),
        *([("fell back", f"{len(fallen)} layers")] if fallen else []),
        ("smoothing", f"{smoothed} groups, alpha {_range(alphas)}" if smoothed else "none"),
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
    return f"""# {name}, SmoothQuant W8A8 INT8

{name} with linear layers in 8-bit integers, for INT8 arithmetic on GPUs and CPUs. Made with
[SmoothQuant](https://arxiv.org/abs/2211.10438), which moves the scale of activation outliers into the weights before
both are rounded.

## Serve

{serve}

## What it is

{table}

Quality and speed were not measured while making it: `smoothquant evaluate` does. What made it, to the byte, is in
`smoothquant.json`. Made with {versions}.
{licence}"""


def _strategy(config: Mapping[str, Any], key: str) -> str:
    """In the words of either format."""
    said = config[key] if key in config else list(config["config_groups"].values())[-1][key]
    words = {"channel": "output channel", "token": "token, found while serving", "tensor": "tensor"}[said["strategy"]]
    if key == "input_activations" and said["strategy"] == "tensor":
        words += ", found while serving" if said["dynamic"] else ", fixed by calibration"
    return words


def _range(alphas: list[float]) -> str:
    return f"{alphas[0]:g}" if len(alphas) == 1 else f"{alphas[0]:g} to {alphas[-1]:g}" if alphas else "none"


def _plain(text: Any) -> str:
    """On one line of a Markdown table, without markup."""
    return re.sub(r"[`|<>\[\]\\*_\s]+", lambda found: "_" if found[0] == "_" else " ", str(text)).strip()


def _hub_name(name: str) -> str | None:
    """`name` where it is one of the hub; None for folders and files."""
    if Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", name) or name.startswith("."):
        return None
    return name


def _source_metadata(source: str) -> dict[str, Any]:
    """What the source model's own card says of INHERITED; nothing where it has none, or none that can be read."""
    path = Path(source) / CARD
    try:
        if not Path(source).is_dir():
            path = Path(hf_hub_download(source, CARD))
        data = ModelCard.load(path, ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, HfHubHTTPError, HFValidationError):
        return {}
    return {key: data[key] for key in INHERITED if data.get(key)}
