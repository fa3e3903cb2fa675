"""The parser accepts every `smoothquant` command in README and docs; those of the README run, except `evaluate`."""

import json
import re
import shlex
from pathlib import Path

import pytest

from benchmarks import clinic
from calibration import __main__ as cli
from tests.helpers import lora, tiny_architectures, tiny_checkpoints, tiny_vision

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES += [*sorted((ROOT / "examples").glob("*.py")), ROOT / "examples/own_exam/README.md"]
# A command on a line of its own, or between backticks if it has arguments.
COMMAND = re.compile(r"^    (smoothquant .*)$|`(smoothquant [a-z]+ [^`]*)`", re.MULTILINE)
SMALL = ["--samples", "4", "--seq-len", "32"]


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each; a comment begins with #, and `...` stands for omitted words."""
    result = []
    for page in PAGES:
        for line, quoted in COMMAND.findall(page.read_text()):
            words = shlex.split((line or quoted).replace("\n", " "), comments=True)[1:]
            result.append((page.name, [word for word in words if word != "..."]))
    return result


def test_there_are_commands():
    assert len(commands()) > 12
    names = {words[0] for _, words in commands()}
    assert names == {"calibrate", "smooth", "evaluate", "verify", "report", "doctor", "convert", "adapter"}


@pytest.mark.parametrize(
    ("page", "words"), commands(), ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_every_command_is_parsed(page, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT/recipe.yaml").write_text("model: a/b\nsamples: 3\n")
    cli._parser(words).parse_args(_complete(words))


def _complete(words: list[str]) -> list[str]:
    """The words with the model or checkpoint that a command in running text may omit, as in `smoothquant verify`."""
    if words[0] in ("calibrate", "smooth") and "-o" not in words and "--print-recipe" not in words:
        return [*words, *(["MODEL"] if len(words) == 1 or words[1].startswith("-") else []), "-o", "OUT"]
    if words[0] in ("evaluate", "report", "verify") and (len(words) == 1 or words[1].startswith("-")):
        return [words[0], "OUT", *words[1:]]
    return words


def test_the_commands_of_the_readme_run_in_their_order(tmp_path, monkeypatch, capsys):
    """On a small model and text. tests/test_evaluate.py runs `evaluate`, which starts engines."""
    monkeypatch.chdir(tmp_path)
    tiny_checkpoints.save("llama", tmp_path / "MODEL")
    tiny_checkpoints.save_text(tmp_path / "mine.jsonl")
    tiny_vision.save_pictures(tmp_path / "pictures", 16)
    lora.save_adapter(tmp_path / "ADAPTER", tiny_architectures.build("llama"))
    executed = []
    for page, words in commands():
        if page != "README.md" or words[0] == "evaluate" or _complete(words) != words:
            continue
        if words[0] == "calibrate" and "/" in words[1]:
            words[1] = "MODEL"
        if words[0] in ("calibrate", "smooth"):
            # Every command names the same folder; later commands read the one that the first command writes.
            out = words.index("-o") + 1 if "-o" in words else None
            if out is not None and Path(words[out]).exists():
                words[out] = f"OUT-{len(executed)}"
            words += [*([] if "--dataset" in words else ["--dataset", "mine.jsonl"]), *SMALL]
        assert cli.main(words) == 0, (words, capsys.readouterr().err)
        if "--print-recipe" in words:
            capsys.readouterr()
        executed.append(words[0])
    assert set(executed) == {"calibrate", "smooth", "verify", "report", "doctor", "convert", "adapter"}
    assert json.loads((tmp_path / "OUT/smoothquant.json").read_text())["quantized"]


def test_the_readme_contains_the_measured_table():
    figures = json.loads((ROOT / "benchmarks/results/clinic.json").read_text())
    assert clinic.summary(figures) in (ROOT / "README.md").read_text()


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
