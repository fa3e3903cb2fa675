"""A compressed-tensors export of SmolLM2-135M through stock vLLM, our plugin left out, beside ours through the plugin.

`python -m benchmarks.interoperability CHECKPOINT MODEL TEXT [--windows 2]`. CHECKPOINT is what `smoothquant calibrate`
made of MODEL. Prints perplexity and KL divergence from MODEL of both; last line: JSON.

The integers and scales are the same. Sums of float32 in another order tip an activation over a rounding tie now and
then, and through thirty layers one flip moves all that follows: the two are then two roundings of one model, equally
far from it (tests/test_end_to_end.py). On models of two layers they agree to 1e-6 (tests/test_convert.py).

On a CPU without VNNI the integers are halved in both (seven bits then, but the same ones): stock vLLM's product clips
there, so that its error would be compared (vllm_smoothquant/kernels.py, onednn_is_exact).
"""

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from calibration import evaluate
from calibration.convert import COMPRESSED_TENSORS, convert
from calibration.doctor import machine
from vllm_smoothquant.kernels import onednn_is_exact


def halve(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        state = load_file(path)
        halved = {
            name: torch.div(t, 2, rounding_mode="trunc") if t.dtype == torch.int8 else t * 2
            for name, t in state.items()
            if t.dtype == torch.int8 or name.endswith("weight_scale")
        }
        save_file(state | halved, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=2)
    args = parser.parse_args()
    engine = {"dtype": "float32", "enforce_eager": True}
    with tempfile.TemporaryDirectory() as folder:
        stock, ours = Path(folder, "stock"), Path(folder, "ours")
        convert(args.checkpoint, stock, COMPRESSED_TENSORS)
        exact = torch.cuda.is_available() or onednn_is_exact()
        if not exact:
            halve(stock)
        convert(stock, ours, "smoothquant")
        windows, _ = evaluate.token_windows(
            [str(ours)], args.text, text_column="text", samples=args.windows, seq_len=512, seed=0
        )
        logits = str(Path(folder, "logits.pt"))
        options = {"decode": None, "timeout": None, **engine}
        found = {"model": evaluate.measure(args.model, windows, keep=logits, **options)}
        found["plugin"] = evaluate.measure(ours, windows, compare=logits, **options)
        os.environ["VLLM_PLUGINS"] = ""
        found["stock vLLM"] = evaluate.measure(stock, windows, compare=logits, **options)
    keys = ("perplexity", "kl_divergence", "top1_agreement", "scored_tokens")
    figures = {name: {key: row[key] for key in keys if key in row} for name, row in found.items()}
    for name, row in figures.items():
        print(f"{name:12} perplexity {row['perplexity']:.4f}, KL {row.get('kl_divergence', 0):.4f}")
    print(json.dumps(figures | {"halved": not exact, "windows": args.windows, "machine": machine()}))


if __name__ == "__main__":
    main()
