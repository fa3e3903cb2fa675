"""Every `smoothquant` command in README and docs is one: our parser takes it, and what needs no engine is run."""

import json
import re
import shlex
from pathlib import Path

import pytest

from calibration import __main__ as cli
from tests.helpers import tiny_checkpoints

ROOT = Path(__file__).parent.parent

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

PAGES += sorted((ROOT / "examples").glob("*.py"))

# A command on a line of its own, or between backticks if it has arguments.
COMMAND = re.compile(r"^    (smoothquant .*)$|`(smoothquant [a-z]+ [^`]*)`", re.MULTILINE)

SMALL = ["--samples", "4", "--seq-len", "32"]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each; a comment begins with #, and `...` stands for what is left out."""
    found = []
    for page in PAGES:
        for alone, within in COMMAND.findall(page.read_text()):
            words = shlex.split((alone or within).replace("\n", " "), comments=True)[1:]
            found.append((page.name, [word for word in words if word != "..."]))
    return found


def test_there_are_commands():
    assert len(commands()) > 12
    said = {words[0] for _, words in commands()}
    assert said == {"calibrate", "smooth", "evaluate", "verify", "report", "doctor", "convert"}


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_every_command_is_understood(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT/recipe.yaml").write_text("model: a/b\nsamples: 3\n")
    cli._parser(words).parse_args(_complete(words))


def _complete(words: list[str]) -> list[str]:
    """In running text a command may leave out what it is about: `smoothquant verify`, say."""
    if words[0] in ("calibrate", "smooth") and "-o" not in words and "--print-recipe" not in words:
        return [*words, *(["MODEL"] if len(words) == 1 or words[1].startswith("-") else []), "-o", "OUT"]
    if words[0] in ("evaluate", "report", "verify") and (len(words) == 1 or words[1].startswith("-")):
        return [words[0], "OUT", *words[1:]]
    return words


def test_what_readme_says_runs_in_that_order_on_a_small_model(tmp_path, monkeypatch, capsys):
    """Evaluation starts engines: tests/test_evaluate.py runs it. Names of models and texts stand for small ones."""
    monkeypatch.chdir(tmp_path)
    tiny_checkpoints.save("llama", tmp_path / "MODEL")
    tiny_checkpoints.save_text(tmp_path / "mine.jsonl")
    ran = []
    for page, words in commands():
        if page != "README.md" or words[0] == "evaluate" or _complete(words) != words:
            continue
        if words[0] == "calibrate" and "/" in words[1]:
            words[1] = "MODEL"
        if words[0] in ("calibrate", "smooth"):
            # Each would make the same folder; the first one is what later commands look at.
            out = words.index("-o") + 1 if "-o" in words else None
            if out is not None and Path(words[out]).exists():
                words[out] = f"OUT-{len(ran)}"
            words += [*([] if "--dataset" in words else ["--dataset", "mine.jsonl"]), *SMALL]
        assert cli.main(words) == 0, (words, capsys.readouterr().err)
        if "--print-recipe" in words:
            capsys.readouterr()
        ran.append(words[0])
    assert set(ran) == {"calibrate", "smooth", "verify", "report", "doctor", "convert"}
    assert json.loads((tmp_path / "OUT/smoothquant.json").read_text())["quantized"]


def test_readme_shows_the_table_as_it_was_measured():
    assert (ROOT / "docs/table/table.md").read_text().strip() in (ROOT / "README.md").read_text()


def test_every_command_and_option_has_a_help_text(capsys):
    """And `smoothquant --help` names every command."""
    (choices,) = (action.choices for action in cli._parser()._actions if action.choices)
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    overall = capsys.readouterr().out
    for name, parser in choices.items():
        assert re.search(rf"^ +{name}\b", overall, re.MULTILINE), name
        assert parser.description.endswith(".")
        for action in parser._actions:
            assert action.help, f"{name} {action.dest}"
            assert not action.help.endswith("."), f"{name} {action.dest}"
        assert any(action.dest == "json" for action in parser._actions), name
