"""llm-compressor's SmoothQuantModifier alone on many models, by its own interpreter: `smoothing_only.py REQUEST.json`.

benchmarks/preservation.py writes the request, reads the answer, and measures our models with the same functions.

    request   models: {name: {"folder", "class", "inputs", and "mappings", if theirs are not to be inferred}}; alpha;
              timeout_s; answer: the file to write
    inputs    torch.save of {"calibration": [batch, ...], "other": batch}; a batch is what the model is called with
    answer    {name: row}; `measure` has the fields of a row

As their documentation says: the model in float32, mixtures of experts opened into linear layers by
load_quantizable_moe, mappings inferred from the model. Each model has a forked process, because their session and the
patches of load_quantizable_moe are global.
"""

import json
import multiprocessing
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn


def logits(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch, use_cache=False).logits.float()


def change(before: torch.Tensor, after: torch.Tensor) -> float:
    """Largest difference of a logit, relative to the largest logit; infinite if a logit is not finite."""
    found = float((after - before).abs().max() / before.abs().max())
    return found if after.isfinite().all() else float("inf")


def matrices(model: Any) -> dict[str, torch.Tensor]:
    """Name -> weight of every linear layer and stack of experts, without embeddings and output head."""
    head = model.get_output_embeddings()
    others = (nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {
        f"{name}.{key}": value.detach()
        for name, module in model.named_modules()
        if not isinstance(module, others) and module is not head
        for key, value in module.named_parameters(recurse=False)
        if value.dim() in (2, 3)
    }


def share_of_changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """The share of the weights of `before` whose matrix is another in `after`."""
    changed = sum(value.numel() for name, value in before.items() if not torch.equal(value, after[name]))
    return changed / sum(value.numel() for value in before.values())


def reason(error: BaseException) -> str:
    """One line: of the first error of a chain, because the later ones hide what failed."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return " ".join(f"{type(error).__name__}: {lines[0]}".replace("|", "/").split())[:200]


def measure(model: dict[str, Any], alpha: float) -> dict[str, Any]:
    """unloadable, error: why it ended there. listed: whether the model's class is in their registry of mappings.

    opened: change of the logits by load_quantizable_moe. change: by all. smoothed: share of the weights.
    """
    inputs = torch.load(model["inputs"])
    architecture = getattr(transformers, model["class"])
    try:
        before = logits(loaded(architecture, model["folder"]), inputs["other"])
    except Exception as error:  # of any kind: another version of transformers
        return {"unloadable": reason(error)}
    row: dict[str, Any] = {}
    try:
        network = opened(architecture, model["folder"])
        row["listed"] = is_listed(type(network).__name__)
        row["opened"] = change(before, logits(network, inputs["other"]))
        weights = {name: value.clone() for name, value in matrices(network).items()}
        smooth(network, model["folder"], inputs["calibration"], alpha, model.get("mappings"))
        row["smoothed"] = share_of_changed(weights, matrices(network))
        row["change"] = change(before, logits(network, inputs["other"]))
    except Exception as error:  # of any kind
        row["error"] = reason(error)
    return row


def loaded(architecture: Any, folder: str | Path) -> Any:
    """The model of `folder` in float32; ValueError if a tensor of the files or of the model is left over."""
    model, loading = architecture.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if keys := sorted(str(key) for part in loading.values() for key in part):
        raise ValueError(f"{keys[0]} and {len(keys) - 1} more tensors do not fit")
    return model.eval()


def opened(architecture: Any, folder: str) -> Any:
    from llmcompressor.modeling.moe.linearize import load_quantizable_moe

    with load_quantizable_moe(architecture):
        return architecture.from_pretrained(folder, dtype=torch.float32).eval()


def is_listed(name: str) -> bool:
    from llmcompressor.modifiers.transform.smoothquant import dynamic_mappings as registry

    return name in registry.MAPPINGS_REGISTRY or name in registry.SMOOTHQUANT_DYNAMIC_MAPPING_REGISTRY


def smooth(model: Any, folder: str, batches: list[Any], alpha: float, mappings: list[Any] | None) -> None:
    from llmcompressor import oneshot
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
    from torch.utils.data import DataLoader

    oneshot(
        model=model,
        processor=transformers.AutoTokenizer.from_pretrained(folder),
        dataset=DataLoader(batches, batch_size=1, collate_fn=lambda rows: rows[0]),
        recipe=SmoothQuantModifier(smoothing_strength=alpha, mappings=mappings),
    )


def in_a_process(work: Callable[[], dict[str, Any]], seconds: float, folder: Path) -> dict[str, Any]:
    """What `work` returns, in a fork of this process; `folder` gets what it prints."""
    answer, log = folder / "row.json", folder / "log.txt"

    def child() -> None:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        answer.write_text(json.dumps(work()))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
        return {"error": f"no answer after {seconds:.0f} s"}
    if not answer.exists():
        return {"error": f"its process ended with {process.exitcode}"}
    return json.loads(answer.read_text())


def main() -> None:
    import llmcompressor  # noqa: F401  once, for all forks

    torch.set_num_threads(1)
    request = json.loads(Path(sys.argv[1]).read_text())
    rows = {}
    for name, model in request["models"].items():
        folder = Path(request["answer"]).parent / "theirs" / name
        folder.mkdir(parents=True)
        rows[name] = in_a_process(partial(measure, model, request["alpha"]), request["timeout_s"], folder)
        print(name, rows[name], file=sys.stderr, flush=True)
    Path(request["answer"]).write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
