"""docs/calibration.md: what a calibration costs, compared with llm-compressor's and with bare forward passes.

`python -m benchmarks.calibration [PART ...]`; all parts if none is named. New figures replace those in
results/calibration.json. Each run is a process of its own.

    compare   SmolLM2-135M-Instruct and Wikipedia articles: bare forward passes, our calibration and llm-compressor's,
              in turn, on the same tokens and in the same arithmetic (the model's dtype, or float32 if this machine
              only emulates it). llm-compressor is installed into .cache/llm-compressor (or give --llm-compressor
              PYTHON). Its checkpoint is converted to our format, integer for integer, and both are measured with vLLM
    quality   the same model calibrated on more and fewer samples, measured through vLLM on other articles
    growth    synthetic Llamas of several sizes, few tokens: seconds by stage and memory, and an estimate for 70B and
              405B; --limit-gb: the limit of anonymous memory for every size
    identical the largest of --sizes twice: block by block with weights in mapped files, and with all weights in memory
              and whole-model passes; the weight files must be the same, byte for byte

The last line printed is JSON; the exit code is 1 if growth exceeds its limit or bytes differ.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.accuracy import MODELS
from benchmarks.calibration import page, synthetic
from benchmarks.machine import describe
from benchmarks.stages import stage_seconds
from calibration.checkpoint.convert import convert
from calibration.evaluation.measure import measure
from calibration.evaluation.windows import token_windows
from calibration.inputs.model import load, sha256
from calibration.inputs.text import load_samples
from calibration.observation.observe import BATCH_SIZE
from calibration.running.precision import compute_dtype
from demo import assets

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "benchmarks" / "results" / "calibration.json"
COMMAND = "python -m benchmarks.calibration"
SEQ_LEN = 512
REQUIREMENT = "llmcompressor==0.14.0.1"
NAMES = ("bare", "ours", "theirs")
# Row -> options, and (samples, tokens of each). Static rows use the observations of the default rows.
QUALITY: dict[str, tuple[list[str], list[tuple[int, int]]]] = {
    "default": (
        ["--alpha", "0.5"],
        [(1, 512), (4, 512), (16, 512), (64, 512), (128, 512), (64, 128), (4, 2048)],
    ),
    "static, auto, 10 % fall back": (
        ["--activations", "static", "--alpha", "auto", "--max-fallback", "10%"],
        [(4, 512), (16, 512), (64, 512), (64, 128), (128, 512)],
    ),
}  # fmt: skip
GROWTH = (16, 64)


def measured(argv: list[str], **environment: str) -> dict[str, Any]:
    """Run `argv`: wall and CPU seconds, peaks of anonymous and of resident memory in GB, stdout and stderr."""
    clock = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(argv, stdout=out, stderr=err, cwd=ROOT, env=os.environ | environment)
        anonymous = resident = 0
        while process.returncode is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                status = ""
            memory = {key: int(kb) for key, kb in re.findall(r"^(RssAnon|VmHWM):\s+(\d+)", status, re.M)}
            anonymous = max(anonymous, memory.get("RssAnon", 0))
            resident = max(resident, memory.get("VmHWM", 0))
            pid, code, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                process.returncode = os.waitstatus_to_exitcode(code)
                break
            time.sleep(0.05)
        out.seek(0)
        err.seek(0)
        printed, errors = out.read(), err.read()
    if process.returncode:
        raise RuntimeError(f"{argv}: exit code {process.returncode}\n{errors[-2000:]}")
    return {
        "wall": time.perf_counter() - clock, "cpu": usage.ru_utime + usage.ru_stime, "anonymous": anonymous / 1e6,
        "resident": resident / 1e6, "out": printed, "err": errors,
    }  # fmt: skip


def bare(request: dict[str, Any]) -> None:
    """In a process of its own: forward passes of the decoder without output head, hooks or files."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(request["model"], dtype=getattr(torch, request["dtype"])).eval()
    batches = torch.tensor(request["input_ids"]).split(BATCH_SIZE)
    with torch.inference_mode():
        model(input_ids=batches[0][:1, :16], use_cache=False)
        clock, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    print(json.dumps({"passes": time.perf_counter() - clock, "cpu": time.process_time() - cpu}))


def their_python(given: str | None) -> str:
    """An interpreter that has llm-compressor."""
    if given:
        return given
    folder = assets.CACHE / "llm-compressor"
    if not (folder / "whole").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(folder / "bin/python"), "-m", "pip", "install", "-q", REQUIREMENT], check=True)
        (folder / "whole").touch()
    return str(folder / "bin/python")


