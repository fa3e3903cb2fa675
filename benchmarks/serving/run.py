"""docs/serving.md: the time of a step when vLLM serves on a CPU: floating point, stock vLLM's INT8, our schemes.

    python -m benchmarks.serving                 both models, compiled and eager; hours on two cores
    python -m benchmarks.serving --models SmolLM2 --modes eager --dtype float32 --prefill 128 --rounds 2 --samples 4

Each arm is a vLLM engine in a process of its own (engine.py). Two engines run at a time: the reference stays, the other
arms follow one another. In a round both engines decode one request, then several, then prefill a long prompt, in turn;
every second round in reverse order. The two runs of a ratio are seconds apart, so that a slowdown of the machine
affects both. Steps are timed in the worker, without scheduler and tokenizer. Nothing comes from a cache: there is no
prefix cache, and each engine compiles everything (except with --keep). Front end and worker are one process, because on
few cores one of them would poll on the core of the other.

Stock vLLM gets the integers of our default checkpoint (`smoothquant convert`) and no plugin. Floors are measured first,
by a process with the same threads and the same malloc (floors.py). Options and environment are the same for all arms:
choose cores with taskset, threads with OMP_NUM_THREADS. The last line printed is JSON.
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
from calibration.evaluation.measure import last_error
from calibration.evaluation.windows import token_windows
from calibration.running.precision import is_native
from demo import assets
from demo.server import stop
from vllm_smoothquant.format.files import MANIFEST, read_json

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "benchmarks" / "results" / "serving.json"
FOLDER = assets.CACHE / "serving"
MODES = {"compiled": False, "eager": True}
# Our arms -> options of their calibration.
OURS: dict[str, list[str]] = {
    "default": [],
    "O1": ["--level", "O1"],
    "O2": ["--level", "O2"],
    "O3": ["--level", "O3"],
    "static, rotated": ["--activations", "static", "--rotation", "always"],
    "static, not rotated": ["--activations", "static", "--rotation", "none"],
    "default, INT8 head": ["--quantize-lm-head"],
    # Rounding changes no speed.
    "W4A8": ["--bits", "4", "--activations", "token", "--rounding", "nearest"],
    "W4A16": ["--bits", "4", "--rounding", "nearest"],
}
ARMS = (FLOAT, STOCK, *OURS)
PROMPT = 16  # tokens that a decoding request starts from
NEGLIGIBLE = 1e-3  # share of an operator in a step
CACHE_BYTES = 2**29  # for keys and values
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
Ask = Callable[..., Any]  # sends a command of engine.py and returns the answer
Case = tuple[int, int, int]  # requests, tokens of each prompt, new tokens of each
Seconds = dict[str, dict[str, list[float]]]  # arm -> case -> of each round


class EngineError(RuntimeError):
    """The engine of `arm` ended instead of answering; str() is the reason, from its log."""

    def __init__(self, arm: str, reason: str) -> None:
        super().__init__(reason)
        self.arm = arm


@dataclass(frozen=True)
class Model:
    """folder: creates the model's folder. samples: number of calibration samples. seq_len: tokens of a sample and of a
    window of text that quality is measured on. speaks: whether the model's perplexity has a meaning.
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
        with assets.made(folder) as partial_folder:
            tiny_checkpoints.save("llama-tied", partial_folder)
    return folder


MODELS = {
    "SmolLM2": Model("SmolLM2-135M-Instruct", assets.model_dir, 16, 512),
    "1.1B": Model("A random Llama of 0.92 G parameters", partial(random_llama, "1.1B"), 4, 64, speaks=False),
    "tiny": Model("A tiny random Llama, to see that this runs", tiny_llama, 4, 32, speaks=False),
}


