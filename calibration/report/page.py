"""`smoothquant report`: one HTML page that shows a checkpoint. It loads nothing, and opens from disk, also on a phone.

The shown values were measured by `calibrate` and are stored in the checkpoint (smoothquant.json, statistics.npz); only
saturation is counted here, in the weights. Where a value was not measured, the page says so.

The page assumes that any text of a checkpoint may be hostile: the template escapes all of it, and the page's security
policy forbids every script except ours and every load.
"""

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_smoothquant.format import int4, int8
from vllm_smoothquant.format.config import CheckpointConfig
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST, PACKED, read_json, read_tensors

from ..checkpoint import channel_statistics as channel_file
from ..checkpoint.channel_statistics import Channels
from ..checkpoint.model_card import rotated_parts, size_in_words
from ..checkpoint.verify import SATURATED
from ..evaluation.columns import cells
from ..running.modules import block_of

HERE = Path(__file__).parent
# The page must open on a phone: limits for its bytes, and for the bytes of the channel curves among them.
MAX_BYTES = 5_000_000
MAX_PROFILES = 1_200_000
# A longer manifest is truncated.
MAX_MANIFEST = 500_000


def report(
    checkpoint: str | Path, output: str | Path, *, png: str | Path | None = None, evaluation: str | Path | None = None
) -> dict[str, Any]:
    """Write the page about `checkpoint` to the file `output`; with `png`, also its figures into that folder.

    evaluation: a file with the output of `smoothquant evaluate --json`, which the page then shows.
    Returns {"output", "bytes", "figures"}. Errors (SmoothQuantError): no checkpoint, a damaged one, no matplotlib.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise SmoothQuantError("report", "matplotlib", error, "pip install 'vllm-smoothquant[report]'") from error
    folder, target = Path(checkpoint), Path(output)
    manifest = read_json(folder / MANIFEST)
    try:
        facts = gather(folder, manifest)
        facts["evaluation"] = None if evaluation is None else _rows(read_json(Path(evaluation)))
        channels = channel_file.read(folder) or []
        images = draw(facts, channels)
    except SmoothQuantError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        fix = f"run `smoothquant verify {folder}` to see every fault"
        raise SmoothQuantError(f"{folder}/{MANIFEST}", "what calibrate writes", error, fix) from error
    script = (HERE / "report.js").read_text()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"figure": _figure, "bytes": _bytes, "percent": "{:.2%}".format}
    page = environment.get_template("report.html").render(
        facts, images={name: _base64(image) for name, image in images.items()}, profiles=profiles(channels),
        heat_maps=[name for name in images if name.startswith("channels-")], script=script,
        script_hash=_base64(hashlib.sha256(script.encode()).digest()),
    ).encode()  # fmt: skip
    _write(target, page)
    if png is not None:
        Path(png).mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            _write(Path(png) / f"{name}.png", image)
    return {"output": str(target), "bytes": len(page), "figures": sorted(images)}


def gather(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the page shows as text and in tables."""
    config = CheckpointConfig.from_dict(read_json(folder / "config.json").get("quantization_config"))
    weights = count_weights(folder)
    errors = {str(k): float(v) for k, v in manifest.get("errors", {}).items()}
    alphas = {str(k): None if v is None else float(v) for k, v in manifest.get("alphas", {}).items()}
    fallbacks = {str(k): str(v) for k, v in manifest.get("fallen_back", {}).items()}
    calibration = dict(manifest["calibration"])
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    return {
        "name": folder.absolute().name,
        "source": manifest["source"],
        "calibration": calibration,
        "data": Path(str(calibration["dataset"])).name,
        "scheme": _scheme(config, ""),
        "layers": [
            {"name": name, "scheme": _scheme(config, name), "error": errors.get(name), "fallback": fallbacks.get(name)}
            | counts
            | {"saturated": counts["worst"] > SATURATED}
            for name, counts in weights.items()
        ],
        "errors": errors,
        "alphas": alphas,
        "learned": _learned(manifest),
        "groups": [dict(group, alpha=alphas.get(group["source"])) for group in manifest["groups"]],
        "fallbacks": fallbacks,
        "in_float": {str(k): str(v) for k, v in dict(manifest["kept"]).items()},
        "not_folded": list(map(str, manifest.get("not_folded", []))),
        "sinks": [
            {
                "layers": ", ".join(map(str, sink["layers"])),
                "times": float(sink["times_median"]),
                "first": float(sink["first_token"]),
                "tokens": [repr(str(token)) for token in sink["tokens"]],
            }
            for sink in manifest.get("sinks", [])
        ],
        "experts": _experts(manifest.get("experts", {}), errors),
        "idle_experts": sum(len(entry["idle"]) for entry in manifest.get("experts", {}).values()),
        "perplexities": {str(k): float(v) for k, v in manifest.get("simulated_perplexity", {}).items()},
        "rotated": rotated_parts(manifest),
        "size": size_in_words(manifest),
        "gate": float(manifest["gate"]["logits"]["change"]),
        "versions": dict(manifest["versions"]),
        "disk_bytes": sum(f.stat().st_size for f in folder.glob("*.safetensors")),
        "integer_bytes": sum(w["bytes"] for w in weights.values()),
        "in_16_bits": sum(2 * w["elements"] for w in weights.values()),
        "manifest": text[:MAX_MANIFEST] + ("\n... truncated" if len(text) > MAX_MANIFEST else ""),
        "smoothed": sorted(config.smoothed),
    }


