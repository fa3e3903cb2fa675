"""vLLM's linear layers with our method, built in this process, and functions that force one kernel."""

import functools
from typing import Any

import pytest
import torch
from vllm.model_executor.layers import linear as vllm_linear

from tests.helpers import handmade_checkpoint
from vllm_smoothquant.config import SmoothQuantVllmConfig
from vllm_smoothquant.format import int8
from vllm_smoothquant.format.config import CheckpointConfig, Scheme
from vllm_smoothquant.kernels import build, exact

IN = 64

# Fused layers of Llama: vLLM's name of the layer, its shards, their [out], and vLLM's name of each shard.
FUSED: dict[str, tuple[list[str], list[int], list[Any]]] = {
    "qkv_proj": (["q_proj", "k_proj", "v_proj"], [64, 32, 32], ["q", "k", "v"]),
    "gate_up_proj": (["gate_proj", "up_proj"], [48, 48], [0, 1]),
    "o_proj": (["o_proj"], [80], [None]),
}

PACKED = {name: shards for name, (shards, _, _) in FUSED.items()}

PREFIX = "model.layers.0"


def build_layer(name: str, config: CheckpointConfig, dtype: torch.dtype) -> Any:
    """vLLM's layer `name` with our method; its weights are not loaded yet."""
    quant_config = SmoothQuantVllmConfig(config)
    quant_config.packed_modules_mapping = PACKED
    kwargs = {"bias": True, "params_dtype": dtype, "quant_config": quant_config, "prefix": f"{PREFIX}.{name}"}
    if name == "qkv_proj":
        return vllm_linear.QKVParallelLinear(IN, 32, 2, 1, **kwargs)
    if name == "gate_up_proj":
        return vllm_linear.MergedColumnParallelLinear(IN, [48, 48], **kwargs)
    return vllm_linear.RowParallelLinear(IN, 80, **kwargs)


def tensors(name: str, config: CheckpointConfig, limit: int = 127) -> list[dict[str, torch.Tensor]]:
    """Checkpoint tensors of each shard of `name`, integers within +-limit. Shards share the input and its scales."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.rand(IN, generator=generator) * 3 + 0.3
    shards = []
    for shard, rows in zip(*FUSED[name][:2], strict=True):
        scheme = config.scheme(f"{PREFIX}.{shard}")
        assert scheme is not None
        shape = (rows, 1) if scheme.weights.strategy == "channel" else (1,)
        shards.append(
            {
                "weight": torch.randint(-limit, limit + 1, (rows, IN), generator=generator, dtype=torch.int8),
                "weight_scale": torch.rand(shape, generator=generator) * 0.01 + 0.001,
                "bias": torch.randn(rows, generator=generator),
            }
        )
        if not scheme.input_activations.dynamic:
            shards[-1]["input_scale"] = torch.tensor([0.043])
        if f"{PREFIX}.{shard}" in config.smoothed:
            shards[-1]["smoothing_factor"] = factor
    return shards


def load(layer: Any, name: str, shards: list[dict[str, torch.Tensor]]) -> None:
    """Load the tensors of `shards` as vLLM's models do it, and process them."""
    call_loaders(layer, name, shards)
    layer.quant_method.process_weights_after_loading(layer)


def call_loaders(layer: Any, name: str, shards: list[dict[str, torch.Tensor]]) -> None:
    """One call per tensor, with vLLM's name of the shard if the layer is fused."""
    for shard, shard_tensors in zip(FUSED[name][2], shards, strict=True):
        for tensor, value in shard_tensors.items():
            param = getattr(layer, tensor)
            param.weight_loader(param, value, *([] if shard is None else [shard]))


def join(shards: list[dict[str, torch.Tensor]], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The shards as one layer, for linear_reference, with scales per channel."""
    rows = [len(t["weight"]) for t in shards]
    scales = [t["weight_scale"].reshape(-1, 1).expand(n, 1) for t, n in zip(shards, rows, strict=True)]
    shared = {key: shards[0][key] for key in ("input_scale", "smoothing_factor") if key in shards[0]}
    return {
        "weight": torch.cat([t["weight"] for t in shards]),
        "weight_scale": torch.cat(scales),
        "bias": torch.cat([t["bias"] for t in shards]).to(dtype),
        **shared,
    }


def tolerance(x: torch.Tensor, layer: dict[str, torch.Tensor], strategy: str, reference: torch.Tensor) -> torch.Tensor:
    """The largest error of a correct kernel against the reference, [tokens, out]. layer: as `join` returns it.

    Kernels multiply by a reciprocal, and the reference divides. Both round, so x / s differs by about 2**-22 relative,
    and a value that close to a half may round the other way. In 16 bits, kernels round x / f to the model's dtype
    first, and the reference keeps float32: 2**-8 relative. Each such value changes an output by one step of the input
    times its weight, at most 127 steps. The sums are exact. The result is rounded once to the output's dtype, and the
    addition of the bias before that in float32.
    """
    values = x.float() / layer["smoothing_factor"] if "smoothing_factor" in layer else x.float()
    scale = layer["input_scale"] if "input_scale" in layer else int8.input_scale(values, strategy)
    steps = values / scale
    coarse = "smoothing_factor" in layer and x.dtype != torch.float32
    # Kernels measure a dynamic scale on the rounded values, too.
    near = steps.abs() * (2.0**-7 if coarse else 2.0**-21)
    ties = ((steps - steps.floor() - 0.5).abs() <= near).sum(dim=1, keepdim=True)
    # An error of the scale, 2**-8 or in float32 2**-23, scales the whole output.
    relative = torch.finfo(x.dtype).eps * (2 if coarse else 1) + 2.0**-21
    magnitude = (steps.abs().clamp(max=128) @ layer["weight"].float().abs().t()) * scale * layer["weight_scale"].t()
    rounding = reference.float().abs() * relative + magnitude * (2.0**-8 if coarse else 2.0**-22)
    return ties * scale * 127 * layer["weight_scale"].t() + rounding


# Argument of force_kernel -> names that the kernel may have.
CPU_KERNELS = {
    "onednn": ("vllm", "onednn-tensor"),
    "vnni": ("compiled",),
    "avx2": ("compiled",),
    "float32": ("float32-integers",),
}


def compile_for(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile our product for the instruction set `target`; a CPU without it skips the test."""
    best = build.target()
    if best is None or list(build.TARGETS).index(target) < list(build.TARGETS).index(best):
        pytest.skip(f"this CPU has no {target}")  # every x86 CPU of the last ten years has AVX2
    monkeypatch.setattr(build, "target", lambda: target)
    monkeypatch.setattr(build, "why_not", functools.cache(build.why_not.__wrapped__))
    assert build.why_not() is None, build.why_not()


def force_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make select_kernel choose `kernel`, a key of CPU_KERNELS, on any CPU."""
    monkeypatch.setattr(exact, "onednn_is_exact", lambda: kernel == "onednn")
    if kernel in build.TARGETS:
        compile_for(kernel, monkeypatch)
    else:
        monkeypatch.setattr(build, "why_not", lambda: f"the test asks for {kernel}")


CASES = [(w, a) for w in ("channel", "tensor") for a in handmade_checkpoint.ACTIVATIONS]

TOKEN, TENSOR, STATIC = (
    Scheme(input_activations=handmade_checkpoint.ACTIVATIONS[a]) for a in ("token", "tensor", "static")
)

STATIC_SMOOTHED = CheckpointConfig(
    input_activations=handmade_checkpoint.ACTIVATIONS["static"],
    smoothed=frozenset(f"{PREFIX}.{shard}" for shard in FUSED["qkv_proj"][0]),
)
