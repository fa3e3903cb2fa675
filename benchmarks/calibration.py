"""docs/calibration.md: what a calibration costs, beside llm-compressor's and beside bare forward passes.

`python -m benchmarks.calibration [--samples 128] [--rounds 2] [--sizes 135M 360M 1B 3B]`. SmolLM2-135M-Instruct and
Wikipedia articles, the same tokens for all, each in a process of its own, in turn. llm-compressor is installed into
.cache/llm-compressor (or give --llm-compressor PYTHON). All compute in the same arithmetic: the model's own dtype, or
float32 where this machine can only emulate that. Growth: synthetic Llamas, few tokens. The last line printed is JSON.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks import synthetic
from benchmarks.machine import describe
from calibration import data
from calibration.arithmetic import is_native
from calibration.load import load
from calibration.passes import BATCH_SIZE
from demo import assets

ROOT = Path(__file__).parent.parent
OUTPUT = ROOT / "docs" / "calibration.md"
CACHE = ROOT / ".cache"
SEQ_LEN = 512
REQUIREMENT = "llmcompressor==0.14.0.1"
NAMES = {"bare": "bare forward passes", "ours": "smoothquant calibrate", "theirs": "llm-compressor oneshot"}
# Growth and projection: samples x tokens of the synthetic models.
GROWTH = (16, 64)
PAPER = (512, 512)


def measured(argv: list[str], **environment: str) -> dict[str, Any]:
    """Run `argv`: wall and CPU seconds, peak of anonymous and of all resident memory in GB, and what it printed."""
    clock = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(argv, stdout=out, stderr=err, cwd=ROOT, env=os.environ | environment)
        anonymous = resident = 0
        while process.returncode is None:
            try:
                status = Path(f"/proc/{process.pid}/status").read_text()
            except OSError:
                status = ""
            found = {key: int(kb) for key, kb in re.findall(r"^(RssAnon|VmHWM):\s+(\d+)", status, re.M)}
            anonymous = max(anonymous, found.get("RssAnon", 0))
            resident = max(resident, found.get("VmHWM", 0))
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
    """In a process of its own: forward passes of the decoder, no head, no hooks, no files."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(request["model"], dtype=getattr(torch, request["dtype"])).eval()
    batches = torch.tensor(request["input_ids"]).split(BATCH_SIZE)
    with torch.inference_mode():
        model(input_ids=batches[0][:1, :16], use_cache=False)
        clock, cpu = time.perf_counter(), time.process_time()
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    print(json.dumps({"passes": time.perf_counter() - clock, "cpu": time.process_time() - cpu}))


def stages(errors: str) -> dict[str, float]:
    """Stage -> seconds, of what `smoothquant calibrate` said."""
    return {stage: float(seconds) for stage, seconds in re.findall(r"^([a-z ]+): ([\d.]+) s$", errors, re.M)}


def their_python(given: str | None) -> str:
    """An interpreter that has llm-compressor."""
    if given:
        return given
    folder = CACHE / "llm-compressor"
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
    """Of one square product on as many cores as this process has."""
    a, b = torch.randn(2, 2048, 2048).to(dtype)
    best = min(_seconds(lambda: a @ b) for _ in range(8))
    return 2 * 2048**3 / best / 1e9


def _seconds(run: Any) -> float:
    clock = time.perf_counter()
    run()
    return time.perf_counter() - clock


