"""Every option of `smoothquant calibrate`: its default, its check, its help. Each option is written once, here.

The command line's parser, `calibrate()` and recipe.yaml (recipe.py) are made from the fields of `Options`. To add an
option, add a field. Its name on the command line and in a recipe is the field's name with dashes.
"""

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vllm_smoothquant.format.config import InputActivations, Scheme, Weights
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.int4 import GROUP_SIZES

# "512 random sentences from the validation set of the Pile" (section 5.1), as the paper's authors published it.
DEFAULT_DATASET = "mit-han-lab/pile-val-backup"
# The paper's three levels (table 2): weights, activations.
LEVELS = {"O1": ("tensor", "token"), "O2": ("tensor", "tensor"), "O3": ("tensor", "static")}
ACTIVATIONS = {
    "token": InputActivations("token", dynamic=True),
    "tensor": InputActivations("tensor", dynamic=True),
    "static": InputActivations("tensor", dynamic=False),
    "none": InputActivations(num_bits=16),
}
# What accelerate distributes itself. Any other word is a device.
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")
DeviceMap = str | Mapping[str, str | int]


# What --alpha takes besides a number.
ALPHAS = ("auto", "grid", "learned")


def _alpha(text: str) -> float | str:
    return text if text in ALPHAS else float(text)


def _share(text: str) -> float:
    """0.1 for "0.1" and for "10%"."""
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def _device_map(value: Any) -> DeviceMap:
    """A word, or module -> device. value: one of these, the number of a GPU, or the text of a JSON object.

    Errors (SmoothQuantError): anything else. Whether the modules and the devices exist, only `load` can know.
    """

    def refuse(got: str | Exception) -> SmoothQuantError:
        expected = f"{', '.join(PLACEMENTS)}, a device, or a JSON object of module to device"
        return SmoothQuantError("--device-map", expected, got, """such as cuda:1 or '{"": 0, "lm_head": "cpu"}'""")

    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            pairs = json.loads(value, object_pairs_hook=list)
        except (ValueError, RecursionError) as error:
            raise refuse(error) from error
        value = dict(pairs)
        if len(value) < len(pairs):
            raise refuse("a repeated module")
    elif value == "disk" or str(value).isdecimal():
        value = {"": value if value == "disk" else int(value)}
    devices = value if isinstance(value, dict) else {"": value}
    for module, device in devices.items():
        word, number = isinstance(device, str) and device != "", type(device) is int and device >= 0
        if not isinstance(module, str) or not (word or number):
            raise refuse(f"{module!r}: {device!r}")
    if not devices:
        raise refuse("no module")
    return value


def option(
    default: Any, help: str, *, metavar: str | None = None, parse: Callable[[str], Any] = str,
    choices: Sequence[str] | None = None, positional: bool = False, recipe: bool = True, smooth: bool = False,
) -> Any:  # fmt: skip
    """A field that is an option. parse: from command-line text to value. default=(): the option may be repeated.

    recipe: whether recipe.yaml has it. smooth: whether `smoothquant smooth` takes it, too.
    """
    metadata = {"help": help, "metavar": metavar, "parse": parse, "choices": choices}
    return field(default=default, metadata=metadata | {"positional": positional, "recipe": recipe, "smooth": smooth})


