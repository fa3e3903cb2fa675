"""benchmarks/serving.py without an engine: what it makes of steps and rounds, the floors, the page."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from benchmarks.serving import floors, page, run
from benchmarks.serving.engine import Steps
from benchmarks.serving.floors import Part

LIMITS = {"bytes_per_s": 100.0, "dtype_ops_per_s": 10.0, "int8_ops_per_s": 40.0}


class Worker(Steps):
    """Answers as vLLM's worker does: the model in one call, the sampling in another."""

    def __init__(self, sampled: object) -> None:
        self.sampled = sampled

    def execute_model(self, scheduled: SimpleNamespace) -> None:
        return None

    def sample_tokens(self, grammar: None) -> object:
        return self.sampled


def scheduled(*tokens: int) -> SimpleNamespace:
    return SimpleNamespace(total_num_scheduled_tokens=sum(tokens), num_scheduled_tokens=dict(enumerate(tokens)))


def test_a_step_is_model_and_sampling(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 3.0, 10.0, 12.0, 20.0, 21.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    worker = Worker(sampled="words")
    worker.note_steps()
    worker.execute_model(scheduled(5, 6))
    assert worker.sample_tokens(None) == "words"
    worker.execute_model(scheduled())  # tells which requests have ended: no step
    assert worker.taken_steps() == [[11, 2, 5.0]]
    assert worker.taken_steps() == []


def test_a_worker_that_answers_before_it_is_done_is_refused() -> None:
    worker = Worker(sampled=SimpleNamespace(get_output=None))
    worker.note_steps()
    worker.execute_model(scheduled(1))
    with pytest.raises(TypeError, match="before it is done"):
        worker.sample_tokens(None)


def test_the_prompts_step_is_no_decoding() -> None:
    steps = [(32, 2, 9.0), (2, 2, 1.0), (2, 2, 5.0), (2, 2, 2.0)]
    assert run.seconds_of(steps, (2, 16, 4)) == 2.0
    assert run.seconds_of(steps[:1], (2, 16, 1)) == 9.0


@pytest.mark.parametrize(
    "steps",
    [
        [(16, 1, 9.0), (17, 2, 1.0), (2, 2, 1.0), (2, 2, 1.0)],  # one request came late
        [(32, 2, 9.0), (2, 2, 1.0), (1, 1, 1.0), (1, 1, 1.0)],  # one was preempted
        [(16, 2, 9.0), (16, 2, 9.0), (2, 2, 1.0), (2, 2, 1.0), (2, 2, 1.0)],  # prompts in chunks
    ],
)
def test_other_steps_are_refused(steps: list[tuple[float, ...]]) -> None:
    with pytest.raises(ValueError, match="expected one step for 2 prompts of 16 tokens and 3 more"):
        run.seconds_of(steps, (2, 16, 4))


def test_a_pair_takes_turns() -> None:
    order: list[str] = []

    def arm(name: str) -> object:
        return lambda case: order.append(f"{name}{case[0]}") or len(order)

    found = run.in_turn({name: arm(name) for name in "ab"}, {"one": (1, 1, 1), "two": (2, 1, 1)}, rounds=2)
    assert order == ["a1", "b1", "a2", "b2", "b1", "a1", "b2", "a2"]
    assert found == {"a": {"one": [1, 6], "two": [3, 8]}, "b": {"one": [2, 5], "two": [4, 7]}}


def test_ratios_are_of_one_round() -> None:
    """A machine that grows slower by the round moves both, and no ratio."""
    found = {"ours": {"decode": [1.0, 2.0, 4.0]}, "its": {"decode": [2.0, 4.0, 8.0]}}
    assert page.ratios(found, "ours", "its") == {"decode": [0.5, 0.5, 0.5]}
    assert page.spread([0.5]) == (0.5, 0.5, 0.5)
    assert page.spread([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0)


@pytest.mark.parametrize("tied", [True, False])
def test_parts_are_what_a_step_reads(tmp_path: Path, tied: bool) -> None:
    tensors = {
        "model.embed_tokens.weight": torch.zeros(10, 4), "model.norm.weight": torch.zeros(4),
        "model.layers.0.mlp.up_proj.weight": torch.zeros(6, 4, dtype=torch.int8),
        "model.layers.0.mlp.up_proj.weight_scale": torch.zeros(6, 1),
        "model.layers.0.mlp.down_proj.weight": torch.zeros(4, 6),
    }  # fmt: skip
    if not tied:
        tensors |= {"lm_head.weight": torch.zeros(10, 4, dtype=torch.int8), "lm_head.weight_scale": torch.zeros(10, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": tied}))
    # The head is the table of embeddings, or its own; the table is not read where it is not the head.
    head = Part(False, True, 40, 80) if tied else Part(True, True, 40, 40 + 10 * 4)
    expected = {head, Part(False, False, 24, 2 * (24 + 4)), Part(True, False, 24, 24 + 6 * 4)}
    assert set(floors.parts(tmp_path, itemsize=2)) == expected


@pytest.mark.parametrize("rounded", [True, False])
def test_products_of_4_bits_are_of_integers_if_activations_are_rounded(tmp_path: Path, rounded: bool) -> None:
    layer = "model.layers.0.mlp.up_proj"
    tensors = {
        "model.norm.weight": torch.zeros(4), f"{layer}.weight_packed": torch.zeros(6, 32, dtype=torch.int32),
        f"{layer}.weight_scale": torch.zeros(6, 2),
    }  # fmt: skip
    save_file(tensors, tmp_path / "model.safetensors")
    scheme = {"input_activations": {"num_bits": 8} if rounded else None}
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": scheme}))
    packed, norm = (6 * 256, 4 * 6 * 32 + 2 * 6 * 2), (0, 2 * 4)
    expected = {Part(True, False, *packed), Part(False, False, *norm)}
    together = {Part(False, False, packed[0] + norm[0], packed[1] + norm[1])}
    assert set(floors.parts(tmp_path, itemsize=2)) == (expected if rounded else together)


@pytest.mark.parametrize(
    ("part", "tokens", "requests", "seconds"),
    [
        (Part(True, False, 100, 100), 1, 1, 5.0),  # 200 operations at 40
        (Part(True, False, 100, 1000), 1, 1, 10.0),  # 1000 bytes at 100
        (Part(False, False, 100, 100), 8, 1, 160.0),
        (Part(False, True, 100, 100), 8, 1, 20.0),  # the head sees what the next token is asked of
    ],
)
def test_a_floor_is_the_larger_of_both(part: Part, tokens: int, requests: int, seconds: float) -> None:
    assert floors.floor([part], LIMITS, tokens, requests) == seconds
    assert floors.floor([part, part], LIMITS, tokens, requests) == 2 * seconds


def test_a_case_has_the_floor_of_the_step_it_measures() -> None:
    body, head = Part(True, False, 100, 0), Part(False, True, 10, 0)
    cases = {"decode": (4, 16, 33), "prefill": (1, 16, 1)}
    found = floors.floors([body, head], LIMITS, cases)
    assert found == {"decode": 4 * 5.0 + 4 * 2.0, "prefill": 16 * 5.0 + 2.0}


SHARES = {"aten::few": 0.02, "aten::most": 0.5, "aten::some": 0.1, "aten::more": 0.2, "aten::least": 0.01}


def section(**changes: object) -> dict:
    def row(seconds: float, ratio: float | None, **quality: float) -> dict:
        return {
            "start": 30.2, "memory": {"VmHWM": 2**31, "RssAnon": 2**30}, "weights": 2**28, "kernels": {"vllm": 210},
            "seconds": {"decode 1": [seconds]}, "profile": {"decode 1": SHARES},
            "quality": {"perplexity": 20.0} | quality,
        } | ({} if ratio is None else {"ratios": {"decode 1": [ratio, ratio * 1.25, ratio * 0.75]}})  # fmt: skip

    host = {
        "threads": 3, "cores": [1, 2, 5], "environment": {"LD_PRELOAD": "libfast.so"}, "malloc": "tcmalloc",
        "onednn_is_exact": True,
    }  # fmt: skip
    return {
        "machine": "a machine", "command": "a command", "what": "A model", "speaks": True, "dtype": "bfloat16",
        "native": True, "calibrated": [16, 512], "windows": [4, 512], "kept": False, "rounds": 8, "steps": 32,
        "reference": page.STOCK, "limits": LIMITS, "floors": {arm: {"decode 1": 0.010} for arm in run.ARMS},
        "rows": {
            page.FLOAT: row(0.040, 2.0),
            page.STOCK: row(0.020, None, kl_divergence=0.03) | host,
            "default": row(0.015, 0.75, kl_divergence=0.2, perplexity=21.0),
            "O2": {"failed": "no kernel"},
        },
    } | changes  # fmt: skip


def test_the_page_has_every_figure() -> None:
    text = page.page({"model": {"eager": section()}})
    assert "## A model, eager" in text
    assert "3 threads on cores 1, 2, 5; malloc: tcmalloc; LD_PRELOAD=libfast.so" in text
    assert "| default | 15.00 | 0.750 | 0.656 to 0.844 | 0.38 | 10.00 | +50% |" in text
    assert "| compressed-tensors | 20.00 | 1.000 |  | 0.50 | 10.00 | +100% |" in text
    assert "| default | 30 | 2048 | 1024 | 256 | vllm: 210 | 21.000 | +5.00% | 0.2000 |" in text
    assert "| O2 | failed: no kernel |" in text
    tables = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert tables == [8] * 5 + [4] * 5 + [10] * 6
    named = "aten::most 50%, aten::more 20%, aten::some 10%, aten::few 2%, all else 18%"
    assert f"| decode 1 | default | {named} |" in text
    assert "\n- " not in text  # nothing to warn of


def test_beside_floating_point_there_is_one_ratio() -> None:
    rows = section()["rows"]
    rows[page.FLOAT] |= {key: rows[page.STOCK][key] for key in ("threads", "cores", "environment")}
    rows[page.FLOAT] |= {"malloc": "tcmalloc", "onednn_is_exact": True}
    del rows[page.FLOAT]["ratios"], rows[page.STOCK]
    text = page.page({"model": {"eager": section(rows=rows, reference=page.FLOAT)}})
    assert "|  | ms a step | of floating point | quartiles | floor, ms | over it |" in text


def test_the_page_says_what_a_reader_must_know() -> None:
    rows = section()["rows"]
    rows[page.STOCK] |= {"malloc": "glibc", "onednn_is_exact": False}
    text = page.page({"model": {"eager": section(rows=rows, native=False, kept=True, rounds=2, speaks=False)}})
    notes = [line for line in text.splitlines() if line.startswith("- ")]
    words = ("wrong sums", "emulates bfloat16", "glibc's malloc", "`--keep`", "2 rounds", "random")
    assert len(notes) == len(words)
    assert all(word in note for word, note in zip(words, notes, strict=True))
    # Of a model that does not speak, only how far each arm is from floating point.
    assert "perplexity |" not in text
    assert "| default | 30 | 2048 | 1024 | 256 | vllm: 210 | 0.2000 |" in text
