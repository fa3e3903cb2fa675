"""docs/serving.md: what a step takes when vLLM serves on a CPU: floating point, stock vLLM's INT8, each scheme of ours.

    python -m benchmarks.serving                 both models, compiled and eager; hours on two cores
    python -m benchmarks.serving --models SmolLM2 --modes eager --dtype float32 --prefill 128 --rounds 2 --samples 4

Each arm is a vLLM engine in a process of its own (engine.py), two at a time: the reference stays while the
others come and go. In a round both decode one request, then several, then take in a long prompt, in turn, every second
round the other way round; a round's ratio is of two runs that were seconds apart, so that a machine that grows slower
moves both. Steps are timed in the worker: neither scheduler nor tokenizer is in them. Nothing comes from a cache: no
prefix cache, and each engine compiles anew (but for --keep). Front end and worker are one process: on few cores the
one would poll on the other's core.

Stock vLLM gets the very integers of our default checkpoint (`smoothquant convert`), and no plugin. Floors are measured
first, by a process with the same threads and the same malloc (floors.py). Options and environment hold for all
arms alike: choose cores with taskset, threads with OMP_NUM_THREADS. The last line printed is JSON.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from ctypes.util import find_library
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.calibration import synthetic
from benchmarks.machine import describe
from benchmarks.serving import floors, page
from benchmarks.serving.page import FLOAT, STOCK
from calibration.checkpoint.convert import COMPRESSED_TENSORS, convert
from calibration.evaluation import evaluate
from calibration.running.precision import is_native
from demo import assets
from demo.server import stop
from vllm_smoothquant.format.files import MANIFEST, read_json

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "benchmarks" / "results" / "serving.json"
FOLDER = assets.CACHE / "serving"
MODES = {"compiled": False, "eager": True}
# Arm of ours -> how it is calibrated.
OURS: dict[str, list[str]] = {
    "default": [],
    "O1": ["--level", "O1"],
    "O2": ["--level", "O2"],
    "O3": ["--level", "O3"],
    "default, INT8 head": ["--quantize-lm-head"],
}
ARMS = (FLOAT, STOCK, *OURS)
PROMPT = 16  # tokens that a decoding request starts from
NEGLIGIBLE = 1e-3  # share of an operator in a step
CACHE_BYTES = 2**29  # for keys and values
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
Ask = Callable[..., Any]
Case = tuple[int, int, int]  # requests, tokens of each prompt, new tokens of each
Seconds = dict[str, dict[str, list[float]]]  # arm -> case -> of each round


class EngineError(RuntimeError):
    """The engine of `arm` ended instead of answering; str() is what its log says of that."""

    def __init__(self, arm: str, said: str) -> None:
        super().__init__(said)
        self.arm = arm


@dataclass(frozen=True)
class Model:
    """folder: makes it. samples of seq_len tokens calibrate it, and windows of as many measure it.

    speaks: whether its perplexity means anything.
    """

    what: str
    folder: Callable[[], Path]
    samples: int
    seq_len: int
    speaks: bool = True


def random_llama(size: str) -> Path:
    from tests.helpers import tiny_checkpoints

    return synthetic.write(size, assets.CACHE / "synthetic" / size, tiny_checkpoints.tokenizer())


def tiny_llama() -> Path:
    from tests.helpers import tiny_checkpoints

    folder = assets.CACHE / "synthetic" / "tiny"
    if not folder.exists():
        with assets.made(folder) as beside:
            tiny_checkpoints.save("llama-tied", beside)
    return folder


MODELS = {
    "SmolLM2": Model("SmolLM2-135M-Instruct", assets.model_dir, 16, 512),
    "1.1B": Model("A random Llama of 0.92 G parameters", partial(random_llama, "1.1B"), 4, 64, speaks=False),
    "tiny": Model("A tiny random Llama, to see that this runs", tiny_llama, 4, 32, speaks=False),
}


def file_name(*words: str) -> str:
    """Compilers are called with such names in the middle of a line: no spaces."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words))