@dataclass(frozen=True)
class Options:
    """The options of `calibrate`. Creating an object checks every value; errors are SmoothQuantError."""

    model: str = option("", "a folder or a hub id, in floating point", metavar="MODEL", positional=True, smooth=True)
    output: str = option("", "the folder to create", metavar="OUT", recipe=False, smooth=True)
    dataset: str = option(
        DEFAULT_DATASET, "calibration text: .txt, .jsonl, .json, .parquet or .csv, also with .gz or .zst, a folder of "
        "such files, or a hub data set NAME[:CONFIG][@SPLIT]; with images, a column image or a folder of images "
        "with metadata.jsonl", metavar="NAME_OR_FILE", smooth=True,
    )  # fmt: skip
    text_column: str = option(
        "text", "the column that holds texts or chats; without a column text, messages or conversations is taken",
        metavar="NAME", smooth=True,
    )  # fmt: skip
    chat_template: str | None = option(
        None, "a Jinja file that makes text of chats, instead of the tokenizer's chat template", metavar="FILE",
        smooth=True,
    )  # fmt: skip
    samples: int = option(64, "number of samples to observe", metavar="N", parse=int, smooth=True)
    seq_len: int = option(512, "tokens in each sample", metavar="N", parse=int, smooth=True)
    seed: int = option(0, "seed of the random choice of samples", metavar="N", parse=int, smooth=True)
    device_map: str | Mapping[str, str | int] = option(
        "auto", "how accelerate places the model: auto, a device such as cpu or cuda:1, or a JSON object of module to "
        'device; {"": "disk"} leaves weights on disk until they are needed', metavar="MAP", smooth=True,
    )  # fmt: skip
    quiet: bool = option(False, "print no progress and no summary", recipe=False, smooth=True)
    alpha: float | str | None = option(
        None, "migration strength of eq. 4: 0 to 1; auto: the best for each group; grid: the best single value; "
        "learned: every factor by itself, by gradients (default: 0.5, or auto for a rotated model and for 4-bit "
        "weights)", metavar="ALPHA", parse=_alpha, smooth=True,
    )  # fmt: skip
    rotation: str = option(
        "auto", "rotate the hidden states by an orthogonal matrix that is folded into the weights: auto, where it "
        "lowers the simulated error under the scheme by a tenth; always; none", choices=("auto", "always", "none"),
    )  # fmt: skip
    level: str | None = option(
        None, "the paper's levels, weights per tensor: inputs per token (O1), dynamic per tensor (O2) or static (O3)",
        choices=tuple(LEVELS),
    )  # fmt: skip
    weights: str | None = option(None, "scope of a weight scale (default: channel)", choices=("channel", "tensor"))
    bits: int = option(8, "bits of a weight: 8, or 4 with a scale for each group of inputs", metavar="8|4", parse=int)
    group_size: int | None = option(
        None, "inputs with one scale, for 4-bit weights: 128, 64 or 32 (default: 128)", metavar="N", parse=int,
    )  # fmt: skip
    rounding: str | None = option(
        None, "how 4-bit weights are rounded: gptq corrects the error of a weight in those after it, nearest does not "
        "(default: gptq)", choices=("gptq", "nearest"),
    )  # fmt: skip
    activations: str | None = option(
        None, "scope of an input scale (default: token; none with 4-bit weights: inputs are not rounded); static keeps "
        "a scale per token where a stored one would more than double the error, --level O3 nowhere",
        choices=tuple(ACTIVATIONS),
    )  # fmt: skip
    modality_weights: str = option(
        "equal", "how a search weighs the tokens of images and of text: equal, or auto, by how much the loss depends "
        "on them", choices=("equal", "auto"),
    )  # fmt: skip
    max_fallback: float = option(
        0.0, "share of the linear layers, such as 10%%, that may change from static to per-token scales or to floating "
        "point", metavar="SHARE", parse=_share,
    )  # fmt: skip
    budget_ppl: float | None = option(
        None, "let only as many layers fall back as keep the simulated perplexity within this share, such as 1.5%% "
        "(default: as many as may)", metavar="SHARE", parse=_share,
    )  # fmt: skip
    budget_size: float | None = option(
        None, "let layers leave 4 bits, first those that gain most for each byte, while the weights of the linear "
        "layers and their scales take at most this share of 16 bits, such as 35%%", metavar="SHARE", parse=_share,
    )  # fmt: skip
    no_smoothing: bool = option(False, "round the model without smoothing, as a baseline")
    quantize_lm_head: bool = option(False, "untie the output head and store it in INT8 as well")
    save_stats: str | None = option(
        None, "a file to write the observation to, for other alphas and schemes", metavar="FILE", recipe=False
    )
    stats: str | None = option(
        None, "take the observation of the same samples from a file of --save-stats", metavar="FILE", recipe=False
    )
    ignore: tuple[str, ...] = option((), "a linear layer to leave in floating point (repeatable)", metavar="NAME")

    def __post_init__(self) -> None:
        for name in ("model", "output", "dataset", "chat_template", "stats", "save_stats"):  # paths are accepted, too
            value = getattr(self, name)
            object.__setattr__(self, name, value if value is None else str(value))
        object.__setattr__(self, "ignore", tuple(self.ignore))
        object.__setattr__(self, "device_map", _device_map(self.device_map))
        for f in fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if choices and value is not None and value not in choices:
                raise SmoothQuantError(option_name(f.name), " or ".join(choices), repr(value), "choose one")
        implied = LEVELS[self.level][1] if self.level else self.activations
        if self.activations not in (None, implied):
            expected = f"{implied}, which --level {self.level} implies"
            raise SmoothQuantError("--activations", expected, str(self.activations), "give only one of the two options")
        self._check_bits()
        number = isinstance(self.alpha, int | float) and 0 <= self.alpha <= 1
        if not (number or self.alpha in (None, *ALPHAS)):
            expected = f"a number in [0, 1], {' or '.join(ALPHAS)}"
            raise SmoothQuantError("--alpha", expected, str(self.alpha), "the paper uses 0.5")
        check_positive(samples=self.samples)
        if self.learned and self.bits == 4:
            fix = "use --alpha auto: the rounding of 4 bits corrects what factors could"
            raise SmoothQuantError("--alpha learned", "8-bit weights", "4 bits", fix)
        if self.learned and self.samples < 2:
            fix = "give more, because one is held out to see whether learning helped"
            raise SmoothQuantError("--samples", "at least 2 with --alpha learned", str(self.samples), fix)
        if self.seq_len < 2:
            fix = "give longer samples, because attention needs two tokens"
            raise SmoothQuantError("--seq-len", "at least 2", str(self.seq_len), fix)
        if not 0 <= self.max_fallback <= 1:
            raise SmoothQuantError("--max-fallback", "a share from 0 to 100 %", f"{self.max_fallback:.4g}", "try 10%")
        if self.budget_ppl is not None and not 0 < self.budget_ppl < math.inf:
            raise SmoothQuantError("--budget-ppl", "a share above 0 %", f"{self.budget_ppl:.4g}", "try 1.5%")
        if self.budget_ppl is not None and not self.may_fall_back:
            raise SmoothQuantError("--budget-ppl", "layers that may fall back", "none", "add --max-fallback 10%")
        stats = Path(self.save_stats).resolve() if self.save_stats and self.output else None
        for folder in (self.output, f"{self.output}.state"):  # the second one is removed by a run that succeeds
            if stats and Path(folder).resolve() in (stats, *stats.parents):
                raise SmoothQuantError("--save-stats", "a file outside the output", str(stats), "choose another file")

    def _check_bits(self) -> None:
        if self.bits not in (8, 4):
            raise SmoothQuantError("--bits", "8 or 4", str(self.bits), "choose one")
        if self.bits == 8:
            for name, value in (
                ("--group-size", self.group_size), ("--rounding", self.rounding), ("--budget-size", self.budget_size),
            ):  # fmt: skip
                if value is not None:
                    raise SmoothQuantError(name, "4-bit weights", "8 bits", "add --bits 4, or leave it out")
            if self.activations == "none":
                raise SmoothQuantError("--activations none", "4-bit weights", "8 bits", "add --bits 4")
            return
        if self.group_size not in (None, *GROUP_SIZES):
            expected = " or ".join(map(str, GROUP_SIZES))
            raise SmoothQuantError("--group-size", expected, str(self.group_size), "choose one")
        for name, value in (("--level", self.level), ("--weights", self.weights)):
            if value is not None:
                fix = "leave it out: 4-bit weights have a scale for each group"
                raise SmoothQuantError(name, "8-bit weights", f"{value} with --bits 4", fix)
        if self.activations not in (None, "none", "token"):
            fix = "no kernel has 4-bit weights with such scales"
            raise SmoothQuantError("--activations", "none or token with --bits 4", str(self.activations), fix)
        if self.budget_size is None:
            return
        if self.max_fallback:
            fix = "give only one of the two options"
            raise SmoothQuantError("--budget-size", "no other limit", f"--max-fallback {self.max_fallback:.4g}", fix)
        group_size = self.group_size or GROUP_SIZES[0]
        smallest = (4 + 32 / group_size) / 16  # bits of a weight and its part of a scale
        if not smallest <= self.budget_size <= 1:
            expected = f"a share from {smallest:.4%}, which 4 bits in groups of {group_size} take, to 100 %"
            raise SmoothQuantError("--budget-size", expected, f"{self.budget_size:.4%}", "try 35%")

    @property
    def learned(self) -> bool:
        """Whether the factors are learned."""
        return self.alpha == "learned" and not self.no_smoothing

    @property
    def may_fall_back(self) -> bool:
        """Whether layers may leave the scheme because the user allows it."""
        return self.max_fallback > 0 or self.budget_size is not None

    @property
    def static_by_design(self) -> bool:
        """Whether layers that static scales cannot serve keep a scale per token; a level is static everywhere."""
        return self.level is None and self.activations == "static"

    def alpha_for(self, *, rotated: bool) -> float | str:
        """alpha, or its default: the paper's 0.5, for 8 bits. A search replaces it where a rotation has changed the
        ranges, and for 4 bits, for which a fixed alpha was worse than none (docs/four_bits.md).
        """
        return self.alpha if self.alpha is not None else "auto" if rotated or self.bits == 4 else 0.5

    @property
    def scheme(self) -> Scheme:
        """The scheme of most layers."""
        if self.bits == 4:
            group_size = self.group_size or GROUP_SIZES[0]
            return Scheme(Weights("group", group_size, num_bits=4), ACTIVATIONS[self.activations or "none"])
        weights, activations = LEVELS.get(self.level or "", ("channel", "token"))
        return Scheme(Weights(self.weights or weights), ACTIVATIONS[self.activations or activations])


