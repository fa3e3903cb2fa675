"""Make an exam from text of your own domain, by rules and a seed. Nothing leaves this machine.

    python examples/own_exam/make.py TEXT.jsonl EXAM [--word REGEX] [--rate 5] [--words 1000] [--questions 150]

TEXT.jsonl has one document a line in a column `text`, and perhaps a column `title`. A document is of the domain if it
has at least --words words and --rate of a thousand of them match --word (default: medical and biological words). EXAM
becomes a copy of this folder with

    choice.jsonl      a sentence up to a blank, and four terms of one kind from the same document; one of them was there
    extraction.jsonl  a passage and one of its sentences up to a blank, where a number or a name of the passage was
    about.json        the rule, and the documents that were chosen
    rest.jsonl        the other documents, to calibrate on: a model must not be calibrated on its exam

A term is a word of at least six lower-case letters that occurs three times in its document and in few other documents.
Terms of the same ending are of one kind; a name is one or several capitalised words inside a sentence.
"""

import argparse
import json
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

DOMAIN = (
    r"disease|patient|medic(al|ine)|symptom|clinical|syndrome|therap|diagnos|drug|surgery|infection"
    r"|species|organism|anatom|tissue|cell(s|ular)\b|bacteri|genus|vertebrate|mammal"
)
BLANK = "____"
CHOICES = 4
WORDS_BEFORE = 4  # the blank, at least
SENTENCE_WORDS = range(8, 41)
PASSAGE_WORDS = range(30, 111)
TERM = re.compile(r"(?<= )[a-z]{6,}(?=[ ,.;])")
NAME = re.compile(r"(?<=[a-z,] )[A-Z][a-z]+(?: [A-Z][a-z]+)*(?=[ ,.;])")
NUMBER = re.compile(r"(?<= )\d[\d,.]*(?=[ ,.;%])")
ENDINGS = ("ing", "ed", "ly", "ic", "al", "ous", "s")  # without one of these: a noun in the singular, mostly
RARE = 0.1  # largest share of all documents that a term occurs in
# What remains where markup was removed.
DAMAGED = re.compile(r"\( |\(\)|\(,| [,.;)]|  |[\[\]{}|=<>_]")

Row = dict[str, Any]


def is_of_domain(text: str, word: str, rate: float, words: int) -> bool:
    all_words = text.split()
    matches = sum(re.match(word, each, re.IGNORECASE) is not None for each in all_words)
    return len(all_words) >= words and 1000 * matches >= rate * len(all_words)


def paragraphs(text: str) -> Iterator[list[str]]:
    """The whole sentences of each paragraph; where a sentence is damaged or unusually long, a new paragraph begins."""
    for paragraph in text.split("\n"):
        sentences: list[str] = []
        for sentence in re.split(r"(?<=[a-z0-9)][.!?])\s+(?=[A-Z])", paragraph.strip()):
            # A quotation or a bracket that is open at the end began or ends in another sentence.
            closed = sentence.count('"') % 2 == 0 and sentence.count("(") == sentence.count(")")
            whole = closed and sentence[:1].isupper() and sentence.endswith((".", "!", "?"))
            if whole and len(sentence.split()) in SENTENCE_WORDS and not DAMAGED.search(sentence):
                sentences.append(sentence)
            elif sentences:
                yield sentences
                sentences = []
        if sentences:
            yield sentences


def kind_of(term: str) -> str:
    return next((ending for ending in ENDINGS if term.endswith(ending)), "")


def until(sentence: str, term: str) -> str | None:
    """The sentence up to `term`, and a blank; None if the term does not occur exactly once, or too early."""
    parts = re.split(rf"\b{re.escape(term)}\b", sentence)
    return parts[0] + BLANK if len(parts) == 2 and len(parts[0].split()) >= WORDS_BEFORE else None


