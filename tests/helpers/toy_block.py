"""A small decoder block to which a test can add a reader of the norm's output."""

from collections.abc import Callable

import torch
from torch import nn


def nothing(block: "Block", normed: torch.Tensor) -> float:
    return 0.0


class Block(nn.Module):
    """x + down(relu(up(norm(x)))) + extra(block, norm(x)), with a linear layer `spare` if `extra` mentions one."""

    def __init__(self, width: int, extra: Callable) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        if "spare" in extra.__code__.co_names:
            self.spare = nn.Linear(width, width)
        self.extra = extra

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm(x)
        y = self.extra(self, normed)
        return x + self.down(torch.relu(self.up(normed))) + y


class Toy(nn.Module):
    """Embedding, two blocks, a head. Called like a transformers model; returns logits [batch, tokens, 32]."""

    def __init__(self, extra: Callable = nothing, width: int = 16, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Embedding(32, width)
            self.layers = nn.ModuleList(Block(width, extra) for _ in range(2))
            self.head = nn.Linear(width, 32)
            for block in self.layers:
                nn.init.uniform_(block.norm.weight, 0.5, 8)
                nn.init.normal_(block.norm.bias)
        self.eval()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> torch.Tensor:
        x = self.embed(input_ids)
        for block in self.layers:
            x = block(x)
        return self.head(x)


def tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 32, (2, 6), generator=torch.Generator().manual_seed(seed))
