"""The measured figures in the README are those of the results of benchmarks: a new measurement changes both.

The table has a test of its own (test_docs.py).
"""

import json
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
README = " ".join((ROOT / "README.md").read_text().split())


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def preservation() -> str:
    from benchmarks.preservation import outcome

    rows = results("preservation")["rows"]
    counts = {tool: [outcome(row[tool]) for row in rows.values()] for tool in ("ours", "theirs")}
    version = re.search(r"llmcompressor ([\d.]+)", results("preservation")["theirs"])
    assert version
    return (
        f"of {len(rows)} tiny models, smoothing alone is exact on {counts['ours'].count('exact')}, and with "
        f"llm-compressor {version[1]} exact on {counts['theirs'].count('exact')} and silently wrong on "
        f"{counts['theirs'].count('WRONG')}"
    )


def change(model: str, row: str, digits: int = 1) -> str:
    return f"{results('accuracy')['models'][model][row]['perplexity_change'] * 100:.{digits}f} %"


def levels() -> str:
    smol, qwen = "SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"
    static = "static (--activations static)"
    return (
        f"SmolLM2-135M loses {change(smol, static)} of perplexity, Qwen2.5-Coder-0.5B {change(qwen, static)}. A "
        f"`--level` is the paper's to the letter: O1 costs {change(smol, 'O1')} and {change(qwen, 'O1')}, O3 "
        f"{change(smol, 'O3')} and {change(qwen, 'O3')}; without the rotation Qwen loses "
        f"{change(qwen, 'O1: smoothing 0.5', 0)} and {change(qwen, 'O3: smoothing 0.5', 0)}"
    )


def cache() -> str:
    rows = results("kv_cache")
    float_cost = rows["floating point"]["fp8"]
    ours = rows["INT8"]["fp8"] - rows["INT8"]["auto"]
    return f"it costs KL {float_cost:.3f} in floating point and {ours:.3f} more in INT8".replace("0.", ".")


def served() -> str:
    from tests.helpers.tiny_architectures import ZOO

    rows = results("served")
    number = sum(rows[name].startswith("yes") for name in ZOO)
    return f"{len(ZOO)} tiny variants of architectures smoothed exactly, {number} of them served by vLLM's CPU backend"


def llama() -> str:
    rates = next(part["rates"] for title, part in results("llama_cpp")["cores"].items() if "process" in title)
    case = rates["one stream"]
    ratios = [a / b for a, b in zip(case["INT8, INT8 head, uni"], case["llama.cpp Q8_0"], strict=True)]
    return f"brings one stream to {statistics.median(ratios):.2f} of its Q8_0".replace("0.", ".")


def learned() -> str:
    rows = results("learned")["models"]["SmolLM2-135M-Instruct"]["W8A8"]
    before, after = (statistics.fmean(rows[row]["kl"]) for row in ("alpha auto", "alpha learned"))
    minutes = rows["alpha learned"]["seconds"] / 60
    return f"from {before:.4f} (`--alpha auto`) to {after:.4f}, in {minutes:.0f} minutes on one core".replace("0.", ".")


SENTENCES: list[Callable[[], str]] = [preservation, levels, cache, served, llama, learned]


@pytest.mark.parametrize("sentence", SENTENCES, ids=lambda function: function.__name__)
def test_the_readme_quotes_the_measured_figures(sentence):
    assert sentence() in README
