"""docs/tensor_parallel.md: two ranks against one on vLLM's CPU backend, for every scheme.

`python -m benchmarks.tensor_parallel`. A tiny Llama written by tests/helpers/handmade_checkpoint.py, with ignored,
smoothed and overridden layers, in float32. For each scheme it compares:

    slices     every parameter of each rank with its part of the checkpoint's tensor, which must be equal bit for bit
    logprobs   log-probabilities of every token of the vocabulary at every position, two ranks with one
    tokens     at how many positions the most likely token is the same

Bounds. Where every scale is static, both compute the same integers; sums are added up in another order, and a value
within 1e-6 of a rounding tie may go the other way: median below 1e-4, mean below 0.05 (as tests/test_served_models.py,
which says why). A dynamic scale of a layer cut along its input (o_proj, down_proj) is measured by each rank on its own
half: a finer rounding than the whole row's, and another one. Then both are roundings of one model with independent
errors, so their mean distance is below sqrt(2) times that of one rank from unrounded activations; and a quarter for
chance. A wrong slice or scale moves the mean by 2 and more.

Pipeline parallel is tried with a floating-point model; the page has the result. The last line printed is JSON.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from benchmarks.machine import describe
from demo.server import free_port
from tests.helpers import engine, handmade_checkpoint, tiny_architectures
from tests.helpers.reference import ReferenceLinear, load_reference

OUTPUT = Path(__file__).parent.parent / "docs" / "tensor_parallel.md"
COMMAND = "python -m benchmarks.tensor_parallel"

CASES = [(w, a, True) for w, a in handmade_checkpoint.SCHEMES] + [(w, "static", False) for w in ("channel", "tensor")]

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def prompts(activations: str) -> list[list[int]]:
    """A single prompt if the requests of a batch share one absmax."""
    generator = torch.Generator().manual_seed(1)
    lengths = (60,) if activations == "tensor" else (40, 7, 100)
    return [torch.randint(0, handmade_checkpoint.VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a rank; called in the worker."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def expected(folder: Path, rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """`parameters` from the checkpoint's files, sliced here: q/k/v and gate/up by rows, o and down by columns."""
    files: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        files |= load_file(path)
    per_tensor = any(name.endswith("weight_scale") and tensor.numel() == 1 for name, tensor in files.items())

    def part(tensor: torch.Tensor, dim: int) -> torch.Tensor:
        return tensor.chunk(ranks, dim)[rank]

    tensors = {}
    for layer in range(handmade_checkpoint.LAYERS):
        prefix = f"model.layers.{layer}"
        for block, name in (
            ("self_attn", "qkv_proj"), ("self_attn", "o_proj"), ("mlp", "gate_up_proj"), ("mlp", "down_proj"),
        ):  # fmt: skip
            shards = [f"{prefix}.{block}.{shard}" for shard in FUSED.get(name, (name,))]
            by_rows = name in FUSED
            target = f"{prefix}.{block}.{name}"
            weights = [part(files[f"{shard}.weight"], 0 if by_rows else 1) for shard in shards]
            scales = [files.get(f"{shard}.weight_scale") for shard in shards]
            if scales[0] is not None:  # vLLM may repack weights in floating point
                tensors[f"{target}.weight"] = torch.cat(weights)
                if per_tensor and by_rows:
                    cut = [scale.expand(len(weight)) for scale, weight in zip(scales, weights, strict=True)]
                else:
                    cut = [part(scale, 0) if by_rows else scale for scale in scales]
                tensors[f"{target}.weight_scale"] = torch.cat(cut).flatten()
            if f"{shards[0]}.input_scale" in files:
                tensors[f"{target}.input_scale"] = files[f"{shards[0]}.input_scale"]
            factor = files.get(f"{shards[0]}.smoothing_factor")
            if factor is not None:
                tensors[f"{target}.inverse_smoothing_factor"] = (factor if by_rows else part(factor, 0)).reciprocal()
            if f"{shards[0]}.bias" in files:
                bias = [files[f"{shard}.bias"] for shard in shards]
                tensors[f"{target}.bias"] = torch.cat([part(b, 0) if by_rows else b for b in bias])
    return tensors


def wrong_slices(folder: Path, ranks: list[dict[str, torch.Tensor]]) -> list[str]:
    wrong = []
    for rank, held in enumerate(ranks):
        for name, tensor in expected(folder, rank, len(ranks)).items():
            if name not in held or not torch.equal(held[name].flatten(), tensor.flatten()):
                wrong.append(f"rank {rank}: {name}")
    return wrong


def unrounded(folder: Path) -> nn.Module:
    """A model with the checkpoint's rounded weights and with activations that are not rounded."""
    model = load_reference(folder)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, ReferenceLinear):
            weight = layer.tensors["weight"].float() * layer.tensors["weight_scale"]
            if "smoothing_factor" in layer.tensors:
                weight = weight / layer.tensors["smoothing_factor"]
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=layer.bias is not None)
            linear.weight.data = weight
            if layer.bias is not None:
                linear.bias.data = layer.bias
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, linear)
    return model


