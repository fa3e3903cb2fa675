"""Quality, memory and speed of checkpoints, measured through vLLM: what is served is what is measured.

    perplexity = exp(-mean log p(token_i | the tokens before it in its window))

and beside it, against the baseline's own probabilities, KL divergence and how often both think the same word likeliest
(_engine.py), and how often the last word of a passage is guessed (last_word.py).

Windows have a fixed length, start with the tokenizer's own first token where it has one (BOS), and are the same for
every model compared. A window's first token has nothing before it and is not scored. Each model runs in an engine of
its own process (_engine.py), so that its memory is its own and comes back. Only that process imports vLLM.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_smoothquant.format.errors import SmoothQuantError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from .last_word import Passage

# The usual text for perplexities; the calibration set is not it.
DEFAULT_DATASET = "Salesforce/wikitext:wikitext-2-raw-v1@test"
# Generation measured for speed: this many prompts of this many tokens at once, each continued by this many.
DECODE = {"batch": 8, "prompt_tokens": 16, "new_tokens": 16, "repeats": 3}
# What --table measures of a model as a server would run it.
SERVE = {"prompt_tokens": 128, "new_tokens": 32, "batches": [1, 16], "repeats": 3}
SMALL_HOST = 4  # cores
GiB = 1 << 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `smoothquant evaluate`."""
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="folders (or hub ids) that vLLM can serve")
    parser.add_argument("--baseline", metavar="MODEL", help="the floating-point model to compare with")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--text", metavar="FILE", help="a .txt, .jsonl, .parquet or .csv file")
    text.add_argument("--dataset", default=DEFAULT_DATASET, metavar="NAME", help="a hub data set NAME[:CONFIG][@SPLIT]")
    parser.add_argument("--text-column", default="text", metavar="NAME", help="the column that holds the text")
    parser.add_argument("--samples", type=int, default=128, metavar="N", help="how many windows to score")
    parser.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens in each window")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which windows are drawn")
    parser.add_argument(
        "--passages",
        type=int,
        default=0,
        metavar="N",
        help="guess the last word of so many passages",
    )
    parser.add_argument(
        "--passage-tokens", type=int, default=512, metavar="N", help="tokens that such a passage may have at most"
    )
    parser.add_argument(
        "--tasks", type=lambda names: names.split(","), default=[], metavar="NAME,...",
        help="tasks of lm-evaluation-harness as well (pip install lm-eval)",
    )  # fmt: skip
    parser.add_argument("--include-path", metavar="DIR", help="a folder with tasks of your own (YAML) for --tasks")
    parser.add_argument("--limit", type=int, metavar="N", help="documents of each task")
    parser.add_argument("--dtype", default="auto", metavar="TYPE", help="of activations, as vLLM's --dtype")
    parser.add_argument(
        "--score-dtype", metavar="TYPE", help="another one for the perplexity alone: float32 where the CPU has no BF16"
    )
    parser.add_argument("--no-speed", action="store_true", help="perplexity and sizes only")
    parser.add_argument(
        "--table", metavar="DIR",
        help="also peak memory, time to the first token, speed at batch 1 and 16; table.md, .json and .png into DIR",
    )  # fmt: skip
    parser.add_argument("--enforce-eager", action="store_true", help="no compilation: starts faster, decodes slower")
    parser.add_argument(
        "--engine",
        type=json.loads,
        default={},
        metavar="JSON",
        help="more engine arguments of vLLM, as one JSON object",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """What `smoothquant evaluate` prints: the text, the engine, and a row for every model, the baseline first."""
    _require_vllm()
    models = ([args.baseline] if args.baseline else []) + args.checkpoints
    source = args.text or args.dataset
    windows, text = token_windows(
        models, source, text_column=args.text_column, samples=args.samples, seq_len=args.seq_len, seed=args.seed
    )
    passages = guessing(models[0], args, source) if args.passages else []
    engine = {"dtype": args.dtype, "enforce_eager": args.enforce_eager, **args.engine}
    score_dtype = args.score_dtype or args.dtype
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="smoothquant-") as folder:
        logits = str(Path(folder) / "baseline.pt")
        for model in models:
            print(f"evaluate: {model}", file=sys.stderr, flush=True)
            row = {"model": model, "baseline": model == args.baseline}
            decode = None if args.no_speed or args.table else DECODE
            serve = SERVE if args.table else None
            quality: dict[str, Any] = {"passages": passages}
            if args.baseline:
                quality["keep" if row["baseline"] else "compare"] = logits
            if score_dtype == args.dtype:
                row |= measure(model, windows, decode=decode, serve=serve, **quality, **engine)
            else:
                row |= measure(model, windows, decode=None, **quality, **engine | {"dtype": score_dtype})
                del row["memory_bytes"]  # in a dtype the model is not served in
                if decode is not None or serve is not None:
                    row |= measure(model, windows, score=False, decode=decode, serve=serve, **engine)
            if args.tasks:
                more = {"include_path": args.include_path, "limit": args.limit}
                row["tasks"] = run_tasks(model, args.tasks, **more, **engine)
            rows.append(row)
    linear = linear_layers(models)
    for row in rows:
        row.update(weight_bytes(row["model"], linear))
        if args.baseline:
            row["perplexity_change"] = row["perplexity"] / rows[0]["perplexity"] - 1
    about = {"vllm": version("vllm"), **engine, "score_dtype": score_dtype}
    return {"text": text, "engine": about, "decode": DECODE, "serve": SERVE if args.table else None, "models": rows}


