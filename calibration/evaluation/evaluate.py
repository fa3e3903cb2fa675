"""Quality, memory and speed of checkpoints, measured through vLLM.

    perplexity = exp(-mean log p(token_i | the tokens before it in its window))

Compared with a baseline, also the KL divergence from its probabilities and how often both have the same likeliest token
(engine.py); and how often the last word of a passage is guessed (last_word.py).

Windows have a fixed length and are the same for every model (windows.py). The first token of a window has nothing
before it and is not scored.
"""

import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .columns import COLUMNS
from .evaluate_options import EvaluateOptions
from .last_word import load_passages
from .measure import DECODE, SERVE, measure_all, request, require_vllm, run_tasks
from .sizes import linear_layers, weight_bytes
from .windows import load_tokenizer, token_windows


def evaluate(options: EvaluateOptions) -> dict[str, Any]:
    """The text, the engine, and a row for every model, the baseline first."""
    require_vllm()
    models = ([options.baseline] if options.baseline else []) + list(options.checkpoints)
    source = options.text or options.dataset
    windows, text = token_windows(
        models, source, text_column=options.text_column, samples=options.samples, seq_len=options.seq_len,
        seed=options.seed,
    )  # fmt: skip
    passages = []
    if options.passages:
        passages = load_passages(
            source, load_tokenizer(models[0]), text_column=options.text_column, passages=options.passages,
            max_tokens=options.passage_tokens, seed=options.seed,
        )  # fmt: skip
    engine = {"dtype": options.dtype, "enforce_eager": options.enforce_eager, **(options.engine or {})}
    with tempfile.TemporaryDirectory(prefix="smoothquant-") as folder:
        logits = str(Path(folder, "baseline.pt"))
        requests = [_requests(options, model, windows, passages, logits, engine) for model in models]
        rows = _measure_rows(requests, apart=options.table is not None)
    linear = linear_layers(models)
    for row in rows:
        row["baseline"] = row["model"] == options.baseline
        row.update(weight_bytes(row["model"], linear))
        if options.baseline:
            row["perplexity_change"] = row["perplexity"] / rows[0]["perplexity"] - 1
        if options.tasks:
            row["tasks"] = run_tasks(
                row["model"], options.tasks, include_path=options.include_path, limit=options.limit, **engine
            )
    about = {"vllm": version("vllm"), **engine, "score_dtype": options.score_dtype or options.dtype}
    return {"text": text, "engine": about, "decode": DECODE, "serve": SERVE if options.table else None, "models": rows}


def _requests(
    options: EvaluateOptions, model: str, windows: list[list[int]], passages: list[Any], logits: str,
    engine: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """One engine that measures everything, or two if the perplexity has a dtype of its own."""
    quality: dict[str, Any] = {"passages": passages}
    if options.baseline:
        quality["keep" if model == options.baseline else "compare"] = logits
    speed: dict[str, Any] = {
        "decode": None if options.no_speed or options.table else DECODE,
        "serve": SERVE if options.table else None,
    }
    if options.score_dtype in (None, options.dtype):
        return [request(model, windows, **quality, **speed, **engine)]
    requests = [request(model, windows, decode=None, **quality, **engine | {"dtype": options.score_dtype})]
    if any(speed.values()):
        requests.append(request(model, windows, score=False, **speed, **engine))
    return requests


def _measure_rows(requests: list[list[dict[str, Any]]], *, apart: bool) -> list[dict[str, Any]]:
    """One row for each model. apart: each engine in a process of its own, so that its peak memory is its own."""
    print(f"evaluate: {', '.join(some[0]['model'] for some in requests)}", file=sys.stderr, flush=True)
    flat = [each for some in requests for each in some]
    answers = iter([measure_all([each])[0] for each in flat] if apart else measure_all(flat))
    rows = []
    for some in requests:
        row = {"model": some[0]["model"]}
        for each in some:
            answer = next(answers)
            if each["score"] and len(some) > 1:
                del answer["memory_bytes"]  # measured in a dtype that the model is not served in
            row |= answer
        rows.append(row)
    return rows


def format_table(result: Mapping[str, Any]) -> str:
    """The result of `evaluate` for people."""
    rows, text, decode, engine = result["models"], result["text"], result["decode"], result["engine"]
    columns = [["model", *(Path(row["model"]).name for row in rows)]]
    for column in COLUMNS:
        cells = [column.format(row[column.key]) if column.key in row else "" for row in rows]
        if any(cells):
            columns.append([column.short, *cells])
    for task, metrics in rows[0].get("tasks", {}).items():
        columns += [[f"{task} {metric}", *(f"{row['tasks'][task][metric]:.4f}" for row in rows)] for metric in metrics]
    widths = [max(map(len, column)) for column in columns]
    header, *body = zip(*columns, strict=True)
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in [header, ["-" * width for width in widths], *body]
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
