"""`smoothquant verify --source MODEL`: whether a checkpoint is that model, smoothed and rounded, and nothing else.

What is trusted. Nothing that can be computed is taken from the manifest: the groups are discovered again on the source.
Alphas, static scales and measured errors remain claims, because only the calibration text can show them.

How the factors s of a group are recovered from the stored tensors:

    norm     s = w / w_stored                    exact, because factors.py multiplies the readers by this quotient
    input    s = smoothing_factor                exact
    linear   |w / s - q * scale| <= scale / 2    for each weight of the rows that are divided by s, and
             |w * s - q * scale| <= scale / 2    of the readers' columns: each weight gives an interval for s
             scale * 127 = max|w / s|            if each row has its own scale: the interval is a point

4-bit weights may be clipped and moved by GPTQ, so that they give no intervals: the factors of a "linear" group with
such a layer are the checkpoint's own record, and each row must be ALIKE the smoothed source's. Zeros have no direction.

What is compared. The smoothed model is computed again in float32, and every tensor of the checkpoint is compared with
it. Rounding moves a weight by at most half a step of its scale, so that an integer that is off by one exceeds this
bound. Every other tensor must equal the smoothed one in its own dtype, every other file what exporting the source
writes.

Example: a row of a "linear" group, w = [0.8, -0.4], stored as q = [40, -20] with the scale 0.01 of the whole tensor:

    |0.8 / s - 0.40| <= 0.005        1.975 <= s <= 2.025
    |0.4 / s - 0.20| <= 0.005        1.951 <= s <= 2.051
    s = sqrt(1.975 * 2.025) = 2.0    the interval that both weights allow is 2.5 % wide
"""

import json
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from vllm_smoothquant.format import int4, int8
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import PACKED, read_json, read_tensors

from ..discovery.discover import TRACE_SHAPE, discover
from ..discovery.graph import Group
from ..discovery.linears import REQUESTED, choose_layers, with_own_input
from ..inputs.model import Source, load, sha256, untie_head
from ..inputs.unread import read_tensors as read_tensors_of
from ..observation.absmax import observe_absmax
from ..observation.observation import input_range
from ..running.modules import output_head
from ..smoothing.factors import FACTOR_OF, Smoothing, needs_power_of_two
from ..smoothing.gate import check_equivalence
from . import export, transforms
from .architecture import Faults, fault
from .intervals import bounds, inverse_bounds, ulp
from .verify_transforms import folded_faults, rotated

_fault = partial(fault, fix="check --source, or calibrate the model again")
# Half a step, plus the float32 rounding errors of up to 127 steps: 127 * 16 * 2**-24.
HALF = 0.5 + 2.0**-13
UNIT = 2.0**-23
# Least cosine of a row of 4-bit weights and the smoothed source's, in smoothed coordinates, where GPTQ works: .93 if
# rounded to the nearest, .79 by GPTQ in the worst of tiny models that were tried, about 0 if it is another row.
ALIKE = 0.5
# Sink tokens are about 1000 times as large as other tokens, and random tokens may not trigger sinks.
MAX_RANGE_RATIO = 1e4
GATE_SHAPE = (2, 64)