def compare(samples: int, rounds: int, python: str | None, folder: Path) -> dict[str, Any]:
    """Rounds of bare passes, ours and theirs, in turn; medians."""
    model = assets.model_dir()
    source = load(str(model))
    dtype = source.model.dtype if is_native(source.model.dtype, "cpu") else torch.float32
    drawn = data.load_samples(
        str(assets.calibration_text()), source.tokenizer, text_column="text", samples=samples, seq_len=SEQ_LEN, seed=0
    )
    request = {
        "model": str(model), "dtype": str(dtype).removeprefix("torch."), "input_ids": drawn.input_ids.tolist(),
        "options": {"batch_size": BATCH_SIZE},
    }  # fmt: skip
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES}
    for turn in range(rounds):
        path = folder / f"request-{turn}.json"
        path.write_text(json.dumps(request | {"output": str(folder / f"theirs-{turn}")}))
        for name in NAMES:
            if name == "bare":
                run = measured([sys.executable, "-m", "benchmarks.calibration", "--bare", str(path)])
                inner = json.loads(run["out"].splitlines()[-1])
                run |= {"part": inner["passes"], "part_cpu": inner["cpu"]}
            elif name == "ours":
                run = measured(
                    [sys.executable, "-m", "calibration", "calibrate", str(model), "-o", str(folder / f"ours-{turn}"),
                     "--dataset", str(assets.calibration_text()), "--samples", str(samples), "--seq-len", str(SEQ_LEN)]
                )  # fmt: skip
                run |= {"stages": stages(run["err"]), "part": stages(run["err"])["observe"]}
            else:
                if python is None:
                    continue
                script = str(Path(__file__).with_name("llm_compressor.py"))
                run = measured([python, script, str(path)], PYTHONPATH="")
                run |= {"stages": json.loads(run["out"].splitlines()[-1])}
                run |= {"part": run["stages"]["calibrate"]}
            print(f"{NAMES[name]}: {run['wall']:.1f} s, CPU {run['cpu']:.1f} s", file=sys.stderr, flush=True)
            found[name].append({key: value for key, value in run.items() if key not in ("out", "err")})
    flops = 2 * synthetic.parameters("135M")[1] * samples * SEQ_LEN
    return {"samples": samples, "dtype": request["dtype"], "gflops_peak": peak_gflops(dtype), "flops": flops,
            "runs": found}  # fmt: skip


def growth(sizes: list[str], models: Path, folder: Path) -> list[dict[str, Any]]:
    """Seconds and memory of whole calibrations of synthetic Llamas."""
    from tests import tiny

    text = tiny.save_text(folder / "text.jsonl", documents=4 * GROWTH[0], characters=300)
    rows = []
    for size in sizes:
        model = synthetic.write(size, models / size, tiny.tokenizer())
        output = folder / f"growth-{size}"
        run = measured(
            [sys.executable, "-m", "calibration", "calibrate", str(model), "-o", str(output), "--dataset", str(text),
             "--samples", str(GROWTH[0]), "--seq-len", str(GROWTH[1])]
        )  # fmt: skip
        every, inside = synthetic.parameters(size)
        rows.append({
            "size": size, "parameters": every, "matrices": inside, "wall": run["wall"], "cpu": run["cpu"],
            "anonymous": run["anonymous"], "stages": stages(run["err"]),
            "bytes": sum(f.stat().st_size for f in output.iterdir()),
        })  # fmt: skip
        print(f"{size}: {run['wall']:.1f} s, {run['anonymous']:.2f} GB", file=sys.stderr, flush=True)
    return rows


def page(result: dict[str, Any], command: str) -> str:
    """docs/calibration.md."""
    text = f"# What a calibration costs\n\nWritten by `{command}`; not by hand. {describe()}\n"
    if "compared" in result:
        text += _comparison(result["compared"], result["theirs"])
    if result.get("growth"):
        text += _growth(result)
    return text


def _comparison(found: dict[str, Any], theirs: str | None) -> str:
    def middle(name: str, key: str) -> float:
        return median(run[key] for run in found["runs"][name])

    rows = ""
    for name, title in NAMES.items():
        if found["runs"][name]:
            seconds = [middle(name, key) for key in ("wall", "cpu", "part")]
            memory = [middle(name, key) for key in ("anonymous", "resident")]
            rows += f"| {title} | " + " | ".join(f"{x:.1f}" for x in seconds)
            rows += f" | {seconds[2] / middle('bare', 'part'):.2f} | " + " | ".join(f"{x:.2f}" for x in memory) + " |\n"
    rate = found["flops"] / middle("bare", "part") / 1e9
    of_theirs = ""
    if found["runs"]["theirs"]:
        share = [middle("ours", key) / middle("theirs", key) for key in ("wall", "part")]
        of_theirs = (
            f" Ours takes {share[0]:.0%} of llm-compressor's wall time, its observation {share[1]:.0%} of theirs."
        )
    return (
        f"\n## Beside llm-compressor\n\nSmolLM2-135M-Instruct, {found['samples']} x {SEQ_LEN} tokens, the same for "
        f"all, in batches of {BATCH_SIZE}; alpha 0.5, weights per channel, activations per token. Arithmetic: "
        f"{found['dtype']} for all three. Medians of {len(found['runs']['bare'])} runs in turn, each in a process of "
        "its own"
        + (f"; llm-compressor's has {theirs}" if theirs else "; llm-compressor was not run")
        + f".{of_theirs} Wall and CPU are of the whole process, imports and loading included; `part` is what "
        "grows with the samples: the passes, `observe`, and `oneshot`. Anonymous memory is what no file backs.\n\n"
        "| | wall, s | CPU, s | part, s | part / bare | anonymous, GB | resident, GB |\n|---|---|---|---|---|---|---|\n"
        f"{rows}\nThe bare passes reach {rate:.0f} of the {found['gflops_peak']:.0f} GFLOPS that one square product "
        f"reaches here in {found['dtype']} ({rate / found['gflops_peak']:.0%}).\n"
    )


