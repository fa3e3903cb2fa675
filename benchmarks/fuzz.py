"""docs/fuzzing.md: damaged checkpoints, given to `smoothquant verify` and to the server's loading.

`python -m benchmarks.fuzz [--cases 2000]`. tests/helpers/corruptions.py draws a mutation of a sound checkpoint with
hypothesis. A separate process checks the result twice:

    verify   with --source, so that a rewritten manifest hides nothing
    server   vLLM's own steps from the folder to the loaded model, without an engine: configuration, plugin, loader,
             layers

A case is counted as
    refused              by a SmoothQuantError or a list of faults
    served right         accepted, and the folder has the same meaning as the sound one
    another checkpoint   by the server: well-formed, with other values, and loaded as the files have them (only `verify`
                         can know that they are not the original's); by `verify`: other static scales, or another kind
                         of dynamic scales, with a rewritten manifest (only the calibration text could show this)
    refused by vLLM      by an exception of vLLM or transformers, because these read config.json before us, load what is
                         not quantised (embeddings, norms), and do not call us if there is no quantization_config
    SILENT, FOREIGN, CRASH, HANG     failures: wrong but accepted; another exception than ours from our code (or from
                         reading what we should have refused); the process died; it took longer than LIMIT_S

The last line printed is JSON; the exit code is 1 if there is any failure.
"""

import argparse
import json
import math
import os
import re
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from tests.helpers import corruptions, engine, tiny_checkpoints

OUTPUT = Path(__file__).parent.parent / "docs" / "fuzzing.md"
COMMAND = "python -m benchmarks.fuzz"
BASES = {
    "static": {"activations": "static", "alpha": "auto", "max_fallback": 0.2},
    "token-tensor": {"weights": "tensor", "alpha": "auto"},
}
LIMIT_S = 120  # vLLM inspects an architecture in a process of its own, which imports all of vLLM
BATCH = 250
BAD = ("SILENT", "FOREIGN", "CRASH", "HANG")
MEMORY = 12 * 2**30


def make_bases(root: Path) -> None:
    """Write root/NAME, a sound checkpoint in two shards for each of BASES, and root/source, the model of both."""
    from calibration.pipeline import calibrate

    source = tiny_checkpoints.save("llama", root / "source")
    text = tiny_checkpoints.save_text(root / "text.jsonl")
    for name, options in BASES.items():
        calibrate(str(source), root / name, dataset=str(text), samples=8, seq_len=32, quiet=True, **options)
        corruptions.shard(root / name)


# --- one case --------------------------------------------------------------------------------------------------------


def verdict_of_verify(folder: Path, source: Path, sound: Any, means: Any) -> tuple[str, str]:
    from calibration.checkpoint.verify import verify
    from vllm_smoothquant.format.errors import SmoothQuantError

    try:
        faults = verify(folder, str(source)).faults
    except SmoothQuantError as error:
        faults = [error]
    except Exception:  # of any kind: an error that is not ours is what is looked for
        return "FOREIGN", traceback.format_exc()[-2000:]
    text = "\n".join(map(str, faults))
    if not all(str(fault).isprintable() for fault in faults):
        return "FOREIGN", f"unprintable characters: {text!r}"
    if faults:
        return "refused", text[:300]
    if means == sound:
        return "served right", ""
    return ("another checkpoint", "") if only_claims(sound, means) else ("SILENT", "verify found nothing")