def checkpoints(model: Model, arms: Sequence[str], folder: Path, samples: int) -> dict[str, Path]:
    """Arm -> what vLLM serves; those that `folder` has are taken as they are."""
    found = {FLOAT: model.folder()}
    text, stats = assets.calibration_text(), folder / "stats.safetensors"
    for arm in ("default", *(arm for arm in arms if arm in OURS and arm != "default")):
        found[arm] = folder / file_name(arm)
        if found[arm].exists():
            continue
        # What was observed serves all schemes, but not another set of layers.
        known = [] if "--quantize-lm-head" in OURS[arm] else ["--stats" if stats.exists() else "--save-stats", stats]
        size = ["--dataset", text, "--samples", samples, "--seq-len", model.seq_len]
        words = ["calibrate", found[FLOAT], "-o", found[arm], "--quiet", *size, *known, *OURS[arm]]
        subprocess.run([sys.executable, "-m", "calibration", *map(str, words)], check=True, cwd=ROOT)
    found[STOCK] = folder / STOCK
    if not found[STOCK].exists():
        convert(found["default"], found[STOCK], COMPRESSED_TENSORS)
    return {arm: found[arm] for arm in arms}


def environment(arm: str, preload: str | None, cache: Path) -> dict[str, str]:
    """Of an engine of `arm`: the plugin for ours alone, and compiled code kept in `cache`."""
    said = os.environ | ENVIRONMENT | {"VLLM_CACHE_ROOT": str(cache), "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch")}
    said.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    if preload:
        said["LD_PRELOAD"] = ":".join(filter(None, (preload, said.get("LD_PRELOAD"))))
    return said if arm in OURS else said | {"VLLM_PLUGINS": ""}


@contextmanager
def engine(
    arguments: dict[str, Any], arm: str, preload: str | None, compiled: Path | None
) -> Iterator[tuple[Ask, float]]:
    """Yield what asks a fresh engine (engine.ASKS), and the seconds until it was ready; EngineError.

    compiled: where its code may be from an earlier run; None: nowhere.
    """
    with tempfile.TemporaryDirectory(prefix="serving-") as folder:
        log = Path(folder, "log.txt")
        reading, writing = os.pipe()
        clock = time.perf_counter()
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.serving.engine", str(writing)], stdin=subprocess.PIPE, text=True,
                stdout=output, stderr=subprocess.STDOUT, pass_fds=[writing], cwd=ROOT, start_new_session=True,
                env=environment(arm, preload, compiled or Path(folder)),
            )  # fmt: skip
        os.close(writing)
        with os.fdopen(reading) as answers:

            def tell(line: Any) -> Any:
                assert process.stdin is not None
                try:
                    process.stdin.write(json.dumps(line) + "\n")
                    process.stdin.flush()
                    answer = answers.readline()
                except BrokenPipeError:
                    answer = ""
                if not answer:
                    raise EngineError(arm, evaluate._last_error(log.read_text(errors="replace")))
                return json.loads(answer)

            try:
                tell(arguments)
                yield lambda what, **how: tell([what, how]), time.perf_counter() - clock
            finally:
                stop(process)


def seconds_of(steps: Sequence[Sequence[float]], case: Case) -> float:
    """Of `steps`, as engine.py notes them: the one that takes the prompt in, or the median of those after it.

    A step that decodes has one token of each request. ValueError where the steps are not those of `case`.
    """
    requests, length, new = case
    decode = [seconds for tokens, running, seconds in steps if tokens == running == requests]
    prefill = [seconds for tokens, _, seconds in steps if tokens == requests * length]
    if (len(prefill), len(decode)) != (1, new - 1) or len(steps) != new:
        raise ValueError(f"expected one step for {requests} prompts of {length} tokens and {new - 1} more, got {steps}")
    return median(decode) if decode else prefill[0]


