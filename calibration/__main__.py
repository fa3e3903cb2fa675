"""The command line: arguments in, one call, a summary or one line of error out."""

import argparse
import json
import logging
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 a fault in the input or the model (one line on stderr), 2 wrong usage, 130 interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with suppress(ValueError):  # not in the main thread
        # As Ctrl-C: what was started is stopped, and nothing half-written stays.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = argparse.Namespace(json="--json" in argv)
    try:
        args = _parser(argv).parse_args(argv)
        command: Command = args.command
        args.said = argv
        return command(args)
    except SmoothQuantError as error:
        if args.json:
            fields = {"where": error.where, "expected": error.expected, "got": error.got, "do": error.do}
            print(json.dumps({"error": fields}, ensure_ascii=False))
        print(f"smoothquant: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        resumes = getattr(args, "command", None) is _calibrate
        then = "the same command goes on from here" if resumes else "nothing was written"
        print(f"smoothquant: interrupted; {then}", file=sys.stderr)
        return 130


def _parser(argv: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser for `argv`: a recipe that it names gives the defaults of `calibrate`."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(prog="smoothquant", description="SmoothQuant W8A8 INT8 checkpoints for vLLM.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Command, text: str) -> argparse.ArgumentParser:
        # No abbreviations: what is short for one option today may be short for two tomorrow.
        sub = commands.add_parser(name, help=text, description=text, formatter_class=formatter, allow_abbrev=False)
        sub.set_defaults(command=command)
        sub.add_argument("--json", action="store_true", help="print one JSON object for machines")
        return sub

    sub = add("calibrate", _calibrate, "Calibrate MODEL and write a smoothed INT8 checkpoint.")
    _source_arguments(sub)
    sub.add_argument(
        "--alpha", type=_alpha, default=0.5, metavar="ALPHA",
        help="migration strength of eq. 4: 0 to 1; auto: for each group what rounds best; grid: the best one for all",
    )  # fmt: skip
    sub.add_argument(
        "--level", choices=("O1", "O2", "O3"),
        help="the paper's levels: weights per tensor with O1 per-token, O2 dynamic per-tensor, O3 static activations",
    )  # fmt: skip
    sub.add_argument("--weights", choices=("channel", "tensor"), help="what shares a weight scale (without: channel)")
    sub.add_argument(
        "--activations", choices=("token", "tensor", "static"), help="what shares an activation scale (without: token)"
    )
    sub.add_argument(
        "--max-fallback", type=_share, default=0.0, metavar="SHARE",
        help="how many of the linear layers, 10%% say, may go from static to per-token scales, or to floating point",
    )  # fmt: skip
    sub.add_argument(
        "--budget-ppl", type=_share, metavar="SHARE",
        help="no more fall back than keeps the simulated perplexity within this, 1.5%% say (without: all that may)",
    )  # fmt: skip
    sub.add_argument("--no-smoothing", action="store_true", help="round the model as it is, to compare with")
    sub.add_argument(
        "--static-range", choices=("absmax", "percentile", "error"), default="absmax",
        help="where static scales end: at the observed maximum, its 99.99th percentile, or where the error is smallest",
    )  # fmt: skip
    sub.add_argument("--quantize-lm-head", action="store_true", help="the output head in INT8 as well, untied first")
    sub.add_argument("--save-stats", metavar="FILE", help="keep what was observed, for other alphas and schemes")
    sub.add_argument("--stats", metavar="FILE", help="do not observe: take what --save-stats kept, of the same samples")
    sub.add_argument("--ignore", action="append", default=[], metavar="NAME", help="a linear layer to leave alone")
    sub.add_argument(
        "--push-to-hub", metavar="REPOSITORY", help="upload the checkpoint afterwards, to a private repository if new"
    )

    sub.add_argument("--recipe", metavar="FILE", help="options from a YAML file; what is said here as well wins")
    sub.add_argument("--print-recipe", action="store_true", help="print these options as such a file, and do nothing")
    sub.set_defaults(parser=sub)
    _read_recipe(argv, sub)

    sub = add("smooth", _smooth, "Smooth MODEL and write it in floating point: the same function, fewer outliers.")
    _source_arguments(sub)
    sub.add_argument("--alpha", type=float, default=0.5, help="migration strength of eq. 4: 0 to 1")

    sub = add("verify", _verify, "Look for everything that is wrong with CHECKPOINT, without running it.")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder that calibrate wrote")
    sub.add_argument("--source", metavar="MODEL", help="the model it was made of: compare every weight with it")

    sub = add("convert", _convert, "Write CHECKPOINT in another format: the same integers, other readers.")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder, ours or in compressed-tensors' format")
    sub.add_argument("-o", "--output", required=True, metavar="OUT", help="the folder to make")
    sub.add_argument(
        "--format", required=True, choices=("compressed-tensors", "smoothquant"),
        help="compressed-tensors: served by stock vLLM and SGLang without this plugin; smoothquant: ours",
    )  # fmt: skip

    sub = add("report", _report, "Show CHECKPOINT in one HTML page: outliers, smoothing, errors, fallbacks.")
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="a folder that calibrate wrote")
    sub.add_argument("-o", "--output", metavar="FILE", help="the page to write (without: CHECKPOINT-report.html here)")
    sub.add_argument("--png", metavar="DIR", help="a folder for the page's figures, as PNG")
    sub.add_argument("--evaluation", metavar="FILE", help="what `evaluate --json` printed, to be shown with it")

    add("doctor", _doctor, "Tell what this machine can do with INT8, which kernels would run, and what to do about it.")

    from .evaluation import evaluate

    sub = add("evaluate", _evaluate, "Measure perplexity through vLLM, of one or several checkpoints and a baseline.")
    evaluate.add_arguments(sub)
    return parser


