"""`smoothquant report`: one HTML page that shows a checkpoint. It loads nothing, and opens from disk, also on a phone.

What it shows was measured by `calibrate` and lies in the checkpoint (smoothquant.json, channels.py's statistics), but
for saturation, which is counted in the weights here. What was not measured is said to be so, and not made up.

Nothing that a checkpoint says is believed to be harmless: the template escapes every word of it, and the page's own
policy forbids any script but ours and any load at all.
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

from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import CheckpointConfig
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST, read_json, read_tensors

from ..checkpoint import channel_statistics as channel_file
from ..checkpoint.channel_statistics import Channels
from ..checkpoint.verify import SATURATED
from ..evaluation.columns import COLUMNS

HERE = Path(__file__).parent
PAGE = "report.html"
# The page must open on a phone: bytes it may have, and of those the bytes of channels that it can draw anew.
MAX_BYTES = 5_000_000
MAX_PROFILES = 1_200_000
# The manifest is shown whole up to this length.
MAX_MANIFEST = 500_000


def report(
    checkpoint: str | Path, output: str | Path, *, png: str | Path | None = None, evaluation: str | Path | None = None
) -> dict[str, Any]:
    """Write the page about `checkpoint` to the file `output`; with `png`, its figures into that folder as well.

    evaluation: what `smoothquant evaluate --json` printed of it, to be shown with it.
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
        seen = channel_file.read(folder)
        images = draw(facts, seen)
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        if isinstance(error, SmoothQuantError):
            raise
        raise SmoothQuantError(
            f"{folder}/{MANIFEST}",
            "what calibrate writes",
            error,
            f"see what `smoothquant verify {folder}` finds",
        ) from error
    script = (HERE / "report.js").read_text()
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"figure": _figure, "bytes": _bytes, "percent": lambda x: f"{x:.2%}"}
    html = environment.get_template(PAGE).render(
        facts, images={name: base64.b64encode(image).decode() for name, image in images.items()},
        heat_maps=[name for name in images if name.startswith("channels-")], profiles=profiles(seen or []),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )  # fmt: skip
    _write(target, html.encode())
    if png is not None:
        Path(png).mkdir(parents=True, exist_ok=True)
        for name, image in images.items():
            _write(Path(png) / f"{name}.png", image)
    return {"output": str(target), "bytes": len(html.encode()), "figures": sorted(images)}