def computed(model: nn.Module, ids: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        logits = [model(torch.tensor([p])).logits[0, :-1].float().log_softmax(-1) for p in ids]
    return torch.cat(logits)


# --- engines ---------------------------------------------------------------------------------------------------------


def serve(request: dict[str, Any]) -> None:
    """In a child process, one for each rank: run the engines one after the other and write what `engines` returns."""
    from vllm import LLM

    answers = []
    for folder, ids in request["models"]:
        llm = LLM(model=folder, max_logprobs=-1, **(engine.DEFAULTS | request["arguments"]))
        answers.append((llm.apply_model(parameters), torch.cat(engine.logprobs_by(llm, ids, vocabulary=True))))
        del llm
        gc.collect()
    torch.save(answers, f"{request['answer']}.{os.environ.get('RANK', '0')}")


def engines(
    models: list[tuple[Path, list[list[int]]]], ranks: int = 1, **arguments: Any
) -> list[tuple[list[dict[str, torch.Tensor]], torch.Tensor]]:
    """For each model the parameters of each rank, and the log-probabilities.

    Two ranks are started as torchrun does it, so that vLLM is imported twice and not three times for each model.
    Errors: engine.EngineFailedError with the output of the child.
    """
    with tempfile.TemporaryDirectory() as temporary:
        if ranks > 1:
            arguments |= {"tensor_parallel_size": ranks, "distributed_executor_backend": "external_launcher"}
        request = {
            "models": [(str(folder), ids) for folder, ids in models], "arguments": arguments,
            "answer": f"{temporary}/answer",
        }  # fmt: skip
        Path(temporary, "request.json").write_text(json.dumps(request))
        environment = engine.small_engine() | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        if ranks > 1:
            environment |= {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(ranks))), "WORLD_SIZE": str(ranks)}
        logs = [Path(temporary, f"log.{rank}") for rank in range(ranks)]
        children = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.tensor_parallel", "--child", f"{temporary}/request.json"],
                env=environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}),
                stdout=log.open("w"), stderr=subprocess.STDOUT,
            )
            for rank, log in enumerate(logs)
        ]  # fmt: skip
        try:
            for child, log in zip(children, logs, strict=True):
                if child.wait(1800) != 0:
                    raise engine.EngineFailedError(log.read_text())
        finally:
            for child in children:
                child.kill()
        answers = [torch.load(f"{request['answer']}.{rank}") for rank in range(ranks)]
    return [([held for (held,), _ in each], each[0][1]) for each in zip(*answers, strict=True)]


def pipeline_parallel(root: Path) -> str:
    """Why vLLM's CPU backend does not run a model in two pipeline stages; "" if it does. The model is not quantised."""
    folder = root / "float"
    tiny_architectures.build("llama").save_pretrained(folder)
    try:
        engine.logprobs(
            folder, [[1, 2, 3, 4]], pipeline_parallel_size=2,
            environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        )  # fmt: skip
    except engine.EngineFailedError as error:
        lines = [line.strip() for line in str(error).splitlines() if "Error" in line]
        return lines[-1].rpartition("] ")[2][:300] if lines else "it ended without a word"
    except subprocess.TimeoutExpired:
        return "no answer in 1800 s"
    return ""


def main() -> None:
    """Serve every scheme with one rank and with two, compare, write the page; exit 1 if a bound is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        serve(json.loads(args.child.read_text()))
        return
    rows, result = "", {}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        models = []
        for weights, activations, overridden in CASES:
            folder = root / f"{weights}-{activations}-{'overrides' if overridden else 'plain'}"
            handmade_checkpoint.checkpoint(folder, weights, activations, **({} if overridden else {"overrides": {}}))
            models.append((folder, prompts(activations)))
        one = engines(models)
        two = engines(models, ranks=2)
        for (folder, ids), (held_one, p), (held_two, q), (weights, activations, overridden) in zip(
            models, one, two, CASES, strict=True
        ):
            wrong = wrong_slices(folder, held_one) + wrong_slices(folder, held_two)
            difference = (p - q).abs()
            rounding = float((p - computed(unrounded(folder), ids)).abs().mean())
            static = activations == "static" and not overridden
            bound = 0.05 if static else 1.25 * 2**0.5 * rounding
            same = int((p.argmax(-1) == q.argmax(-1)).sum())
            good = not wrong and float(difference.mean()) < bound
            good = good and (not static or float(difference.median()) < 1e-4)
            result[folder.name] = {
                "good": good, "wrong_slices": wrong, "median": float(difference.median()),
                "mean": float(difference.mean()), "max": float(difference.max()), "bound": bound, "same_token": same,
                "positions": len(p),
            }  # fmt: skip
            rows += (
                f"| {weights} | {activations} | {'yes' if overridden else 'no'} | {len(wrong) or 'none'} "
                f"| {difference.median():.1e} | {difference.mean():.1e} | {bound:.1e} | {same} of {len(p)} "
                f"| {'yes' if good else '**no**'} |\n"
            )
        refusal = pipeline_parallel(root)
    pipeline = (
        f"vLLM's CPU backend does not run it, of a model that is not quantised either: `{refusal}`"
        if refusal
        else "vLLM's CPU backend runs it for a model that is not quantised."
    )
    reasons = __doc__.partition("Bounds. ")[2].partition("\n\n")[0].replace("\n", " ")
    OUTPUT.write_text(
        f"# Two ranks against one\n\nWritten by `{COMMAND}`; not by hand. {describe()}\n\n"
        "Tensor parallel, float32, a tiny Llama with ignored, smoothed and (where it says so) overridden layers. "
        "Slices: parameters of either rank that are not their part of the checkpoint's tensor, to the last bit. "
        f"Differences are of all log-probabilities, two ranks against one.\n\n{reasons}\n\n"
        "| weights | activations | overrides | wrong slices | median | mean | bound of the mean | same likeliest token "
        f"| within |\n|---|---|---|---|---|---|---|---|---|\n{rows}\n"
        f"Pipeline parallel: {pipeline}\n"
    )
    print(json.dumps({"schemes": result, "pipeline_parallel": refusal or "runs"}))
    sys.exit(0 if all(each["good"] for each in result.values()) else 1)


if __name__ == "__main__":
    main()
