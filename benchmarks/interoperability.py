"""docs/interoperability.md: a compressed-tensors export through stock vLLM, our plugin left out, beside the plugin.

`python -m benchmarks.interoperability [--windows 8]`. SmolLM2-135M-Instruct in the default scheme, calibrated on some
Wikipedia articles, measured on others. The last line printed is JSON.

The integers and scales are the same. Sums of float32 in another order tip an activation over a rounding tie now and
then, and through thirty layers one flip moves all that follows: the two are then two roundings of one model, equally
far from it (tests/test_end_to_end.py); on models of two layers they agree to 1e-5 (tests/test_convert.py). How far that
may move a perplexity, the plugin itself shows, with embeddings larger by NUDGE: every norm takes that out again but for
the last place of float32.

On a CPU without VNNI the integers are halved in both (seven bits then, but the same ones): stock vLLM's product clips
there, so that its error would be compared (vllm_smoothquant/kernels/exact.py).
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.machine import describe
from calibration.checkpoint.convert import COMPRESSED_TENSORS, convert
from calibration.evaluation import evaluate
from demo import assets
from vllm_smoothquant.kernels.exact import onednn_is_exact

OUTPUT = Path(__file__).parent.parent / "docs" / "interoperability.md"
COMMAND = "python -m benchmarks.interoperability"
NUDGE = 2.0**-22


def halve(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        halved = {
            name: torch.div(t, 2, rounding_mode="trunc") if t.dtype == torch.int8 else t * 2
            for name, t in state.items()
            if t.dtype == torch.int8 or name.endswith("weight_scale")
        }
        save_file(state | halved, path, metadata={"format": "pt"})


def nudge(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        nudged = {name: t.float() * (1 + NUDGE) for name, t in state.items() if "embed_tokens" in name}
        save_file(state | nudged, path, metadata={"format": "pt"})


def measure(folder: Path, windows: int, halved: bool) -> dict[str, dict[str, Any]]:
    """Row -> figures; `from_plugin`: KL divergence from the plugin's own distributions."""
    model, checkpoint = assets.model_dir(), folder / "int8"
    subprocess.run(
        [sys.executable, "-m", "calibration", "calibrate", str(model), "-o", str(checkpoint), "--quiet",
         "--dataset", str(assets.calibration_text()), "--samples", "16", "--seq-len", "512"],
        check=True,
    )  # fmt: skip
    stock, ours, nudged = folder / "stock", folder / "ours", folder / "nudged"
    convert(checkpoint, stock, COMPRESSED_TENSORS)
    if halved:
        halve(stock)
    convert(stock, ours, "smoothquant")
    shutil.copytree(ours, nudged)
    nudge(nudged)
    ids, _ = evaluate.token_windows(
        [str(ours)], str(assets.evaluation_text()), text_column="text", samples=windows, seq_len=512, seed=0
    )
    options: dict[str, Any] = {"decode": None, "dtype": "float32", "enforce_eager": True}
    before = {name: str(folder / f"{name}.pt") for name in ("model", "plugin")}

    def both(checkpoint: Path) -> dict[str, Any]:
        row = evaluate.measure(checkpoint, ids, compare=before["model"], **options)
        other = evaluate.measure(checkpoint, ids, compare=before["plugin"], **options)
        return row | {"from_plugin": other["kl_divergence"]}

    found = {"floating point": evaluate.measure(model, ids, keep=before["model"], **options)}
    evaluate.measure(ours, ids, keep=before["plugin"], **options)
    found["the plugin"] = both(ours)
    found["the plugin, embeddings nudged in the last place"] = both(nudged)
    os.environ["VLLM_PLUGINS"] = ""
    found["stock vLLM"] = both(stock)
    keys = ("perplexity", "kl_divergence", "from_plugin", "top1_agreement", "scored_tokens", "kernels")
    return {name: {key: row[key] for key in keys if key in row} for name, row in found.items()}


def page(rows: dict[str, dict[str, Any]], halved: bool) -> str:
    text = (
        f"# The same integers through stock vLLM\n\nWritten by `{COMMAND}`; not by hand. {describe()}\n\n"
        "`smoothquant convert OUT -o COMPRESSED --format compressed-tensors` of SmolLM2-135M-Instruct (default scheme),"
        " served with `VLLM_PLUGINS=`, beside the same checkpoint through the plugin; "
        f"{rows['the plugin']['scored_tokens']} "
        "tokens of articles that calibration did not see, float32 around the integers."
        + (" The integers are halved, because stock vLLM's product clips on this CPU." if halved else "")
        + " Sums in another order tip an activation over a rounding tie now and then, and through thirty layers one "
        "flip moves all that follows; how far, the plugin shows against itself.\n\n"
        "| | perplexity | change | KL from floating point | KL from the plugin |\n|---|---|---|---|---|\n"
    )
    exact = rows["floating point"]["perplexity"]
    for name, row in rows.items():
        text += f"| {name} | {row['perplexity']:.3f} | "
        if "kl_divergence" in row:
            text += f"{row['perplexity'] / exact - 1:+.2%} | {row['kl_divergence']:.4f} | {row['from_plugin']:.4f} |\n"
        else:
            text += "| | |\n"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    halved = not (torch.cuda.is_available() or onednn_is_exact())
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args.windows, halved)
    OUTPUT.write_text(page(rows, halved))
    print(json.dumps(rows | {"halved": halved, "machine": describe()}))


if __name__ == "__main__":
    main()