def _growth(result: dict[str, Any]) -> str:
    rows = result["growth"]
    names = ("load", "discover", "observe", "gate", "quantize and export")
    text = (
        f"\n## How it grows\n\nSynthetic Llamas in BF16, {GROWTH[0]} x {GROWTH[1]} tokens, weights left in "
        "memory-mapped files; one run each.\n\n"
        "| | parameters | checkpoint, GB | " + " | ".join(f"{n}, s" for n in names)
        + " | all, s | anonymous, GB |\n|---|" + "---|" * (len(names) + 4) + "\n"
    )  # fmt: skip
    for row in rows:
        cells = [f"{row['parameters'] / 1e9:.2f} G", f"{row['bytes'] / 1e9:.2f}"]
        cells += [f"{row['stages'].get(name, 0):.1f}" for name in names]
        text += f"| {row['size']} | " + " | ".join([*cells, f"{row['wall']:.0f}", f"{row['anonymous']:.2f}"]) + " |\n"
    last = rows[-1]
    tokens = GROWTH[0] * GROWTH[1]
    # The trial pass over the first batch is in `observe` as well.
    rate = 2 * last["matrices"] * (tokens + BATCH_SIZE * GROWTH[1]) / last["stages"]["observe"]
    text += (
        f"\n## On paper\n\nFrom the rate of the {last['size']} model's observation here ({rate / 1e9:.0f} GFLOPS), for "
        f"{PAPER[0]} x {PAPER[1]} tokens; work is 2 operations a parameter and token. Activations: of two blocks, on "
        "disk, in float32. A block: its weights in float32.\n\n"
        "| | observe here | activations, GB | a block, GB |\n|---|---|---|---|\n"
    )
    for size in synthetic.UNTIED:
        hidden, _, layers, *_ = synthetic.SIZES[size]
        matrices = synthetic.parameters(size)[1]
        work = 2 * matrices * PAPER[0] * PAPER[1]
        text += (
            f"| {size} | {work / rate / 3600:.0f} h | "
            f"{2 * PAPER[0] * PAPER[1] * hidden * 4 / 1e9:.0f} | {matrices / layers * 4 / 1e9:.1f} |\n"
        )
    return text


def main() -> None:
    """Measure, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=128, help=f"of {SEQ_LEN} tokens")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sizes", nargs="*", default=["135M", "360M", "1B", "3B"], choices=synthetic.SIZES)
    parser.add_argument("--llm-compressor", metavar="PYTHON", help="an interpreter that has it")
    parser.add_argument("--without-llm-compressor", action="store_true")
    parser.add_argument("--models", type=Path, default=CACHE / "synthetic", help="where synthetic models are kept")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare:
        bare(json.loads(Path(args.bare).read_text()))
        return
    python = None if args.without_llm_compressor else their_python(args.llm_compressor)
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, Any] = {"theirs": their_versions(python) if python else None}
        if args.rounds:
            result["compared"] = compare(args.samples, args.rounds, python, Path(folder))
        result["growth"] = growth(args.sizes, args.models, Path(folder))
    command = f"python -m benchmarks.calibration --samples {args.samples} --rounds {args.rounds}"
    OUTPUT.write_text(page(result, f"{command} --sizes {' '.join(args.sizes)}".rstrip()))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
