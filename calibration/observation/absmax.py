"""Watch the inputs of linear layers: absmax of every input channel over all calibration tokens.

    absmax_j = max over tokens |X[token, j]|        float32 [in], the max|X_j| of eq. 4 (Xiao et al., 2022)

Everything later needs no second pass: a smoothed layer's absmax is absmax / smoothing_factor, and its static per-tensor
range is the largest of those.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from tqdm import tqdm

from vllm_smoothquant.format.errors import SmoothQuantError

from ..running.modules import decoder_of
from ..running.precision import fast_arithmetic


@contextmanager
def watching_absmax(model: torch.nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """While open, every forward of the linear layers `names` updates the yielded dict: name -> float32 [in]."""
    absmax: dict[str, torch.Tensor] = {}
    # q, k and v read one and the same tensor: its absmax is computed once. The tensor itself is held, not its id,
    # because an id can be used again once its tensor is gone.
    last: list[torch.Tensor] = []

    def watch(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            x = args[0]
            if not last or last[0] is not x:
                rows = x.detach().reshape(-1, x.shape[-1])
                # No |x| the size of x; and aminmax over rows takes four times as long as the two.
                last[:] = [x, torch.maximum(rows.amax(dim=0), -rows.amin(dim=0)).to(torch.float32)]
            absmax[name] = torch.maximum(absmax[name], last[1]) if name in absmax else last[1]

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(name) for name in names]
    try:
        yield absmax
    finally:
        for handle in handles:
            handle.remove()
        last.clear()


def observe(
    model: torch.nn.Module, names: list[str], input_ids: torch.Tensor, *, batch_size: int = 4, quiet: bool = False
) -> dict[str, torch.Tensor]:
    """Run the decoder over `input_ids` [samples, seq_len]; returns name -> absmax float32 [in] of each of `names`.

    The language-model head is not run unless it is to be observed: on a small model it is a fifth of the work.
    Errors (SmoothQuantError): a layer no sample reached, or NaN / infinity in its input.
    """
    runs = decoder_of(model, names)
    device = next(model.parameters()).device
    with torch.no_grad(), fast_arithmetic(model), watching_absmax(model, names) as absmax:
        bar = tqdm(total=len(input_ids), desc="observe", unit="sample", disable=True if quiet else None)
        for batch in input_ids.split(batch_size):
            runs(input_ids=batch.to(device), use_cache=False)
            bar.update(len(batch))
        bar.close()
    return checked(names, absmax)


def checked(names: Iterable[str], absmax: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`absmax` of `names`; SmoothQuantError where no sample reached a layer, or its input was NaN or infinite."""
    for name in names:
        if name not in absmax:
            raise SmoothQuantError(
                name,
                expected="every linear layer to be reached by calibration",
                got="no input seen",
                do="give more or other calibration text, or leave the layer out with --ignore",
            )
        if not torch.isfinite(absmax[name]).all():
            raise SmoothQuantError(
                f"{name}: input", expected="finite activations", got="NaN or infinity",
                do="check the model in this dtype: it overflows on the calibration text",
            )  # fmt: skip
    return {name: absmax[name].clone() for name in names}
