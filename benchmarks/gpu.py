"""docs/gpu.md: the speed of INT8 on a GPU, from single products to whole engines. Under 8 minutes on an H100.

    python -m benchmarks.gpu            Llama-3.1-8B's layers, 8 of its 32; for an NVIDIA GPU
    python -m benchmarks.gpu --small    a tiny model and few repeats, to test the script; runs on a CPU, too

Three parts (--parts): `gemm`, a layer's product compared with the measured peaks of memory and of INT8; `layer`, norm
and layer as compiled here, with vLLM's own operators, and with our Triton kernel; `engine`, prefill and decode through
vLLM. All candidates of a comparison are measured in turn, round after round, so that a change of the GPU's clock
affects all of them. Figures are medians. The table is written to --output, if given; the last line printed is JSON.
"""

import argparse
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.machine import describe
from tests.helpers.cuda_stubs import layer_of
from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import CheckpointConfig, InputActivations, Scheme, Weights

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCHEMES = {
    "ours, per channel": Scheme(Weights("channel"), InputActivations("token", dynamic=True)),
    "ours, O1": Scheme(Weights("tensor"), InputActivations("token", dynamic=True)),
    "ours, O2": Scheme(Weights("tensor"), InputActivations("tensor", dynamic=True)),
    "ours, O3": Scheme(Weights("tensor"), InputActivations("tensor", dynamic=False)),
}
SIZES = ("hidden", "intermediate", "heads", "kv_heads", "head_dim", "layers", "vocabulary")
LLAMA = dict(zip(SIZES, (4096, 14336, 32, 8, 128, 8, 32000), strict=True))
TINY = dict(zip(SIZES, (128, 256, 4, 2, 64, 2, 320), strict=True))
# One process, so that the engines can run in turn. FlashInfer is not installed everywhere.
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}
PARTS = ("gemm", "layer", "engine")


def interleaved(candidates: dict[str, Callable[[], Any]], rounds: int, inner: int) -> dict[str, float]:
    """Median seconds of one call of each candidate; `rounds` times in turn, each time the mean of `inner` calls."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for function in candidates.values():
        function()  # compiles and allocates memory
    for _ in range(rounds):
        for name, function in candidates.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(inner):
                function()
            synchronize()
            seconds[name].append((time.perf_counter() - start) / inner)
    return {name: statistics.median(values) for name, values in seconds.items()}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def graphed(function: Callable[[], Any]) -> Callable[[], Any]:
    """`function` as a CUDA graph, as in vLLM: without the time in which Python launches the kernels."""
    if DEVICE != "cuda":
        return function
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def shapes(model: dict[str, int]) -> dict[str, tuple[int, int]]:
    """vLLM's name of a layer -> [out, in]."""
    queries, keys = model["heads"] * model["head_dim"], model["kv_heads"] * model["head_dim"]
    return {
        "qkv_proj": (queries + 2 * keys, model["hidden"]),
        "o_proj": (model["hidden"], queries),
        "gate_up_proj": (2 * model["intermediate"], model["hidden"]),
        "down_proj": (model["hidden"], model["intermediate"]),
    }


def peaks(small: bool) -> dict[str, float]:
    """Bytes a second that a copy reads and writes, and INT8 operations a second of a large product, both measured."""
    size, n = (2**22, 256) if small else (2**30, 8192)
    source, target = (torch.empty(size, dtype=torch.int8, device=DEVICE) for _ in range(2))
    a = torch.randint(-127, 128, (n, n), dtype=torch.int8, device=DEVICE)
    seconds = interleaved({"copy": lambda: target.copy_(source), "mm": lambda: torch._int_mm(a, a.t())}, 5, 3)
    return {"bytes_per_s": 2 * size / seconds["copy"], "int8_ops_per_s": 2 * n**3 / seconds["mm"]}


