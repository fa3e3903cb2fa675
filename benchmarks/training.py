"""The training loop of the small models that benchmarks train here: AdamW, warm-up and cosine, clipped gradients."""

import sys
from collections.abc import Iterable

import torch
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup

WARM_UP = 1 / 20  # of the steps
LARGEST_GRADIENT = 1.0


def fit(
    parameters: Iterable[torch.nn.Parameter], losses: Iterable[torch.Tensor], steps: int, learning_rate: float,
    weight_decay: float,
) -> None:  # fmt: skip
    """Take `steps` steps. losses: computes the loss of the next batch when it is asked for it."""
    trained = list(parameters)
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(steps * WARM_UP), steps)
    bar = tqdm(range(steps), desc="train", file=sys.stderr, mininterval=10)
    for _, loss in zip(bar, losses, strict=False):
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, LARGEST_GRADIENT)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
