"""Recipes: the options of `smoothquant calibrate` in a YAML file, under the names that the command line gives them.

    model: HuggingFaceTB/SmolLM2-135M-Instruct        smoothquant calibrate --recipe recipe.yaml -o OUT
    samples: 128                                      smoothquant calibrate MODEL --print-recipe > recipe.yaml
    alpha: auto
    no-smoothing: false

Reading is strict: an unknown key, a key that comes twice, a value the option would not take. What the command line says
as well, it decides; a flag can only be switched on there, and `ignore` only be added to.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml

from vllm_smoothquant.format.errors import SmoothQuantError

RECIPE = "recipe.yaml"
# How a run talks, or where its result goes, is no part of how a checkpoint is made.
NOT_KEPT = ("help", "json", "quiet", "recipe", "print_recipe", "output", "push_to_hub", "stats", "save_stats")


class _Loader(yaml.SafeLoader):
    """Of YAML's types those that options have; a key that comes twice is an error, where YAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} comes twice", node.start_mark)
        return super().construct_mapping(node, deep)


def apply(path: str, parser: argparse.ArgumentParser) -> None:
    """Make the recipe in the file `path` the defaults of `parser`. SmoothQuantError where it says what no option is."""
    actions = options(parser)
    for key, value in _read(path).items():
        if key not in actions:
            raise SmoothQuantError(
                f"{path}: {key}", expected=f"one of {', '.join(actions)}", got="an unknown key", do="remove it"
            )
        action = actions[key]
        action.default = _value(f"{path}: {key}", action, value)
        action.required = False  # a positional as well: argparse then takes its default where none is given


def dump(args: argparse.Namespace, parser: argparse.ArgumentParser) -> str:
    """The recipe that makes what `args` would. Options that were left alone are said with their defaults."""
    said = {key: getattr(args, action.dest) for key, action in options(parser).items() if action.dest not in NOT_KEPT}
    return yaml.safe_dump({key: value for key, value in said.items() if value is not None}, sort_keys=False)


def relax(parser: argparse.ArgumentParser) -> None:
    """Require nothing: a recipe may be printed before there is a model or a place to write to."""
    for action in options(parser).values():
        action.required = False


def options(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Name as the command line spells it, without dashes before it -> the option."""
    found = {}
    for action in parser._actions:
        if action.dest not in ("help", "json", "recipe", "print_recipe"):
            long = [name for name in action.option_strings if name.startswith("--")]
            found[long[0].removeprefix("--") if long else action.dest] = action
    return found


def _read(path: str) -> dict[str, Any]:
    try:
        value = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise SmoothQuantError(
            path, expected="a recipe in YAML", got=" ".join(str(error).split())[:200], do="see --print-recipe"
        ) from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise SmoothQuantError(
            path, expected="options and their values", got=type(value).__name__, do="see --print-recipe"
        )
    return value


def _value(where: str, action: argparse.Action, value: Any) -> Any:
    """`value` as the option would have it from the command line."""

    def refuse(expected: str) -> SmoothQuantError:
        return SmoothQuantError(where, expected=expected, got=repr(value)[:100], do="see --print-recipe")

    if isinstance(action.default, bool):
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if isinstance(action.default, list):
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise refuse("a list of names")
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise refuse("one word or number")
    if callable(action.type):
        try:
            value = action.type(str(value))
        except ValueError:
            raise refuse("what the option takes") from None
    elif not isinstance(value, str):
        raise refuse("a word (in quotes, if it looks like a number)")
    if action.choices is not None and value not in action.choices:
        raise refuse(" or ".join(map(str, action.choices)))
    return value
