"""`make demo`: calibrate a real model, measure it, serve it, ask it a question.

    SmolLM2-135M-Instruct -> INT8 checkpoints with and without smoothing -> perplexity of all three through vLLM
    -> `vllm serve --quantization smoothquant` -> an answer over the OpenAI API -> a table

Calibration and measurement use different Wikipedia articles. All results stay in .cache/demo; results.json has the
figures. Every step is a command that a user would type.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from openai import OpenAI

from calibration.evaluation import evaluate
from calibration.running.precision import is_native
from demo import assets
from demo.server import vllm_serve

QUESTION, ANSWER = "What is the name of the capital city of France?", "Paris"
# If BF16 is emulated, it is ten times slower than float32: use fewer samples, and float32 for the perplexities.
SLOW_BF16 = not is_native(torch.bfloat16, "cuda" if torch.cuda.is_available() else "cpu")
SAMPLES, WINDOWS = (16, 8) if SLOW_BF16 else (64, 32)
CALIBRATION = ["--samples", str(SAMPLES), "--seq-len", "512"]
# Without smoothing and with dynamic scales, the result does not depend on the samples, so that a few are enough.
NO_CALIBRATION = ["--no-smoothing", "--samples", "4", "--seq-len", "64"]
FOLDER = assets.CACHE / "demo"
KV_CACHE = ["--kv-cache-memory-bytes", "1G"]  # vLLM would take most of the machine's memory


def main() -> int:
    start = time.monotonic()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    say("model and text")
    model = assets.model_dir()
    print((model / "source.txt").read_text().strip())
    calibration, evaluation = assets.calibration_text(), assets.evaluation_text()
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)

    smoothed, plain = FOLDER / "SmolLM2-135M-Instruct-INT8", FOLDER / "SmolLM2-135M-Instruct-INT8-no-smoothing"
    say("calibrate")
    calibrate(model, smoothed, calibration, CALIBRATION)
    say("round the model without smoothing, to compare with")
    calibrate(model, plain, calibration, NO_CALIBRATION)

    say("measure BF16, plain INT8 and smoothed INT8 through vLLM, on articles that calibration did not see")
    result = measure(model, plain, smoothed, evaluation)
    print(evaluate.format_table(result), flush=True)

    say("serve")
    answer = ask(smoothed)
    result["question"], result["answer"], result["seconds"] = QUESTION, answer, time.monotonic() - start
    (FOLDER / "results.json").write_text(json.dumps(result, indent=2))
    say(f"done; the figures are in {os.path.relpath(FOLDER / 'results.json')}")
    if ANSWER not in answer:
        print(f"demo: expected an answer with {ANSWER!r} in it, got {answer!r}", file=sys.stderr)
        return 1
    return 0


def calibrate(model: Path, output: Path, text: Path, options: list[str]) -> None:
    smoothquant("calibrate", str(model), "-o", str(output), "--dataset", str(text), *options)


def measure(model: Path, plain: Path, smoothed: Path, text: Path) -> dict[str, Any]:
    """evaluate's result for all three. No speed, because models one after the other show how busy the machine was."""
    options = ["--text", str(text), "--samples", str(WINDOWS), "--enforce-eager", "--no-speed", "--json"]
    if SLOW_BF16:
        print("this CPU has no BF16 arithmetic: the perplexities are measured with activations in float32")
        options += ["--score-dtype", "float32"]
    models = [str(plain), str(smoothed), "--baseline", str(model)]
    return json.loads(smoothquant("evaluate", *models, *options, capture=True))


def ask(checkpoint: Path) -> str:
    """Serve `checkpoint`, ask QUESTION over the OpenAI API, stop the server."""
    log = FOLDER / "serve.log"
    arguments = ["--quantization", "smoothquant", "--served-model-name", "smollm2", "--max-model-len", "2048"]
    print("$ vllm serve", os.path.relpath(checkpoint), *arguments, flush=True)
    with vllm_serve(checkpoint, *arguments, "--enforce-eager", *KV_CACHE, log=log) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none needed", timeout=120)
        reply = client.chat.completions.create(
            model="smollm2", messages=[{"role": "user", "content": QUESTION}], temperature=0, max_tokens=40
        )
    answer = reply.choices[0].message.content or ""
    print(f"Q: {QUESTION}\nA: {answer}", flush=True)
    return answer


def smoothquant(*arguments: str, capture: bool = False) -> str:
    """Run `smoothquant ARGUMENTS...` of this environment; a failure ends the demo with its exit code."""
    print("$ smoothquant", *(os.path.relpath(a) if os.path.isabs(a) else a for a in arguments), flush=True)
    command = [str(Path(sys.executable).parent / "smoothquant"), *arguments]
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode != 0:
        sys.exit(done.returncode)
    return done.stdout or ""


def say(step: str) -> None:
    print(f"\n=== {step}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
