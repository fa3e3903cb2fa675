"""Measure models through vLLM in a separate process: the measured engine is the one that serves.

Only that process (engine.py, lm_eval_tasks.py) imports vLLM. Importing vLLM takes half of an engine's start, so one
process measures several models one after the other, except if the peak memory of a process is measured.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_smoothquant.format.errors import SmoothQuantError

from .last_word import Passage

# Generation measured for speed: this many prompts of this many tokens at once, each continued by this many.
DECODE = {"batch": 8, "prompt_tokens": 16, "new_tokens": 16, "repeats": 3}
# What --table measures of a model as a server would run it.
SERVE = {"prompt_tokens": 128, "new_tokens": 32, "batches": [1, 16], "repeats": 3}
SMALL_HOST = 4  # cores
GiB = 1 << 30


def measure(
    model: str | Path, windows: Sequence[Sequence[int]], *, timeout: float | None = None, **arguments: Any
) -> dict[str, Any]:
    """The figures of `model`, measured by one engine; arguments: those of `make_request`.

    Errors: SmoothQuantError if vLLM cannot run the model, subprocess.TimeoutExpired after `timeout` seconds. No process
    is left in any case.
    """
    return measure_all([make_request(model, windows, **arguments)], timeout)[0]


def make_request(
    model: str | Path, windows: Sequence[Sequence[int]], *, score: bool = True, passages: Sequence[Passage] = (),
    keep: str | None = None, compare: str | None = None, decode: Mapping[str, int] | None = DECODE,
    serve: Mapping[str, Any] | None = None, **engine: Any,
) -> dict[str, Any]:  # fmt: skip
    """A request to one engine. Its answer has memory_bytes of all weights and the kernels of quantised layers.

    score: adds perplexity and scored_tokens. passages: last_word_accuracy. decode: decode_tokens_per_second. serve:
    the figures of engine.serving. keep: a file to write this model's probabilities to. compare: a file that another
    request wrote; adds kl_divergence and top1_agreement with that request's model. engine: arguments of vLLM's LLM().
    """
    lengths = [len(ids) for ids in [*windows, *(passage["ids"] for passage in passages)]]
    lengths += [part["prompt_tokens"] + part["new_tokens"] + 1 for part in (decode, serve) if part is not None]
    return {
        "model": str(model), "windows": [list(window) for window in windows], "score": score,
        "passages": list(passages), "keep": keep, "compare": compare, "decode": decode, "serve": serve,
        # kv_cache_memory_bytes: without it vLLM reserves nearly all of the machine's memory for the cache.
        "engine": {
            "max_model_len": max(lengths) + 1, "max_num_seqs": 16, "kv_cache_memory_bytes": GiB, "seed": 0, **engine
        },
    }  # fmt: skip


def measure_all(requests: Sequence[dict[str, Any]], timeout: float | None = None) -> list[dict[str, Any]]:
    """The answers to `requests`, measured one after the other in one process."""
    return _run_process("calibration.evaluation.engine", requests, timeout)


def run_tasks(
    model: str | Path, tasks: Sequence[str], *, include_path: str | None = None, limit: int | None = None, **engine: Any
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, by lm-evaluation-harness through a new vLLM engine.

    tasks: names, or paths of YAML files. include_path: a folder with more tasks. limit: documents of each task.
    """
    if find_spec("lm_eval") is None:
        raise SmoothQuantError("--tasks", "lm-evaluation-harness", "no such package", "pip install 'lm-eval>=0.4.9'")
    request = {
        "model": str(model), "tasks": list(tasks), "include_path": include_path, "limit": limit,
        "engine": {"kv_cache_memory_bytes": GiB, "seed": 0, **engine},
    }  # fmt: skip
    return _run_process("calibration.evaluation.lm_eval_tasks", [request], None)[0]


def _run_process(module: str, requests: Sequence[dict[str, Any]], timeout: float | None) -> list[Any]:
    """The answers of `python -m MODULE REQUESTS ANSWERS`. No process is left, also after an error or a timeout."""
    require_vllm()
    environment = engine_environment(requests[0]["engine"])
    if not any(request.get("serve") for request in requests):
        # The engine runs in the process itself, which starts faster. With `serve` it runs as in a server.
        environment.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    with tempfile.TemporaryDirectory(prefix="smoothquant-") as folder:
        request_file, answer_file, log = (Path(folder, name) for name in ("requests.json", "answers.jsonl", "log.txt"))
        request_file.write_text(json.dumps(list(requests)))
        answer_file.touch()
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(request_file), str(answer_file)],
                stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(timeout)
            finally:
                with suppress(ProcessLookupError):  # the group also has the engine's workers
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        answers = answer_file.read_text().splitlines()
        if code != 0 or len(answers) < len(requests):
            model = requests[min(len(answers), len(requests) - 1)]["model"]
            reason = last_error(log.read_text(errors="replace"))
            raise SmoothQuantError(model, "a model that vLLM can run", reason, f"see what `vllm serve {model}` prints")
        return [json.loads(answer) for answer in answers]


def engine_environment(engine: Mapping[str, Any] | None = None) -> dict[str, str]:
    """This process's environment for a process that runs vLLM; variables that the user has set stay.

    Only vLLM's CPU backend reads the added variable. By default it reserves a core for the front end, which is half of
    a small host.
    """
    environment = dict(os.environ)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= SMALL_HOST and (engine or {}).get("tensor_parallel_size", 1) == 1:
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    return environment


def require_vllm() -> None:
    """SmoothQuantError if vLLM is not installed."""
    try:
        version("vllm")
    except PackageNotFoundError as error:
        fix = "install it: `make venv` on a CPU host, `pip install vllm` on a host with a CUDA GPU"
        raise SmoothQuantError("evaluate", "vLLM in this environment", "none installed", fix) from error


def last_error(log: str) -> str:
    """The reason in a vLLM log: its last exception that does not only report the failure of another process."""
    lines = [line.rpartition("] ")[2] if "ERROR" in line else line for line in log.splitlines() if line.strip()]
    reason = lines[-1].strip() if lines else "no output"
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if "Error: " in line and "root cause" not in line:
            # pydantic prints the reason on the next line.
            detail = following.partition(" [type=")[0].strip() if "validation error" in line else ""
            reason = f"{line.strip()} {detail}".strip()
    return reason[:400]
