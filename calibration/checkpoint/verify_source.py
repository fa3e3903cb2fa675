"""`smoothquant verify --source MODEL`: is this checkpoint that model, smoothed and rounded, and nothing else?

Nothing is taken from the manifest that can be computed. The groups are discovered again on the source, and each
group's factors are read back from what the checkpoint stores:

    norm     s = w / w_stored                                exactly (smooth.py folds what is stored)
    input    s = smoothing_factor                            exactly
    linear   |w / s - q * scale| <= scale / 2                for every weight of the rows divided by s, and
             |w * s - q * scale| <= scale / 2                of the columns that follow: an interval for s; where every
             scale * 127 = max|w / s|                        channel has a scale, this makes it a point

Then the smoothed model is built anew in float32, and every tensor of the checkpoint is compared with it. Rounding moves
a weight by half a step of its scale at most; an integer that is one off is half a step too far. Every other tensor must
be the smoothed one in its own dtype, every other file what exporting the source writes. What only the calibration text
can tell (alphas, static scales, errors) stays a claim.
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vllm_smoothquant.format import int8
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import read_json, read_tensors

from ..discovery.discover import TRACE_SHAPE, discover
from ..discovery.graph import Graph, Group
from ..discovery.linears import choose_linears
from ..inputs.model import Source, load, untie_head
from ..observation.absmax import observe_absmax
from ..observation.observation import input_range
from ..smoothing.factors import FACTOR_OF, Smoothing
from ..smoothing.gate import check_equivalence
from . import export

# Half a step, and what some roundings of float32 make of 127 steps: 127 * 16 * 2**-24.
HALF = 0.5 + 2.0**-13
UNIT = 2.0**-23
# Sinks are a thousand times the other tokens, and random ones may not wake them.
FAR = 1e4
GATE_SHAPE = (2, 64)


def compare_with_source(
    checkpoint: Path, source: str, manifest: Mapping[str, Any], layers: dict[str, Any]
) -> Iterator[SmoothQuantError]:
    """Every fault, and into `layers` for each quantised one: `error`, of the weights in the source's own coordinates,
    ||W' - W|| / ||W||, and `steps`, how far the worst weight is from its integer, in steps of its scale."""
    loaded = load(source)
    model = loaded.model
    said = manifest.get("source", {})
    if said.get("sha256") != loaded.hashes:
        yield _fault(
            f"{source}: weight files", f"sha256 {_short(said.get('sha256'))}, by the manifest", _short(loaded.hashes)
        )
    if said.get("dtype") != str(model.dtype).removeprefix("torch."):
        yield _fault("manifest: source.dtype", str(model.dtype), repr(said.get("dtype")))

    tensors = dict(read_tensors(checkpoint))
    stored = Stored(model, tensors)
    head = next((n for n, m in model.named_modules() if m is model.get_output_embeddings()), None)
    if head in stored.quantised:
        untie_head(source, model)
    ids = _random_ids(model)
    kept = {n: why for n, why in _claim(manifest, "kept", dict).items() if not str(why).startswith("fell back")}
    ignore = frozenset(name for name, why in kept.items() if why == "asked for by --ignore")
    names, recomputed = choose_linears(model, ignore, lm_head=head in stored.quantised)
    for name in sorted(kept.items() ^ recomputed.items()):
        yield _fault(
            f"manifest: kept: {name[0]}", recomputed.get(name[0], "nothing"), str(kept.get(name[0], "nothing"))
        )
    for name in sorted(set(_claim(manifest, "quantized", list)) ^ set(stored.quantised)):
        yield _fault(f"manifest: quantized: {name}", "the layers that are INT8 in the files", "others")
    for name in sorted(set(stored.quantised) - set(names)):
        yield _fault(f"{name}.weight", "floating point: this layer cannot be quantised", "int8")

    graph = discover(model, ids[: TRACE_SHAPE[0], : TRACE_SHAPE[1]], keep=set(recomputed)).with_inputs(names)
    factors, width = dict[str, torch.Tensor](), dict[str, float]()
    for group in sorted(graph.groups, key=lambda g: g.kind == "linear"):  # those last: they build on the others
        try:
            factors[group.source], width[group.source] = stored.factors(group, Smoothing(model, graph, factors))
        except SmoothQuantError as error:
            yield error
            return
    smoothing = Smoothing(model, graph, factors)
    yield from _groups(graph, smoothing, width, manifest)
    inputs = [[export.hub_module_name(model, n) for n in r if n in stored.quantised] for r in graph.shared_input_groups]
    if sorted(r for r in inputs if r) != sorted(map(list, _claim(manifest, "inputs", list))):
        yield _fault("manifest: inputs", "the layers that read one tensor, as the source runs", "others")
    yield from _tensors(stored, smoothing, graph, width, layers)
    yield from _ranges(stored, smoothing, ids)
    check_equivalence(smoothing.folded(), list(ids[: GATE_SHAPE[0]].split(1)))
    yield from _other_files(checkpoint, loaded)