def only_claims(sound: Any, means: Any) -> bool:
    """Whether all differences are static scales, kinds of dynamic scales, or roundings of a scale in float32.

    Only the calibration text could show that these are wrong.
    """
    import torch

    if (
        means is None
        or means[0] | {"layers": None} != sound[0] | {"layers": None}
        or means[1].keys() != sound[1].keys()
    ):
        return False
    for name, (dtype, shape, raw) in means[1].items():
        before = sound[1][name]
        if before == (dtype, shape, raw) or (name.endswith(".input_scale") and before[:2] == (dtype, shape)):
            continue
        if before[:2] != (dtype, shape) or dtype != "torch.float32":
            return False
        a, b = (torch.frombuffer(bytearray(each), dtype=torch.float32) for each in (before[2], raw))
        if not bool(((a - b).abs() <= 1e-5 * a.abs()).all()):
            return False
    changed = [name for name in sound[0]["layers"] if sound[0]["layers"][name] != means[0]["layers"][name]]
    return all("dynamic=True" in each["layers"][name][0] for name in changed for each in (sound[0], means[0]))


def load_as_served(folder: Path) -> dict[str, Any]:
    """Every parameter of vLLM's model, loaded as in a server."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    arguments = engine.DEFAULTS | {"max_model_len": 64}
    config = EngineArgs(model=str(folder), **arguments).create_engine_config()
    with set_current_vllm_config(config):
        return {name: tensor.clone() for name, tensor in get_model(vllm_config=config).state_dict().items()}


def refuse_as_configured(folder: Path) -> None:
    """The plugin's checks of config.json and headers; none if config.json cannot be read, because vLLM reports that.

    load_as_served makes the same calls later; most cases end here, twenty times as fast.
    """
    from vllm_smoothquant.config import SmoothQuantVllmConfig

    config = read_config(folder)
    if "quantization_config" in config:
        SmoothQuantVllmConfig.from_config(config["quantization_config"]).maybe_update_config(str(folder))


def read_config(folder: Path) -> dict[str, Any]:
    """config.json; empty if it cannot be read."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text()) if path.is_file() else {}  # reading a pipe would block
    except Exception:  # a damaged file may raise any error
        return {}
    return config if isinstance(config, dict) else {}


def verdict_of_server(folder: Path, sound: Any, means: Any, loaded: dict[str, Any]) -> tuple[str, str]:
    import torch

    try:
        refuse_as_configured(folder)
        state = load_as_served(folder)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        # pydantic keeps only the text of an error.
        if re.search(r": expected .+, got .+; ", str(error), re.DOTALL):
            return "refused", str(error)[:300]
        lines = traceback.format_exc()
        own = "vllm_smoothquant" in lines.rpartition("File ")[2]
        # vLLM loads and refuses embeddings, norms, ignored layers, and config.json except for our entry.
        other = means is not None and means[0] | {"layers": None} != sound[0] | {"layers": None}
        vllms = not own and means is not None and (other or not ours_to_refuse(sound, means))
        vllms = vllms or (not own and "create_engine_config" in lines and (means is None or means[0] != sound[0]))
        vllms = vllms or (not own and "quantization_config" not in read_config(folder))
        return ("refused by vLLM", str(error)[:200]) if vllms else ("FOREIGN", lines[-2000:])
    same = state.keys() == loaded.keys() and all(torch.equal(state[k], loaded[k]) for k in state)
    if means is not None and means[1] == sound[1]:
        # The configurations may differ in values that loading does not use, but not in the schemes of the layers.
        if means[0]["layers"] == sound[0]["layers"]:
            return ("served right", "") if same else ("SILENT", "other parameters of the same tensors")
        dynamic = all("dynamic=True" in scheme for scheme, _ in means[0]["layers"].values())
        return ("another checkpoint", "") if dynamic or same else ("SILENT", "another scheme")
    if means is None:
        return "SILENT", "a folder that cannot be read was served"
    return other_values(sound, means, same)


def touched(sound: Any, means: Any) -> bool:
    """Whether a tensor of a quantised layer has changed."""
    before, after = sound[1], means[1]
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return any(name.rpartition(".")[0] in sound[0]["layers"] for name in changed)


