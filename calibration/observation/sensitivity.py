"""How much the loss depends on the tokens of images, compared with those of text.

    ratio(block) = mean over image tokens of |dL / dz|, divided by the mean over text tokens

z is the block's output, L the mean -log p of the text tokens. A search that weighs each token's error by it spends
accuracy where the loss notices. Source: MBQ, Modality-Balanced Quantization (arXiv 2412.19509, section 4).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..running.forward import forward
from ..running.hooks import hooked
from ..running.modules import decoder_blocks


def image_weights(model: nn.Module, batch: Mapping[str, torch.Tensor], image_token: int) -> dict[str, float]:
    """Decoder block -> ratio, of samples with images. Nothing of the model is changed.

    batch: as images.together makes it.
    """
    outputs: dict[str, torch.Tensor] = {}

    def start(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if outputs:
            return args, kwargs
        hidden = (args[0] if args else kwargs["hidden_states"]).detach().requires_grad_()
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    def keep(name: str, module: nn.Module, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if first.requires_grad:
            outputs[name] = first

    def hooks(blocks: Mapping[str, nn.Module]) -> Iterator[RemovableHandle]:
        for name, block in blocks.items():
            yield block.register_forward_pre_hook(start, with_kwargs=True)
            yield block.register_forward_hook(partial(keep, name))

    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    image = (ids == image_token) & mask
    with torch.enable_grad(), hooked(hooks(_of_decoder(model, ids.shape))):
        logits = forward(model, batch).logits[:, :-1].float()
        targets = torch.where((mask & ~image)[:, 1:], ids[:, 1:], -100).to(logits.device)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        gradients = torch.autograd.grad(loss, list(outputs.values()))
    ratios = {}
    for name, gradient in zip(outputs, gradients, strict=True):
        size = gradient.float().abs().mean(dim=-1).cpu()
        ratios[name] = float(size[image].mean() / size[mask & ~image].mean())
    return ratios


def _of_decoder(model: nn.Module, shape: Sequence[int]) -> dict[str, nn.Module]:
    """The blocks of the list that has the most parameters: not those of a tower."""
    lists: dict[str, dict[str, nn.Module]] = {}
    for name, block in decoder_blocks(model).items():
        lists.setdefault(name.rpartition(".")[0], {})[name] = block
    head = getattr(model, "get_decoder", lambda: model)()
    inside = set(head.modules())
    return max(
        (blocks for blocks in lists.values() if all(block in inside for block in blocks.values())),
        key=lambda blocks: sum(p.numel() for block in blocks.values() for p in block.parameters()),
    )
