"""A compressed-tensors export of SmolLM2-135M through stock vLLM, our plugin left out, beside ours through the plugin.

`python -m benchmarks.interoperability CHECKPOINT TEXT [--windows 4]`. CHECKPOINT is what `smoothquant calibrate` wrote.
Prints both perplexities; last line: JSON.

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
    parser.add_argument("text")
    parser.add_argument("--windows", type=int, default=4)
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
        figures = {"plugin": evaluate.perplexity(ours, windows, **engine)}
        os.environ["VLLM_PLUGINS"] = ""
        figures["stock"] = evaluate.perplexity(stock, windows, **engine)
    print(f"perplexity through the plugin {figures['plugin']:.6f}, through stock vLLM {figures['stock']:.6f}")
    print(json.dumps(figures | {"halved": not exact, "windows": args.windows, "machine": machine()}))


if __name__ == "__main__":
    main()
