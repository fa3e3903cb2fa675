"""benchmarks/results/served.json: which architectures of tests/helpers/tiny_architectures.py vLLM's CPU backend
serves in INT8, and how exactly.

`python -m benchmarks.served [NAME ...]`. Each tiny model is calibrated (per token, alpha auto), served by vLLM's own
implementation of its architecture in float32, and its log-probabilities of random prompts are compared with the plain
reference on the same files (tests/helpers/reference.py); in brackets the mean difference. Models that are named replace
their answers. benchmarks/architectures.py puts them into its table. The last line printed is JSON.
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

from calibration.pipeline import calibrate
from tests.helpers import engine, tiny_architectures, tiny_checkpoints
from tests.helpers.reference import load_reference
from vllm_smoothquant.format.errors import SmoothQuantError

# Set in the processes that main starts.
CHILD = "SMOOTHQUANT_SERVED_CHILD"
OUTPUT = Path(__file__).parent / "results" / "served.json"
# Both compute the same integers, but sum norms and attention in another order: an activation that lies on a rounding
# tie may fall to the other side, and what follows moves by a part of the rounding error. Were everything rounded apart,
# they would be sqrt(2) of it apart; a wrong scale or slice is many times that. Means over all tokens are compared.
BOUND = 0.5


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, tiny_architectures.VOCAB, (n,), generator=generator).tolist() for n in (5, 16, 24)]


def computed(model: PreTrainedModel) -> torch.Tensor:
    """Log-probabilities of the tokens that came, of all prompts, by a model of transformers."""
    answer = []
    with torch.no_grad():
        for ids in prompts():
            logprobs = model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)
            answer.append(logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0])
    return torch.cat(answer)


def served_by_vllm(folder: Path) -> torch.Tensor:
    """The same, by vLLM."""
    arguments = {"model": str(folder), "model_impl": "vllm", **engine.DEFAULTS}
    return torch.cat(engine.generate(arguments, prompts()))


def mean_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().mean())


def serve(name: str, folder: Path) -> str:
    """What the table says of `name`."""
    tiny_checkpoints.save(name, folder / "model")
    text = tiny_checkpoints.save_text(folder / "text.jsonl")
    try:
        # auto: what cannot be folded is divided at run time, so that is served as well.
        options = {"alpha": "auto", "dataset": str(text), "samples": 8, "seq_len": 32, "quiet": True}
        calibrate(str(folder / "model"), folder / "int8", **options)
    except SmoothQuantError as error:
        return f"refused: {error}"
    # Before vLLM: its Transformers backend rewrites classes of transformers, which then run nowhere else.
    reference = computed(load_reference(folder / "int8"))
    exact = computed(AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32).eval())
    try:
        served = served_by_vllm(folder / "int8")
    except Exception as error:  # whatever vLLM raises for an architecture it does not know, or knows differently
        return f"not by vLLM: {reason(error)}"
    finally:
        gc.collect()
    apart, rounding = mean_distance(served, reference), mean_distance(reference, exact)
    if apart <= BOUND * rounding:
        return f"yes ({apart:.0e})"
    # Not ours to mend where vLLM and transformers already differ without us.
    differs = mean_distance(served_by_vllm(folder / "model"), exact)
    if differs > apart / 2:
        return f"yes, but vLLM's floating-point model is {differs:.0e} from transformers' ({apart:.0e})"
    return f"WRONG ({apart:.0e}; rounding {rounding:.0e})"


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    # pydantic has the reason on its second line.
    line = lines[1].partition(" [type=")[0] if "validation error" in lines[0] and len(lines) > 1 else lines[0]
    said = f"{type(error).__name__}: {line.strip()}"
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
    parser.add_argument("names", nargs="*", metavar="NAME", default=list(tiny_architectures.ZOO))
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    if CHILD in os.environ:
        serve_all(args.names, args.output)
        return
    environment = engine.small_engine() | {"VLLM_LOGGING_LEVEL": "ERROR", CHILD: "1"}
    answers = json.loads(args.output.read_text()) if args.output.exists() else {}
    args.output.write_text(json.dumps({name: said for name, said in answers.items() if name not in args.names}))
    left = args.names
    while left:
        command = [sys.executable, "-m", "benchmarks.served", *left, "--output", str(args.output)]
        subprocess.run(command, env=environment, check=False, stderr=subprocess.DEVNULL)
        answers = json.loads(args.output.read_text()) if args.output.exists() else {}
        if left[0] not in answers:
            answers[left[0]] = "not by vLLM: its process ended"
            args.output.write_text(json.dumps(answers, indent=2, sort_keys=True) + "\n")
        left = [name for name in left if name not in answers]
    wrong = [name for name, said in answers.items() if said.startswith("WRONG")]
    print(json.dumps({"served": sum(a.startswith("yes") for a in answers.values()), "wrong": wrong}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
