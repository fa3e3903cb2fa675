"""benchmarks/results/served.json: which architectures of tests/helpers/tiny_architectures.py, and which families of
tiny_vision.py, vLLM's CPU backend serves in INT8, and how exactly.

`python -m benchmarks.served [NAME ...]`. Each tiny model is calibrated (per token, alpha auto, rotated where that is
possible) and served by vLLM's own implementation of its architecture in float32, or in bfloat16 where its kernel for
gated delta rules takes nothing else. A family that reads images gets one in its prompt. Log-probabilities of random
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
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from calibration.discovery.rotations import find_rotations
from calibration.pipeline import calibrate
from tests.helpers import engine, tiny_architectures, tiny_checkpoints, tiny_vision, vision_engine
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


def dtype_of(config: PreTrainedConfig) -> str:
    """vLLM's kernel for gated delta rules on a CPU takes bfloat16 alone."""
    return "bfloat16" if hasattr(config, "linear_key_head_dim") else "float32"


def computed(model: PreTrainedModel) -> torch.Tensor:
    """Log-probabilities of the tokens of all prompts, by a model of transformers."""
    answer = []
    with torch.no_grad():
        for ids in prompts():
            logprobs = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
            answer.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return torch.cat(answer)


def served_by_vllm(folder: Path, dtype: str) -> torch.Tensor:
    """Log-probabilities of the tokens of all prompts, by vLLM."""
    arguments = {"model": str(folder), "model_impl": "vllm", **engine.DEFAULTS, "dtype": dtype}
    return torch.cat(engine.logprobs_here(arguments, prompts()))


def mean_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean())


def serve(name: str, folder: Path) -> str:
    """The table's entry for `name`."""
    if name in tiny_vision.FAMILIES:
        return serve_images(name, folder)
    dtype = dtype_of(tiny_architectures.config(name))
    torch_dtype = getattr(torch, dtype)
    tiny_checkpoints.save(name, folder / "model", torch_dtype)
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
    reference = computed(load_reference(folder / "int8", torch_dtype))
    exact = computed(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch_dtype).eval())
    try:
        served = served_by_vllm(folder / "int8", dtype)
    except Exception as error:  # vLLM raises various errors for architectures that it does not support
        return f"not by vLLM: {reason(error)}"
    finally:
        gc.collect()
    apart, rounding = mean_distance(served, reference), mean_distance(reference, exact)
    allowed = BOUND * rounding
    if dtype != "float32":
        # Two computations in bfloat16 are apart by sqrt(2) times what it moves each from float32.
        allowed = max(allowed, 2**0.5 * mean_distance(reference, computed(load_reference(folder / "int8"))))
    if apart <= allowed:
        return f"yes ({apart:.0e}{', bfloat16' * (dtype != 'float32')})"
    # If vLLM and transformers already differ in floating point, the cause is not the checkpoint.
    differs = mean_distance(served_by_vllm(folder / "model", dtype), exact)
    if differs > apart / 2:
        return f"yes, but vLLM's floating-point model is {differs:.0e} from transformers' ({apart:.0e})"
    return f"WRONG ({apart:.0e}; rounding {rounding:.0e})"


def serve_images(name: str, folder: Path) -> str:
    """The table's entry for the family `name`, with an image in the prompt and among the calibration samples."""
    tiny_vision.save(name, folder / "model")
    pictures = tiny_vision.save_pictures(folder / "pictures")
    options = {"alpha": "auto", "dataset": str(pictures), "samples": 8, "seq_len": 32, "quiet": True}
    calibrate(str(folder / "model"), folder / "int8", rotation="none", **options)
    exact = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    reference = load_reference(folder / "int8")
    apart, rounding = [], []
    for number, (_, served) in zip(vision_engine.PICTURES, vision_engine.answer(str(folder / "int8")), strict=True):
        inputs = vision_engine.inputs(folder / "int8", number)
        # vLLM's attention on a CPU is causal within an image as well, that of floating point too.
        inputs.pop("token_type_ids", None)
        with torch.no_grad():
            a, b = (model(**inputs).logits[0, :-1].log_softmax(-1) for model in (reference, exact))
        apart.append(mean_distance(a, served))
        rounding.append(mean_distance(a, b))
    if max(a / b for a, b in zip(apart, rounding, strict=True)) <= BOUND:
        return f"yes ({max(apart):.0e})"
    return f"WRONG ({max(apart):.0e}; rounding {max(rounding):.0e})"


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
    parser.add_argument("names", nargs="*", metavar="NAME", default=[*tiny_architectures.ZOO, *tiny_vision.FAMILIES])
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