def _read_recipe(argv: Sequence[str], sub: argparse.ArgumentParser) -> None:
    if "calibrate" not in argv[:1]:
        return
    from . import recipe

    only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    only.add_argument("--recipe")
    only.add_argument("--print-recipe", action="store_true")
    early, _ = only.parse_known_args(argv)
    if early.recipe:
        recipe.apply(early.recipe, sub)
    if early.print_recipe:
        recipe.relax(sub)


def _source_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("model", metavar="MODEL", help="a folder or a hub id, in floating point")
    sub.add_argument("-o", "--output", required=True, metavar="OUT", help="the folder to make")
    sub.add_argument(
        "--dataset", default="mit-han-lab/pile-val-backup", metavar="NAME_OR_FILE",
        help="calibration text: .txt, .jsonl, .parquet or .csv, or a hub data set NAME[:CONFIG][@SPLIT]",
    )  # fmt: skip
    sub.add_argument("--text-column", default="text", metavar="NAME", help="the column that holds the text")
    sub.add_argument("--samples", type=int, default=64, metavar="N", help="how many samples to observe")
    sub.add_argument("--seq-len", type=int, default=512, metavar="N", help="tokens in each sample")
    sub.add_argument("--seed", type=int, default=0, metavar="N", help="which samples are drawn")
    sub.add_argument("--device-map", default="auto", metavar="MAP", help="where accelerate puts the model")
    sub.add_argument("--quiet", action="store_true", help="no progress, no summary")


def _alpha(text: str) -> float | str:
    return text if text in ("auto", "grid") else float(text)


def _share(text: str) -> float:
    """0.1 of "0.1" and of "10%"."""
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def _source_options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("alpha", "dataset", "text_column", "samples", "seq_len", "seed", "device_map")
    return {name: getattr(args, name) for name in names} | {"quiet": args.quiet or args.json}


def _calibrate(args: argparse.Namespace) -> int:
    _silence_libraries()
    from . import recipe

    if args.print_recipe:
        print(recipe.dump(args, args.parser), end="")
        return 0
    from .pipeline import LEVELS, calibrate
    from .running.progress import PeakMemory

    clock = time.perf_counter()
    weights, activations = LEVELS.get(args.level, ("channel", "token"))
    if args.level and args.activations not in (None, activations):
        raise SmoothQuantError(
            "--activations", expected=f"{activations}, which --level {args.level} means", got=args.activations,
            do="give one of the two options",
        )  # fmt: skip
    if args.push_to_hub:
        from .checkpoint import model_card

        model_card.check_repository(args.push_to_hub)
    with PeakMemory() as memory:
        manifest = calibrate(
            args.model,
            args.output,
            weights=args.weights or weights,
            activations=args.activations or activations,
            smoothing=not args.no_smoothing,
            max_fallback=args.max_fallback,
            budget_ppl=args.budget_ppl,
            static_range=args.static_range,
            ignore=frozenset(args.ignore),
            quantize_lm_head=args.quantize_lm_head,
            stats=args.stats,
            save_stats=args.save_stats,
            **_source_options(args),
        )
    if not manifest:  # one of several processes, and not the one that writes
        return 0
    # No part of what verify checks: it holds what was asked, the manifest what was done.
    (Path(args.output) / recipe.RECIPE).write_text(recipe.dump(args, args.parser), encoding="utf-8")
    hint = f"took:      {time.perf_counter() - clock:.0f} s, at most {memory.bytes / 1e9:.2f} GB of memory"
    hint += f"\nserve it:  vllm serve {args.output} --quantization smoothquant"
    if args.push_to_hub:
        hint += f"\nuploaded:  {model_card.push(Path(args.output), args.push_to_hub)}"
    return _finish(args, manifest, hint)