def their_versions(python: str) -> str:
    code = (
        "from importlib.metadata import version as v; "
        "print(', '.join(f'{n} {v(n)}' for n in ('llmcompressor', 'torch', 'transformers')))"
    )
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def peak_gflops(dtype: torch.dtype) -> float:
    """The rate of one square product on all cores of this process."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    best = min(_seconds(lambda: a @ b) for _ in range(8))
    return 2 * 2048**3 / best / 1e9


def _seconds(run: Any) -> float:
    clock = time.perf_counter()
    run()
    return time.perf_counter() - clock


def compare(samples: int, rounds: int, python: str) -> dict[str, Any]:
    """Rounds of bare passes, our calibration and llm-compressor's, in turn; every second round in reverse order."""
    model = assets.model_dir()
    source = load(str(model))
    dtype = compute_dtype(source.model)
    tokens = load_samples(
        str(assets.calibration_text()), source.tokenizer, text_column="text", samples=samples, seq_len=SEQ_LEN, seed=0
    )
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        request = {
            "model": str(model), "dtype": str(dtype).removeprefix("torch."), "input_ids": tokens.input_ids.tolist(),
            "output": str(folder / "theirs"), "options": {"batch_size": BATCH_SIZE},
        }  # fmt: skip
        path = folder / "request.json"
        path.write_text(json.dumps(request))
        for turn in range(rounds):
            for name in NAMES if turn % 2 == 0 else reversed(NAMES):
                shutil.rmtree(folder / name, ignore_errors=True)
                if name == "bare":
                    run = measured([sys.executable, "-m", "benchmarks.calibration", "--bare", str(path)])
                    part = json.loads(run["out"].splitlines()[-1])["passes"]
                elif name == "ours":
                    run = calibrated(model, folder / name, assets.calibration_text(), samples, SEQ_LEN)
                    part = run["stages"]["observe"]
                else:
                    script = str(Path(__file__).with_name("llm_compressor.py"))
                    run = measured([python, script, str(path)], PYTHONPATH="")
                    run["stages"] = json.loads(run["out"].splitlines()[-1])
                    part = run["stages"]["calibrate"]
                figures = {key: value for key, value in run.items() if key not in ("out", "err")}
                runs[name].append({"part": part} | figures)
                print(f"{name}: {run['wall']:.1f} s, of which {part:.1f} s", file=sys.stderr, flush=True)
        convert(folder / "theirs", folder / "converted", "smoothquant")
        with scoring() as score:
            scores = {"bare": score(model), "ours": score(folder / "ours"), "theirs": score(folder / "converted")}
    return {
        "samples": samples, "seq_len": SEQ_LEN, "batch_size": BATCH_SIZE, "dtype": request["dtype"],
        "gflops_peak": peak_gflops(dtype), "flops": 2 * synthetic.parameters("135M")[1] * samples * SEQ_LEN,
        "theirs": their_versions(python), "runs": runs, "scores": scores,
    }  # fmt: skip


def calibrated(model: Path, output: Path, text: Path, samples: int, seq_len: int, *options: str) -> dict[str, Any]:
    """`measured` for `smoothquant calibrate`, and the seconds of its stages."""
    run = measured(
        [sys.executable, "-m", "calibration", "calibrate", str(model), "-o", str(output), "--dataset", str(text),
         "--samples", str(samples), "--seq-len", str(seq_len), *options]
    )  # fmt: skip
    return run | {"stages": stage_seconds(run["err"])}


@contextmanager
def scoring() -> Iterator[Callable[[Path], dict[str, float]]]:
    """score(folder): perplexity through vLLM; from the second model on, also its distance from the first model."""
    model = next(iter(MODELS.values()))
    windows, _ = token_windows(
        [str(model.folder())], str(assets.evaluation_text()), text_column="text", samples=model.windows,
        seq_len=model.seq_len, seed=0,
    )  # fmt: skip
    dtype = str(compute_dtype(load(str(model.folder())).model)).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as temporary:
        first = Path(temporary, "first.pt")

        def score(folder: Path) -> dict[str, float]:
            logits: dict[str, Any] = {"compare" if first.exists() else "keep": str(first)}
            row = measure(folder, windows, decode=None, dtype=dtype, enforce_eager=True, **logits)
            return {key: row[key] for key in ("perplexity", "kl_divergence", "top1_agreement") if key in row}

        yield score


def quality(before: list[dict[str, Any]], save: Callable[[list[dict[str, Any]]], None]) -> list[dict[str, Any]]:
    """Perplexity and KL divergence from floating point for every number of samples and of tokens in each.

    before: rows of an earlier run, which are not measured again. save: called with all rows after each new one.
    """
    known = {(row["what"], row.get("samples"), row.get("seq_len")): row for row in before}
    model, text = assets.model_dir(), assets.calibration_text()
    with tempfile.TemporaryDirectory() as temporary, scoring() as score:
        rows: list[dict[str, Any]] = [{"what": "floating point", **score(model)}]
        for what, (options, sizes) in QUALITY.items():
            for samples, seq_len in sizes:
                row = known.get((what, samples, seq_len))
                if row is None:
                    stats, output = Path(temporary, f"{samples}-{seq_len}.safetensors"), Path(temporary, "int8")
                    reuse = ["--stats" if stats.exists() else "--save-stats", str(stats)]
                    run = calibrated(model, output, text, samples, seq_len, *options, *reuse)
                    row = {"what": what, "samples": samples, "seq_len": seq_len, "wall": run["wall"], **score(output)}
                    shutil.rmtree(output)
                    print(row, file=sys.stderr, flush=True)
                rows.append(row)
                save(rows)
    return rows