def file_name(*words: str) -> str:
    """A name without spaces, because compilers are called with it in an unquoted command line."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", "-".join(words))


def checkpoints(model: Model, arms: Sequence[str], folder: Path, samples: int) -> dict[str, Path]:
    """Arm -> the folder that vLLM serves. Checkpoints that exist in `folder` are used as they are."""
    paths = {FLOAT: model.folder()}
    text, stats = assets.calibration_text(), folder / "stats.safetensors"
    for arm in ("default", *(arm for arm in arms if arm in OURS and arm != "default")):
        paths[arm] = folder / file_name(arm)
        if paths[arm].exists():
            continue
        # One observation is enough for all schemes, but not for another set of layers or another rotation.
        other = {"--quantize-lm-head", "--rotation"} & set(OURS[arm])
        reuse = [] if other else ["--stats" if stats.exists() else "--save-stats", stats]
        size = ["--dataset", text, "--samples", samples, "--seq-len", model.seq_len]
        words = ["calibrate", paths[FLOAT], "-o", paths[arm], "--quiet", *size, *reuse, *OURS[arm]]
        if not model.speaks and "--rotation" not in words:
            words += ["--rotation", "none"]  # of random weights it is a coin flip, and it changes no speed
        subprocess.run([sys.executable, "-m", "calibration", *map(str, words)], check=True, cwd=ROOT)
    paths[STOCK] = folder / STOCK
    if not paths[STOCK].exists():
        convert(paths["default"], paths[STOCK], COMPRESSED_TENSORS)
    return {arm: paths[arm] for arm in arms}


# Instruction set -> the environment in which torch, Inductor, oneDNN and engine.py use no later one.
ISAS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "SMOOTHQUANT_BENCHMARK_ISA": "avx2"},
}


def environment(arm: str, preload: str | None, cache: Path) -> dict[str, str]:
    """The environment of an engine of `arm`: only our arms load the plugin; compiled code is stored in `cache`."""
    variables = os.environ | ENVIRONMENT | {"VLLM_CACHE_ROOT": str(cache)}
    variables["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "torch")
    variables.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
    if preload:
        variables["LD_PRELOAD"] = ":".join(filter(None, (preload, variables.get("LD_PRELOAD"))))
    return variables if arm in OURS else variables | {"VLLM_PLUGINS": ""}


@contextmanager
def engine(
    arguments: dict[str, Any], arm: str, preload: str | None, compiled: Path | None
) -> Iterator[tuple[Ask, float]]:
    """Yield an Ask for a new engine and the seconds until it was ready. Errors: EngineError.

    compiled: the folder of compiled code, which may have code from an earlier run; None: a new folder.
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
                    raise EngineError(arm, last_error(log.read_text(errors="replace")))
                return json.loads(answer)

            try:
                tell(arguments)
                yield lambda command, **options: tell([command, options]), time.perf_counter() - clock
            finally:
                stop(process)


def seconds_of(steps: Sequence[Sequence[float]], case: Case) -> float:
    """Seconds of the prompt's step among `steps`, as engine.py records them, or the median of the steps after it.

    A step that decodes has one token of each request. Errors: ValueError if the steps are not those of `case`.
    """
    requests, length, new = case
    decode = [seconds for tokens, running, seconds in steps if tokens == running == requests]
    prefill = [seconds for tokens, _, seconds in steps if tokens == requests * length]
    if (len(prefill), len(decode)) != (1, new - 1) or len(steps) != new:
        raise ValueError(f"expected one step for {requests} prompts of {length} tokens and {new - 1} more, got {steps}")
    return median(decode) if decode else prefill[0]


def in_turn(pair: Mapping[str, Callable[[Case], float]], cases: Mapping[str, Case], rounds: int) -> Seconds:
    """Run all cases by both arms of `pair`, `rounds` times; every second time the other arm first."""
    seconds: Seconds = {arm: {name: [] for name in cases} for arm in pair}
    for turn in range(rounds):
        for name, case in cases.items():
            for arm in pair if turn % 2 == 0 else reversed(pair):
                seconds[arm][name].append(pair[arm](case))
    return seconds


def compare(
    model: Model, args: argparse.Namespace, cases: Mapping[str, Case], paths: Mapping[str, Path], **served: Any
) -> dict[str, Any]:
    """Arm -> its figures. The reference's seconds are those of all pairs; a ratio is of two runs of the same round.

    served: dtype and enforce_eager of all engines.
    """
    windows, _ = token_windows(
        [str(paths[FLOAT])], str(assets.evaluation_text()), text_column="text", samples=args.windows,
        seq_len=model.seq_len, seed=0,
    )  # fmt: skip
    vocabulary = AutoConfig.from_pretrained(paths[FLOAT], trust_remote_code=False).vocab_size
    longest = max(model.seq_len + 1, *(length + new for _, length, new in cases.values()))
    most = max(requests for requests, _, _ in cases.values())
    reference = args.reference
    # Floating point first, because the other arms' distributions are compared with its.
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
            run(case)  # compiles and allocates
        return run

    def profiled(ask: Ask) -> dict[str, dict[str, float]]:
        """Case -> operator -> its share of the steps' time."""
        shares = {}
        for case, (requests, length, new) in cases.items():
            profile = ask("profile", prompts=requests, length=length, new=new, vocabulary=vocabulary)
            total = sum(seconds for _, _, seconds in profile["steps"])
            of_case = {operator: seconds / total for operator, seconds in profile["operators"].items()}
            shares[case] = {operator: share for operator, share in of_case.items() if share > NEGLIGIBLE}
        return shares

    with tempfile.TemporaryDirectory() as folder, started(reference) as (ask_reference, start):
        rows[reference] |= {"start": start} | ask_reference("about")
        run_reference = timed(ask_reference)
        for arm in others:
            try:
                with started(arm) as (ask, start):
                    row: dict[str, Any] = {"start": start} | ask("about")
                    times = in_turn({reference: run_reference, arm: timed(ask)}, cases, args.rounds)
                    # The reference's other figures are measured once, with the first arm.
                    asks = {arm: ask} if "memory" in rows[reference] else {reference: ask_reference, arm: ask}
                    rows[arm] = row | {"seconds": times[arm], "ratios": page.ratios(times, arm, reference)}
                    for case, values in times[reference].items():
                        rows[reference]["seconds"][case] += values
                    # Memory before quality: the logits of whole windows, which no server holds, would be the peak.
                    for name, ask_arm in asks.items():
                        rows[name]["memory"] = ask_arm("memory")
                        rows[name]["profile"] = profiled(ask_arm)
                    for name in sorted(asks, key=lambda name: name != FLOAT):
                        logits = {"keep" if name == FLOAT else "compare": f"{folder}/logits.pt"}
                        rows[name]["quality"] = asks[name]("score", windows=windows, **logits)
            except EngineError as error:
                if error.arm in (FLOAT, reference):
                    raise  # the other arms are compared with these two
                rows[arm] = {"failed": str(error)}
                print(f"{arm}: {error}", file=sys.stderr, flush=True)
    return {arm: rows[arm] for arm in ARMS if arm in rows}


