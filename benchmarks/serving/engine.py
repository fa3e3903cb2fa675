"""The process that run.py starts for each arm: one vLLM engine, its worker, and nothing else.

`python -m benchmarks.serving.engine FD` reads lines of JSON from stdin and writes an answer to each into the open file
FD, because libraries print on stdout and stderr. The first line has the arguments of vllm.LLM, the others are [name of
one of COMMANDS, its arguments].
"""

import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# Libraries that replace glibc's malloc.
ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")
THREADING = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_CPU_AFFINITY", "KMP_AFFINITY", "LD_PRELOAD")


class Steps:
    """An extension of vLLM's worker (worker_extension_cls): records its steps and describes its process."""

    def note_steps(self: Any) -> None:
        """From now on record each step as [tokens, requests, seconds].

        vLLM splits a step into the model and the sampling; the engine's own work between them is not counted.
        """
        self.noted: list[list[float]] = []
        execute, sample = self.execute_model, self.sample_tokens

        def timed_execute(scheduled: Any) -> Any:
            start = time.perf_counter()
            output = execute(scheduled)
            seconds = time.perf_counter() - start
            if scheduled.total_num_scheduled_tokens:
                counts = [scheduled.total_num_scheduled_tokens, len(scheduled.num_scheduled_tokens)]
                self.noted.append([*counts, seconds])
            return output

        def timed_sample(grammar: Any) -> Any:
            start = time.perf_counter()
            output = sample(grammar)
            if hasattr(output, "get_output"):
                raise TypeError("the worker answers before it is done: this step's time would be part of it")
            self.noted[-1][2] += time.perf_counter() - start
            return output

        self.execute_model, self.sample_tokens = timed_execute, timed_sample

    def taken_steps(self: Any) -> list[list[float]]:
        """The steps since the last call."""
        steps, self.noted = self.noted, []
        return steps

    def whereabouts(self) -> dict[str, Any]:
        """Threads, cores, preloaded libraries, the malloc in use, and whether oneDNN's INT8 sums are right."""
        from vllm_smoothquant.kernels.exact import onednn_is_exact

        maps = Path("/proc/self/maps").read_text()
        # The environment at the start of the process: later vLLM adds to LD_PRELOAD for processes that it starts.
        started = dict(entry.split("=", 1) for entry in Path("/proc/self/environ").read_text().split("\0") if entry)
        return {
            "threads": torch.get_num_threads(), "cores": sorted(os.sched_getaffinity(0)),
            "environment": {name: file_names(started[name]) for name in THREADING if started.get(name)},
            "malloc": next((name for name in ALLOCATORS if re.search(rf"/lib{name}[^/]*\.so", maps)), "glibc"),
            "onednn_is_exact": onednn_is_exact(),
        }  # fmt: skip

    def resident(self) -> dict[str, int]:
        """Bytes: VmHWM, the peak of resident memory, and RssAnon, the resident memory now that no file backs."""
        status = Path("/proc/self/status").read_text()
        return {key: int(kb) * 1024 for key, kb in re.findall(r"^(VmHWM|RssAnon):\s+(\d+)", status, re.M)}

    def multipliers(self: Any) -> dict[str, int]:
        """Name of a kernel of quantised layers (ours, or vLLM's class) -> number of layers that use it."""
        from vllm_smoothquant.linear import SmoothQuantLinearMethod

        layers: Counter[str] = Counter()
        for module in self.get_model().modules():
            method = getattr(module, "quant_method", None)
            if isinstance(method, SmoothQuantLinearMethod):
                inner = getattr(method.kernel, "kernel", None)  # the kernel that vLLM chose
                layers[method.kernel.name + (f", {type(inner).__name__}" if inner else "")] += 1
            elif kernel := getattr(getattr(module, "scheme", None), "kernel", None):
                layers[type(kernel).__name__] += 1
        return layers


def file_names(value: str) -> str:
    """The paths in `value` without their folders, because these differ from machine to machine."""
    return ":".join(Path(part).name for part in value.split(":"))


def one(llm: Any, method: str) -> Any:
    """The answer of the only worker."""
    (answer,) = llm.collective_rpc(method)
    return answer


def about(llm: Any) -> dict[str, Any]:
    return one(llm, "whereabouts") | {"kernels": one(llm, "multipliers"), "weights": one(llm, "memory_of_weights")}


def run(llm: Any, prompts: int, length: int, new: int, vocabulary: int) -> list[list[float]]:
    """The steps of `prompts` prompts of `length` tokens at once, continued by `new` tokens each."""
    from vllm import SamplingParams

    ids = [[(7 * i + j) % vocabulary for j in range(length)] for i in range(prompts)]
    sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)
    one(llm, "taken_steps")
    llm.generate([{"prompt_token_ids": prompt} for prompt in ids], sampling, use_tqdm=False)
    return list(one(llm, "taken_steps"))


def profile(llm: Any, **case: int) -> dict[str, Any]:
    """`run` under torch's profiler: the steps, and operator -> seconds in itself without the operators it called."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        steps = run(llm, **case)
    return {"steps": steps, "operators": {e.key: e.self_cpu_time_total / 1e6 for e in profiler.key_averages()}}


def score(llm: Any, windows: list[list[int]], keep: str | None = None, compare: str | None = None) -> dict[str, float]:
    from calibration.evaluation import engine

    return engine.score(llm, windows, keep=keep, compare=compare)


OLD = "SMOOTHQUANT_BENCHMARK_ISA"  # "avx2": run as on a CPU that has no more
NEWER = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported")


def older_cpu() -> None:
    """Before vLLM is imported: it and the plugin see a CPU without the instructions that OLD leaves out.

    ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA, which run.py sets, do the same for torch, Inductor and oneDNN.
    """
    if os.environ.get(OLD):
        for name in NEWER:
            if not hasattr(torch.cpu, name):
                raise AttributeError(f"torch.cpu has no {name}: this emulation is for another version of torch")
            setattr(torch.cpu, name, lambda: False)


COMMANDS: dict[str, Callable[..., Any]] = {
    "about": about, "run": run, "profile": profile, "score": score, "memory": lambda llm: one(llm, "resident"),
}  # fmt: skip


def main() -> None:
    with os.fdopen(int(sys.argv[1]), "w") as answers:

        def answer(value: Any) -> None:
            print(json.dumps(value), file=answers, flush=True)

        older_cpu()
        from vllm import LLM

        llm = LLM(
            worker_cls="calibration.evaluation.engine.MeasuredWorker",
            worker_extension_cls="benchmarks.serving.engine.Steps",
            skip_tokenizer_init=True, enable_prefix_caching=False, **json.loads(sys.stdin.readline()),
        )  # fmt: skip
        llm.collective_rpc("note_steps")
        answer("ready")
        for line in sys.stdin:
            command, arguments = json.loads(line)
            answer(COMMANDS[command](llm, **arguments))


if __name__ == "__main__":
    main()