def ours_to_refuse(sound: Any, means: Any) -> str:
    """Why the quantised layers' tensors must be refused; "" if only values differ."""
    import torch

    before, after = sound[1], means[1]
    for name in sorted(before.keys() | after.keys()):
        if name.rpartition(".")[0] not in sound[0]["layers"] or before.get(name) == after.get(name):
            continue
        if name not in before or name not in after:
            return f"{name}: {'missing' if name in before else 'added'}"
        integers = name.endswith(".weight")
        if (integers or name.endswith(("scale", "factor"))) and before[name][:2] != after[name][:2]:
            return f"{name}: {before[name][:2]} became {after[name][:2]}"
        if name.endswith(("_scale", "smoothing_factor")):
            value = torch.frombuffer(bytearray(after[name][2]), dtype=torch.float32)
            if not bool((torch.isfinite(value) & (value > 0)).all()):
                return f"{name}: not finite and positive"
    return ""


def other_values(sound: Any, means: Any, same: bool) -> tuple[str, str]:
    """Accepted with other tensors: right only if only values differ, scales are valid, and the values were loaded."""
    before, after = sound[1], means[1]
    if before.keys() != after.keys():
        return "SILENT", f"other tensors: {sorted(before.keys() ^ after.keys())[:3]}"
    if reason := ours_to_refuse(sound, means):
        return "SILENT", reason
    for name in before:
        if before[name][1] != after[name][1]:
            return "SILENT", f"{name}: shape {before[name][1]} became {after[name][1]}"
    # vLLM may repack tensors that are not quantised, so that these are not compared.
    return ("SILENT", "the change was not loaded") if same and touched(sound, means) else ("another checkpoint", "")


def work(root: Path, seed: int, cases: int) -> None:
    """Print one JSON line before and after each case."""
    import torch
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as with_seed
    from hypothesis import strategies as st
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    torch.accelerator.empty_cache = lambda: None  # as in vLLM's CPU worker: there is no accelerator
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print on stdout
    with tempfile.TemporaryDirectory() as temporary, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{temporary}/store", 0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        sound = {name: corruptions.meaning(root / name) for name in BASES}
        loaded = {name: load_as_served(root / name) for name in BASES}
        assert all(load_as_served(root / name).keys() == loaded[name].keys() for name in BASES)

        @with_seed(seed)
        @settings(
            max_examples=cases, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(data=st.data(), base=st.sampled_from(sorted(BASES)))
        def one(data: st.DataObject, base: str) -> None:
            with tempfile.TemporaryDirectory(dir=temporary) as place:
                folder = Path(shutil.copytree(root / base, Path(place) / "copy"))
                print(json.dumps({"begin": [base, "being spoilt"]}), file=out)
                done = corruptions.damage(folder, data.draw)
                print(json.dumps({"begin": [base, *done]}), file=out)
                means = corruptions.meaning(folder)
                verified = verdict_of_verify(folder, root / "source", sound[base], means)
                print(json.dumps({"begin": [base, *done, "verified"]}), file=out)
                served = verdict_of_server(folder, sound[base], means, loaded[base])
                print(json.dumps({"verify": verified, "server": served}), file=out)

        one()
        print(json.dumps({"end": True}), file=out)


# --- all of them -----------------------------------------------------------------------------------------------------


def run(root: Path, cases: int, ends: float, log: Any) -> tuple[int, dict[str, Counter[str]]]:
    """Run batches in processes of their own. Returns (number of cases, who -> outcome -> count).

    ends: no batch begins after this time.monotonic(). log: called with every failure.
    """
    counts: dict[str, Counter[str]] = {"verify": Counter(), "server": Counter()}
    seed = done = 0
    while done < cases and time.monotonic() < ends:
        seed += 1
        begun, ended = None, False
        for line in watch(root, seed, min(BATCH, cases - done)):
            ended = "end" in line
            begun = line.get("begin", begun)
            outcome = {who: line[who] for who in counts} if "verify" in line else {}
            if "died" in line and not ended:
                outcome = dict.fromkeys(counts, line["died"])
            done += bool(outcome)
            for who, (what, why) in outcome.items():
                counts[who][what] += 1
                if what in BAD:
                    log(json.dumps({"case": begun, who: [what, why]}))
        print(f"{done} cases: { {who: dict(count) for who, count in counts.items()} }", file=sys.stderr, flush=True)
    return done, counts


def watch(root: Path, seed: int, cases: int) -> Iterator[dict[str, Any]]:
    """The lines of `work` in a new process; {"died": [CRASH or HANG, end of stderr]} if it does not end."""
    with Path(root, "stderr").open("w+b") as stderr:
        child = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.fuzz", "--worker", str(root), str(seed), str(cases)],
            env=engine.small_engine() | {"VLLM_LOGGING_LEVEL": "CRITICAL"}, stdout=subprocess.PIPE, stderr=stderr,
        )  # fmt: skip
        assert child.stdout is not None
        buffer, limit = b"", 300  # the first case waits for vLLM to be imported
        while True:
            readable, _, _ = select.select([child.stdout], [], [], limit)
            chunk = os.read(child.stdout.fileno(), 65536) if readable else b""
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in map(json.loads, lines):
                yield line
                limit = LIMIT_S
                if "end" in line:
                    child.kill()  # faster than vLLM's shutdown
                    child.wait()
                    return
            if not chunk:
                break
        if not readable:
            child.kill()
        child.wait()
        stderr.seek(0)
        text = stderr.read().decode(errors="replace")[-500:]
        yield {"died": ["CRASH" if readable else "HANG", f"exit code {child.returncode}: {text}"]}


