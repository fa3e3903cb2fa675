"""Calibrate a model on your own text and write an INT8 checkpoint that `vllm serve` takes.

    python examples/calibrate.py HuggingFaceTB/SmolLM2-135M-Instruct SmolLM2-INT8 my_text.jsonl [SAMPLES SEQ_LEN]

The text is a .txt, .jsonl, .parquet or .csv file (or the name of a hub data set) with a column `text`: some hundred
passages like those that the model will process. A few thousand tokens are enough; more make the ranges safer.
"""

import sys

from calibration import calibrate

if __name__ == "__main__":
    model, output, text, *rest = sys.argv[1:]
    size = dict(zip(("samples", "seq_len"), map(int, rest), strict=False))
    manifest = calibrate(model, output, dataset=text, **size)
    smoothed = sum(group["smoothed"] for group in manifest["groups"])
    print(f"{output}: {len(manifest['quantized'])} linear layers in INT8, {smoothed} groups smoothed")