def _learned(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """How the factors were learned; empty if they were not."""
    if not (found := manifest.get("learned", {})):
        return {}
    kl = {key: float(found[key]) for key in ("searched_kl", "learned_kl")}
    return {**kl, "steps": int(found["steps"]), "taken": bool(found["taken"])}


def count_weights(folder: Path) -> dict[str, dict[str, Any]]:
    """Layer -> share of its integers at the ends of their range (`full`), of the fullest row (`worst`), bytes and
    elements of the weight, input_scale or None.
    """
    counts: dict[str, dict[str, Any]] = {}
    scales: dict[str, float] = {}
    for name, tensor in read_tensors(folder, (".weight", f".{PACKED}", ".input_scale")):
        layer, _, suffix = name.rpartition(".")
        if suffix == "input_scale":
            scales[layer] = float(tensor)
        elif suffix == PACKED or tensor.dtype == torch.int8:
            integers, largest = (int4.unpack(tensor), int4.QMAX) if suffix == PACKED else (tensor, int8.QMAX)
            ends = (integers.to(torch.int16).abs() >= largest).float()
            shares = {"full": float(ends.mean()), "worst": float(ends.mean(1).max())}
            counts[layer] = {**shares, "bytes": tensor.nbytes, "elements": integers.numel()}
    return {name: {**entry, "input_scale": scales.get(name)} for name, entry in counts.items()}


def draw(facts: Mapping[str, Any], channels: Sequence[Channels]) -> dict[str, bytes]:
    """File name without suffix -> PNG."""
    from . import figures

    images = {}
    if channels:
        images["overview"] = figures.overview(channels)
        for i, (kind, members) in enumerate(figures.by_kind(channels).items()):
            images[f"channels-{i}"] = figures.heat_maps(kind, members)
    if facts["errors"]:
        images["errors"] = figures.by_block("error of each layer as served", facts["errors"], log=True)
    if facts["experts"]:
        images["experts"] = figures.experts(facts["experts"])
    alphas = {name: alpha for name, alpha in facts["alphas"].items() if alpha is not None}
    if len(set(alphas.values())) > 1:
        images["alphas"] = figures.by_block("alpha of each group (none: not smoothed)", alphas, log=False)
    return images


def profiles(channels: Sequence[Channels]) -> list[dict[str, Any]]:
    """What the page's script draws for one layer: four curves over the channels, as base64 of logarithmic 8-bit levels.

    value = low * (high / low) ** (level / 255)
    """
    from . import figures

    columns = max(min(figures.COLUMNS, MAX_PROFILES // (4 * max(len(channels), 1))), 16)
    entries = []
    for c in channels:
        curves = {}
        for name, pair in (("X", (c.activations, c.smoothed_activations)), ("W", (c.weights, c.smoothed))):
            values = figures.joined(np.stack(pair), columns)
            high = max(float(values.max()), 1e-30)
            low = max(float(values[values > 0].min()) if (values > 0).any() else high, high * 1e-6)
            span = max(math.log(high / low), 1e-6)
            levels = np.round(np.log(np.maximum(values, low) / low) / span * 255).astype(np.uint8)
            before, after = (_base64(row.tobytes()) for row in levels)
            curves[name] = {"low": low, "high": high, "before": before, "after": after}
        entries.append({"layers": list(c.layers), "channels": len(c.activations), "curves": curves})
    return entries


def _experts(blocks: Mapping[str, Any], errors: Mapping[str, float]) -> dict[str, dict[str, list[float]]]:
    """Number of a block -> quantity -> one value for each of its experts."""
    found = {}
    for block, entry in blocks.items():
        experts = [[str(name) for name in layers] for layers in entry["layers"]]
        load = [float(count) for count in entry["load"]]
        quantities = {"tokens of the search sample": load} if len(load) == len(experts) else {}
        if any(name in errors for layers in experts for name in layers):
            known = [[errors[name] for name in layers if name in errors] for layers in experts]
            quantities["error as served, mean over its layers"] = [float(np.mean(e)) if e else math.nan for e in known]
        if quantities:
            found[block_of(block).rpartition(".")[2] or block] = quantities
    return found


def _scheme(config: CheckpointConfig, name: str) -> str:
    scheme = config.scheme(name)
    if scheme is None:
        return "floating point"
    activations, weights = "in 16 bits", f"per_{scheme.weights.strategy}"
    if scheme.input_activations.rounded:
        activations = f"per_{scheme.input_activations.strategy}"
        activations += " dynamic" if scheme.input_activations.dynamic else " static"
    if scheme.weights.group_size is not None:
        weights = f"4 bits per group of {scheme.weights.group_size}"
    smoothed = ", smoothed at run time" if name in config.smoothed else ""
    return f"weights {weights}, activations {activations}{smoothed}"


def _rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The models of an evaluation, every figure as text; a column is left out if no model has its figure."""
    columns = {column.long: texts for column, texts in cells(result["models"]).items()}
    names = [Path(str(row["model"])).name for row in result["models"]]
    return [{"model": name} | {k: texts[i] for k, texts in columns.items()} for i, name in enumerate(names)]


def _write(path: Path, content: bytes) -> None:
    """Write a temporary file next to `path` and rename it, so that `path` is never incomplete."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    except OSError as error:
        raise SmoothQuantError(str(path), "a file that can be written", error, "choose another -o") from error
    finally:
        partial.unlink(missing_ok=True)


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