def tcmalloc() -> str | None:
    """The machine's tcmalloc, or the one that some builds of vLLM contain and preload."""
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
    """Measure the models and modes of the command line and write the page; its other sections stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["SmolLM2", "1.1B"], choices=MODELS)
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument(
        "--arms", nargs="*", default=ARMS, choices=ARMS, help=f"in addition to {FLOAT} and the reference"
    )
    parser.add_argument("--reference", default=STOCK, choices=(FLOAT, STOCK), help="the arm of all ratios")
    parser.add_argument("--dtype", help="around the integers, of all arms (default: the model's)")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=32, help="decoding steps of each run")
    parser.add_argument("--batch", type=int, default=16, help="requests that decode at once")
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the long prompt")
    parser.add_argument("--windows", type=int, default=4, help="windows of text that quality is measured on")
    parser.add_argument("--samples", type=int, help="to calibrate with (default: 16 for SmolLM2, else 4)")
    parser.add_argument("--preload", metavar="FILE", default=tcmalloc(), help="the malloc of all arms")
    parser.add_argument("--keep", action="store_true", help="keep checkpoints and compiled code for the next run")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="the JSON file of all figures")
    parser.add_argument("--output", type=Path, default=page.OUTPUT, help="the page to write")
    parser.add_argument("--isa", choices=ISAS, default="native", help="as on a CPU that has no later instructions")
    args = parser.parse_args()
    os.environ |= ISAS[args.isa]
    cases = {
        "decode 1": (1, PROMPT, args.steps + 1),
        f"decode {args.batch}": (args.batch, PROMPT, args.steps + 1),
        f"prefill {args.prefill}": (1, args.prefill, 1),
    }
    arms = [arm for arm in ARMS if arm in (FLOAT, args.reference, *args.arms)]
    figures: dict[str, Any] = json.loads(args.figures.read_text()) if args.figures.exists() else {}
    for name in args.models:
        model = MODELS[name]
        model_dtype = AutoConfig.from_pretrained(model.folder(), trust_remote_code=False).dtype
        torch_dtype = getattr(torch, args.dtype) if args.dtype else model_dtype
        dtype = str(torch_dtype).removeprefix("torch.")
        limits = measured_limits(dtype, args.preload)
        with nullcontext(FOLDER / name) if args.keep else tempfile.TemporaryDirectory(dir=assets.CACHE) as folder:
            paths = checkpoints(model, arms, Path(folder), args.samples or model.samples)
            manifest = read_json(Path(folder) / "default" / MANIFEST)["calibration"]
            floors_of_arms = {
                arm: floors.floors(floors.parts(path, torch_dtype.itemsize), limits, cases)
                for arm, path in paths.items()
            }
            for mode in args.modes:
                figures.setdefault(name, {})[mode] = {
                    "machine": describe(), "command": shlex.join(["python", "-m", "benchmarks.serving", *sys.argv[1:]]),
                    "what": model.what, "speaks": model.speaks, "dtype": dtype, "native": is_native(torch_dtype, "cpu"),
                    "calibrated": [manifest["samples"], manifest["seq_len"]], "windows": [args.windows, model.seq_len],
                    "kept": args.keep, "rounds": args.rounds, "steps": args.steps, "reference": args.reference,
                    "limits": limits, "floors": floors_of_arms,
                    "rows": compare(model, args, cases, paths, dtype=dtype, enforce_eager=MODES[mode]),
                }  # fmt: skip
                args.figures.write_text(json.dumps(figures, indent=2) + "\n")
                args.output.write_text(text := page.page(figures))
    print(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
