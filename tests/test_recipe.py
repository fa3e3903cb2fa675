"""Recipes hold every option of calibrate, are read strictly, and give the same checkpoint again."""

import json
from dataclasses import fields

import pytest
import yaml

from calibration import __main__ as cli
from calibration import options
from calibration.recipe import RECIPE
from tests.helpers import tiny_checkpoints
from vllm_smoothquant.format.files import MANIFEST

ONLY_FOUR_BITS = ("group-size", "rounding", "budget-size")


def printed(capsys, *arguments: str) -> dict:
    assert cli.main(["calibrate", *arguments, "--print-recipe"]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def write(path, **options) -> str:
    path.write_text(yaml.safe_dump(options))
    return str(path)


def test_every_option_of_calibrate_is_in_a_recipe(capsys, tmp_path):
    """Except those that do not affect the checkpoint."""
    recipe = printed(
        capsys, "some/model", "-o", "OUT", "--level", "O3", "--weights", "channel", "--activations", "static",
        "--budget-ppl", "1.5%", "--max-fallback", "10%", "--ignore", "a", "--ignore", "b", "--alpha", "auto",
        "--chat-template", "t.jinja",
    )  # fmt: skip
    four_bits = printed(
        capsys,
        "some/model",
        "-o",
        "OUT",
        "--bits",
        "4",
        "--group-size",
        "64",
        "--rounding",
        "nearest",
        "--budget-size",
        "40%",
    )
    assert printed(capsys, "--recipe", write(tmp_path / "f.yaml", **four_bits)) == four_bits
    assert four_bits["budget-size"] == 0.4
    recipe |= {key: four_bits[key] for key in ONLY_FOUR_BITS}
    assert recipe.keys() == {f.name.replace("_", "-") for f in fields(options.Options) if f.metadata["recipe"]}
    assert recipe["max-fallback"] == 0.1
    assert recipe["ignore"] == ["a", "b"]
    recipe = {key: value for key, value in recipe.items() if key not in ONLY_FOUR_BITS}
    assert printed(capsys, "--recipe", write(tmp_path / "r.yaml", **recipe)) == recipe


def test_without_options_the_defaults_are_printed(capsys):
    recipe = printed(capsys)
    assert recipe["samples"] == 64
    assert recipe["no-smoothing"] is False
    assert "model" not in recipe


def test_the_command_line_overrides_and_ignored_layers_add_up(capsys, tmp_path):
    path = write(tmp_path / "r.yaml", model="a/b", samples=7, alpha="auto", ignore=["x"])
    recipe = printed(capsys, "--recipe", path, "--alpha", "0.7", "--ignore", "y")
    assert (recipe["model"], recipe["samples"], recipe["alpha"], recipe["ignore"]) == ("a/b", 7, 0.7, ["x", "y"])
    assert printed(capsys, "c/d", "--recipe", path)["model"] == "c/d"
    assert printed(capsys, "--recipe", path, "c/d")["model"] == "c/d"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("sample: 3", "unknown key"),
        ("seq_len: 3", "unknown key"),
        ("recipe: other.yaml", "unknown key"),
        ("samples: 3\nsamples: 4", "is repeated"),
        ("samples: many", "a value that the option takes"),
        ("samples: true", "one word or number"),
        ("samples: [3]", "one word or number"),
        ("level: O4", "O1 or O2 or O3"),
        ("dataset: 7", "in quotes"),
        ("no-smoothing: 'yes'", "true or false"),
        ("ignore: lm_head", "a list of names"),
        ("[1, 2]", "options and their values"),
        ("", "options and their values"),
        ("a: [", "a recipe in YAML"),
        ("model: !!python/object/apply:os.system ['true']", "a recipe in YAML"),
    ],
)
def test_an_invalid_recipe_is_an_error_in_one_line(capsys, tmp_path, text, expected):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    assert cli.main(["calibrate", "m", "-o", str(tmp_path / "out"), "--recipe", str(path)]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1


def test_the_saved_recipe_gives_the_same_checkpoint(tmp_path, capsys):
    model, text = tiny_checkpoints.save("llama", tmp_path / "model"), tiny_checkpoints.save_text(tmp_path / "t.jsonl")
    first, second = tmp_path / "first", tmp_path / "second"
    command = ["calibrate", str(model), "-o", str(first), "--dataset", str(text), "--samples", "4", "--seq-len", "32"]
    assert cli.main([*command, "--quiet", "--activations", "static", "--weights", "tensor"]) == 0
    recipe = (first / RECIPE).read_text()
    assert str(tmp_path) not in recipe  # it is made to be shared
    command = ["calibrate", str(model), "--recipe", str(first / RECIPE), "-o", str(second), "--quiet"]
    assert cli.main([*command, "--dataset", str(text)]) == 0
    assert json.loads((first / MANIFEST).read_text()) == json.loads((second / MANIFEST).read_text())
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()
    assert cli.main(["verify", str(second)]) == 0
