"""benchmarks/served.json: which architectures of tests/zoo.py vLLM's CPU backend serves in INT8, and how exactly.

`python -m benchmarks.served [NAME ...]`. Each tiny model is calibrated (per token, alpha auto), served by vLLM's own
implementation of its architecture in float32, and its log-probabilities of random prompts are compared with the plain
reference on the same files (calibration/reference.py). benchmarks/architectures.py puts the answers into its table. The
last line printed is JSON.
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

from calibration.pipeline import calibrate
from calibration.reference import load_reference
from tests import engine, tiny, zoo
from vllm_smoothquant.checkpoint import SmoothQuantError

# Set in the processes that main starts.
CHILD = "SMOOTHQUANT_SERVED_CHILD"
OUTPUT = Path(__file__).parent / "served.json"
# Both compute the same integers, but sum norms and attention in another order: an activation that lies on a rounding
# tie may fall to the other side, which moves one product by one step of 1/127 of its token's range. A wrong scale or a
# wrong slice moves log-probabilities by 0.1 and more.
BOUND = 0.02


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, zoo.VOCAB, (n,), generator=generator).tolist() for n in (5, 16, 24)]


def expected(checkpoint: Path) -> list[torch.Tensor]:
    """The reference's log-probabilities of the tokens that came."""
    model = load_reference(checkpoint)
    answer = []
    with torch.no_grad():
        for ids in prompts():
            logprobs = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
            answer.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return answer


def serve(name: str, folder: Path) -> str:
    """What the table says of `name`."""
    tiny.save(name, folder / "model")
    text = tiny.save_text(folder / "text.jsonl")
    try:
        # auto: what cannot be folded is divided at run time, so that is served as well.
        options = {"alpha": "auto", "dataset": str(text), "samples": 8, "seq_len": 32, "quiet": True}
        calibrate(str(folder / "model"), folder / "int8", **options)
    except SmoothQuantError as error:
        return f"refused: {error}"
    try:
        arguments = {"model": str(folder / "int8"), "model_impl": "vllm", **engine.DEFAULTS}
        served = engine.generate(arguments, prompts())
    except Exception as error:  # whatever vLLM raises for an architecture it does not know, or knows differently
        return f"not by vLLM: {reason(error)}"
    finally:
        gc.collect()
    difference = max(float((a - b).abs().max()) for a, b in zip(served, expected(folder / "int8"), strict=True))
    return f"{'yes' if difference <= BOUND else 'WRONG'} ({difference:.0e})"


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    said = f"{type(error).__name__}: {lines[-1] if 'validation error' in lines[0] else lines[0]}"
    return " ".join(said.replace("|", "/").split())[:160]


def serve_all(names: list[str], output: Path) -> None:
    """Serve `names` one after the other in this process, which a model that vLLM refuses leaves unfit for the next."""
    transformers.utils.logging.disable_progress_bar()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            said = serve(name, Path(folder))
        answers = json.loads(output.read_text()) if output.exists() else {}
        output.write_text(json.dumps(answers | {name: said}, indent=2, sort_keys=True) + "\n")
        print(f"{name:20} {said}", flush=True)
        if not said.startswith("yes"):
            return


def main() -> None:
    """Serve the models named, or all; write what came of each; exit 1 if one was served wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(zoo.ZOO))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    if CHILD in os.environ:
        serve_all(args.names, args.output)
        return
    environment = engine.small_engine() | {"VLLM_LOGGING_LEVEL": "ERROR", CHILD: "1"}
    args.output.unlink(missing_ok=True)
    left = args.names
    while left:
        command = [sys.executable, "-m", "benchmarks.served", *left, "--output", str(args.output)]
        subprocess.run(command, env=environment, check=False, stderr=subprocess.DEVNULL)
        answers = json.loads(args.output.read_text()) if args.output.exists() else {}
        if left[0] not in answers:
            args.output.write_text(json.dumps(answers | {left[0]: "not by vLLM: its process ended"}, indent=2))
            answers[left[0]] = "crashed"
        left = [name for name in left if name not in answers]
    wrong = [name for name, said in answers.items() if said.startswith("WRONG")]
    print(json.dumps({"served": sum(a.startswith("yes") for a in answers.values()), "wrong": wrong}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