def _smooth(args: argparse.Namespace) -> int:
    _silence_libraries()
    from .pipeline import smooth

    return _finish(args, smooth(args.model, args.output, **_source_options(args)), "same function, floating point")


def _verify(args: argparse.Namespace) -> int:
    _silence_libraries()
    from .checkpoint.verify import verify

    verdict = verify(args.checkpoint, args.source)
    if args.json:
        print(json.dumps({"checkpoint": args.checkpoint, **verdict.to_dict()}, ensure_ascii=False))
    else:
        for fault in verdict.faults:
            print(f"smoothquant: {fault}", file=sys.stderr)
        print(f"{args.checkpoint}: {len(verdict.faults)} faults; in order: {', '.join(verdict.checked) or 'nothing'}")
        if verdict.layers:
            name, worst = max(verdict.layers.items(), key=lambda item: item[1]["error"])
            print(f"rounded weights differ from the source's by {worst['error']:.2%} at worst, in {name}")
    return 1 if verdict.faults else 0


def _convert(args: argparse.Namespace) -> int:
    _silence_libraries()
    from .checkpoint.convert import convert

    manifest = convert(args.checkpoint, args.output, args.format)
    print(
        json.dumps({"output": args.output, **manifest}, ensure_ascii=False)
        if args.json
        else f"{args.output}: {len(manifest['quantized'])} linear layers in INT8, in {args.format} format\n"
        f"serve it:  vllm serve {args.output}"
    )
    return 0


def _report(args: argparse.Namespace) -> int:
    _silence_libraries()
    from .report.page import report

    output = args.output or f"{os.path.basename(os.path.abspath(args.checkpoint))}-report.html"
    done = report(args.checkpoint, output, png=args.png, evaluation=args.evaluation)
    said = f"{output}: {done['bytes'] / 1e6:.1f} MB, {len(done['figures'])} figures; open it in a browser"
    print(json.dumps(done, ensure_ascii=False) if args.json else said)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    _silence_libraries()
    from .doctor import examine, format_report

    facts = examine()
    print(json.dumps(facts, ensure_ascii=False) if args.json else format_report(facts))
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    _silence_libraries()
    from .evaluation import evaluate
    from .report import table

    if args.table:
        if not args.baseline:
            raise SmoothQuantError("--table", expected="a model to compare with", got="none", do="add --baseline MODEL")
        table.check(args.table)
    result = evaluate.run(args)
    if args.table:
        text = table.write(result, args.table, shlex.join(["smoothquant", *args.said]))
        print(json.dumps(result, ensure_ascii=False) if args.json else text)
        return 0
    print(json.dumps(result, ensure_ascii=False) if args.json else evaluate.format_table(result))
    return 0


def _finish(args: argparse.Namespace, manifest: dict[str, Any], hint: str) -> int:
    if args.json:
        print(json.dumps({"output": args.output, **manifest}, ensure_ascii=False))
    elif not args.quiet:
        print(f"{args.output}: {_summary(manifest)}\nmanifest:  {args.output}/{MANIFEST}\n{hint}")
    return 0


def _summary(manifest: dict[str, Any]) -> str:
    fallen = manifest.get("fallen_back")
    sizes = [
        f"{len(manifest['quantized'])} linear layers in INT8" if manifest["quantized"] else "floating point",
        *([f"{len(fallen)} layers fell back"] if fallen else []),
        f"{sum(group['smoothed'] for group in manifest['groups'])} groups smoothed",
        f"logits moved {manifest['gate']['logits']['change']:.1e} by smoothing",
    ]
    text = ", ".join(sizes)
    if manifest["sinks"]:
        worst = max(manifest["sinks"], key=lambda sink: sink["times_median"])
        text += (
            f"\nsink tokens in {len(manifest['sinks'])} inputs, at worst {worst['times_median']:.0f} times the median "
            f"token ({', '.join(worst['layers'])}): static scales need --max-fallback there"
        )
    return text


def _silence_libraries() -> None:
    """Our own bars and lines are the progress; the libraries' would drown them. Errors still come as exceptions."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    logging.getLogger("datasets").setLevel(logging.ERROR)


if __name__ == "__main__":
    sys.exit(main())