def growth(sizes: list[str], models: Path) -> dict[str, Any]:
    """Seconds and memory of whole calibrations of synthetic Llamas."""
    from tests.helpers import tiny_checkpoints

    rows = []
    with tempfile.TemporaryDirectory(dir=models) as folder:
        text = tiny_checkpoints.save_text(Path(folder, "text.jsonl"), documents=4 * GROWTH[0], characters=300)
        for size in sizes:
            model = synthetic.write(size, models / size, tiny_checkpoints.tokenizer())
            output = Path(folder, "int8")
            run = calibrated(model, output, text, *GROWTH)
            parameters, matrices = synthetic.parameters(size)
            rows.append({
                "size": size, "parameters": parameters, "matrices": matrices, "stages": run["stages"],
                "bytes": sum(f.stat().st_size for f in output.iterdir()),
                **{key: run[key] for key in ("wall", "cpu", "anonymous", "resident")},
            })  # fmt: skip
            shutil.rmtree(output)
            print(f"{size}: {run['wall']:.1f} s, {run['anonymous']:.2f} GB", file=sys.stderr, flush=True)
    return {"samples": GROWTH[0], "seq_len": GROWTH[1], "batch_size": BATCH_SIZE, "rows": rows}


def identical(size: str, models: Path) -> dict[str, Any]:
    """Peak of anonymous memory in GB of both calibrations, and whether every weight file has the same sha256."""
    from tests.helpers import tiny_checkpoints

    with tempfile.TemporaryDirectory(dir=models) as folder:
        text = tiny_checkpoints.save_text(Path(folder, "text.jsonl"), documents=4 * GROWTH[0], characters=300)
        model = synthetic.write(size, models / size, tiny_checkpoints.tokenizer())
        mapped, held = Path(folder, "mapped"), Path(folder, "held")
        peaks = {"mapped": calibrated(model, mapped, text, *GROWTH)["anonymous"]}
        run = measured([sys.executable, "-m", "benchmarks.calibration", "--held", str(model), str(held), str(text)])
        peaks["held"] = run["anonymous"]
        hashes = [{path.name: sha256(path) for path in out.glob("*.safetensors")} for out in (mapped, held)]
    return {"size": size, "anonymous": peaks, "files": len(hashes[0]), "same": hashes[0] == hashes[1]}


def hold(model: str, output: str, text: str) -> None:
    """In a process of its own: calibrate with all weights in memory, by passes over the whole model."""
    from calibration import pipeline
    from calibration.observation import observe

    def in_memory(*arguments: Any) -> Any:
        source = load(*arguments)
        for parameter in source.model.parameters():
            parameter.data = parameter.data.clone()
        return source

    def never(*_: Any) -> None:
        raise observe.BlockNotIsolated("as requested")

    pipeline.load, observe.Blocks = in_memory, never  # type: ignore[assignment, misc]
    samples, seq_len = GROWTH
    manifest = pipeline.calibrate(model, output, dataset=text, samples=samples, seq_len=seq_len, quiet=True)
    assert manifest["calibration"]["passes"] == "whole model: as requested"


def main() -> None:
    """Measure the parts named on the command line and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help="compare, quality, growth, identical (default: all)")
    parser.add_argument("--samples", type=int, default=128, help=f"of {SEQ_LEN} tokens, to compare on")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sizes", nargs="*", default=["135M", "360M", "1B", "3B"], choices=synthetic.SIZES)
    parser.add_argument("--again", action="store_true", help="also measure rows of `quality` that are known")
    parser.add_argument("--limit-gb", type=float, default=3.0)
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="an interpreter that has it")
    parser.add_argument(
        "--models", type=Path, default=assets.CACHE / "synthetic", help="folder of the synthetic models"
    )
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--held", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        bare(json.loads(Path(args.bare).read_text()))
        return
    if args.held:
        hold(*args.held)
        return
    figures: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    parts = {
        "compare": lambda: compare(args.samples, args.rounds, their_python(args.llm_compressor)),
        "quality": lambda: quality([] if args.again else figures.get("quality", {}).get("figures", []), save),
        "growth": lambda: growth(args.sizes, args.models),
        "identical": lambda: identical(args.sizes[-1], args.models),
    }
    if unknown := set(args.parts) - parts.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")

    def save(measured: Any) -> None:
        figures[part] = {"machine": describe(), "figures": measured}
        FIGURES.write_text(json.dumps(figures, indent=2) + "\n")
        page.write(figures, COMMAND)

    for part in args.parts or parts:
        save(parts[part]())
    print(json.dumps(figures))
    rows = figures.get("growth", {"figures": {"rows": []}})["figures"]["rows"]
    same = figures.get("identical", {"figures": {"same": True}})["figures"]["same"]
    sys.exit(0 if same and all(row["anonymous"] <= args.limit_gb for row in rows) else 1)


if __name__ == "__main__":
    main()