def compare_with_source(checkpoint: Path, source: str, manifest: Mapping[str, Any], layers: dict[str, Any]) -> Faults:
    """Yield every difference between the folder `checkpoint` and the model `source`.

    Adds to `layers` for each quantised layer: `error`, ||W' - W|| / ||W|| in the source's own coordinates, and `steps`,
    the largest distance of a weight from its integer, in steps of its scale.
    """
    loaded = load(source)
    model = loaded.model
    claimed, hashes = _claim(manifest, "source", dict), loaded.hashes | {"config.json": loaded.config_hash}
    yield from _differences(f"{source}: sha256 by the manifest", _claim(claimed, "sha256", dict), hashes)
    if claimed.get("dtype") != str(model.dtype).removeprefix("torch."):
        yield _fault("manifest: source.dtype", str(model.dtype), repr(claimed.get("dtype")))

    claims = transforms.read(checkpoint)
    stored = Stored(model, dict(read_tensors(checkpoint)), claims)
    head_is_int8 = any(model.get_submodule(name) is output_head(model) for name in stored.quantised)
    if head_is_int8:
        untie_head(source, model)
    in_float = {n: why for n, why in _claim(manifest, "kept", dict).items() if not str(why).startswith("fell back")}
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(0, vocabulary, GATE_SHAPE, generator=torch.Generator().manual_seed(0))
    trace_ids = ids[: TRACE_SHAPE[0], : TRACE_SHAPE[1]]
    rotation = rotated(source, model, trace_ids, claims) if claims.matrices else None
    described = {} if rotation is None else rotation.describe()
    claimed_rotation = {key: manifest.get("rotation", {}).get(key) for key in described}
    yield from _differences("manifest: rotation", described, claimed_rotation)
    discovered = discover(model, trace_ids)
    ignore = frozenset(name for name, why in in_float.items() if why == REQUESTED)
    names, reasons = choose_layers(model, discovered, ignore, lm_head=head_is_int8)
    yield from _differences("manifest: kept", reasons, in_float)
    quantized = dict.fromkeys(map(str, _claim(manifest, "quantized", list)), "int8")
    yield from _differences("manifest: quantized", dict.fromkeys(stored.quantised, "int8"), quantized)
    for name in sorted(stored.quantised.keys() - set(names)):
        yield _fault(f"{name}.weight", "floating point: this layer cannot be quantised", "int8")

    graph = discovered.keeping(reasons).with_inputs(with_own_input(model, names))
    factors, width = dict[str, torch.Tensor](), dict[str, float]()
    for each in sorted(graph.groups, key=lambda g: g.kind == "linear"):  # these last, because they depend on the others
        factors[each.source], width[each.source] = stored.factors(
            each, Smoothing(model, graph, factors, stored.quantised)
        )
    smoothing = Smoothing(model, graph, factors, stored.quantised)
    yield from _groups(smoothing, width, _claim(manifest, "groups", list))
    yield from folded_faults(transforms.folded(smoothing, rotation), claims, max(width.values(), default=0.0))
    inputs = [[stored.quantised[n] for n in group if n in stored.quantised] for group in graph.shared_input_groups]
    if sorted(map(str, filter(None, inputs))) != sorted(map(str, _claim(manifest, "inputs", list))):
        yield _fault("manifest: inputs", "the layers that read one tensor when the source runs", "others")
    yield from _weights(stored, smoothing, width, layers)
    yield from _other_tensors(stored, smoothing, width)
    yield from _ranges(stored, smoothing, ids)
    check_equivalence(smoothing.folded(), list(ids.split(1)))
    yield from _carried(stored, loaded)
    yield from _other_files(checkpoint, loaded)


