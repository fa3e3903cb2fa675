"""Quality, memory and speed of checkpoints, measured through vLLM.

    perplexity = exp(-mean log p(token_i | the tokens before it in its window))

With a baseline also: the KL divergence from the baseline's probabilities, and how often both models have the same
likeliest token (engine.py). With passages also: the share of last words that are predicted (last_word.py).

All windows have the same length and are the same for every model (windows.py). The first token of a window is not
scored, because no token precedes it.
"""

import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .columns import cells, standard_error
from .evaluate_options import EvaluateOptions
from .last_word import Passage, load_passages
from .measure import DECODE, SERVE, make_request, measure_all, require_vllm, run_tasks
from .sizes import linear_layers, weight_bytes
from .windows import load_tokenizer, token_windows

STDERR = "_stderr"  # the harness's ending of a metric's standard error


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """The text, the engine, and under "models" a row for every model, the baseline first."""
    require_vllm()
    models = ([options.baseline] if options.baseline else []) + list(options.checkpoints)
    source = options.text or options.dataset
    common: dict[str, Any] = {"text_column": options.text_column, "seed": options.seed}
    windows, text = token_windows(models, source, samples=options.samples, seq_len=options.seq_len, **common)
    passages: list[Passage] = []
    if options.passages:
        passages = load_passages(
            source, load_tokenizer(models[0]), passages=options.passages, max_tokens=options.passage_tokens, **common
        )
    engine = {"dtype": options.dtype, "enforce_eager": options.enforce_eager, **(options.engine or {})}
    rows: list[dict[str, Any]] = [{"model": model, "baseline": model == options.baseline} for model in models]
    with tempfile.TemporaryDirectory(prefix="smoothquant-") as folder:
        logits = str(Path(folder, "baseline.pt"))
        jobs = [(row, each) for row in rows for each in _requests(options, row, windows, passages, logits, engine)]
        # --table: each engine has a process of its own, because the peak memory of a process is measured.
        for batch in [[job] for job in jobs] if options.table else [jobs]:
            print("evaluate:", ", ".join(dict.fromkeys(row["model"] for row, _ in batch)), file=sys.stderr, flush=True)
            answers = measure_all([request for _, request in batch])
            for (row, request), answer in zip(batch, answers, strict=True):
                if request["engine"]["dtype"] != engine["dtype"]:
                    del answer["memory_bytes"]  # the model is not served in this dtype
                row.update(answer)
    linear = linear_layers(models)  # after the engines, which download the weight files of a hub id
    for row in rows:
        row.update(weight_bytes(row["model"], linear))
        if options.baseline:
            row |= change(row, rows[0])
        if options.tasks:
            limits: dict[str, Any] = {"include_path": options.include_path, "limit": options.limit}
            row["tasks"] = run_tasks(row["model"], options.tasks, **limits, **engine)
    about = {"vllm": version("vllm"), **engine, "score_dtype": options.score_dtype or options.dtype}
    return {"text": text, "engine": about, "decode": DECODE, "serve": SERVE if options.table else None, "models": rows}


def change(row: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, float]:
    """The relative change of perplexity, and its standard error over the windows, which are the same for both."""
    relative = row["perplexity"] / baseline["perplexity"] - 1
    figures = {"perplexity_change": relative}
    differences = [a - b for a, b in zip(row["window_losses"], baseline["window_losses"], strict=True)]
    if len(differences) > 1 and row is not baseline:
        # d exp(x) = exp(x) dx, x the mean difference of the losses.
        figures["perplexity_change_standard_error"] = (1 + relative) * standard_error(differences)
    return figures


def _requests(
    options: EvaluateOptions, row: Mapping[str, Any], windows: list[list[int]], passages: list[Passage], logits: str,
    engine: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """One request that measures everything, or two if the perplexity has a dtype of its own."""
    model = row["model"]
    quality: dict[str, Any] = {"passages": passages}
    if options.baseline:
        quality["keep" if row["baseline"] else "compare"] = logits
    speed: dict[str, Any] = {
        "decode": None if options.no_speed or options.table else DECODE,
        "serve": SERVE if options.table else None,
    }
    if options.score_dtype in (None, options.dtype):
        return [make_request(model, windows, **quality, **speed, **engine)]
    requests = [make_request(model, windows, decode=None, **quality, **engine | {"dtype": options.score_dtype})]
    if any(speed.values()):
        requests.append(make_request(model, windows, score=False, **speed, **engine))
    return requests


def _score(metrics: Mapping[str, float], metric: str) -> str:
    error = metrics.get(metric + STDERR)
    return f"{metrics[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")


def format_table(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` as a table for a terminal."""
    rows, text, decode, engine = result["models"], result["text"], result["decode"], result["engine"]
    columns = [["model", *(Path(row["model"]).name for row in rows)]]
    columns += [[column.short, *texts] for column, texts in cells(rows).items()]
    for task, metrics in rows[0].get("tasks", {}).items():
        for metric in (metric for metric in metrics if not metric.endswith(STDERR)):
            columns.append([f"{task} {metric}", *(_score(row["tasks"][task], metric) for row in rows)])
    widths = [max(map(len, column)) for column in columns]
    header, *body = zip(*columns, strict=True)
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in [header, ["-" * width for width in widths], *body]
    ]
    lines += [
        f"perplexity: {text['windows']} windows of {text['seq_len']} tokens of {text['source']}, "
        f"{rows[0]['scored_tokens']} tokens scored, dtype {engine['score_dtype']}; vLLM {engine['vllm']}",
        *(
            [
                "KL: nats per token from the baseline's distribution; top-1: the same likeliest token",
                "±: standard error over the windows",
            ]
            * ("KL" in header)
        ),
        *([f"last word: guessed, of {rows[0].get('passages')} passages"] * ("last word" in header)),
        "on disk: all weight files; linear: the tensors of the layers that are INT8 in a checkpoint given here",
        "in memory: what loading the weights added to the process that holds them",
        *(
            [
                f"decode: {decode['batch']} prompts at once, {decode['new_tokens']} new tokens each, median of "
                f"{decode['repeats']}, dtype {engine['dtype']}"
            ]
            * ("decode" in header)
        ),
    ]
    lines += [f"{Path(row['model']).name}: INT8 by {', '.join(row['kernels'])}" for row in rows if row["kernels"]]
    return "\n".join(lines)