class Stored:
    """The checkpoint's tensors by the source's module names. quantised: module -> its name in the files."""

    def __init__(self, model: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
        self.model, self.tensors = model, tensors
        integers = {name.removesuffix(".weight") for name, tensor in tensors.items() if tensor.dtype == torch.int8}
        linears = [name for name, module in model.named_modules() if getattr(module, "weight", None) is not None]
        hub = {name: export.hub_names(model, {f"{name}.weight": torch.empty(16, 16)}) for name in linears}
        self.quantised = {
            name: next(iter(renamed)).removesuffix(".weight")
            for name, renamed in hub.items()
            if len(renamed) == 1 and next(iter(renamed)).removesuffix(".weight") in integers
        }

    def plain(self, module: str, parameter: str) -> torch.Tensor:
        """A parameter in floating point of a norm or a linear layer, as the file has it."""
        (name,) = export.hub_names(self.model, {f"{module}.{parameter}": torch.empty(16, 16)})
        return self.tensors[name].float()

    def integers(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(q [out, in] float32, scale [out, 1] or [1]) of a quantised layer, whichever way the file keeps it."""
        name = self.quantised[module]
        return self._upright(module, self.tensors[f"{name}.weight"].float()), self.tensors[f"{name}.weight_scale"]

    def _upright(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        return weight if isinstance(self.model.get_submodule(module), nn.Linear) else weight.t()

    def smoothed(self, module: str, smoothing: Smoothing) -> torch.Tensor:
        """float32 [out, in]: the source's weight as `smoothing` leaves it."""
        return self._upright(module, smoothing.parameters(module)["weight"])

    def factors(self, group: Group, before: Smoothing) -> tuple[torch.Tensor, float]:
        """(s [channels] of `group`, how wide its interval is, relative to s). `before`: the groups known so far."""
        ones = torch.ones(group.channels)
        if group.kind == "input":
            names = [self.quantised[r.name] for r in group.readers if r.name in self.quantised]
            found = [self.tensors[f"{n}.smoothing_factor"] for n in names if f"{n}.smoothing_factor" in self.tensors]
            return (found[0] if found else ones), 0.0
        if group.kind == "norm":
            first = next(name for name, rule in group.rules.items() if rule != "fixed")
            p = self.model.get_submodule(group.source).get_parameter(first).detach().float()
            q = self.plain(group.source, first)
            s = FACTOR_OF[group.rules[first]](p, q)
            return torch.where(group.foldable & torch.isfinite(s) & (s > 0), s, ones), 0.0
        return self._interval(group, before)

    def _interval(self, group: Group, before: Smoothing) -> tuple[torch.Tensor, float]:
        low, high = torch.zeros(group.channels), torch.full((group.channels,), torch.inf)
        weight = self.smoothed(group.source, before)
        bias = before.parameters(group.source).get("bias")
        if group.source in self.quantised:
            q, scale = self.integers(group.source)
            edges = [(q - HALF) * scale / weight, (q + HALF) * scale / weight]
            low, high = _narrow(low, high, *edges, dim=1, inverse=True)
            if scale.dim() == 2:
                point = weight.abs().amax(1) / (int8.QMAX * scale[:, 0])
                exact = point > 0
                low, high = (torch.where(exact, point * (1 + sign * 8 * UNIT), b) for sign, b in ((-1, low), (1, high)))
        else:
            own = self._upright(group.source, self.plain(group.source, "weight"))
            slack = torch.finfo(self.model.dtype).eps
            ratio = torch.where(weight != 0, own / weight, torch.nan)
            low, high = _narrow(low, high, ratio * (1 - slack), ratio * (1 + slack), dim=1, inverse=True)
        if bias is not None:
            slack = 2 * torch.finfo(self.model.dtype).eps
            ratio = (self.plain(group.source, "bias") / bias)[:, None]
            low, high = _narrow(low, high, ratio * (1 - slack), ratio * (1 + slack), dim=1, inverse=True)
        pointed = group.source in self.quantised and self.integers(group.source)[1].dim() == 2
        for reader in () if pointed else group.readers:
            if reader.name in self.quantised and bool((reader.power == 1).all()):
                q, scale = self.integers(reader.name)
                columns = self.smoothed(reader.name, before)
                edges = [(q - HALF) * scale / columns, (q + HALF) * scale / columns]
                bottom, top = _narrow(torch.zeros(q.shape[1]), torch.full((q.shape[1],), torch.inf), *edges, dim=0)
                mapped = reader.channel_of >= 0
                low.scatter_reduce_(0, reader.channel_of[mapped], bottom[mapped], "amax")
                high.scatter_reduce_(0, reader.channel_of[mapped], top[mapped], "amin")
        # Nothing bounds the factor of a channel whose weights are all zero, and nothing depends on it.
        free = ~group.foldable | ~torch.isfinite(high) | (low <= 0)
        apart = ~free & (low > high * (1 + 8 * UNIT))
        if apart.any():
            raise _fault(
                f"{group.source}.weight", "the source's rows divided by a factor, its readers multiplied by it",
                f"{int(apart.sum())} for which there is none",
            )  # fmt: skip
        s = torch.where(free, 1.0, (low * high).sqrt())
        return s, float((high / low - 1)[~free].clamp(min=0).max()) if (~free).any() else 0.0


def _narrow(
    low: torch.Tensor, high: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, dim: int, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`low`, `high` within what every element's [a, b] (in either order; NaN and infinity say nothing) allows."""
    a, b = torch.minimum(a, b), torch.maximum(a, b)
    says = torch.isfinite(a) & torch.isfinite(b)
    if inverse:  # of 1 / s: whatever is at or below 0 bounds nothing
        bottom = torch.where(says & (b > 0), 1 / b, 0.0).amax(dim)
        top = torch.where(says & (a > 0), 1 / a, torch.inf).amin(dim)
    else:
        bottom = torch.where(says, a, 0.0).amax(dim)
        top = torch.where(says, b, torch.inf).amin(dim)
    return torch.maximum(low, bottom), torch.minimum(high, top)


def _tensors(
    stored: Stored, smoothing: Smoothing, graph: Graph, width: Mapping[str, float], layers: dict[str, Any]
) -> Iterator[SmoothQuantError]:
    """Every tensor against the smoothed source."""
    model = stored.model
    uncertain = {
        name: width[group.source] for group in graph.groups for name in (group.source, *(r.name for r in group.readers))
    }
    for name in stored.quantised:
        expected, (q, scale) = stored.smoothed(name, smoothing), stored.integers(name)
        if expected.shape != q.shape:
            yield _fault(f"{stored.quantised[name]}.weight", f"shape {list(expected.shape)}", str(list(q.shape)))
            continue
        off = (expected / scale - q).abs()
        apart = q * scale - expected
        into, out = smoothing.input_factor(name), smoothing.output_factor(name)
        original = expected
        for factor, undo in ((into, lambda t, f: t / f), (out, lambda t, f: t * f[:, None])):
            if factor is not None:
                apart, original = undo(apart, factor), undo(original, factor)
        layers[stored.quantised[name]] = {
            "error": float(apart.norm() / original.norm()), "steps": float(off.max()),
        }  # fmt: skip
        wrong = off > HALF + int8.QMAX * uncertain.get(name, 0.0)
        if wrong.any():
            yield _fault(
                f"{stored.quantised[name]}.weight", "the source's weights, smoothed and rounded",
                f"{int(wrong.sum())} of {wrong.numel()} over half a step away, the worst {float(off.max()):.3g} steps",
            )  # fmt: skip
    for block in export.source_tensors(model):
        plain, folded = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        for key, tensor in block.items():
            owner, _, suffix = key.rpartition(".")
            if owner in smoothing.modules and not (owner in stored.quantised and suffix == "weight"):
                folded[key] = smoothing.parameters(owner).get(suffix, tensor).to(tensor.dtype)
            elif owner not in smoothing.modules and not (owner in stored.quantised and suffix == "weight"):
                plain[key] = tensor
        for expected_here, exact in ((plain, True), (folded, False)):
            for name, wanted in export.hub_names(model, expected_here).items() if expected_here else ():
                got = stored.tensors[name]
                if got.dtype != wanted.dtype:
                    yield _fault(name, f"{wanted.dtype}, as the source has it", str(got.dtype))
                slack = 0.0 if exact else 2 * torch.finfo(got.dtype).eps + max(width.values())
                if not bool(((got.float() - wanted.float()).abs() <= slack * wanted.float().abs()).all()):
                    yield _fault(name, "the source's values" if exact else "the source's values, smoothed", "others")


def _ranges(stored: Stored, smoothing: Smoothing, ids: torch.Tensor) -> Iterator[SmoothQuantError]:
    """Static ranges against what random tokens reach: only the calibration text can tell more."""
    scales = {name: stored.tensors.get(f"{hub}.input_scale") for name, hub in stored.quantised.items()}
    static = {name: float(scale) for name, scale in scales.items() if scale is not None}
    absmax = observe_absmax(stored.model, sorted(static), ids) if static else {}
    for name, scale in static.items():
        reached = input_range(absmax[name], smoothing.input_factor(name))
        if reached > 0 and not 1 / FAR < scale * int8.QMAX / reached < FAR:
            where = f"{stored.quantised[name]}.input_scale"
            yield _fault(where, f"about the range of random tokens, {reached:.3g}", f"{scale * int8.QMAX:.3g}")


def _other_files(checkpoint: Path, source: Source) -> Iterator[SmoothQuantError]:
    """config.json, generation config, tokenizer and template against what exporting the source writes."""
    quantization = read_json(checkpoint / "config.json")["quantization_config"]
    with tempfile.TemporaryDirectory() as temporary:
        export.write_config(Path(temporary), source.model, source.tokenizer, quantization)
        for wanted in sorted(Path(temporary).iterdir()):
            got = checkpoint / wanted.name
            if not got.is_file():
                yield _fault(str(got), "a file, as the source has it", "none")
            elif wanted.suffix != ".json":
                if wanted.read_bytes() != got.read_bytes():
                    yield _fault(str(got), "what the source has", "something else")
            else:
                a, b = read_json(wanted), read_json(got)
                # What these two say depends on where and by what the tokenizer was loaded.
                for key in sorted((a.keys() | b.keys()) - {"transformers_version", "local_files_only"}):
                    # Through JSON: NaN equals itself there, and True is not 1.
                    values = [json.dumps(each.get(key, "nothing"), sort_keys=True) for each in (a, b)]
                    if values[0] != values[1]:
                        yield _fault(f"{got}: {key}", values[0][:100], values[1][:100])


def _groups(
    graph: Graph, smoothing: Smoothing, width: Mapping[str, float], manifest: Mapping[str, Any]
) -> Iterator[SmoothQuantError]:
    """The manifest's groups against the rediscovered ones and the factors read back."""
    said = {str(group.get("source")): group for group in _claim(manifest, "groups", list)}
    found = {group.source: smoothing.describe(group) for group in graph.groups}
    for source in sorted(said.keys() | found.keys()):
        for key in ("kind", "readers", "channels", "factor_min", "factor_max"):
            a, b = found.get(source, {}).get(key), said.get(source, {}).get(key)
            near = isinstance(a, float) and isinstance(b, float) and abs(a - b) <= (width[source] + 1e-5) * abs(a)
            if a != b and not near:
                yield _fault(f"manifest: groups: {source}.{key}", repr(a), repr(b))


def _claim(manifest: Mapping[str, Any], key: str, kind: type) -> Any:
    value = manifest.get(key)
    if not isinstance(value, kind):
        raise _fault(f"manifest: {key}", f"a {kind.__name__}", repr(value)[:80])
    return value


def _random_ids(model: PreTrainedModel) -> torch.Tensor:
    words = model.config.get_text_config().vocab_size
    return torch.randint(0, words, GATE_SHAPE, generator=torch.Generator().manual_seed(0))


def _short(hashes: Any) -> str:
    return json.dumps({n: h[:16] for n, h in hashes.items()} if isinstance(hashes, dict) else hashes, sort_keys=True)


def _fault(where: str, expected: str, got: str) -> SmoothQuantError:
    return SmoothQuantError(where, expected, got, "check --source, or calibrate the model again")