def format_table(result: Mapping[str, Any]) -> str:
    """`run`'s result for people."""
    header = ["model", "perplexity", "change", "KL", "top-1", "last word", "on disk", "linear", "in memory", "decode"]
    rows, text, decode, engine = result["models"], result["text"], result["decode"], result["engine"]
    cells = [
        [
            Path(row["model"]).name,
            f"{row['perplexity']:.3f}",
            f"{row['perplexity_change']:+.2%}" if "perplexity_change" in row else "",
            f"{row['kl_divergence']:.4f}" if "kl_divergence" in row else "",
            f"{row['top1_agreement']:.1%}" if "top1_agreement" in row else "",
            f"{row['last_word_accuracy']:.1%}" if "last_word_accuracy" in row else "",
            _mib(row["disk_bytes"]),
            _mib(row["linear_bytes"]),
            _mib(row["memory_bytes"]) if "memory_bytes" in row else "",
            f"{row['decode_tokens_per_second']:.1f} tok/s" if "decode_tokens_per_second" in row else "",
        ]
        for row in rows
    ]
    for task, metrics in rows[0].get("tasks", {}).items():
        for metric in metrics:
            header.append(f"{task} {metric}")
            for line, row in zip(cells, rows, strict=True):
                line.append(f"{row['tasks'][task][metric]:.4f}")
    # A column that nobody asked for is left out.
    columns = [c for c in zip(header, *cells, strict=True) if any(c[1:])]
    header, *cells = (list(line) for line in zip(*columns, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in [header, ["-" * width for width in widths], *cells]
    ]
    lines += [
        f"perplexity: {text['windows']} windows of {text['seq_len']} tokens of {text['source']}, "
        f"{rows[0]['scored_tokens']} tokens scored, dtype {engine['score_dtype']}",
        *(["KL: nats per token from the baseline's distribution; top-1: the same likeliest token"] * ("KL" in header)),
        *([f"last word: guessed, of {rows[0].get('passages')} passages"] * ("last word" in header)),
        "on disk: all weight files; linear: the tensors of the layers that are INT8 in a checkpoint given here",
        "in memory: what loading the weights added to the process that holds them",
        f"decode: {decode['batch']} prompts at once, {decode['new_tokens']} new tokens each, median of "
        f"{decode['repeats']}, dtype {engine['dtype']}; vLLM {engine['vllm']}",
    ]
    lines += [f"{Path(row['model']).name}: INT8 by {', '.join(row['kernels'])}" for row in rows if row["kernels"]]
    return "\n".join(lines)


def perplexity(model: str | Path, windows: Sequence[Sequence[int]], **engine: Any) -> float:
    """Perplexity of `model` on `windows` of token ids; `engine` are arguments of vLLM's LLM()."""
    return measure(model, windows, decode=None, **engine)["perplexity"]


def measure(
    model: str | Path,
    windows: Sequence[Sequence[int]],
    *,
    score: bool = True,
    passages: Sequence["Passage"] = (),
    keep: str | None = None,
    compare: str | None = None,
    decode: Mapping[str, int] | None = DECODE,
    serve: Mapping[str, Any] | None = None,
    timeout: float | None = None,
    **engine: Any,
) -> dict[str, Any]:
    """What a fresh vLLM engine says of `model`: memory_bytes of all weights, kernels that compute quantised layers,
    with `score` perplexity and scored_tokens, with `passages` last_word_accuracy, with `decode`
    decode_tokens_per_second, with `serve` what _engine.serving says; keep: a file for this model's probabilities;
    compare: the file that another call kept, for kl_divergence and top1_agreement with that call's model.

    `engine` are arguments of vLLM's LLM(). Raises SmoothQuantError where vLLM cannot run the model,
    subprocess.TimeoutExpired after `timeout` seconds; no process is left in any case.
    """
    _require_vllm()
    longest = max(len(ids) for ids in [*windows, *(p["ids"] for p in passages)])
    if decode is not None:
        longest = max(longest, decode["prompt_tokens"] + decode["new_tokens"])
    if serve is not None:
        longest = max(longest, serve["prompt_tokens"] + serve["new_tokens"] + 1)
    # kv_cache_memory_bytes: without it vLLM takes nearly all the machine's memory for the cache, whatever the model.
    arguments = {"max_model_len": longest + 1, "max_num_seqs": 16, "kv_cache_memory_bytes": GiB, "seed": 0, **engine}
    request = {
        "model": str(model),
        "windows": [list(window) for window in windows],
        "score": score,
        "passages": list(passages),
        "keep": keep,
        "compare": compare,
        "decode": decode,
        "serve": serve,
        "engine": arguments,
    }
    return _apart("calibration.evaluation.engine", request, timeout)


def run_tasks(
    model: str | Path, tasks: Sequence[str], *, include_path: str | None = None, limit: int | None = None, **engine: Any
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, by lm-evaluation-harness through a fresh vLLM engine.

    tasks: its names, or paths of its YAML files; include_path: a folder of more of them; limit: documents of each.
    """
    _require_vllm()
    if find_spec("lm_eval") is None:
        raise SmoothQuantError(
            "--tasks", expected="lm-evaluation-harness", got="no such package", do="pip install 'lm-eval>=0.4.9'"
        )
    request = {
        "model": str(model),
        "tasks": list(tasks),
        "include_path": include_path,
        "limit": limit,
        "engine": {"kv_cache_memory_bytes": GiB, "seed": 0, **engine},
    }
    return _apart("calibration.evaluation.lm_eval_tasks", request)


def _apart(module: str, request: dict[str, Any], timeout: float | None = None) -> dict[str, Any]:
    """What `python -m MODULE REQUEST ANSWER` answers; whichever way that ends, nothing of it keeps running."""
    with tempfile.TemporaryDirectory(prefix="smoothquant-") as folder:
        asked, answered, log = (Path(folder) / name for name in ("request.json", "answer.json", "log.txt"))
        asked.write_text(json.dumps(request))
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", module, str(asked), str(answered)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=engine_environment(request["engine"]),
                start_new_session=True,
            )
            try:
                code = process.wait(timeout)
            finally:
                # The engine's workers are of its group: none is left.
                _kill_group(process)
        if code != 0:
            raise SmoothQuantError(
                request["model"], expected="a model that vLLM can run",
                got=_last_error(log.read_text(errors="replace")), do=f"see what `vllm serve {request['model']}` says",
            )  # fmt: skip
        return json.loads(answered.read_text())


def token_windows(
    models: Sequence[str], source: str, *, text_column: str, samples: int, seq_len: int, seed: int
) -> tuple[list[list[int]], dict[str, Any]]:
    """`samples` windows of `seq_len` token ids from `source` for all of `models`, and a description of the text."""
    from transformers import AutoTokenizer

    from ..inputs.text import load_samples

    tokenizers = []
    for model in models:
        try:
            tokenizers.append(AutoTokenizer.from_pretrained(model, trust_remote_code=False))
        except (OSError, ValueError, KeyError) as error:
            got = " ".join(str(error).split())[:200]
            raise SmoothQuantError(
                model, expected="a model with its tokenizer", got=got, do="check the path"
            ) from error
        if tokenizers[-1].get_vocab() != tokenizers[0].get_vocab():
            raise SmoothQuantError(
                model, expected=f"the tokenizer of {models[0]}", got="another one",
                do="evaluate them one at a time: perplexities of different tokens do not compare",
            )  # fmt: skip
    tokenizer = tokenizers[0]
    prefix = leading_tokens(tokenizer)
    if seq_len < len(prefix) + 2:
        raise SmoothQuantError("--seq-len", expected=f"at least {len(prefix) + 2}", got=str(seq_len), do="use more")
    drawn = load_samples(
        source, tokenizer, text_column=text_column, samples=samples, seq_len=seq_len - len(prefix), seed=seed
    )
    # A window that starts its document has the prefix from the tokenizer.
    windows = [ids if ids[: len(prefix)] == prefix else prefix + ids for ids in drawn.input_ids.tolist()]
    return windows, {
        "source": source, "windows": len(windows), "seq_len": seq_len, "seed": seed, "tokens_sha256": drawn.sha256
    }  # fmt: skip


def guessing(model: str, args: argparse.Namespace, source: str) -> list["Passage"]:
    """The passages whose last word is to be guessed."""
    from transformers import AutoTokenizer

    from .last_word import load_passages

    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    return load_passages(
        source, tokenizer, text_column=args.text_column, passages=args.passages, max_tokens=args.passage_tokens,
        seed=args.seed,
    )  # fmt: skip


def leading_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """The special tokens that this tokenizer puts before a text: BOS for Llama, none for SmolLM2."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return full[: next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)]


def linear_layers(models: Sequence[str]) -> frozenset[str]:
    """Names of the layers that are INT8 in any of the checkpoints."""
    return frozenset(
        name.removesuffix(".weight_scale")
        for model in models
        for name in _tensors(model)
        if name.endswith(".weight_scale")
    )


def weight_bytes(model: str, linear: frozenset[str]) -> dict[str, int]:
    """disk_bytes of all weight files, linear_bytes of the layers `linear` with their scales and factors."""
    of_linear = [size for name, size in _tensors(model).items() if name.rpartition(".")[0] in linear]
    return {"disk_bytes": sum(f.stat().st_size for f in _weight_files(model)), "linear_bytes": sum(of_linear)}


def engine_environment(engine: Mapping[str, Any] | None = None) -> dict[str, str]:
    """This process's environment for a process that runs vLLM; what the user has set stays.

    Only vLLM's CPU backend reads what is added. By itself it keeps a core for the front end; on a small host that is
    half of the machine.
    """
    environment = dict(os.environ)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) <= SMALL_HOST and (engine or {}).get("tensor_parallel_size", 1) == 1:
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
    return environment


def _tensors(model: str) -> dict[str, int]:
    """Name -> bytes of every tensor in the safetensors files, read from their headers."""
    sizes = {}
    for file in _weight_files(model):
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                sizes[name] = end - start
    return sizes


def _weight_files(model: str) -> list[Path]:
    from transformers.utils import cached_file

    config = cached_file(model, "config.json")
    assert config is not None  # the tokenizer was read from beside it
    return sorted(Path(config).parent.glob("*.safetensors"))


def _require_vllm() -> None:
    try:
        version("vllm")
    except PackageNotFoundError as error:
        raise SmoothQuantError(
            "evaluate", expected="vLLM in this environment", got="none installed",
            do="install it: `make venv` on a CPU host, `pip install vllm` beside a CUDA GPU",
        ) from error  # fmt: skip


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def _last_error(log: str) -> str:
    """What a vLLM log says went wrong: its last exception that is not about another process having failed."""
    lines = [line.rpartition("] ")[2] if "ERROR" in line else line for line in log.splitlines() if line.strip()]
    found = lines[-1].strip() if lines else "no output"
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if "Error: " in line and "root cause" not in line:
            # pydantic has the reason on a line of its own.
            reason = following.partition(" [type=")[0].strip() if "validation error" in line else ""
            found = f"{line.strip()} {reason}".strip()
    return found[:400]


def _mib(size: int) -> str:
    return f"{size / (1 << 20):.0f} MiB"
