"""The command line: parse arguments, call one function, print a summary or one line of error."""

import argparse
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST

from .evaluation.evaluate_options import EvaluateOptions
from .options import Options, add_arguments, from_arguments
from .recipe import apply_recipe, dump_recipe

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a fault in the input or the model (one line on stderr), 2 wrong usage, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with suppress(ValueError):  # raised outside the main thread
        # SIGTERM acts as Ctrl-C: child processes are stopped, and incomplete files are removed.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = argparse.Namespace(json="--json" in argv)
    try:
        args = _parser(argv).parse_args(argv)
        _silence_libraries()
        args.argv = argv
        command: Command = args.command
        return command(args)
    except SmoothQuantError as error:
        if args.json:
            print(json.dumps({"error": error.to_dict()}, ensure_ascii=False))
        print(f"smoothquant: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumes = getattr(args, "command", None) is _calibrate
        outcome = "the same command resumes from here" if resumes else "nothing was written"
        print(f"smoothquant: interrupted; {outcome}", file=sys.stderr)
        return 130


def _parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser for `argv`. If `argv` names a recipe, the recipe gives the defaults of `calibrate`."""
    parser = argparse.ArgumentParser(prog="smoothquant", description="SmoothQuant W8A8 INT8 checkpoints for vLLM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str, checkpoint: str = "") -> argparse.ArgumentParser:
        # No abbreviations, because a later version may add a second option that an abbreviation fits.
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="print one JSON object for machines")
        if checkpoint:
            sub.add_argument("checkpoint", metavar="CHECKPOINT", help=checkpoint)
        return sub

    sub = add("calibrate", _calibrate, "Calibrate MODEL and write a smoothed INT8 checkpoint.")
    add_arguments(sub, Options)
    sub.add_argument("--recipe", metavar="FILE", help="options from a YAML file; the command line overrides them")
    sub.add_argument("--print-recipe", action="store_true", help="print these options as such a file, and do nothing")
    if argv[:1] == ["calibrate"]:
        _read_recipe(argv, sub)

    sub = add("smooth", _smooth, "Smooth MODEL and write it in floating point: the same function, fewer outliers.")
    add_arguments(sub, Options, smooth=True)

    wrote = "a folder that calibrate wrote"
    sub = add("verify", _verify, "Find every fault in CHECKPOINT, without running it.", wrote)
    sub.add_argument("--source", metavar="MODEL", help="the model it was made of: compare every weight with it")

    sub = add(
        "convert", _convert, "Write CHECKPOINT in another format: the same integers for other readers.",
        "a folder in our format or in compressed-tensors'",
    )  # fmt: skip
    sub.add_argument("-o", "--output", required=True, metavar="OUT", help="the folder to create")
    sub.add_argument(
        "--format", required=True, choices=("compressed-tensors", "smoothquant"),
        help="compressed-tensors: served by stock vLLM and SGLang without this plugin; smoothquant: ours",
    )  # fmt: skip

    sub = add("adapter", _adapter, "Make a LoRA adapter of the source model fit a checkpoint with folded smoothing.")
    sub.add_argument("adapter", metavar="ADAPTER", help="a folder or hub id in PEFT's format")
    sub.add_argument("--checkpoint", required=True, metavar="CHECKPOINT", help=wrote)
    sub.add_argument("-o", "--output", required=True, metavar="OUT", help="the folder to create")

    sub = add("report", _report, "Show CHECKPOINT on one HTML page: outliers, smoothing, errors, fallbacks.", wrote)
    sub.add_argument("-o", "--output", metavar="FILE", help="the page to write (default: ./CHECKPOINT-report.html)")
    sub.add_argument("--png", metavar="DIR", help="also write the page's figures as PNG into this folder")
    sub.add_argument("--evaluation", metavar="FILE", help="also show the output of `evaluate --json` in this file")

    sub = add("doctor", _doctor, "Show what this machine can do with INT8, and which scheme MODEL should get on it.")
    sub.add_argument(
        "model", metavar="MODEL", nargs="?",
        help="a folder or a hub id, of which only config.json and the headers of safetensors are read",
    )  # fmt: skip
    add_arguments(add("evaluate", _evaluate, "Measure checkpoints and a baseline through vLLM."), EvaluateOptions)
    return parser


def _read_recipe(argv: Sequence[str], sub: argparse.ArgumentParser) -> None:
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe")
    early.add_argument("--print-recipe", action="store_true")
    args, _ = early.parse_known_args(argv)
    if args.recipe:
        apply_recipe(args.recipe, sub)
    if args.print_recipe:  # possible without a model or an output
        for action in sub._actions:
            action.required = False


def _calibrate(args: argparse.Namespace) -> int:
    if args.print_recipe:
        print(dump_recipe(vars(args)), end="")
        return 0
    args.quiet |= args.json
    options = from_arguments(Options, args)
    from .pipeline import run
    from .running.progress import PeakMemory

    start = time.perf_counter()
    with PeakMemory() as memory:
        manifest = run(options)
    if not manifest:  # one of several processes, and not the one that writes
        return 0
    hint = f"took:      {time.perf_counter() - start:.0f} s, at most {memory.bytes / 1e9:.2f} GB of memory"
    return _finish(args, manifest, f"{hint}\nserve it:  vllm serve {args.output} --quantization smoothquant")


def _smooth(args: argparse.Namespace) -> int:
    from .pipeline import smooth

    args.quiet |= args.json
    return _finish(args, smooth(**vars(from_arguments(Options, args))), "same function, floating point")


def _verify(args: argparse.Namespace) -> int:
    from .checkpoint.verify import verify

    verdict = verify(args.checkpoint, args.source)
    text = f"{args.checkpoint}: {len(verdict.faults)} faults; in order: {', '.join(verdict.checked) or 'nothing'}"
    if verdict.layers:
        name, worst = max(verdict.layers.items(), key=lambda item: item[1]["error"])
        text += f"\nrounded weights differ from the source's by at most {worst['error']:.2%}, in {name}"
    for fault in [] if args.json else verdict.faults:
        print(f"smoothquant: {fault}", file=sys.stderr)
    _print(args, {"checkpoint": args.checkpoint, **verdict.to_dict()}, text)
    return 1 if verdict.faults else 0


def _convert(args: argparse.Namespace) -> int:
    from .checkpoint.convert import convert

    manifest = convert(args.checkpoint, args.output, args.format)
    layers = f"{len(manifest['quantized'])} linear layers in INT8, in {args.format} format"
    text = f"{args.output}: {layers}\nserve it:  vllm serve {args.output}"
    return _print(args, {"output": args.output, **manifest}, text)


def _adapter(args: argparse.Namespace) -> int:
    from .checkpoint.adapter import adapt

    result = adapt(args.adapter, args.checkpoint, args.output)
    text = (
        f"{args.output}: {len(result['layers'])} layers adapted to {args.checkpoint}, {len(result['unchanged'])} "
        f"unchanged; outputs differ by at most {result['error']:.1e}"
        f"\nserve it:  vllm serve {args.checkpoint} --enable-lora --lora-modules NAME={args.output}"
    )
    return _print(args, result, text)


def _report(args: argparse.Namespace) -> int:
    from .report.page import report

    output = args.output or f"{os.path.basename(os.path.abspath(args.checkpoint))}-report.html"
    result = report(args.checkpoint, output, png=args.png, evaluation=args.evaluation)
    text = f"{output}: {result['bytes'] / 1e6:.1f} MB, {len(result['figures'])} figures; open it in a browser"
    return _print(args, result, text)


def _doctor(args: argparse.Namespace) -> int:
    from .doctor import examine, format_report

    if args.model is None:
        facts = examine()
        return _print(args, facts, format_report(facts))
    from .advice.recommend import format_model, recommend
    from .footprint import footprint

    size = footprint(args.model)  # first, because a wrong name should not wait for the machine's report
    facts = examine()
    found = recommend(facts, size, args.model)
    return _print(args, {**facts, "model": found}, f"{format_report(facts)}\n\n{format_model(found)}")


def _evaluate(args: argparse.Namespace) -> int:
    from .evaluation.evaluate import evaluate, format_table
    from .report import table

    options = from_arguments(EvaluateOptions, args)
    if options.table:
        table.check(options.table)
    result = evaluate(options)
    if options.table:
        return _print(args, result, table.write(result, options.table, shlex.join(["smoothquant", *args.argv])))
    return _print(args, result, format_table(result))


def _finish(args: argparse.Namespace, manifest: dict[str, Any], hint: str) -> int:
    if args.quiet and not args.json:
        return 0
    text = f"{args.output}: {_summary(manifest)}\nmanifest:  {args.output}/{MANIFEST}\n{hint}"
    return _print(args, {"output": args.output, **manifest}, text)


def _print(args: argparse.Namespace, result: Mapping[str, Any], text: str) -> int:
    """Print `result` as one JSON object with --json, else `text`; the exit code of success."""
    print(json.dumps(result, ensure_ascii=False) if args.json else text)
    return 0


def _summary(manifest: dict[str, Any]) -> str:
    from .checkpoint.model_card import rotated_parts, size_in_words

    fallbacks = manifest.get("fallen_back")
    parts = [
        f"{len(manifest['quantized'])} linear layers in INT8" if manifest["quantized"] else "floating point",
        *([f"{len(fallbacks)} layers fell back"] if fallbacks else []),
        *([f"their weights {size}"] if (size := size_in_words(manifest)) else []),
        *([f"{what} rotated"] if (what := rotated_parts(manifest)) else []),
        f"{sum(group['smoothed'] for group in manifest['groups'])} groups smoothed",
        f"logits moved {manifest['gate']['logits']['change']:.1e} by smoothing",
    ]
    text = ", ".join(parts)
    if manifest["sinks"]:
        worst = max(manifest["sinks"], key=lambda sink: sink["times_median"])
        text += (
            f"\nsink tokens in {len(manifest['sinks'])} inputs, the largest {worst['times_median']:.0f} times the "
            f"median token ({', '.join(worst['layers'])}): static scales fail there"
        )
    return text


def _silence_libraries() -> None:
    """Our own bars and lines show the progress; the libraries' would hide them. Their errors are still exceptions."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("datasets").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
