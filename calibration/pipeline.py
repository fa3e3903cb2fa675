"""SmoothQuant in the paper's order (Xiao et al., 2022, arXiv 2211.10438).

    s_j = max|X_j|^alpha / max|W_j|^(1-alpha)        Y = (X diag(s)^-1) (diag(s) W)                       (eq. 3-4)

Seven stages. No checkpoint is written before stage 6 has shown that smoothing keeps the function.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST, read_json

from .checkpoint.export import check_names, check_output, unread
from .checkpoint.write import write_checkpoint, write_smoothed
from .discovery.discover import TRACE_SHAPE, discover
from .discovery.linears import choose_layers, choose_linears
from .inputs.model import check_head, check_seq_len, load, untie_head
from .inputs.text import load_samples
from .observation.absmax import observed_layer
from .observation.observation import Observation
from .observation.observe import observe
from .observation.processes import Processes
from .observation.resume import ObservationStore, temporary_store
from .observation.saved import check_writable
from .options import Options
from .recipe import RECIPE, dump_recipe
from .rounding.groups import eight_bits
from .smoothing.choose_rotation import choose_rotation
from .smoothing.factors import Smoothing, smooth_groups
from .smoothing.gate import GATE_SHAPE, check_equivalence
from .smoothing.learn import check_placement, planned
from .smoothing.size import check_budget


def calibrate(model: str, output: str | Path, **options: Any) -> dict[str, Any]:
    """Write a smoothed INT8 checkpoint of `model` (folder or hub id) into the new folder `output`; return its manifest.

    options: fields of options.Options. Errors are SmoothQuantError; a checkpoint is written completely or not at all.
    An interrupted run leaves OUTPUT.state, from which the next run resumes (observation/resume.py). Under `accelerate
    launch` or torchrun the processes share the samples, and only the first returns the manifest; the others return {}.

    Example: calibrate("HuggingFaceTB/SmolLM2-135M-Instruct", "OUT", alpha="auto", samples=128)
    """
    return run(Options(model=model, output=str(output), **options))


def run(options: Options) -> dict[str, Any]:
    """`calibrate` with the options in one object."""
    processes = Processes.of_launcher()
    store = ObservationStore(Path(options.output), processes)
    if processes.from_first(lambda: _is_finished(options, store)):
        with store.session():  # each process removes its own files
            return read_json(Path(options.output, MANIFEST)) if processes.first else {}
    processes.from_first(lambda: check_output(Path(options.output)))
    with store.session():
        observation = observe_model(options, store)  # stages 1 to 4
        if not processes.first:
            return {}
        for line in (*float16_overflow(observation), *idle_experts(observation)):
            print(line, file=sys.stderr)
        with timed("5. plan the smoothing", options):
            plan = planned(observation, options)
        with timed("6. check the equivalence", options):
            gate_report = check_gate(observation, plan.smoothing)
        with timed("7. quantize and write", options):
            store.remember(dump_recipe(vars(options)))
            return write_checkpoint(observation, plan, gate_report, options, store.checkpoint)


def _is_finished(options: Options, store: ObservationStore) -> bool:
    """Whether an earlier run of the same command was killed between writing OUT and removing its state."""
    recipe, request = Path(options.output, RECIPE), store.request()
    if request is None or not Path(options.output, MANIFEST).is_file() or not recipe.is_file():
        return False
    if request:
        return request == dump_recipe(vars(options))
    return recipe.read_text(encoding="utf-8") == dump_recipe(vars(options), published=True)


def smooth(model: str, output: str | Path, **options: Any) -> dict[str, Any]:
    """Write the smoothed floating-point `model` in its own dtype, with the same function, into the folder `output`."""
    # Powers of two keep every bit of a smoothed model; a rotation would not.
    smooth_options = Options(model=model, output=str(output), **options | {"rotation": "none"})
    if isinstance(alpha := smooth_options.alpha_for(rotated=False), str):
        raise SmoothQuantError("--alpha", "a number in [0, 1]", alpha, "the paper uses 0.5")
    check_output(Path(output))
    observation = observe_model(smooth_options)
    alphas = {group.source: alpha for group in observation.graph.groups if group.kind != "input"}
    # Powers of two, because with them all weights stay exact in any dtype, bit for bit.
    smoothing = smooth_groups(observation.model, observation.graph, observation.absmax, alphas, (), power_of_two=True)
    return write_smoothed(observation, smoothing, check_gate(observation, smoothing), Path(output))


def observe_model(options: Options, store: ObservationStore | None = None) -> Observation:
    """Stages 1 to 4, which do not depend on alpha or the scheme: one observation serves any number of plans.

    store: where to resume from, and to record; without it, nothing stays on disk.
    """
    if store is None:
        with temporary_store() as store:
            return observe_model(options, store)
    quiet = options.quiet or not store.processes.first
    if (stats := options.save_stats) is not None:
        store.processes.from_first(lambda: check_writable(Path(stats)))
    with timed("1. load the model", options, quiet):
        source = load(options.model, store.processes.placement(options.device_map))
        check_head(source, options)
        if options.learned:
            check_placement(source.model)
        if options.quantize_lm_head:
            untie_head(options.model, source.model)
        ignore, lm_head = frozenset(options.ignore), options.quantize_lm_head
        # A wrong --ignore, or a model that cannot have 4 bits, is refused before the text is read.
        possible, _ = choose_linears(source.model, ignore, lm_head=lm_head)
        eight_bits(source.model, possible, options.scheme)
    with timed("2. draw the samples", options, quiet):
        check_seq_len(source, options.seq_len)
        size = {"samples": options.samples, "seq_len": options.seq_len, "seed": options.seed}
        samples = load_samples(
            options.dataset, source.tokenizer, text_column=options.text_column, chat_template=options.chat_template,
            vocab_rows=source.model.get_input_embeddings().weight.shape[0], quiet=not store.processes.first,
            model=options.model, config=source.model.config, **size,
        )  # fmt: skip
    with timed("3. discover who reads what, and rotate", options, quiet):
        rotation, rotated = choose_rotation(options, source, samples, unread(source), quiet=quiet)
        trace_ids = samples.input_ids[: TRACE_SHAPE[0], : TRACE_SHAPE[1]]
        graph = discover(source.model, trace_ids)
        layers, in_float = choose_layers(source.model, graph, ignore, lm_head=lm_head)
        check_names(source.model, layers)
        check_budget(source.model, layers, options.scheme, options.budget_size)
        if not quiet:
            print(_choice(layers, in_float, eight_bits(source.model, layers, options.scheme)), file=sys.stderr)
    with timed("4. observe the activations", options, quiet):
        kept = graph.keeping(in_float)
        return observe(options, source, samples, kept, layers, in_float, store, rotation, rotated)


def float16_overflow(observation: Observation) -> Iterator[str]:
    """One line if the activations of a float16 model leave its range: calibration in float32 does not show that."""
    if observation.model.dtype == torch.float16:
        name = max(observation.absmax, key=lambda name: float(observation.absmax[name].max()))
        largest = float(observation.absmax[name].max())
        if largest > torch.finfo(torch.float16).max:
            yield (
                f"{observed_layer(name)}: activations reach {largest:.3g}, beyond float16's 65504: "
                "serve this checkpoint, and its source, with --dtype bfloat16 or float32"
            )


def idle_experts(observation: Observation) -> Iterator[str]:
    """One line if no token of the calibration text reached some experts."""
    if idle := observation.idle_experts:
        yield (
            f"{idle[0]} and {len(idle) - 1} more layers of experts saw no token: their ranges are those of the other "
            "experts of their block; give more text"
        )


def check_gate(observation: Observation, smoothing: Smoothing) -> dict[str, Any]:
    """The gate's report; SmoothQuantError if `smoothing` changes the function."""
    samples = observation.samples
    batches = [*samples.images[:1], *samples.input_ids[: GATE_SHAPE[0], : GATE_SHAPE[1]].split(2)]
    # Without factors at run time: a layer that divides its input multiplies its weight, and no other layer changes.
    return check_equivalence(smoothing.folded(), batches)


def _choice(layers: list[str], in_float: dict[str, str], eight: dict[str, str]) -> str:
    """What becomes integers and what does not, before the long work. eight: layers with 8 bits where others have 4."""

    def listed(reasons: dict[str, str]) -> Iterator[str]:
        for reason in dict.fromkeys(reasons.values()):
            names = [name for name, why in reasons.items() if why == reason]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            yield f"    {names[0]}{more}: {reason}"

    lines = [f"{len(layers)} linear layers become integers; in floating point:", *listed(in_float)]
    if eight:
        lines += ["in 8 bits:", *listed(eight)]
    return "\n".join(lines)


@contextmanager
def timed(stage: str, options: Options, quiet: bool = False) -> Iterator[None]:
    """Print on stderr how long a stage took. The manifest has no times, because equal inputs must give equal bytes."""
    start = time.perf_counter()
    yield
    if not (options.quiet or quiet):
        print(f"{stage}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
