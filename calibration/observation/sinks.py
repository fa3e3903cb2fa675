"""Tokens whose activations dwarf all others': attention sinks, which ruin a scale that they share with the rest.

    peak_t = max over channels |X[t, channel]|         a sink: peak_t > TIMES * median over tokens of peak

They are few (mostly the first token, or a line break), and thousands of times larger than the rest in the inputs of a
few layers. Found by one forward pass over a few samples; told in the manifest, so that one sees which layers need a
scale for each token, or none.

Source: Sun et al., Massive Activations in Large Language Models (arXiv 2402.17762).
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            low, high = torch.aminmax(args[0].detach(), dim=-1)
            peaks[name] = torch.maximum(-low, high).float().cpu()

        return model.get_submodule(name).register_forward_pre_hook(hook)

    with hooked(watch(name) for name in names):
        yield peaks


def first_readers(inputs: Iterable[Sequence[str]]) -> dict[str, list[str]]:
    """The first layer that reads a tensor -> all that read it, in `inputs` together."""
    return {names[0]: list(names) for names in inputs if names}


def name_sinks(
    peaks: Mapping[str, torch.Tensor], readers: Mapping[str, list[str]], ids: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:  # fmt: skip
    """For each tensor with a sink: the layers that read it, how many times the median peak its largest is, the tokens.

    peaks: first reader -> float32 [samples, tokens], as `ids`. readers: first_readers.
    first_token: share of the sinks that begin a sample. tokens: the commonest among them, as text.
    """
    found = []
    for name, peak in peaks.items():
        if peak.shape != ids.shape:
            continue  # routed tokens, say: no position to name
        sinks = peak > TIMES * peak.median()
        if sinks.any():
            common = Counter(ids[sinks].tolist()).most_common(3)
            found.append(
                {
                    "layers": readers[name],
                    "times_median": float(peak.max() / peak.median()),
                    "first_token": float(sinks[:, 0].sum() / sinks.sum()),
                    "tokens": [tokenizer.decode([token]) for token, _ in common],
                }
            )
    return found
