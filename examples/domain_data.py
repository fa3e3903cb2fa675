"""Calibrate on text of your own domain and compare that with general text. Nothing leaves this machine.

    python examples/domain_data.py MODEL OUT TEXT.jsonl [--word REGEX] [--samples 16] [--windows 8]

TEXT.jsonl has one document a line in a column `text`. A document is of the domain if at least RATE of a thousand words
match --word (default: medical words). The first half of every document calibrates and the second half measures, so that
no text is in both. The checkpoints OUT/domain and OUT/general differ only in the text that they were calibrated on; the
difference is largest for static scales. OUT/figures.json has the printed figures.

Perplexities are computed by transformers, which is slow and needs no vLLM; with vLLM,
`smoothquant evaluate OUT/domain OUT/general --baseline MODEL --text OUT/domain-held-out.jsonl` gives the served ones.
"""

import argparse
import json
import math
import re
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import calibration.from_pretrained  # noqa: F401  teaches transformers to load our checkpoints
from calibration import calibrate
from calibration.evaluation.windows import token_windows

RATE = 3
MEDICAL = r"disease|patient|medic(al|ine)|symptom|clinical|syndrome|therap|diagnos|drug|surgery|infection"


def split(text: Path, out: Path, word: str) -> dict[str, tuple[Path, Path, int]]:
    """Domain and general -> file for calibration, file for measuring, number of documents."""
    parts: dict[str, list[str]] = {"domain": [], "general": []}
    for line in text.read_text().splitlines():
        document = json.loads(line)["text"]
        words = document.split()
        matches = sum(re.match(word, w, re.IGNORECASE) is not None for w in words)
        parts["domain" if words and 1000 * matches >= RATE * len(words) else "general"].append(document)
    files = {}
    for name, documents in parts.items():
        files[name] = (out / f"{name}-calibration.jsonl", out / f"{name}-held-out.jsonl", len(documents))
        for path, half in zip(files[name][:2], (0, 1), strict=True):
            halves = [d[half * (len(d) // 2) : (half + 1) * (len(d) // 2)] for d in documents]
            path.write_text("".join(json.dumps({"text": h}) + "\n" for h in halves))
    return files


def perplexity(model: torch.nn.Module, windows: list[list[int]]) -> float:
    losses = []
    with torch.no_grad():
        for ids in windows:
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float()
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:])))
    return math.exp(float(torch.stack(losses).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--word", default=MEDICAL, metavar="REGEX", help="matches the beginning of words of the domain")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--activations", default="static", choices=("static", "token", "tensor"))
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    files = split(args.text, args.out, args.word)
    shape = {"text_column": "text", "seq_len": args.seq_len, "seed": 0}
    for name, (text, _, documents) in files.items():
        print(f"{name}: {documents} documents")
        calibrate(
            args.model, args.out / name, dataset=str(text), samples=args.samples, activations=args.activations,
            **shape,
        )  # fmt: skip
    held_out = {
        name: token_windows([args.model], str(text), samples=args.windows, **shape)[0]
        for name, (_, text, _) in files.items()
    }
    figures: dict[str, dict[str, float]] = {}
    for name in ("floating point", *files):
        folder = args.model if name == "floating point" else args.out / name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        figures[name] = {text: perplexity(model, windows) for text, windows in held_out.items()}
    print(f"{'perplexity on held-out text':36}{'domain':>10}{'general':>10}")
    for name, row in figures.items():
        label = name if name == "floating point" else f"calibrated on {name} text"
        print(f"{label:36}{row['domain']:10.3f}{row['general']:10.3f}")
    (args.out / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