def gemm(model: dict[str, int], small: bool) -> list[dict[str, Any]]:
    """One layer of each kind as a CUDA graph, in BF16 and in our schemes, quantisation included. First row: peaks."""
    limits = peaks(small)
    rows: list[dict[str, Any]] = [dict(limits)]
    for name, shape in shapes(model).items():
        out_features, in_features = shape
        layers = {key: layer_of(scheme, False, shape, device=DEVICE)[0] for key, scheme in SCHEMES.items()}
        layers["BF16"] = torch.nn.Linear(in_features, out_features, dtype=torch.bfloat16, device=DEVICE)
        for tokens in (1, 4) if small else (1, 16, 128, 2048):
            x = torch.randn(tokens, in_features, dtype=torch.bfloat16, device=DEVICE)
            with batch_of(tokens):
                seconds = interleaved(
                    {key: graphed(partial(layer, x)) for key, layer in layers.items()}, *repeats(small)
                )
            moved = out_features * in_features + tokens * (in_features + 2 * out_features)
            products = 2 * tokens * out_features * in_features
            bound = max(moved / limits["bytes_per_s"], products / limits["int8_ops_per_s"])
            rows.append({"layer": name, "tokens": tokens, "bound": bound, **seconds})
    return rows


@contextmanager
def batch_of(tokens: int) -> Iterator[None]:
    """Give each row a slot, because O2 needs the slots of a batch to capture a graph."""
    from vllm.config import VllmConfig
    from vllm.forward_context import set_forward_context

    slots = {"attention": torch.arange(tokens, device=DEVICE)}
    with set_forward_context(None, VllmConfig(), num_tokens=tokens, slot_mapping=slots):
        yield


def repeats(small: bool) -> tuple[int, int]:
    return (3, 2) if small else (9, 20)


def layer(model: dict[str, int], small: bool) -> list[dict[str, Any]]:
    """RMSNorm and the layer after it, compiled and as a CUDA graph, with different ways to quantise."""
    rows = []
    for name in ("qkv_proj", "gate_up_proj"):
        out_features, in_features = shapes(model)[name]
        ours, static = (
            layer_of(SCHEMES[key], False, (out_features, in_features), device=DEVICE)[0]
            for key in ("ours, per channel", "ours, O3")
        )
        gain = torch.ones(in_features, dtype=torch.bfloat16, device=DEVICE)
        norm = torch.compile(rms_norm(gain), dynamic=True)
        candidates: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            # Outside compiled code the layer uses vLLM's operators: the norm, then one that quantises.
            "vLLM's operators": chain(norm, ours),
            "ours, fused": torch.compile(chain(rms_norm(gain), ours), dynamic=True),
            "ours, static, fused": torch.compile(chain(rms_norm(gain), static), dynamic=True),
        }
        if DEVICE == "cuda":
            candidates["ours, Triton"] = chain(norm, partial(with_triton, ours))
        for tokens in (1, 4) if small else (1, 16, 128, 2048):
            x = torch.randn(tokens, in_features, dtype=torch.bfloat16, device=DEVICE)
            seconds = interleaved({key: graphed(partial(f, x)) for key, f in candidates.items()}, *repeats(small))
            rows.append({"layer": f"norm + {name}", "tokens": tokens, **seconds})
    return rows


def chain(first: Callable[..., Any], second: Callable[..., Any]) -> Callable[[torch.Tensor], Any]:
    return lambda x: second(first(x))


