"""SmoothQuant in the paper's order (Xiao et al., 2022, arXiv 2211.10438).

    s_j = max|X_j|^alpha / max|W_j|^(1-alpha)        Y = (X diag(s)^-1) (diag(s) W)                       (eq. 3-4)

Seven stages, each in a folder of its own. Nothing is written before stage 6 has shown that smoothing keeps the
function.
"""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from vllm_smoothquant.format.files import MANIFEST, read_json

from .checkpoint.export import check_output
from .checkpoint.write import write_checkpoint, write_smoothed
from .discovery.discover import TRACE_SHAPE, discover
from .discovery.linears import choose_linears
from .inputs.model import check_seq_len, load, untie_head
from .inputs.text import load_samples
from .observation.observation import Observation
from .observation.observe import observe
from .observation.processes import Processes
from .observation.resume import ObservationStore, temporary_store
from .observation.saved import check_writable
from .options import RECIPE, Options, dump_recipe
from .smoothing.factors import Smoothing, smooth_groups
from .smoothing.gate import check_equivalence
from .smoothing.plan import make_plan

# A few texts that are long enough for attention.
GATE_SHAPE = (4, 64)


def calibrate(model: str, output: str | Path, **options: Any) -> dict[str, Any]:
    """Write a smoothed INT8 checkpoint of `model` (folder or hub id) into the new folder `output`; return its manifest.

    options: fields of options.Options. Errors are SmoothQuantError; a checkpoint is written completely or not at all.
    An interrupted run leaves OUTPUT.state, from which the next run resumes (observation/resume.py). Under `accelerate
    launch` or torchrun the processes share the samples; all processes but the first return {}.

    Example: calibrate("HuggingFaceTB/SmolLM2-135M-Instruct", "OUT", alpha="auto", samples=128)
    """
    return run(Options(model=model, output=str(output), **options))


def run(options: Options) -> dict[str, Any]:
    """`calibrate` with the options in one object."""
    processes = Processes.of_launcher()
    store = ObservationStore(Path(options.output))
    finished = _finished(options, store) if processes.first else None
    if processes.any(finished is not None):
        return finished or {}
    if processes.first:
        check_output(Path(options.output))
    with store.session() if processes.first else nullcontext():
        observation = observe_model(options, processes, store)  # stages 1 to 4
        if not processes.first:
            return {}
        with timed("5. plan the smoothing", options):
            plan = make_plan(observation, options)
        with timed("6. check the equivalence", options):
            gate_report = check_gate(observation, plan.smoothing)
        with timed("7. quantize and write", options):
            return write_checkpoint(observation, plan, gate_report, options, store.checkpoint)


def _finished(options: Options, store: ObservationStore) -> dict[str, Any] | None:
    """The manifest, if an earlier run of the same command was killed between writing OUT and removing its state."""
    recipe = Path(options.output, RECIPE)
    if not (store.folder.is_dir() and recipe.is_file() and recipe.read_text() == dump_recipe(vars(options))):
        return None
    with store.session():
        return read_json(Path(options.output, MANIFEST))


def smooth(model: str, output: str | Path, **options: Any) -> dict[str, Any]:
    """Write the smoothed floating-point `model`, same function, own dtype, into the new folder `output`."""
    given = Options(model=model, output=str(output), **options)
    alpha = given.fixed_alpha
    check_output(Path(output))
    observation = observe_model(given)
    # Powers of two: the model's own 16-bit weights stay exact, bit for bit.
    alphas = {group.source: alpha for group in observation.graph.groups if group.kind != "input"}
    smoothing = smooth_groups(observation.model, observation.graph, observation.absmax, alphas, power_of_two=True)
    return write_smoothed(observation, smoothing, check_gate(observation, smoothing), Path(output))


def observe_model(
    options: Options, processes: Processes | None = None, store: ObservationStore | None = None
) -> Observation:
    """Stages 1 to 4, which do not depend on alpha or the scheme: one observation serves any number of plans.

    store: where to resume from; without it, nothing stays on disk.
    """
    processes = processes or Processes()
    quiet = options.quiet or not processes.first
    if options.save_stats is not None and processes.first:
        check_writable(Path(options.save_stats))
    with timed("1. load the model", options, quiet):
        source = load(options.model, processes.placement(options.device_map))
        if options.quantize_lm_head:
            untie_head(options.model, source.model)
        layers, in_float = choose_linears(source.model, frozenset(options.ignore), lm_head=options.quantize_lm_head)
    with timed("2. draw the samples", options, quiet):
        samples = load_samples(
            options.dataset, source.tokenizer, text_column=options.text_column, samples=options.samples,
            seq_len=options.seq_len, seed=options.seed,
        )  # fmt: skip
        check_seq_len(source, options.seq_len)
    with timed("3. discover who reads what", options, quiet):
        trace_ids = samples.input_ids[: TRACE_SHAPE[0], : TRACE_SHAPE[1]]
        graph = discover(source.model, trace_ids, keep=set(in_float))
    with (
        timed("4. observe the activations", options, quiet),
        nullcontext(store) if store else temporary_store() as place,
    ):
        return observe(
            source, samples, graph, layers, in_float, store=place, processes=processes, stats=options.stats,
            save_stats=options.save_stats, quiet=quiet,
        )  # fmt: skip


def check_gate(observation: Observation, smoothing: Smoothing) -> dict[str, Any]:
    """The gate's report; SmoothQuantError if `smoothing` changes the function."""
    batches = observation.samples.input_ids[: GATE_SHAPE[0], : GATE_SHAPE[1]].split(2)
    # A layer that divides its input at run time multiplies its weight by the same factor: no other layer changes.
    return check_equivalence(smoothing.folded(), list(batches))


@contextmanager
def timed(stage: str, options: Options, quiet: bool = False) -> Iterator[None]:
    """Print on stderr how long a stage took. Not in the manifest, because the same inputs must give the same bytes."""
    start = time.perf_counter()
    yield
    if not (options.quiet or quiet):
        print(f"{stage}: {time.perf_counter() - start:.1f} s", file=sys.stderr)
