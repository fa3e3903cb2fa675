"""docs/interoperability.md: a compressed-tensors export through stock vLLM, compared with our plugin.

`python -m benchmarks.interoperability [--windows 8]`. SmolLM2-135M-Instruct in the default scheme, calibrated on some
Wikipedia articles and measured on others. The last line printed is JSON.

Integers and scales are the same in both. But both add float32 values in different orders, so that sometimes an
activation near a rounding tie is rounded the other way, and over thirty layers one such flip changes everything after
it. The results are two roundings of one model, equally far from it (tests/test_end_to_end.py); on models of two layers
they agree to 1e-5 (tests/test_convert.py). How far this may move a perplexity is measured with the plugin alone, by
embeddings that are larger by NUDGE, because every norm removes this factor except for the last bit of float32.

On a CPU without VNNI the integers are halved in both (to seven bits), because stock vLLM's product clips there and its
wrong sums would be compared (vllm_smoothquant/kernels/exact.py).
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
from calibration.evaluation.measure import measure
from calibration.evaluation.windows import token_windows
from demo import assets
from vllm_smoothquant.format.files import MANIFEST
from vllm_smoothquant.kernels.exact import onednn_is_exact

OUTPUT = Path(__file__).parent.parent / "docs" / "interoperability.md"
COMMAND = "python -m benchmarks.interoperability"
NUDGE = 2.0**-22
# tests/test_compressed_tensors.py converts or refuses each of these.
OTHERS = """
## Checkpoints that others rounded

`smoothquant convert THEIRS -o OUT --format smoothquant` takes compressed-tensors' W8A8 checkpoints, such as
llm-compressor's. The integers stay theirs: `converted_from` in `smoothquant.json` names the method, and `verify` then
does not ask for our rounding (their scale is absmax / 127.5, so that rows end at 127 or -128), only that no row is zero
under the scale of an ordinary row. What is written passes `verify` and can be converted back; a refused conversion
leaves nothing behind. Compared are config.json, the tensors and the architecture that transformers builds.

| property | |
|---|---|
| formats `int-quantized`, `naive-quantized` | converted |
| packed formats, FP8, 4 bits | refused |
| weights `channel`, `tensor`; `actorder` `weight` or `static` | converted |
| weights `group`, `block`; `actorder` `group`; `symmetric: false`; zero points other than 0 | refused |
| activations dynamic `token`, static `tensor`; both in one checkpoint | converted |
| no activations, dynamic `tensor`, `symmetric: false`, output activations | refused |
| scales in 16 bits; scales [out], [], [1, 1]; zero points of 0 | converted |
| `targets` and `ignore` by names, classes and `re:` patterns | converted, if the tensors agree |
| `kv_cache_scheme`, `k_scale`, `transform_config`, sparsity, any unknown property | refused |
| INT8 routed experts, one matrix each, dynamic `token` | converted |
| INT8 experts with static scales or in one tensor, embeddings, Conv1D | refused |
| static scales that differ among q, k, v or gate, up | refused: vLLM computes these as one layer |
"""


def halve(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        halved = {
            name: torch.div(t, 2, rounding_mode="trunc") if t.dtype == torch.int8 else t * 2
            for name, t in state.items()
            if t.dtype == torch.int8 or name.endswith("weight_scale")
        }
        save_file(state | halved, path, metadata={"format": "pt"})
    (folder / MANIFEST).unlink()  # it says that calibrate rounded these integers


def nudge(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        nudged = {name: t.float() * (1 + NUDGE) for name, t in state.items() if "embed_tokens" in name}
        save_file(state | nudged, path, metadata={"format": "pt"})


def measure_rows(folder: Path, windows: int, halved: bool) -> dict[str, dict[str, Any]]:
    """Row -> figures; `from_plugin`: KL divergence from the plugin's distributions."""
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
    ids, _ = token_windows(
        [str(ours)], str(assets.evaluation_text()), text_column="text", samples=windows, seq_len=512, seed=0
    )
    options: dict[str, Any] = {"decode": None, "dtype": "float32", "enforce_eager": True}
    logits = {name: str(folder / f"{name}.pt") for name in ("model", "plugin")}

    def compare(checkpoint: Path) -> dict[str, Any]:
        row = measure(checkpoint, ids, compare=logits["model"], **options)
        other = measure(checkpoint, ids, compare=logits["plugin"], **options)
        return row | {"from_plugin": other["kl_divergence"]}

    rows = {"floating point": measure(model, ids, keep=logits["model"], **options)}
    measure(ours, ids, keep=logits["plugin"], **options)
    rows["the plugin"] = compare(ours)
    rows["the plugin, embeddings nudged in the last place"] = compare(nudged)
    os.environ["VLLM_PLUGINS"] = ""
    rows["stock vLLM"] = compare(stock)
    keys = ("perplexity", "kl_divergence", "from_plugin", "top1_agreement", "scored_tokens", "kernels")
    return {name: {key: row[key] for key in keys if key in row} for name, row in rows.items()}


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
    return text + OTHERS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--windows", type=int, default=8)
    args = parser.parse_args()
    halved = not (torch.cuda.is_available() or onednn_is_exact())
    with tempfile.TemporaryDirectory() as folder:
        rows = measure_rows(Path(folder), args.windows, halved)
    OUTPUT.write_text(page(rows, halved))
    print(json.dumps(rows | {"halved": halved, "machine": describe()}))


if __name__ == "__main__":
    main()
