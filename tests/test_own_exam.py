"""examples/own_exam: questions by rules, read and scored by lm-evaluation-harness without a socket."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest

from benchmarks import no_network
from demo import assets
from tests.test_privacy import NO_SOCKETS, run

EXAM = Path(__file__).parent.parent / "examples" / "own_exam"
MAKE = runpy.run_path(str(EXAM / "make.py"))
QUESTIONS = 100

# lm-evaluation-harness with a model that knows every answer, and with one that guesses; prints the scores of each.
SIT = (
    NO_SOCKETS
    + """
import json, random
from pathlib import Path
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

exam = Path(sys.argv[1])
choices, extractions = ([json.loads(line) for line in (exam / f"{name}.jsonl").read_text().splitlines()]
                        for name in ("choice", "extraction"))
right = {(q["question"].split("____")[0].rstrip(), q["choices"][q["answer"]]) for q in choices}
answers = {q["passage"] + q["question"].split("____")[0].rstrip(): q["answer"] for q in extractions}

class Candidate(LM):
    def __init__(self, knows):
        super().__init__()
        self.knows, self.rng = knows, random.Random(0)
    def loglikelihood(self, requests):
        known = ((context, ending.strip()) in right for context, ending in (r.args for r in requests))
        return [(float(each) if self.knows else self.rng.random(), False) for each in known]
    def loglikelihood_rolling(self, requests):
        raise NotImplementedError
    def generate_until(self, requests):
        contexts = [r.args[0] for r in requests]
        if self.knows:
            return [" " + answers[context.replace("\\n\\n", "")] + ", and so on" for context in contexts]
        return [" " + self.rng.choice(context.split()) for context in contexts]

manager = TaskManager(include_path=str(exam), include_defaults=False)  # the index of all other tasks takes a while
for knows in (True, False):
    candidate, options = Candidate(knows), {"task_manager": manager, "bootstrap_iters": 1000}
    results = simple_evaluate(candidate, tasks=["own_exam"], **options)["results"]
    print(json.dumps({task: {k: float(v) for k, v in r.items() if "," in k} for task, r in results.items()}))
"""
)


@pytest.fixture(scope="module")
def exam(tmp_path_factory) -> Path:
    """From the articles of the demo, as benchmarks/clinic.py makes it."""
    assets.articles()
    folder = tmp_path_factory.mktemp("exam") / "exam"
    MAKE["make"](assets.CACHE / "articles.jsonl", folder, questions=QUESTIONS)
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_model_that_knows_is_right_and_one_that_guesses_is_right_by_chance_without_a_socket(exam):
    process = run(SIT, str(exam))
    assert process.returncode == 0, process.stderr
    known, guessed = map(json.loads, process.stdout.splitlines()[-2:])
    assert known["own_exam_choice"]["acc,none"] == 1
    assert known["own_exam_extraction"]["exact_match,none"] == 1
    # Four standard errors of a guess among four; a word of the passage is rarely the answer.
    assert abs(guessed["own_exam_choice"]["acc,none"] - 0.25) < 4 * (0.25 * 0.75 / QUESTIONS) ** 0.5
    assert guessed["own_exam_extraction"]["exact_match,none"] < 0.1
    assert 0 < guessed["own_exam_choice"]["acc_stderr,none"] < 0.05


def test_every_question_has_its_answer_in_the_text(exam):
    """And the text that is left to calibrate on has none of the exam's documents."""
    texts = {row["title"]: row["text"] for row in rows(assets.CACHE / "articles.jsonl")}
    chosen = json.loads((exam / "about.json").read_text())["documents"]
    source = "\n".join(texts[title] for title in chosen)
    questions, extractions = rows(exam / "choice.jsonl"), rows(exam / "extraction.jsonl")
    assert len(questions) == len(extractions) == QUESTIONS
    for row in questions:
        assert len(set(row["choices"])) == 4
        filled = [row["question"].replace("____", choice) in source for choice in row["choices"]]
        assert filled[row["answer"]], row
    for row in extractions:
        before = row["question"].removesuffix("____")
        assert row["passage"].count(before + row["answer"]) == 1, row
        assert len(re.findall(rf"\b{re.escape(row['answer'])}\b", row["passage"])) == 1, row
    rest = {row["title"] for row in rows(exam / "rest.jsonl")}
    assert rest | set(chosen) == set(texts)
    assert not rest & set(chosen)


def test_the_same_seed_makes_the_same_exam(exam, tmp_path):
    again = [tmp_path / "again", tmp_path / "other"]
    for seed, folder in enumerate(again):
        MAKE["make"](assets.CACHE / "articles.jsonl", folder, questions=QUESTIONS, seed=seed)
    for name in ("choice.jsonl", "extraction.jsonl"):
        made, same, other = ((folder / name).read_bytes() for folder in (exam, *again))
        assert made == same
        assert made != other


def test_own_questions_may_have_text_after_the_blank_or_no_blank(tmp_path, monkeypatch):
    read = shutil.copy(EXAM / "read.py", tmp_path)
    asked = [("A (____) and more", ["x", "y"]), ("What?", ["x", "y"]), ("It is ____.", [1, 2])]
    lines = [json.dumps({"question": question, "choices": choices, "answer": 1}) for question, choices in asked]
    (tmp_path / "choice.jsonl").write_text("\n".join(lines))
    docs = runpy.run_path(read)["choice"]()["test"].to_list()
    assert [(doc["prompt"], doc["endings"]) for doc in docs] == [
        ("A (", ["x) and more", "y) and more"]), ("Question: What?\nAnswer:", [" x", " y"]), ("It is", [" 1.", " 2."]),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "reason"), [("", "expected questions"), ('{"question": "a"}', "got no choices, answer")]
)
def test_a_faulty_exam_is_named(text, reason, tmp_path):
    read = runpy.run_path(shutil.copy(EXAM / "read.py", tmp_path))
    (tmp_path / "choice.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"choice.jsonl.*{reason}"):
        read["choice"]()


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [(" 40 mg.", "40", 1), (" 400", "40", 0), ("40.5", "40", 0), ("roe v. Wade", "Roe", 1), ("", "Roe", 0)],
)
def test_an_extraction_is_right_if_the_text_begins_with_the_answer(text, answer, right):
    read = runpy.run_path(str(EXAM / "read.py"))
    assert read["begins_with_the_answer"]({"answer": answer}, [text]) == {"exact_match": right}


def test_the_guard_refuses_other_machines_and_records_them(tmp_path, monkeypatch):
    """A new Python, as the engine starts it, connects to its own machine, and cannot look up or reach another one."""
    for name, value in no_network.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    own = """
import socket
server = socket.create_server(("127.0.0.1", 0))
socket.create_connection(server.getsockname()).close()
socket.getaddrinfo("localhost", 80)
"""
    assert run(own).returncode == 0
    assert no_network.attempts(tmp_path, "create_server") == []
    with pytest.raises(ValueError, match="a process that runs another"):
        no_network.attempts(tmp_path, "another")
    for other in ('socket.getaddrinfo("a.b", 1)', 'socket.socket(type=socket.SOCK_DGRAM).connect(("192.0.2.1", 1))'):
        assert "PermissionError" in run(f"import socket; {other}").stderr
    assert no_network.attempts(tmp_path, "a.b") == ["socket.getaddrinfo a.b", "socket.connect 192.0.2.1"]