def in_turn(pair: Mapping[str, Callable[[Case], float]], cases: Mapping[str, Case], rounds: int) -> Seconds:
    """All cases by both arms of `pair`, `rounds` times; every second time the other one first."""
    found: Seconds = {arm: {case: [] for case in cases} for arm in pair}
    for turn in range(rounds):
        for case, what in cases.items():
            for arm in pair if turn % 2 == 0 else reversed(pair):
                found[arm][case].append(pair[arm](what))
    return found


def compare(
    model: Model, args: argparse.Namespace, cases: Mapping[str, Case], paths: Mapping[str, Path], **served: Any
) -> dict[str, Any]:
    """Arm -> its figures; the reference's seconds are those of all pairs, ratios are to the reference's same round.

    served: dtype and enforce_eager of all engines.
    """
    windows, _ = evaluate.token_windows(
        [str(paths[FLOAT])], str(assets.evaluation_text()), text_column="text", samples=args.windows,
        seq_len=model.seq_len, seed=0,
    )  # fmt: skip
    vocabulary = AutoConfig.from_pretrained(paths[FLOAT], trust_remote_code=False).vocab_size
    longest = max(model.seq_len + 1, *(length + new for _, length, new in cases.values()))
    most = max(requests for requests, _, _ in cases.values())
    reference = args.reference
    # Floating point first: it is what the others' distributions are compared with.
    others = sorted((arm for arm in paths if arm != reference), key=lambda arm: arm != FLOAT)
    rows: dict[str, Any] = {reference: {"seconds": {case: [] for case in cases}}}

    def started(arm: str) -> Any:
        print(f"{model.what}: {arm}", file=sys.stderr, flush=True)
        arguments = {
            "model": str(paths[arm]), "seed": 0, "max_model_len": longest, "max_num_seqs": most,
            "max_num_batched_tokens": max(longest, most * PROMPT), "kv_cache_memory_bytes": CACHE_BYTES, **served,
        }  # fmt: skip
        compiled = FOLDER / "compiled" / file_name(model.what, arm)
        return engine(arguments, arm, args.preload, compiled if args.keep else None)

    def timed(ask: Ask) -> Callable[[Case], float]:
        def run(case: Case) -> float:
            requests, length, new = case
            return seconds_of(ask("run", prompts=requests, length=length, new=new, vocabulary=vocabulary), case)

        for case in cases.values():
            run(case)  # compiles, allocates
        return run

    def profiled(ask: Ask) -> dict[str, dict[str, float]]:
        """Case -> operator -> its share of the steps' time."""
        found = {}
        for case, (requests, length, new) in cases.items():
            seen = ask("profile", prompts=requests, length=length, new=new, vocabulary=vocabulary)
            whole = sum(seconds for _, _, seconds in seen["steps"])
            shares = {operator: seconds / whole for operator, seconds in seen["operators"].items()}
            found[case] = {operator: share for operator, share in shares.items() if share > NEGLIGIBLE}
        return found

    with tempfile.TemporaryDirectory() as folder, started(reference) as (ask_reference, start):
        rows[reference] |= {"start": start} | ask_reference("about")
        run_reference = timed(ask_reference)
        for arm in others:
            try:
                with started(arm) as (ask, start):
                    row: dict[str, Any] = {"start": start} | ask("about")
                    found = in_turn({reference: run_reference, arm: timed(ask)}, cases, args.rounds)
                    asked = {arm: ask} if "memory" in rows[reference] else {reference: ask_reference, arm: ask}
                    rows[arm] = row | {"seconds": found[arm], "ratios": page.ratios(found, arm, reference)}
                    for case, values in found[reference].items():
                        rows[reference]["seconds"][case] += values
                    # The logits of whole windows, which no server holds, would be the peak.
                    for name, its in asked.items():
                        rows[name]["memory"] = its("memory")
                        rows[name]["profile"] = profiled(its)
                    for name in sorted(asked, key=lambda name: name != FLOAT):
                        way = {"keep" if name == FLOAT else "compare": f"{folder}/logits.pt"}
                        rows[name]["quality"] = asked[name]("score", windows=windows, **way)
            except EngineError as error:
                if error.arm in (FLOAT, reference):
                    raise  # without them there is nothing to compare with
                rows[arm] = {"failed": str(error)}
                print(f"{arm}: {error}", file=sys.stderr, flush=True)
    return {arm: rows[arm] for arm in ARMS if arm in rows}