def rms_norm(gain: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    def norm(x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * gain

    return norm


def with_triton(ours: Any, x: torch.Tensor) -> torch.Tensor:
    """The output of the layer `ours`, quantised by our Triton kernel with smoothing factors of one."""
    from vllm_smoothquant.kernels.ops import quantize_per_token

    integers, scale = quantize_per_token(x, torch.ones(x.shape[1], device=DEVICE))
    return ours.quant_method.kernel.multiply(integers, ours.weight, scale, ours.weight_scale, x.dtype, ours.bias)


def write_checkpoints(folder: Path, model: dict[str, int]) -> dict[str, dict[str, Any]]:
    """Row -> arguments of vllm.LLM. The weights are random, because speed does not depend on them."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
        "hidden_size": model["hidden"], "intermediate_size": model["intermediate"],
        "num_hidden_layers": model["layers"],
        "num_attention_heads": model["heads"], "num_key_value_heads": model["kv_heads"], "head_dim": model["head_dim"],
        "vocab_size": model["vocabulary"], "max_position_embeddings": 8192, "rope_theta": 10000.0,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    queries, keys = model["heads"] * model["head_dim"], model["kv_heads"] * model["head_dim"]
    hidden, wide = model["hidden"], model["intermediate"]
    linears = {
        "self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    torch.manual_seed(0)
    embedding = (model["vocabulary"], model["hidden"])
    plain = {name: torch.randn(embedding).bfloat16() * 0.02 for name in ("model.embed_tokens.weight", "lm_head.weight")}
    plain["model.norm.weight"] = torch.ones(model["hidden"], dtype=torch.bfloat16)
    floating: dict[str, torch.Tensor] = {}
    quantised: dict[str, dict[str, torch.Tensor]] = {"channel": {}, "tensor": {}, "static": {}}
    # All layers have the same weights, because drawing random numbers takes longer than anything else here.
    one = {linear: torch.randn(shape, device=DEVICE) * shape[1] ** -0.5 for linear, shape in linears.items()}
    for index in range(model["layers"]):
        for which in ("input_layernorm", "post_attention_layernorm"):
            plain[f"model.layers.{index}.{which}.weight"] = torch.ones(model["hidden"], dtype=torch.bfloat16)
        for linear, weight in one.items():
            name = f"model.layers.{index}.{linear}"
            floating[f"{name}.weight"] = weight.bfloat16().cpu()
            for strategy in ("channel", "tensor"):
                integers, scale = int8.quantize_weight(weight, strategy)
                tensors = {f"{name}.weight": integers.cpu(), f"{name}.weight_scale": scale.cpu()}
                quantised[strategy] |= tensors
                if strategy == "tensor":
                    quantised["static"] |= tensors | {f"{name}.input_scale": torch.tensor([0.03])}

    def write(name: str, tensors: dict[str, torch.Tensor], quantization: dict[str, Any] | None) -> dict[str, Any]:
        target = folder / name
        target.mkdir()
        extra = {} if quantization is None else {"quantization_config": quantization}
        (target / "config.json").write_text(json.dumps(config | extra))
        copies = {key: value.clone() for key, value in (plain | tensors).items()}
        save_file(copies, target / "model.safetensors", metadata={"format": "pt"})
        return {"model": str(target)}

    rows = {"BF16": write("bf16", floating, None)}
    rows["compressed-tensors INT8"] = write("compressed", quantised["channel"], COMPRESSED)
    for name, scheme in SCHEMES.items():
        stored = "static" if not scheme.input_activations.dynamic else scheme.weights.strategy
        ours = CheckpointConfig(scheme.weights, scheme.input_activations, ignore=frozenset(["lm_head"]))
        rows[name] = write(name.replace(", ", "-").replace(" ", "-"), quantised[stored], ours.to_dict())
    if DEVICE == "cuda" and torch.cuda.get_device_capability() >= (8, 9):
        rows["FP8, dynamic"] = {**rows["BF16"], "quantization": "fp8"}
    return rows


COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def engine(model: dict[str, int], small: bool, chosen: list[str] | None) -> list[dict[str, Any]]:
    """Prefill and decode of every row; all engines exist at once and run in turn. A failed row has the reason."""
    for key, value in ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from vllm import LLM, SamplingParams

    answers: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        rows = write_checkpoints(Path(folder), model)
        engines: dict[str, Any] = {}
        for name, arguments in rows.items():
            if chosen and name not in chosen:
                continue
            before = torch.cuda.memory_allocated() if DEVICE == "cuda" else 0
            try:
                engines[name] = LLM(
                    **arguments, dtype="bfloat16", skip_tokenizer_init=True, enforce_eager=small, max_num_seqs=128,
                    max_model_len=256 if small else 4096, enable_prefix_caching=False, max_num_batched_tokens=4096,
                    kv_cache_memory_bytes=2**26 if small else 2**31, gpu_memory_utilization=0.5,
                )  # fmt: skip
            except Exception as error:  # vLLM raises various errors; the other rows are still measured
                answers.append({"row": name, "failed": f"{type(error).__name__}: {error}".splitlines()[0][:200]})
                continue
            memory = (torch.cuda.memory_allocated() - before) / 2**20 if DEVICE == "cuda" else 0.0
            answers.append({"row": name, "MiB, cache included": round(memory)})
        # Name -> (prompts, tokens of each, tokens to decode).
        cases = {"prefill 8": (1, 8, 1), "decode 2": (2, 4, 5)} if small else {
            "prefill 512": (1, 512, 1), "prefill 2048": (1, 2048, 1),
            "decode 1": (1, 16, 33), "decode 16": (16, 16, 33), "decode 128": (128, 16, 33),
        }  # fmt: skip

        def ask(llm: Any, prompts: int, length: int, new: int) -> None:
            sampling = SamplingParams(max_tokens=new, temperature=0.0, ignore_eos=True, detokenize=False)
            ids = [[(7 * i + j) % model["vocabulary"] for j in range(length)] for i in range(prompts)]
            llm.generate([{"prompt_token_ids": prompt} for prompt in ids], sampling, use_tqdm=False)

        def seconds(*case: int) -> dict[str, float]:
            return interleaved({name: partial(ask, llm, *case) for name, llm in engines.items()}, 2 if small else 7, 1)

        for case, (prompts, length, new) in cases.items():
            times = seconds(prompts, length, new)
            if new > 1:
                # The time of each token after the first.
                first = seconds(prompts, length, 1)
                times = {name: (times[name] - first[name]) / (new - 1) for name in times}
            for answer in answers:
                if answer["row"] in times:
                    answer[case] = times[answer["row"]]
        engines.clear()
        gc.collect()
    return answers


def table(rows: list[dict[str, Any]]) -> str:
    """A table in Markdown, seconds as milliseconds."""
    columns = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        return f"{value * 1e3:.3f}" if isinstance(value, float) else str(value)

    lines = [" | ".join(columns), "|".join("---" for _ in columns)]
    lines += [" | ".join(cell(row.get(column, "")) for column in columns) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def report(result: dict[str, Any]) -> str:
    text = f"# On a GPU\n\nWritten by `python -m benchmarks.gpu`; not by hand. {result['machine']}\n"
    text += "\nRandom weights; milliseconds, medians, all candidates measured in turn.\n"
    if "gemm" in result:
        limits, *rows = result["gemm"]
        text += "\n## One layer, quantisation included\n\nMeasured peaks: "
        text += f"{limits['bytes_per_s'] / 1e9:.0f} GB/s, {limits['int8_ops_per_s'] / 1e12:.2f} INT8 TOP/s; "
        text += f"`bound` is what they allow.\n\n{table(rows)}"
    if "layer" in result:
        text += f"\n## Norm and the layer behind it\n\n{table(result['layer'])}"
    if "engine" in result:
        text += (
            f"\n## Engines\n\nPrefill of one prompt; decode: one step of so many requests.\n\n{table(result['engine'])}"
        )
    return text


@contextmanager
def one_rank() -> Iterator[None]:
    """While open, this process is vLLM's only rank, which layers need without an engine."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    backend = "nccl" if DEVICE == "cuda" else "gloo"
    with tempfile.TemporaryDirectory() as folder, set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend=backend)
        ensure_model_parallel_initialized(1, 1)
        yield
        cleanup_dist_env_and_memory()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny model, to test the script")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--rows", help="engines to measure, such as 'BF16;ours, O1'")
    parser.add_argument("--output", type=Path, help="the page to write, such as docs/gpu.md")
    args = parser.parse_args(arguments)
    parts = args.parts.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {args.parts}")
    model = TINY if args.small else LLAMA
    result: dict[str, Any] = {"machine": describe(), "small": args.small}
    import vllm_smoothquant

    vllm_smoothquant.register()
    if {"gemm", "layer"} & set(parts):
        with torch.no_grad(), one_rank():
            for name, part in (("gemm", gemm), ("layer", layer)):
                if name in parts:
                    result[name] = part(model, args.small)
    if "engine" in parts:
        result["engine"] = engine(model, args.small, args.rows.split(";") if args.rows else None)
    text = report(result)
    if args.output:
        args.output.write_text(text)
    print(text)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main()