def main() -> None:
    """Create sound checkpoints, damage them, count the outcomes and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no batch after this time")
    parser.add_argument("--log", type=Path, help="a file for all failures, one JSON line each")
    parser.add_argument("--worker", nargs=3, metavar=("ROOT", "SEED", "CASES"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(Path(args.worker[0]), int(args.worker[1]), int(args.worker[2]))
        return
    with tempfile.TemporaryDirectory() as temporary:
        make_bases(Path(temporary))
        with (args.log or Path(os.devnull)).open("a", buffering=1) as log:
            ends = time.monotonic() + 60 * args.minutes
            cases, counts = run(Path(temporary), args.cases, ends, lambda line: print(line, file=log))
    outcomes = ["refused", "served right", "another checkpoint", "refused by vLLM", *BAD]
    rows = "".join(
        f"| {outcome} | {counts['verify'][outcome]} | {counts['server'][outcome]} |\n" for outcome in outcomes
    )
    OUTPUT.write_text(
        f"# {cases} spoilt checkpoints\n\n"
        f"Written by `{COMMAND} --cases {args.cases}`; not by hand. {describe()}\n\n"
        "Mutations of two sound checkpoints of a tiny Llama (static with fallbacks; dynamic with one scale for each "
        "matrix), drawn by hypothesis (tests/helpers/corruptions.py): tensors "
        "dropped, added, renamed, retyped, reshaped, swapped, "
        "their values NaN, zero, huge; safetensors headers no library writes; bits flipped; config.json with keys "
        "dropped, added, retyped, absurd, of another model; JSON that is none; an index that leads elsewhere; files "
        "gone, cut, doubled, links, pipes, pickles. Half of them with a rebuilt manifest. `verify` has `--source`; "
        f"the server is vLLM's own loading without an engine. More than {LIMIT_S} s is a hang. What the rows mean: "
        "benchmarks/fuzz.py.\n\n"
        f"| | `verify` | server |\n|---|---|---|\n{rows}"
    )
    result = {who: {outcome: count[outcome] for outcome in outcomes} for who, count in counts.items()}
    print(json.dumps({"cases": cases, **result}))
    sys.exit(1 if any(count[outcome] for count in counts.values() for outcome in BAD) else 0)


if __name__ == "__main__":
    main()