def tcmalloc() -> str | None:
    """The machine's, or the one that some builds of vLLM bring along and preload themselves."""
    vllm = find_spec("vllm")
    libs = Path(*vllm.submodule_search_locations, "libs") if vllm and vllm.submodule_search_locations else Path("none")
    bundled = sorted(map(str, libs.glob("libtcmalloc*.so*")))
    return find_library("tcmalloc_minimal") or find_library("tcmalloc") or next(iter(bundled), None)


def measured_limits(dtype: str, preload: str | None) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.serving.floors", dtype], env=environment(FLOAT, preload, Path(folder)),
            check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure what is asked for, write the page: sections of models and modes that are not asked for stay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["SmolLM2", "1.1B"], choices=MODELS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--arms", nargs="*", default=ARMS, choices=ARMS, help=f"beside {FLOAT} and the reference")
    parser.add_argument("--reference", default=STOCK, choices=(FLOAT, STOCK), help="stays while the others come and go")
    parser.add_argument("--dtype", help="around the integers, of all arms (without: the model's own)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=32, help="that decode, in each run")
    parser.add_argument("--batch", type=int, default=16, help="requests that decode at once, beside one alone")
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the long prompt")
    parser.add_argument("--windows", type=int, default=4, help="of text, to measure quality on")
    parser.add_argument("--samples", type=int, help="to calibrate with (without: 16 of SmolLM2, 4 of a random one)")
    parser.add_argument("--preload", metavar="FILE", default=tcmalloc(), help="the malloc of all arms")
    parser.add_argument("--keep", action="store_true", help="checkpoints and compiled code, for a next run")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="the JSON file to keep them in")
    parser.add_argument("--output", type=Path, default=page.OUTPUT, help="the page to write")
    args = parser.parse_args()
    cases = {
        "decode 1": (1, PROMPT, args.steps + 1),
        f"decode {args.batch}": (args.batch, PROMPT, args.steps + 1),
        f"prefill {args.prefill}": (1, args.prefill, 1),
    }
    arms = [arm for arm in ARMS if arm in (FLOAT, args.reference, *args.arms)]
    figures: dict[str, Any] = json.loads(args.figures.read_text()) if args.figures.exists() else {}
    for name in args.models:
        model = MODELS[name]
        own = AutoConfig.from_pretrained(model.folder(), trust_remote_code=False).dtype
        kind = getattr(torch, args.dtype) if args.dtype else own
        dtype = str(kind).removeprefix("torch.")
        limits = measured_limits(dtype, args.preload)
        with nullcontext(FOLDER / name) if args.keep else tempfile.TemporaryDirectory(dir=assets.CACHE) as folder:
            paths = checkpoints(model, arms, Path(folder), args.samples or model.samples)
            seen = read_json(Path(folder) / "default" / MANIFEST)["calibration"]
            floors = {
                arm: floors.floors(floors.parts(path, kind.itemsize), limits, cases) for arm, path in paths.items()
            }
            for mode in args.modes:
                figures.setdefault(name, {})[mode] = {
                    "machine": describe(), "command": shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
                    "what": model.what, "speaks": model.speaks, "dtype": dtype, "native": is_native(kind, "cpu"),
                    "calibrated": [seen["samples"], seen["seq_len"]], "windows": [args.windows, model.seq_len],
                    "kept": args.keep, "rounds": args.rounds, "steps": args.steps, "reference": args.reference,
                    "limits": limits, "floors": floors,
                    "rows": compare(model, args, cases, paths, dtype=dtype, enforce_eager=MODES[mode]),
                }  # fmt: skip
                args.figures.write_text(json.dumps(figures, indent=2) + "\n")
                args.output.write_text(text := page.page(figures))
    print(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
