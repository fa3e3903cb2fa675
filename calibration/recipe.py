"""recipe.yaml: the options of `smoothquant calibrate` in a file.

    model: HuggingFaceTB/SmolLM2-135M-Instruct        smoothquant calibrate --recipe recipe.yaml -o OUT
    samples: 128                                      smoothquant calibrate MODEL --print-recipe > recipe.yaml
    alpha: auto
    no-smoothing: false

A recipe is read strictly: an unknown key, a repeated key, or a value that the option does not take is an error. An
option on the command line overrides the recipe's, except that `--ignore` adds to the recipe's list.
"""

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from vllm_smoothquant.format.errors import SmoothQuantError

from .options import Options, public_name

RECIPE = "recipe.yaml"
# Options of a recipe that may be paths.
PATHS = ("model", "dataset", "chat-template")


def apply_recipe(path: str, parser: argparse.ArgumentParser) -> None:
    """Make the recipe in the file `path` the defaults of `parser`."""
    actions = {action.dest: action for action in parser._actions}
    for name, value in read_recipe(path).items():
        actions[name].default = value
        actions[name].required = False  # also of the positional, because argparse then takes its default


def read_recipe(path: str) -> dict[str, Any]:
    """Field name -> value of every option in the recipe. Errors (SmoothQuantError): an invalid key or value."""
    try:
        recipe = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise SmoothQuantError(path, "a recipe in YAML", error, "see --print-recipe") from error
    if not isinstance(recipe, dict) or not all(isinstance(key, str) for key in recipe):
        raise SmoothQuantError(path, "options and their values", type(recipe).__name__, "see --print-recipe")
    known = {f.name.replace("_", "-"): f for f in fields(Options)}
    for key in recipe:
        if key not in known:
            raise SmoothQuantError(f"{path}: {key}", f"one of {', '.join(known)}", "an unknown key", "remove it")
    return {known[key].name: _recipe_value(f"{path}: {key}", known[key], value) for key, value in recipe.items()}


def dump_recipe(values: Mapping[str, Any], *, published: bool = False) -> str:
    """The text of the recipe with `values`: field name -> value, defaults included.

    published: for others to read, without the folders of this machine.
    """
    recipe = {f.name.replace("_", "-"): values[f.name] for f in fields(Options) if f.metadata["recipe"]}
    if published:
        recipe |= {key: public_name(recipe[key]) for key in PATHS if recipe.get(key)}
    recipe = {key: list(value) if isinstance(value, tuple) else value for key, value in recipe.items()}
    return yaml.safe_dump({key: value for key, value in recipe.items() if value is not None}, sort_keys=False)


def _recipe_value(where: str, option: Any, value: Any) -> Any:
    """`value` as the command line's parser would return it."""

    def refuse(expected: str) -> SmoothQuantError:
        return SmoothQuantError(where, expected, repr(value)[:100], "see --print-recipe")

    if option.type is bool:
        if not isinstance(value, bool):
            raise refuse("true or false")
        return value
    if option.name == "ignore":
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise refuse("a list of names")
        return value
    if option.name == "device_map" and isinstance(value, dict):
        return value
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise refuse("one word or number")
    parse, choices = option.metadata["parse"], option.metadata["choices"]
    if parse is str and not isinstance(value, str):
        raise refuse("a word (in quotes if it looks like a number)")
    try:
        parsed = parse(str(value))
    except ValueError:
        raise refuse("a value that the option takes") from None
    if choices is not None and parsed not in choices:
        raise refuse(" or ".join(choices))
    return parsed


class _Loader(yaml.SafeLoader):
    """YAML in which a repeated key is an error, because yaml.SafeLoader silently takes the last value."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key!r} is repeated", node.start_mark)
        return super().construct_mapping(node, deep)
