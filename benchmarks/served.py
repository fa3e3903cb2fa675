"""benchmarks/served.json: which architectures of tests/zoo.py vLLM's CPU backend serves in INT8, and how exactly.

`python -m benchmarks.served [NAME ...]`. Each tiny model is calibrated (default scheme), served by vLLM's own
implementation of its architecture in float32, and its log-probabilities of random prompts are compared with the plain
reference on the same files (calibration/reference.py). benchmarks/architectures.py puts the answers into its table. The
last line printed is JSON.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from calibration.pipeline import calibrate
from calibration.reference import load_reference
from tests import engine, tiny, zoo
from vllm_smoothquant.checkpoint import SmoothQuantError

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
        calibrate(str(folder / "model"), folder / "int8", dataset=str(text), samples=8, seq_len=32, quiet=True)
    except SmoothQuantError as error:
        return f"refused: {error}"
    try:
        served = engine.logprobs(folder / "int8", prompts(), model_impl="vllm")
    except engine.EngineFailedError as error:
        return f"not by vLLM: {reason(str(error))}"
    difference = max(float((a - b).abs().max()) for a, b in zip(served, expected(folder / "int8"), strict=True))
    return f"{'yes' if difference <= BOUND else 'WRONG'} ({difference:.0e})"


def reason(log: str) -> str:
    """The first exception in vLLM's output."""
    lines = [line.rpartition("] ")[2].strip() for line in log.splitlines()]
    errors = [line for line in lines if "Error: " in line]
    return (errors or lines or ["no output"])[0][:160].replace("|", "/")


def main() -> None:
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    answers = json.loads(OUTPUT.read_text()) if OUTPUT.exists() else {}
    for name in sys.argv[1:] or zoo.ZOO:
        with tempfile.TemporaryDirectory() as folder:
            answers[name] = serve(name, Path(folder))
        print(f"{name:20} {answers[name]}", flush=True)
        OUTPUT.write_text(json.dumps(answers, indent=2, sort_keys=True) + "\n")
    wrong = [name for name, said in answers.items() if said.startswith("WRONG")]
    print(json.dumps({"served": sum(a.startswith("yes") for a in answers.values()), "wrong": wrong}))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
