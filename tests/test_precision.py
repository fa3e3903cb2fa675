"""Models run in float32 whatever their dtype (calibration/running/precision.py), also those that look at dtypes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from calibration.checkpoint.verify import verify
from calibration.pipeline import calibrate
from calibration.running import precision
from calibration.running.modules import decoder_blocks
from tests.helpers import tiny_checkpoints, tiny_vision


class Tower(nn.Module):
    """Its code rounds a patch to the dtype of the layer that reads it, as those of InternVL and DINO do."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(x.to(self.projection.weight.dtype))


class Model(nn.Module):
    """Its code rounds the last hidden states to the dtype of its head, as that of Mamba does."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 8)
        self.tower = Tower()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(2)])
        self.head = nn.Linear(8, 16, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        x = x + self.tower(x / 3)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x.to(self.head.weight.dtype))


@pytest.mark.parametrize("tied", [False, True])
def test_code_that_looks_at_a_dtype_sees_float32(tied: bool) -> None:
    torch.manual_seed(0)
    model, ids = Model(tied=tied).to(torch.bfloat16), torch.arange(6)[None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = Model(tied=tied)
    copy.load_state_dict(before)
    dtypes = []

    def note(module: nn.Module, args: object, output: object) -> None:
        dtypes.append([next(block.parameters()).dtype for block in model.blocks])

    with torch.no_grad(), precision.in_float32(model, lambda name: precision.plain_parameters(model, name)):
        for block in decoder_blocks(model).values():
            block.register_forward_hook(note, prepend=True)
        assert torch.equal(model(ids), copy(ids))
    # One block at a time, because together they may not fit into memory.
    assert dtypes == [[torch.float32, torch.bfloat16], [torch.bfloat16, torch.float32]]
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, before[name]), name


def test_what_is_left_out_keeps_its_dtype() -> None:
    model = Model(tied=False).to(torch.bfloat16)
    change = precision.plain_parameters
    with torch.no_grad(), precision.in_float32(model, lambda name: change(model, name), without=[model.blocks[0]]):
        seen: list[torch.dtype] = []
        model.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(module[0].weight.dtype))
        with pytest.raises(RuntimeError, match="dtype"):  # the block has 16 bits and gets float32
            model(torch.arange(6)[None])
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("native", [True, False])
def test_a_mamba_in_bfloat16_is_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """native: whether the CPU multiplies bfloat16; without, all of calibration runs in float32."""
    monkeypatch.setitem(precision._NATIVE_ON_CPU, torch.bfloat16, lambda: native)
    source = tiny_checkpoints.save("mamba2", tmp_path / "source", torch.bfloat16)
    text = tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    calibrate(str(source), tmp_path / "int8", dataset=str(text), samples=4, seq_len=32, quiet=True)
    assert not verify(tmp_path / "int8", str(source)).faults


@pytest.mark.parametrize("family", ["internvl", "qwen2.5-vl"])
def test_images_in_bfloat16_are_observed_where_bfloat16_is_emulated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """Their towers round the pixels to the dtype of the layer that reads them."""
    monkeypatch.setitem(precision._NATIVE_ON_CPU, torch.bfloat16, lambda: False)
    model = tiny_vision.build(family).to(torch.bfloat16)
    source = tiny_vision.save_folder(family, model, tiny_vision.processor(family), tmp_path / "source")
    pictures = tiny_vision.save_pictures(tmp_path / "pictures")
    calibrate(str(source), tmp_path / "int8", dataset=str(pictures), samples=4, seq_len=128, quiet=True)
    assert not verify(tmp_path / "int8", str(source)).faults