def choice_questions(text: str, documents_of: Counter[str], documents: int, rng: random.Random) -> Iterator[Row]:
    """One question for each sentence that has a term or a name with enough others of its kind."""
    counts = Counter(re.findall(r"[a-z]+", text))
    places: dict[str, list[int]] = {}
    for match in [*TERM.finditer(text), *NAME.finditer(text)]:
        places.setdefault(match[0], []).append(match.start())
    terms = {t for t in TERM.findall(text) if counts[t] >= 3 and documents_of[t] <= max(1, RARE * documents)}
    pools: dict[str, set[str]] = {"name": set(NAME.findall(text))}
    for term in terms:
        pools.setdefault(kind_of(term), set()).add(term)
    for sentence in (sentence for sentences in paragraphs(text) for sentence in sentences):
        found = [("name", name) for name in NAME.findall(sentence)]
        found += [(kind_of(term), term) for term in TERM.findall(sentence) if term in terms]
        rng.shuffle(found)
        at = text.index(sentence)
        for kind, term in found:
            question = until(sentence, term)
            others = sorted(other for other in pools[kind] if other not in sentence and other not in term)
            if question and len(others) >= CHOICES - 1:
                # The nearest ones, because they are about the same subject.
                others.sort(key=lambda other: min(abs(place - at) for place in places[other]))
                choices = [term, *others[: CHOICES - 1]]
                rng.shuffle(choices)
                yield {"question": question, "choices": choices, "answer": choices.index(term), "kind": kind}
                break


def extraction_questions(text: str, rng: random.Random) -> Iterator[Row]:
    """One question for each passage of several sentences with several numbers, or with several names."""
    for sentences in paragraphs(text):
        passage: list[str] = []
        for sentence in sentences:
            passage.append(sentence)
            if len(" ".join(passage).split()) in PASSAGE_WORDS and len(passage) > 1:
                question = extraction(passage, rng)
                if question:
                    yield question
                    passage = []


def extraction(passage: list[str], rng: random.Random) -> Row | None:
    """A question about one number or name of the passage, which also has another one of the same kind."""
    text = " ".join(passage)
    found: list[Row] = []
    for kind, pattern in (("number", NUMBER), ("name", NAME)):
        answers = sorted({answer.rstrip(".,") for answer in pattern.findall(text)})
        for answer in answers:
            # Once in the passage, so that the question has one answer.
            question = next(filter(None, (until(sentence, answer) for sentence in passage)), None)
            if question and len(answers) > 1 and len(re.findall(rf"\b{re.escape(answer)}\b", text)) == 1:
                found.append({"passage": text, "question": question, "answer": answer, "kind": kind})
    return rng.choice(found) if found else None


def write(path: Path, rows: Iterable[Row]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def make(
    text: Path, exam: Path, *, word: str = DOMAIN, rate: float = 5, words: int = 1000, questions: int = 150,
    seed: int = 0,
) -> Row:  # fmt: skip
    """Write the exam and return what about.json has."""
    rows = [json.loads(line) for line in text.read_text(encoding="utf-8").splitlines()]
    chosen = [row for row in rows if is_of_domain(row["text"], word, rate, words)]
    documents_of = Counter(each for row in rows for each in set(re.findall(r"[a-z]+", row["text"])))
    rng = random.Random(seed)
    parts: dict[str, list[Row]] = {"choice": [], "extraction": []}
    for row in chosen:
        parts["choice"] += choice_questions(row["text"], documents_of, len(rows), rng)
        parts["extraction"] += extraction_questions(row["text"], rng)
    shutil.copytree(Path(__file__).parent, exam, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name, made in parts.items():
        write(exam / f"{name}.jsonl", rng.sample(made, min(questions, len(made))))
    write(exam / "rest.jsonl", (row for row in rows if row not in chosen))
    about = {
        "word": word, "rate": rate, "words": words, "seed": seed,
        "documents": [row.get("title", row["text"][:40]) for row in chosen],
        "possible": {name: len(made) for name, made in parts.items()},
        "questions": {name: min(questions, len(made)) for name, made in parts.items()},
    }  # fmt: skip
    (exam / "about.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("exam", type=Path)
    parser.add_argument("--word", default=DOMAIN, metavar="REGEX", help="matches the beginning of words of the domain")
    parser.add_argument("--rate", type=float, default=5, help="of a thousand words that must match")
    parser.add_argument("--words", type=int, default=1000, help="that a document must have")
    parser.add_argument("--questions", type=int, default=150, help="at most, of each of the two parts")
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(make(**vars(parser.parse_args())), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