def gather(folder: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the page says in words and tables."""
    config = CheckpointConfig.from_dict(read_json(folder / "config.json").get("quantization_config"))
    weights = count_weights(folder)
    errors = {str(k): float(v) for k, v in manifest.get("errors", {}).items()}
    alphas = {str(k): None if v is None else float(v) for k, v in manifest.get("alphas", {}).items()}
    fallen = {str(k): str(v) for k, v in manifest.get("fallen_back", {}).items()}
    layers = [
        {
            "name": name,
            "scheme": _scheme(config, name),
            "error": errors.get(name),
            "full": weights[name]["full"],
            "saturated": weights[name]["worst"] > SATURATED,
            "input_scale": weights[name]["input_scale"],
            "fallen": fallen.get(name),
        }
        for name in weights
    ]
    int8_bytes = sum(w["bytes"] for w in weights.values())
    files = sorted(folder.glob("*.safetensors"))
    calibration = dict(manifest["calibration"])
    text = json.dumps(manifest, indent=2, ensure_ascii=False)
    return {
        "name": folder.absolute().name,
        "source": manifest["source"],
        "calibration": calibration,
        "data": Path(str(calibration["dataset"])).name,
        "scheme": _scheme(config, ""),
        "layers": layers,
        "errors": errors,
        "alphas": alphas,
        "groups": [dict(group, alpha=alphas.get(group["source"])) for group in manifest["groups"]],
        "fallen": fallen,
        "kept": {str(k): str(v) for k, v in dict(manifest["kept"]).items()},
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
        "perplexities": {str(k): float(v) for k, v in manifest.get("simulated_perplexity", {}).items()},
        "gate": float(manifest["gate"]["logits"]["change"]),
        "versions": dict(manifest["versions"]),
        "sizes": {"disk": sum(f.stat().st_size for f in files), "int8": int8_bytes, "was": 2 * _weights(weights)},
        "manifest": text[:MAX_MANIFEST] + ("\n... cut here" if len(text) > MAX_MANIFEST else ""),
        "smoothed": sorted(config.smoothed),
    }


def count_weights(folder: Path) -> dict[str, dict[str, Any]]:
    """Layer -> share of its integers at +-127 (`full`), of the fullest row (`worst`), bytes, input_scale or None."""
    found: dict[str, dict[str, Any]] = {}
    scales: dict[str, float] = {}
    for name, tensor in read_tensors(folder, (".weight", ".input_scale")):
        layer, _, suffix = name.rpartition(".")
        if suffix == "input_scale":
            scales[layer] = float(tensor)
        elif tensor.dtype == torch.int8:
            ends = (tensor.to(torch.int16).abs() >= int8.QMAX).float()
            found[layer] = {
                "full": float(ends.mean()), "worst": float(ends.mean(1).max()), "bytes": tensor.numel()
            }  # fmt: skip
    return {name: entry | {"input_scale": scales.get(name)} for name, entry in found.items()}


def draw(facts: Mapping[str, Any], seen: Sequence[Channels] | None) -> dict[str, bytes]:
    """File name without ending -> PNG."""
    from . import figures

    images = {}
    if seen:
        images["overview"] = figures.overview(seen)
        for i, (kind, members) in enumerate(figures.by_kind(seen).items()):
            images[f"channels-{i}"] = figures.heat_maps(kind, members)
    if facts["errors"]:
        images["errors"] = figures.by_block("error of each layer as served", facts["errors"], log=True)
    alphas = {name: alpha for name, alpha in facts["alphas"].items() if alpha is not None}
    if len(set(alphas.values())) > 1:
        images["alphas"] = figures.by_block("alpha of each group (none: not smoothed)", alphas, log=False)
    return images


def profiles(seen: Sequence[Channels]) -> list[dict[str, Any]]:
    """What the page draws anew for one layer: four curves over the channels, as base64 of logarithmic 8-bit levels.

    value = low * (high / low) ** (level / 255)
    """
    from . import figures

    columns = min(figures.COLUMNS, MAX_PROFILES // (4 * len(seen))) if seen else 0
    entries = []
    for c in seen:
        entry: dict[str, Any] = {"layers": list(c.layers), "channels": len(c.activations), "curves": {}}
        for name, pair in (("X", (c.activations, c.smoothed_activations)), ("W", (c.weights, c.smoothed))):
            values = figures.joined(np.stack(pair), max(columns, 16))
            high = max(float(values.max()), 1e-30)
            low = max(float(values[values > 0].min()) if (values > 0).any() else high, high * 1e-6)
            span = max(math.log(high / low), 1e-6)
            levels = np.round(np.log(np.maximum(values, low) / low) / span * 255).astype(np.uint8)
            entry["curves"][name] = {
                "low": low, "high": high, "before": base64.b64encode(levels[0].tobytes()).decode(),
                "after": base64.b64encode(levels[1].tobytes()).decode(),
            }  # fmt: skip
        entries.append(entry)
    return entries


def _scheme(config: CheckpointConfig, name: str) -> str:
    scheme = config.scheme(name)
    if scheme is None:
        return "floating point"
    activations = scheme.input_activations
    words = f"per_{activations.strategy} {'dynamic' if activations.dynamic else 'static'}"
    return f"weights per_{scheme.weights.strategy}, activations {words}" + ", smoothed at run time" * (
        name in config.smoothed
    )


def _weights(counted: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(int(w["bytes"]) for w in counted.values())


def _rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """The models of an evaluation, every number as text; columns that none of them has are left out."""
    rows = result["models"]
    columns = [column for column in COLUMNS if any(column.key in row for row in rows)]
    return [
        {"model": Path(str(row["model"])).name}
        | {c.long: c.format(float(row[c.key])) if c.key in row else "" for c in columns}
        for row in rows
    ]


def _write(path: Path, content: bytes) -> None:
    """Beside, then renamed: no half a page."""
    beside = path.with_name(f".{path.name}.partial")
    try:
        beside.write_bytes(content)
        os.replace(beside, path)
    except OSError as error:
        raise SmoothQuantError(str(path), "a file that can be written", error, "choose another -o") from error
    finally:
        beside.unlink(missing_ok=True)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
