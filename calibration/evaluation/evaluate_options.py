"""Every option of `smoothquant evaluate`. This file imports no model code, so that `--help` answers at once."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_smoothquant.format.errors import SmoothQuantError

from ..options import option

# The usual text for perplexities; it is not the calibration data set.
DEFAULT_DATASET = "Salesforce/wikitext:wikitext-2-raw-v1@test"


@dataclass(frozen=True)
class EvaluateOptions:
    """What `evaluate` measures. Creating it checks the options that depend on each other (SmoothQuantError)."""

    checkpoints: tuple[str, ...] = option(
        (), "folders or hub ids that vLLM can serve", metavar="CHECKPOINT", positional=True
    )
    baseline: str | None = option(None, "the floating-point model to compare with", metavar="MODEL")
    text: str | None = option(None, "a .txt, .jsonl, .parquet or .csv file, instead of --dataset", metavar="FILE")
    dataset: str = option(DEFAULT_DATASET, "a hub data set NAME[:CONFIG][@SPLIT]", metavar="NAME")
    text_column: str = option("text", "the column that holds the text", metavar="NAME")
    samples: int = option(128, "number of windows to score", metavar="N", parse=int)
    seq_len: int = option(512, "tokens in each window", metavar="N", parse=int)
    seed: int = option(0, "seed of the random choice of windows", metavar="N", parse=int)
    passages: int = option(0, "number of passages whose last word is to be predicted", metavar="N", parse=int)
    passage_tokens: int = option(512, "maximal tokens of such a passage", metavar="N", parse=int)
    tasks: tuple[str, ...] | None = option(
        None, "also run these tasks of lm-evaluation-harness (pip install lm-eval)", metavar="NAME,...",
        parse=lambda names: tuple(names.split(",")),
    )  # fmt: skip
    include_path: str | None = option(None, "a folder with your own tasks (YAML) for --tasks", metavar="DIR")
    limit: int | None = option(None, "documents of each task", metavar="N", parse=int)
    dtype: str = option("auto", "dtype of activations, as vLLM's --dtype", metavar="TYPE")
    score_dtype: str | None = option(
        None, "another dtype for the perplexity only: float32 if the CPU has no BF16", metavar="TYPE"
    )
    no_speed: bool = option(False, "measure perplexity and sizes only")
    table: str | None = option(
        None, "also measure peak memory, time to the first token and speed at batch 1 and 16; write table.md, "
        "table.json and table.png into DIR", metavar="DIR",
    )  # fmt: skip
    enforce_eager: bool = option(False, "do not compile: faster start, slower decoding")
    engine: Mapping[str, Any] | None = option(
        None, "more engine arguments of vLLM, as one JSON object", metavar="JSON", parse=json.loads
    )

    def __post_init__(self) -> None:
        if self.text and self.dataset != DEFAULT_DATASET:
            raise SmoothQuantError("--text", "one text to measure on", "--dataset as well", "give only one of the two")
        if self.table and not self.baseline:
            raise SmoothQuantError("--table", "a model to compare with", "none", "add --baseline MODEL")
        if not isinstance(self.engine, Mapping | None):
            raise SmoothQuantError("--engine", "a JSON object", str(self.engine), "write it as '{\"name\": value}'")
