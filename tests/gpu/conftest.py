"""These tests need a CUDA device; without one each test is skipped with a reason. How to run them: docs/cuda.md."""

from pathlib import Path

import pytest
import torch

REASON = "needs an NVIDIA GPU: torch.cuda.is_available() is False"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=REASON))
