"""Sink tokens: a few tokens, mostly the first, whose activations are far larger than those of all others.

    peak_t = max over channels |X[t, channel]|         a sink: peak_t > TIMES * median over tokens of peak

In the inputs of a few layers their peak is thousands of times the median, which ruins a scale that they share with the
rest. One forward pass over a few samples finds them. The manifest names them and the layers, because these layers need
a scale for each token, or none.

Source: Sun et al., Massive Activations in Large Language Models (arXiv 2402.17762).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..running.hooks import hooked

TIMES = 20
SAMPLES = 4


@contextmanager
def watching_peaks(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """While open, a forward of the linear layers `names` puts the peak of every token into the yielded dict."""
    peaks: dict[str, torch.Tensor] = {}

    def hook(name: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        low, high = torch.aminmax(args[0].detach(), dim=-1)
        peaks[name] = torch.maximum(-low, high).float().cpu()

    with hooked(model.get_submodule(name).register_forward_pre_hook(partial(hook, name)) for name in names):
        yield peaks


def name_sinks(
    peaks: Mapping[str, torch.Tensor], readers: Mapping[str, list[str]], ids: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:  # fmt: skip
    """For each tensor with a sink: the layers that read it, its largest peak as a multiple of the median, the tokens.

    peaks: first reader of a tensor -> float32 [samples, tokens], as `ids`. readers: first reader -> all readers.
    first_token: share of the sinks that begin a sample. tokens: the most common sinks, as text.
    """
    tensors = []
    for name, peak in peaks.items():
        median = peak.median()
        # Routed tokens have no position, and to a median of zero nothing can be compared.
        if peak.shape != ids.shape or not median or not (sinks := peak > TIMES * median).any():
            continue
        common = Counter(ids[sinks].tolist()).most_common(3)
        tensors.append(
            {
                "layers": readers[name],
                # Divided in float64: in float32 it overflows where the median is almost zero, and JSON has no infinity.
                "times_median": float(peak.max()) / float(median),
                "first_token": float(sinks[:, 0].sum() / sinks.sum()),
                "tokens": [tokenizer.decode([token]) for token, _ in common],
            }
        )
    return tensors
