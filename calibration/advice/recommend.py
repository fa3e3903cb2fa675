"""The rows of the table that fit one machine and one model, and their sizes against its memory."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from .claims import sources
from .table import HARDWARE, MODELS, TAKE, USES, Hardware, hardware_of

Facts = Mapping[str, Any]
# Key of TAKE -> which of the model's sizes it has. FP8 has 8 bits and as many scales as INT8.
SIZE_OF = {"int8": "int8", "static": "int8", "fp8": "int8", "w4a16": "int4", "w4a8": "int4", "float": "bf16"}
ONLY_FOUR_BITS = ("loss 4", "loss 4x32")  # what to know where nothing else fits
SIZES = {"bf16": "BF16", "int8": "INT8", "int4": "4 bits"}


def recommend(facts: Facts, size: Facts, model: str) -> dict[str, Any]:
    """What to take for `model`, of size `size` (footprint.footprint), on the machine `facts` (doctor.examine).

    fits: key of SIZES -> whether the weights fit one device. `kinds` and `hardware` have the texts of the table.
    """
    rows = hardware_of(facts)
    memory = _memory(facts)
    fits = {key: size["weight_bytes"][key] <= memory for key in SIZES}
    kinds = [{"kind": MODELS[key].name, "text": MODELS[key].text, "claims": _claims(MODELS[key].claims)}
             for key in size["kinds"]]  # fmt: skip
    uses = [
        {"hardware": HARDWARE[key].name, "ran": HARDWARE[key].ran, "uses": _uses(HARDWARE[key], size, fits, model)}
        for key in rows
    ]
    return {"name": model, **size, "kinds": kinds, "memory_bytes": memory, "fits": fits, "advice": uses}


def format_model(found: Facts) -> str:
    """The result of `recommend` as text."""
    share = found["linear_parameters"] / found["parameters"]
    lines = [
        f"model    {found['name']}: {', '.join(kind['kind'] for kind in found['kinds'])}",
        f"integers {found['layers']} linear layers with {found['linear_parameters']:,} parameters, {share:.0%} of "
        f"{found['parameters']:,}",
    ]
    for key, name in SIZES.items():
        verdict = "fits" if found["fits"][key] else "does not fit"
        size = found["weight_bytes"][key]
        lines.append(f"weights  {name}: {size:,} bytes ({size / 2**30:.2f} GiB), {verdict}")
    cache, tokens = found["cache"]["bytes"], found["cache"]["tokens"]
    amount = "not known from config.json" if cache is None else f"{cache:,} bytes ({cache / 2**30:.2f} GiB)"
    lines.append(f"memory   {found['memory_bytes'] / 2**30:.1f} GiB for the weights, the cache and everything else")
    lines.append(f"cache    one context of {tokens:,} tokens in 16 bits: {amount}, beside the weights")
    for row in found["advice"]:
        lines += ["", f"{row['hardware']}; executed by us: {row['ran']}"]
        for use in row["uses"].values():
            lines += [f"- {use['use']}: {use['what']}, because {use['why']}", f"    {use['command']}"]
            lines += [f"    {text} ({source})" for text, source in _pairs(use["claims"])]
    lines.append("")
    for kind in found["kinds"]:
        lines.append(f"- {kind['kind']}: {kind['text']}")
        lines += [f"    {text} ({source})" for text, source in _pairs(kind["claims"])]
    lines += ["", "What calibrate writes, `vllm serve OUT` serves. When not to use INT8: docs/which_scheme.md"]
    return "\n".join(lines)


def _memory(facts: Facts) -> int:
    """Bytes of the largest GPU, or of the machine without one. A model over several devices needs more than one."""
    gpus = [gpu["memory_bytes"] for gpu in facts["gpus"]]
    return int(max(gpus, default=facts["memory_bytes"]["total"]))


def _uses(row: Hardware, size: Facts, fits: Mapping[str, bool], model: str) -> dict[str, dict[str, Any]]:
    found = {}
    for key, use in USES.items():
        advice = row.uses[key]
        take, why, claims = advice.take, advice.why, advice.claims
        if not fits[SIZE_OF[take]]:
            if row.four is not None and fits["int4"]:
                take, why, claims = row.four, "only 4 bits fit in this memory", ONLY_FOUR_BITS
            else:
                why += "; it does not fit this memory, so use several devices (--tensor-parallel-size)"
        what, command = TAKE[take]
        found[key] = {
            "use": use, "take": take, "what": what, "why": why, "command": command.replace("MODEL", shlex.quote(model)),
            "claims": _claims(claims),
        }  # fmt: skip
    return found


def _claims(keys: tuple[str, ...]) -> list[dict[str, str]]:
    return [dict(zip(("text", "source", "address"), claim, strict=True)) for claim in sources(keys)]


def _pairs(claims: list[dict[str, str]]) -> Iterator[tuple[str, str]]:
    return ((claim["text"], claim["source"]) for claim in claims)
