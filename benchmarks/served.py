"""benchmarks/results/served.json: which architectures of tests/helpers/tiny_architectures.py vLLM's CPU backend serves
in INT8, and how exactly.

`python -m benchmarks.served [NAME ...]`. Each tiny model is calibrated (per token, alpha auto, rotated where that is
possible) and served by vLLM's own implementation of its architecture in float32. Its log-probabilities of random
prompts are compared with those of the plain reference on the same files (tests/helpers/reference.py); the mean
difference is in brackets. The answers of the models named on the command line are replaced. benchmarks/architectures.py
puts the answers into its table. The last line printed is JSON.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from calibration.discovery.rotations import find_rotations
from calibration.pipeline import calibrate
from tests.helpers import engine, tiny_architectures, tiny_checkpoints
from tests.helpers.reference import load_reference
from vllm_smoothquant.format.config import STREAM
from vllm_smoothquant.format.errors import SmoothQuantError

# Set in the processes that main starts.
CHILD = "SMOOTHQUANT_SERVED_CHILD"
OUTPUT = Path(__file__).parent / "results" / "served.json"
# vLLM and the reference compute the same integers, but add up norms and attention in different orders. An activation
# near a rounding tie may then be rounded the other way, which changes later values by a part of the rounding error.
# Two independent roundings would differ by sqrt(2) times that error, a wrong scale or slice by many times as much. The
# bound is for means over all tokens.
BOUND = 0.5


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, tiny_architectures.VOCAB, (n,), generator=generator).tolist() for n in (5, 16, 24)]


def computed(model: PreTrainedModel) -> torch.Tensor:
    """Log-probabilities of the tokens of all prompts, by a model of transformers."""
    answer = []
    with torch.no_grad():
        for ids in prompts():
            logprobs = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
            answer.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return torch.cat(answer)


def served_by_vllm(folder: Path) -> torch.Tensor:
    """Log-probabilities of the tokens of all prompts, by vLLM."""
    arguments = {"model": str(folder), "model_impl": "vllm", **engine.DEFAULTS}
    return torch.cat(engine.logprobs_here(arguments, prompts()))


def mean_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean())


def serve(name: str, folder: Path) -> str:
    """The table's entry for `name`."""
    tiny_checkpoints.save(name, folder / "model")
    text = tiny_checkpoints.save_text(folder / "text.jsonl")
    try:
        # With auto, inputs whose factors cannot be folded are divided at run time, so that this is tested, too.
        options = {"alpha": "auto", "dataset": str(text), "samples": 8, "seq_len": 32, "quiet": True}
        graph = find_rotations(tiny_architectures.build(name), tiny_architectures.tokens(1))
        options["rotation"] = "always" if STREAM in graph.sizes else "none"
        calibrate(str(folder / "model"), folder / "int8", **options)
    except SmoothQuantError as error:
        return f"refused: {error}"
    # Before vLLM runs, because its Transformers backend rewrites classes of transformers.
    reference = computed(load_reference(folder / "int8"))
    exact = computed(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval())
    try:
        served = served_by_vllm(folder / "int8")
    except Exception as error:  # vLLM raises various errors for architectures that it does not support
        return f"not by vLLM: {reason(error)}"
    finally:
        gc.collect()
    apart, rounding = mean_distance(served, reference), mean_distance(reference, exact)
    if apart <= BOUND * rounding:
        return f"yes ({apart:.0e})"
    # If vLLM and transformers already differ in floating point, the cause is not the checkpoint.
    differs = mean_distance(served_by_vllm(folder / "model"), exact)
    if differs > apart / 2:
        return f"yes, but vLLM's floating-point model is {differs:.0e} from transformers' ({apart:.0e})"
    return f"WRONG ({apart:.0e}; rounding {rounding:.0e})"


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    # pydantic puts the reason on the second line.
    line = lines[1].partition(" [type=")[0] if "validation error" in lines[0] and len(lines) > 1 else lines[0]
    text = f"{type(error).__name__}: {line.strip()}"
    return " ".join(text.replace("|", "/").split())[:160]


def serve_all(names: list[str], output: Path) -> None:
    """Serve `names` one after the other in this process, until one fails: vLLM may be unusable after a failure."""
    transformers.utils.logging.disable_progress_bar()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            answer = serve(name, Path(folder))
        answers = json.loads(output.read_text()) if output.exists() else {}
        output.write_text(json.dumps(answers | {name: answer}, indent=2, sort_keys=True) + "\n")
        print(f"{name:20} {answer}", flush=True)
        if not answer.startswith("yes"):
            return


def main() -> None:
    """Serve the models named on the command line, or all; write the answers; exit 1 if one was served wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(tiny_architectures.ZOO))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    if CHILD in os.environ:
        serve_all(args.names, args.output)
        return
    environment = engine.small_engine() | {"VLLM_LOGGING_LEVEL": "ERROR", CHILD: "1"}
    answers = json.loads(args.output.read_text()) if args.output.exists() else {}
    args.output.write_text(json.dumps({name: answer for name, answer in answers.items() if name not in args.names}))
    remaining = args.names
    while remaining:
        command = [sys.executable, "-m", "benchmarks.served", *remaining, "--output", str(args.output)]
        subprocess.run(command, env=environment, check=False, stderr=subprocess.DEVNULL)
        answers = json.loads(args.output.read_text()) if args.output.exists() else {}
        if remaining[0] not in answers:
            answers[remaining[0]] = "not by vLLM: its process ended"
            args.output.write_text(json.dumps(answers, indent=2, sort_keys=True) + "\n")
        remaining = [name for name in remaining if name not in answers]
    wrong = [name for name, answer in answers.items() if answer.startswith("WRONG")]
    print(json.dumps({"served": sum(a.startswith("yes") for a in answers.values()), "wrong": wrong}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
