"""Find the vectors of a model that can be rotated, by running it once.

    stream    x -> x Q          embeddings and linear layers write it, norms and linear layers read it
    heads     v -> v R          each head between a linear layer (v_proj) and the next one (o_proj)

Q and R are orthogonal. Writers get W -> Q^T W, readers W -> W Q, and the function stays (QuaRot, arXiv 2404.00456,
section 4; SpinQuant, arXiv 2405.16406, calls them R1 and R2).

How. As discover.py, with other rules (rotation_rules.py): the trace follows vectors instead of scales. Sources are the
outputs of embeddings, linear layers and norms. Where two vectors are added, they must be rotated alike, so that their
sources are joined. The stream is the set with an embedding that the most norms read. A norm commutes with a rotation
(n(x Q) = n(x) Q) if its weights are folded into its readers and it does not subtract a mean; a norm that does commutes
with each Q that leaves the vector (1, ..., 1) where it is. probe.py tests which one it is.

Whatever else reads or writes one channel of the stream forbids the rotation, and a Refusal names it: a norm whose
output is added to the stream, an expert that is no linear layer, a part of the model that did not run.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vllm_smoothquant.format.config import STREAM

from .graph import Refusal
from .probe import NormForm, embedding_is_linear, norm_form
from .recorder import Recorder
from .rotation_rules import ROTATION_RULES
from .rules import aten
from .trace import Labels, Source, Trace


@dataclass(frozen=True)
class Side:
    """One side of a linear layer. channels: int64 [vectors, n]; `matrix` [n, n] rotates the vectors x[channels[i]]."""

    matrix: str
    channels: torch.Tensor


@dataclass(frozen=True)
class RotationGraph:
    """The result of `find_rotations`. Empty if nothing can be rotated; `refusals` say why.

    sizes: matrix -> n. centred: whether the matrix of the stream must leave (1, ..., 1) where it is. embeddings: whose
    rows are vectors of the stream. norms: what they compute. norm_of: linear layer -> the norm that it reads. inputs,
    outputs: linear layer -> the vectors in its input and in its output.
    """

    sizes: dict[str, int]
    centred: bool
    embeddings: tuple[str, ...]
    norms: dict[str, NormForm]
    norm_of: dict[str, str]
    inputs: dict[str, Side]
    outputs: dict[str, Side]
    refusals: tuple[Refusal, ...]


def find_rotations(model: nn.Module, input_ids: torch.Tensor) -> RotationGraph:
    """Run `model(input_ids=...)` once and find what can be rotated. Nothing of the model is changed.

    input_ids: int64 [batch, tokens >= 2]. An output head that is tied to the embeddings counts as untied.
    """
    recorder = _Vectors(model)
    recorder.run(input_ids)
    return recorder.graph()


class VectorTrace(Trace):
    """Follows vectors. norms: sources whose weights lie on the vector.

    parents: source -> source that is rotated by the same matrix. blocks: source -> int64 [channels]; channels with one
    number always get the same treatment, so that they may be mixed.
    """

    no_rule = "an operation that does not carry a rotation"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, ROTATION_RULES)
        self.norms: set[str] = set()
        self.parents: dict[str, str] = {}
        self.blocks: dict[str, torch.Tensor] = {}

    def root(self, source: str) -> str:
        """The name of the set of joined sources that has `source`."""
        while (parent := self.parents.get(source, source)) != source:
            source = parent
        return source

    def whole(self, ids: torch.Tensor) -> Source | None:
        """The source whose channels, all and in order, are each row of `ids`."""
        row = ids[(0,) * (ids.dim() - 1)].cpu()
        if not row.any() or not torch.equal(ids, ids[(0,) * (ids.dim() - 1)].expand_as(ids)):
            return None
        source = self.ledger.source_of(int(row[0]))
        return source if torch.equal(row, torch.arange(source.first, source.first + source.channels)) else None

    def joined(self, a: torch.Tensor, b: torch.Tensor, reader: Any) -> torch.Tensor | None:
        """Labels of the sum of vectors a and b, which are rotated alike from now on."""
        names = [source.name for ids in (a, b) if (source := self.whole(ids)) is not None]
        if len(names) < 2 or self.norms & set(names):
            reason = "a sum with the output of a norm" if self.norms & set(names) else "a sum with what is not rotated"
            for ids in (a, b):
                self.pin(ids, reader, reason)
            return None
        self.parents[self.root(names[1])] = self.root(names[0])
        return a

    def _mutate(self, func: Any, args: tuple, kwargs: dict) -> None:
        """Rows that are added to rows of another tensor, as experts add their outputs: a sum of vectors."""
        if func.overloadpacket is aten.index_add_ and args[1] == 0 and self.whole(self.ids(args[3])) is not None:
            into, row = self.ids(args[0]), self.ids(args[3])[:1]
            carried = self.joined(into, row.expand(into.shape), func) if into.any() else row.expand(into.shape)
            if carried is not None:
                sources = frozenset(s for t in (args[0], args[3]) if t in self._labels for s in self._labels[t].sources)
                self._store(args[0], Labels(carried, sources))
                return
        super()._mutate(func, args, kwargs)

    def share_rows(self, ids: torch.Tensor) -> None:
        """The channels in one row of `ids` get one treatment, those of other rows another."""
        for dim, stride in enumerate(ids.stride()):
            if stride == 0 and dim < ids.dim() - 1:
                ids = ids.narrow(dim, 0, 1)
        for row in ids.reshape(-1, ids.shape[-1]).unique(dim=0).cpu():
            for source, channels in self.ledger.channels(row):
                inside = torch.zeros(source.channels, dtype=torch.int64)
                inside[channels] = 1
                blocks = self.blocks.get(source.name, torch.zeros_like(inside))
                self.blocks[source.name] = (2 * blocks + inside).unique(return_inverse=True)[1]


class _Vectors(Recorder):
    """reads: norm or linear layer -> the source that it reads as whole vectors. calls: embedding -> its arguments."""

    trace: VectorTrace

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, VectorTrace(model))
        self.trace.norms = set(self.norms)
        self.opaque = {name for name, module in self.modules.items() if isinstance(module, nn.Embedding)}
        self.reads: dict[str, str] = {}
        self.calls: dict[str, tuple[tuple, dict]] = {}

    def at_norm(self, name: str, tensors: list[torch.Tensor]) -> None:
        source = self.trace.whole(self.trace.ids(tensors[0])) if len(tensors) == 1 else None
        if source is None or source.name in self.norms or self.reads.setdefault(name, source.name) != source.name:
            self.trace.pin_read(tensors, name, "a norm of what is no vector of the stream")

    def at_opaque(self, name: str, args: tuple, kwargs: dict, output: Any) -> None:
        self.trace.pin_read((args, kwargs), name, "an index")
        if isinstance(output, torch.Tensor) and output.shape[-1] == self.modules[name].weight.shape[1]:
            self.trace.emit(name, output)
            self.calls[name] = (args, kwargs)

    def foreign_use(self, name: str) -> str | None:
        """The tie between embeddings and head is cut before a rotation."""
        module, embeddings = self.modules[name], getattr(self.model, "get_input_embeddings", lambda: None)()
        ends = [module, embeddings if module is self.head else self.head]
        tied = ends[1] is not None and embeddings in ends and getattr(ends[1], "weight", None) is module.weight
        weight = module.weight if tied else None
        if tied and len(self.owners[id(weight)]) == 2 and id(weight) not in self.trace.parameters_read:
            return None
        return super().foreign_use(name)

    def graph(self) -> RotationGraph:
        ledger, root = self.trace.ledger, self.trace.root
        self.pin_what_is_not_proved()
        for name, columns in self.input_labels.items():
            if (source := self.trace.whole(columns)) is not None:
                self.reads[name] = source.name
        members: dict[str, list[str]] = {}
        for name in ledger.sources:
            if name not in self.norm_shapes:
                members.setdefault(root(name), []).append(name)
        norms = Counter(root(source) for name, source in self.reads.items() if name in self.norm_shapes)
        embedded = {root(name): name for name in ledger.sources if name in self.opaque}
        refusals: list[Refusal] = []
        found = RotationGraph({}, False, (), {}, {}, {}, {}, ())
        if embedded:
            stream = max(embedded, key=lambda name: norms[name])
            found = self.stream(stream, members[stream], refusals) or found
        self.heads(found, members, refusals)
        return RotationGraph(**{**vars(found), "refusals": tuple(refusals)})

    def pin_what_is_not_proved(self) -> None:
        ledger = self.trace.ledger
        for name, (args, kwargs) in self.calls.items():
            if not embedding_is_linear(self.modules[name], args, kwargs):
                ledger.pin_source(name, name, "its output is not proved to be linear in its rows")
        self.forms = {name: norm_form(self.modules[name], shape) for name, shape in self.norm_shapes.items()}
        for name, form in self.forms.items():
            if form is None and name in self.reads:
                ledger.pin_source(self.reads[name], name, "it is not proved to commute with a rotation")

    def stream(self, stream: str, members: list[str], refusals: list[Refusal]) -> RotationGraph | None:
        """The rotation of the sources `members`; None, and `refusals`, if something forbids it."""
        ledger, root = self.trace.ledger, self.trace.root
        norms = {name for name in self.norm_shapes if name in self.reads and root(self.reads[name]) == stream}
        size = ledger.sources[stream].channels
        for name in (*members, *norms):
            source, blocks = ledger.sources[name], self.trace.blocks.get(name)
            if blocks is not None and int(blocks.max()) > 0:
                ledger.pin_source(name, name, "its channels do not get the same treatment")
            for reader, columns in self.input_labels.items():
                partly = ((columns >= source.first) & (columns < source.first + source.channels)).any()
                if partly and self.reads.get(reader) != name:
                    ledger.pin_source(name, reader, "it reads a part of the vector")
            refusals += [Refusal(name, *key, count, source.channels) for key, count in source.reasons.items()]
        if not norms and not refusals:
            refusals.append(Refusal(stream, "no norm", "none reads it", size, size))
        if refusals:
            return None
        each = Side(STREAM, torch.arange(size)[None])
        norm_of = {name: source for name, source in self.reads.items() if source in norms}
        readers = [name for name, source in self.reads.items() if name in self.transposed and root(source) == stream]
        forms = {name: form for name, form in self.forms.items() if name in norms and form is not None}
        return RotationGraph(
            sizes={STREAM: size},
            centred=any(form.centred for form in forms.values()),
            embeddings=tuple(name for name in members if name in self.opaque),
            norms=forms,
            norm_of={name: norm for name, norm in norm_of.items() if name in self.transposed},
            inputs=dict.fromkeys((*readers, *(name for name in norm_of if name in self.transposed)), each),
            outputs=dict.fromkeys((name for name in members if name in self.transposed), each),
            refusals=(),
        )

    def heads(self, found: RotationGraph, members: dict[str, list[str]], refusals: list[Refusal]) -> None:
        """Add the rotations of heads to `found`."""
        for names in members.values():
            name = names[0]
            if len(names) > 1 or name not in self.transposed or name in found.outputs or name not in self.trace.blocks:
                continue
            source, blocks = self.trace.ledger.sources[name], self.trace.blocks[name]
            labels = {reader: columns - source.first for reader, columns in self.input_labels.items()}
            readers = {r: c for r, c in labels.items() if ((c >= 0) & (c < source.channels)).any()}
            read = torch.cat([c[(c >= 0) & (c < source.channels)] for c in readers.values()] or [torch.zeros(0).long()])
            heads = [(blocks == number).nonzero()[:, 0] for number in blocks[read].unique()]
            sides = {reader: _copies(columns, heads) for reader, columns in readers.items()}
            sizes = {len(head) for head in heads}
            if not readers:
                continue
            if source.pinned[torch.cat(heads)].any() or None in sides.values() or len(sizes) != 1 or sizes == {1}:
                reasons = dict(source.reasons) or {(name, "its heads are not read as whole vectors"): source.channels}
                refusals += [Refusal(name, *key, count, source.channels) for key, count in reasons.items()]
                continue
            size = sizes.pop()
            found.sizes[f"head_{size}"] = size
            found.outputs[name] = Side(f"head_{size}", torch.stack(heads))
            found.inputs.update({r: Side(f"head_{size}", side) for r, side in sides.items() if side is not None})


def _copies(columns: torch.Tensor, heads: Iterable[torch.Tensor]) -> torch.Tensor | None:
    """int64 [copies, n]: where in a layer's input the vectors `heads` (channels of the source) are.

    columns: the source's channel behind each input channel. None: a head is there in part.
    """
    copies = []
    for head in heads:
        places = [(columns == channel).nonzero()[:, 0] for channel in head.tolist()]
        if len({len(place) for place in places}) != 1:
            return None
        copies.append(torch.stack(places, dim=1))
    return torch.cat(copies) if copies else None