class Stored:
    """The checkpoint's tensors by the source's module names. quantised: module -> its name in the files; four_bits:
    those that have 4 bits. claims: what the checkpoint says was folded."""

    def __init__(self, model: PreTrainedModel, tensors: dict[str, torch.Tensor], claims: transforms.Folded) -> None:
        self.model, self.tensors, self.claims = model, tensors, claims
        self.quantised: dict[str, str] = {}
        self.four_bits: set[str] = set()
        packed = {key.removesuffix(PACKED) + "weight" for key in tensors if key.endswith(f".{PACKED}")}
        integers = packed | {key for key, tensor in tensors.items() if tensor.dtype == torch.int8}
        for name, module in model.named_modules():
            keys = export.file_names(model, f"{name}.weight") if getattr(module, "weight", None) is not None else []
            if len(keys) == 1 and keys[0] in integers:
                self.quantised[name] = keys[0].removesuffix(".weight")
                self.four_bits |= {name} if keys[0] in packed else set()

    def parameter(self, module: str, parameter: str) -> torch.Tensor:
        """float32: a parameter that is stored in floating point."""
        (name,) = export.file_names(self.model, f"{module}.{parameter}")
        return self.tensors[name].float()

    def integers(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """(q float32 [out, in], scale [out, 1] or [1], or [out, in] with 4 bits) of a quantised layer."""
        name = self.quantised[module]
        if module in self.four_bits:
            q, scale = int4.unpack(self.tensors[f"{name}.{PACKED}"]).float(), self.tensors[f"{name}.weight_scale"]
            return q, scale.repeat_interleave(q.shape[1] // scale.shape[1], dim=1)
        return self._out_in(module, self.tensors[f"{name}.weight"].float()), self.tensors[f"{name}.weight_scale"]

    def _out_in(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """`weight` as [out, in]; Conv1D stores [in, out]."""
        return weight if isinstance(self.model.get_submodule(module), nn.Linear) else weight.t()

    def smoothed(self, module: str, smoothing: Smoothing) -> torch.Tensor:
        """float32 [out, in]: the source's weight, smoothed by `smoothing`."""
        return self._out_in(module, smoothing.parameters(module)["weight"])

    def factors(self, group: Group, known: Smoothing) -> tuple[torch.Tensor, float]:
        """(s [channels] of `group`, the width of its interval relative to s). known: the groups recovered so far."""
        ones = torch.ones(group.channels)
        if group.kind == "input":
            keys = [f"{self.quantised[r.name]}.smoothing_factor" for r in group.readers if r.name in self.quantised]
            return next((self.tensors[key] for key in keys if key in self.tensors), ones), 0.0
        if group.kind == "norm":
            first = next(name for name, rule in group.rules.items() if rule != "fixed")
            p = self.model.get_submodule(group.source).get_parameter(first).detach().float()
            s = FACTOR_OF[group.rules[first]](p, self.parameter(group.source, first))
            return torch.where(group.foldable & torch.isfinite(s) & (s > 0), s, ones), 0.0
        if self.four_bits & {group.source, *(reader.name for reader in group.readers)}:
            return self.claims.modules.get(group.source, {}).get(transforms.OUTPUT_FACTOR, ones), 0.0
        low, high = self._interval(group, known)
        # A channel whose weights are all zero has no bound, and its factor has no effect.
        free = ~group.foldable | ~torch.isfinite(high) | (low <= 0)
        empty = ~free & (low > high * (1 + 8 * UNIT))
        if empty.any():
            got = f"{int(empty.sum())} of {len(empty)} rows without such a factor"
            raise _fault(f"{group.source}.weight", "rows divided by a factor that multiplies the readers' columns", got)
        s = torch.where(free, 1.0, (low * high).sqrt())
        if needs_power_of_two(self.model, group, self.quantised):
            return 2.0 ** s.log2().round(), 0.0
        return s, float((high / low - 1)[~free].clamp(min=0).max()) if (~free).any() else 0.0

    def _interval(self, group: Group, known: Smoothing) -> tuple[torch.Tensor, torch.Tensor]:
        """(low, high), float32 [channels] each: the factors of a "linear" group that its tensors allow."""
        source, readers, dtype = group.source, group.readers, self.model.dtype
        weight, bias = self.smoothed(source, known), known.parameters(source).get("bias")
        if source not in self.quantised:
            w = self._out_in(source, self.parameter(source, "weight"))
            low, high = inverse_bounds((w - ulp(w, dtype)) / weight, (w + ulp(w, dtype)) / weight)
        else:
            q, scale = self.integers(source)
            low, high = inverse_bounds((q - HALF) * scale / weight, (q + HALF) * scale / weight)
            if scale.dim() == 2:
                point, readers = weight.abs().amax(1) / (int8.QMAX * scale[:, 0]), ()
                low = torch.where(point > 0, point * (1 - 8 * UNIT), low)
                high = torch.where(point > 0, point * (1 + 8 * UNIT), high)
        if bias is not None:
            b = self.parameter(source, "bias")
            ends = [((b + sign * 2 * ulp(b, dtype)) / bias)[:, None] for sign in (-1, 1)]
            bottom, top = inverse_bounds(*ends)
            low, high = torch.maximum(low, bottom), torch.minimum(high, top)
        for reader in readers:
            if reader.name in self.quantised and bool((reader.power == 1).all()):
                q, scale = self.integers(reader.name)
                weight = self.smoothed(reader.name, known)
                bottom, top = bounds((q - HALF) * scale / weight, (q + HALF) * scale / weight, dim=0)
                mapped = reader.channel_of >= 0
                low.scatter_reduce_(0, reader.channel_of[mapped], bottom[mapped], "amax")
                high.scatter_reduce_(0, reader.channel_of[mapped], top[mapped], "amin")
        return low, high


def _weights(stored: Stored, smoothing: Smoothing, width: Mapping[str, float], layers: dict[str, Any]) -> Faults:
    """The quantised weights against the smoothed source."""
    uncertainty = {
        name: width[group.source]
        for group in smoothing.graph.groups
        for name in (group.source, *(reader.name for reader in group.readers))
    }
    for name, file_name in stored.quantised.items():
        expected, (q, scale) = stored.smoothed(name, smoothing), stored.integers(name)
        if expected.shape != q.shape:
            yield _fault(f"{file_name}.weight", f"shape {list(expected.shape)}", str(list(q.shape)))
            continue
        steps = (expected / scale - q).abs()
        error, original = q * scale - expected, expected
        if (columns := smoothing.input_factor(name)) is not None:
            error, original = error / columns, original / columns
        if (rows := smoothing.output_factor(name)) is not None:
            error, original = error * rows[:, None], original * rows[:, None]
        layers[file_name] = {"error": float(error.norm() / original.norm()), "steps": float(steps.max())}
        if name in stored.four_bits:
            alike = (nn.functional.cosine_similarity(q * scale, expected) >= ALIKE) | ~(q.any(1) | expected.any(1))
            if not alike.all():
                got = f"{int((~alike).sum())} of {len(alike)} rows that are others"
                yield _fault(f"{file_name}.{PACKED}", "the source's weights, smoothed and rounded", got)
            continue
        wrong = steps > HALF + int8.QMAX * uncertainty.get(name, 0.0)
        if wrong.any():
            got = f"{int(wrong.sum())} of {wrong.numel()} over half a step away, worst {float(steps.max()):.3g} steps"
            yield _fault(f"{file_name}.weight", "the source's weights, smoothed and rounded", got)


def _other_tensors(stored: Stored, smoothing: Smoothing, width: Mapping[str, float]) -> Faults:
    """The tensors in floating point: those of smoothed modules within two roundings, all others exactly."""
    for block in export.source_tensors(stored.model):
        exact, smoothed = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        for key, tensor in block.items():
            owner, _, suffix = key.rpartition(".")
            if owner in stored.quantised and suffix == "weight":
                continue
            if owner in smoothing.modules:
                smoothed[key] = smoothing.parameters(owner).get(suffix, tensor).to(tensor.dtype)
            else:
                exact[key] = tensor
        for tensors, expected in ((exact, "the source's values"), (smoothed, "the source's values, smoothed")):
            for name, wanted in export.hub_names(stored.model, tensors).items():
                got = stored.tensors[name]
                if got.dtype != wanted.dtype:
                    yield _fault(name, f"{wanted.dtype}, as the source has it", str(got.dtype))
                a, b = got.float(), wanted.float()
                slack = 0.0 if tensors is exact else 2 * ulp(b, got.dtype) + max(width.values()) * b.abs()
                if not bool(((a - b).abs() <= slack).all()):
                    yield _fault(name, expected, "others")


def _ranges(stored: Stored, smoothing: Smoothing, ids: torch.Tensor) -> Faults:
    """Static ranges against the ranges of random tokens, roughly: only the calibration text can show more."""
    scales = {name: stored.tensors.get(f"{file_name}.input_scale") for name, file_name in stored.quantised.items()}
    static = {name: float(scale) * int8.QMAX for name, scale in scales.items() if scale is not None}
    absmax = observe_absmax(stored.model, sorted(static), ids) if static else {}
    for name, stored_range in static.items():
        reached = input_range(absmax[name], smoothing.input_factor(name))
        if reached > 0 and not 1 / MAX_RANGE_RATIO < stored_range / reached < MAX_RANGE_RATIO:
            where = f"{stored.quantised[name]}.input_scale"
            yield _fault(where, f"about the range of random tokens, {reached:.3g}", f"{stored_range:.3g}")


def _carried(stored: Stored, source: Source) -> Faults:
    """Tensors that the source's model does not read, against the checkpoint's, bit for bit."""
    for name, expected in read_tensors_of(source.folder, export.unread(source)):
        got = stored.tensors.get(name)
        if got is None or got.dtype != expected.dtype or not torch.equal(got, expected):
            yield _fault(name, "the source's tensor, unchanged", "none" if got is None else "another one")


def _other_files(checkpoint: Path, source: Source) -> Faults:
    """config.json and the side files (tokenizer, chat template, ...) against what exporting the source writes."""
    quantization = read_json(checkpoint / "config.json")["quantization_config"]
    with tempfile.TemporaryDirectory() as temporary:
        export.write_config(Path(temporary), source, quantization)
        for name, expected in export.file_hashes(Path(temporary)).items():
            path = checkpoint / name
            if not path.is_file():
                yield _fault(str(path), "a file, as the source has it", "none")
            elif sha256(path) != expected:
                yield from _differences(str(path), _content(Path(temporary, name)), _content(path))


def _content(path: Path) -> dict[str, Any]:
    """The keys of a JSON object, to name the one that differs; the hash of any other file."""
    try:
        return read_json(path) if path.suffix == ".json" else {"sha256": sha256(path)}
    except SmoothQuantError:  # a list, or no JSON
        return {"sha256": sha256(path)}


def _groups(smoothing: Smoothing, width: Mapping[str, float], claimed: list[dict[str, Any]]) -> Faults:
    """The manifest's groups against the discovered groups and the recovered factors."""
    claims = {str(group.get("source")): group for group in claimed}
    groups = {group.source: smoothing.describe(group) for group in smoothing.graph.groups}
    for source in sorted(claims.keys() | groups.keys()):
        for key in ("kind", "readers", "channels", "factor_min", "factor_max"):
            a, b = groups.get(source, {}).get(key), claims.get(source, {}).get(key)
            near = isinstance(a, float) and isinstance(b, float) and abs(a - b) <= (width[source] + 1e-5) * abs(a)
            if a != b and not near:
                yield _fault(f"manifest: groups: {source}.{key}", repr(a), repr(b))


def _claim(manifest: Mapping[str, Any], key: str, kind: type) -> Any:
    value = manifest.get(key)
    if not isinstance(value, kind):
        raise _fault(f"manifest: {key}", f"a {kind.__name__}", repr(value)[:80])
    return value


def _differences(where: str, expected: Mapping[str, Any], got: Mapping[str, Any]) -> Faults:
    """A fault for each key with different values, compared as JSON: there NaN equals itself and True differs from 1."""
    for key in sorted(expected.keys() | got.keys()):
        a, b = (json.dumps(values.get(key, "nothing"), sort_keys=True) for values in (expected, got))
        if a != b:
            yield _fault(f"{where}: {key}", a[:100], b[:100])