def public_name(name: str) -> str:
    """`name` for what is published: of a file or folder on this machine its last part, anything else as it is."""
    return Path(name).resolve().name if Path(name).exists() else name


def option_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def check_positive(**counts: int) -> None:
    """Errors (SmoothQuantError): one of the options `counts` is less than 1."""
    for name, count in counts.items():
        if count < 1:
            raise SmoothQuantError(option_name(name), "at least 1", str(count), "give a positive number")


def add_arguments(parser: argparse.ArgumentParser, options: type, *, smooth: bool = False) -> None:
    """Add a command-line option for every field of the dataclass `options`; with `smooth` only for smooth's fields."""
    for f in fields(options):
        if smooth and not f.metadata["smooth"]:
            continue
        meta = f.metadata
        shown = f.default not in (None, (), "") and f.type is not bool
        arguments: dict[str, Any] = {"help": meta["help"] + (f" (default: {f.default})" if shown else "")}
        if f.type is bool:
            arguments |= {"action": "store_true"}
        elif meta["positional"]:
            arguments |= {"metavar": meta["metavar"], "nargs": "+" if f.default == () else None}
        elif f.default == ():
            arguments |= {"metavar": meta["metavar"], "action": "append", "default": []}
        else:
            arguments |= {"metavar": meta["metavar"], "choices": meta["choices"], "type": meta["parse"]}
            arguments |= {"default": f.default, "required": f.name == "output"}
        names = [f.name] if meta["positional"] else [option_name(f.name)]
        parser.add_argument(*(["-o"] if f.name == "output" else []), *names, **arguments)


def from_arguments(options: type, arguments: argparse.Namespace) -> Any:
    """An object of the dataclass `options` from parsed arguments; fields without an argument keep their default."""
    return options(**{f.name: getattr(arguments, f.name) for f in fields(options) if hasattr(arguments, f.name)})
