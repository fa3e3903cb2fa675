"""Reads the questions next to this file, for the two tasks in choice.yaml and extraction.yaml."""

import json
import re
from pathlib import Path
from typing import Any

import datasets

FOLDER = Path(__file__).parent
BLANK = "____"


def choice(**_: Any) -> dict[str, datasets.Dataset]:
    """endings: each choice with the text after the blank, so that the probability of the whole sentence counts."""
    docs = []
    for row in rows("choice.jsonl", "question", "choices", "answer"):
        prompt, space, after = around_blank(row["question"])
        endings = [f"{space}{choice}{after}" for choice in row["choices"]]
        docs.append({"prompt": prompt, "endings": endings, "answer": row["answer"]})
    return {"test": datasets.Dataset.from_list(docs)}


def extraction(**_: Any) -> dict[str, datasets.Dataset]:
    docs = []
    for row in rows("extraction.jsonl", "passage", "question", "answer"):
        prompt, _, _ = around_blank(row["question"])
        docs.append({"passage": row["passage"], "prompt": prompt, "answer": str(row["answer"])})
    return {"test": datasets.Dataset.from_list(docs)}


def around_blank(question: str) -> tuple[str, str, str]:
    """(what the model reads, the space after it, the text after the blank). Without a blank the whole question is read.

    The space belongs to the answer, because a tokenizer joins it with the word that follows.
    """
    before, blank, after = question.partition(BLANK)
    if not blank:
        return f"Question: {question}\nAnswer:", " ", ""
    prompt = before.rstrip()
    return prompt, before[len(prompt) :], after


def begins_with_the_answer(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """exact_match: 1 if the first words of the generated text are those of the answer, except for case."""
    answer = re.escape(doc["answer"].strip())
    return {"exact_match": float(re.match(rf"\s*{answer}(?!\w|[.,]\d)", results[0], re.IGNORECASE) is not None)}


def rows(name: str, *keys: str) -> list[dict[str, Any]]:
    """The rows of a file in this folder. Errors: ValueError if it is missing or empty, or a row lacks one of `keys`."""
    path = FOLDER / name
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if not lines:
        raise ValueError(f"{path}: expected questions, one JSON object a line; make.py writes them, or write your own")
    found = [json.loads(line) for line in lines]
    for number, row in enumerate(found, 1):
        if missing := [key for key in keys if key not in row]:
            raise ValueError(f"{path}, line {number}: expected {', '.join(keys)}, got no {', '.join(missing)}")
    return found
