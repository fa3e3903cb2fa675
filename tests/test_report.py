"""`smoothquant report`: one file that loads nothing, shows what the checkpoint contains, and escapes all of it.

benchmarks/screenshots.py opens the page in a real browser.
"""

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from calibration import __main__ as cli
from calibration.checkpoint import channel_statistics
from calibration.checkpoint.verify import verify
from calibration.options import Options
from calibration.pipeline import calibrate, observe_model
from calibration.report import figures
from calibration.report.page import MAX_BYTES, report
from calibration.smoothing.plan import make_plan
from tests.helpers import tiny_checkpoints
from vllm_smoothquant.format.errors import SmoothQuantError
from vllm_smoothquant.format.files import MANIFEST

HOSTILE = "</script><script>alert(1)</script><img src=https://example.org/x onerror=alert(1)>{{ 7 * 7 }}'\"&amp;"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint with everything that a page can show: alphas and errors of a search, static scales, fallbacks."""
    root = tmp_path_factory.mktemp("report")
    options = {"activations": "static", "alpha": "auto", "max_fallback": 0.2}
    model, text = tiny_checkpoints.save("llama", root / "model"), tiny_checkpoints.save_text(root / "text.jsonl")
    size = {"samples": 8, "seq_len": 32, "rotation": "none", "quiet": True}
    calibrate(str(model), root / "out", dataset=str(text), **size | options)
    return root / "out"


@pytest.fixture
def copy(checkpoint, tmp_path):
    return Path(shutil.copytree(checkpoint, tmp_path / "copy"))


class Page(HTMLParser):
    """tags: every (name, attributes). text: the visible text. scripts: the content of script tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.text, self.scripts, self.inside = [], "", [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag if tag in ("script", "style") else ""

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        elif not self.inside:
            self.text += data


def page(folder: Path, output: Path, **options) -> str:
    result = report(folder, output, **options)
    html = output.read_text()
    assert result["bytes"] == len(html.encode()) < MAX_BYTES
    return html


def test_the_page_is_one_file_and_shows_the_manifest(checkpoint, tmp_path):
    html = page(checkpoint, tmp_path / "report.html", png=tmp_path / "png")
    shown = Page(html)
    for tag, attributes in shown.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form") or attributes.get("rel") == "icon"
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, attributes)
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"@import|url\(", html)
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import)\s*\(", html)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    for words in (
        manifest["source"]["model"], *manifest["quantized"], *manifest["kept"].values(), *manifest["fallen_back"],
        *manifest["source"]["sha256"].values(), *(g["source"] for g in manifest["groups"]), *manifest["versions"],
    ):  # fmt: skip
        assert words in shown.text, words
    names = {f.stem for f in (tmp_path / "png").iterdir()}
    assert names == {"overview", "alphas", "errors", "channels-0", "channels-1", "channels-2", "channels-3"}
    for file in (tmp_path / "png").iterdir():
        with Image.open(file) as image:
            assert len(np.unique(np.asarray(image.convert("L")))) > 10, f"{file.name} is empty"


def test_hostile_text_is_escaped(copy, tmp_path):
    """HOSTILE in every string of the manifest and of the statistics, and a hostile folder name."""

    def spoiled(value, key=""):
        if isinstance(value, dict):
            # Keys that the page looks up must stay; keys that it shows may be any text.
            fixed = key not in ("kept", "fallen_back", "versions", "errors", "alphas", "simulated_perplexity")
            return {k if fixed else k + HOSTILE: spoiled(v, k) for k, v in value.items()}
        if isinstance(value, list):
            return [spoiled(v) for v in value]
        return value + HOSTILE if isinstance(value, str) else value

    path = copy / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["sinks"] = [{"layers": ["a"], "times_median": 30.0, "first_token": 0.5, "tokens": ["<b>"]}]
    config = manifest.pop("quantization_config")
    path.write_text(json.dumps(spoiled(manifest) | {"quantization_config": config}))
    channels = channel_statistics.read(copy)
    channel_statistics.write(copy, [replace(c, layers=(c.layers[0] + HOSTILE,)) for c in channels])
    hostile = copy.rename(tmp_path / "<img src=x onerror=alert(1)>")
    html = page(hostile, tmp_path / "report.html")
    assert "https://example.org" in html
    assert "<img src=https" not in html
    assert "</script><script>alert" not in html
    shown = Page(html)
    assert "{{ 7 * 7 }}" in shown.text
    assert [tag for tag, _ in shown.tags].count("script") == len(shown.scripts) == 2
    assert all(a.get("src", "").startswith("data:") for tag, a in shown.tags if tag == "img")


def test_statistics_equal_the_observation(tmp_path):
    """The file's values, compared with the model, the observed maxima and the plan."""
    model, text = tiny_checkpoints.save("llama", tmp_path / "model"), tiny_checkpoints.save_text(tmp_path / "t.jsonl")
    options = Options(model=str(model), dataset=str(text), samples=4, seq_len=32, quiet=True)
    observation = observe_model(options)
    plan = make_plan(observation, options)
    channel_statistics.write(tmp_path, channel_statistics.collect(observation, plan))
    channels = {c.layers[0]: c for c in channel_statistics.read(tmp_path)}
    assert len(channels) == 8
    query = "model.layers.1.self_attn.q_proj"
    assert channels[query].layers == tuple(f"model.layers.1.self_attn.{x}_proj" for x in "qkv")
    c = channels["model.layers.1.mlp.down_proj"]
    weight = observation.model.get_submodule(c.layers[0]).weight
    factor = plan.smoothing.input_factor(c.layers[0])
    expected = {
        "activations": observation.absmax[c.layers[0]],
        "weights": weight.abs().amax(0),
        "factor": factor,
        "smoothed": (weight.abs() * factor).amax(0),
    }
    for key, values in expected.items():
        # The file has eight bits of precision.
        torch.testing.assert_close(torch.from_numpy(getattr(c, key)), values.detach(), rtol=2**-8, atol=0)


def test_vllm_and_transformers_do_not_take_the_statistics_for_weights(checkpoint):
    """They look for other suffixes; verify checks the file by its hash."""
    assert channel_statistics.STATISTICS in json.loads((checkpoint / MANIFEST).read_text())["files"]
    assert not verify(checkpoint).faults
    assert not channel_statistics.STATISTICS.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".json"))


def test_the_same_calibration_writes_the_same_statistics(tmp_path):
    channels = [channel_statistics.Channels(("a",), *(np.arange(1, 9, dtype=np.float32),) * 4)]
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        channel_statistics.write(tmp_path / name, channels)
    first, second = ((tmp_path / name / channel_statistics.STATISTICS).read_bytes() for name in ("first", "second"))
    assert first == second


def test_without_statistics_the_page_says_so(copy, tmp_path):
    (copy / channel_statistics.STATISTICS).unlink()
    assert "no channel statistics" in Page(page(copy, tmp_path / "report.html")).text


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not a zip", b"\x80\x04N."])
def test_damaged_statistics_are_an_error(copy, tmp_path, damage):
    (copy / channel_statistics.STATISTICS).write_bytes(damage)
    with pytest.raises(SmoothQuantError, match=re.escape(channel_statistics.STATISTICS)):
        report(copy, tmp_path / "report.html")
    assert [p.name for p in tmp_path.iterdir()] == ["copy"]


@pytest.mark.parametrize(
    "change", [{"groups": 3}, {"gate": None}, {"sinks": [{}]}, {"kept": "x"}, {"alphas": {"a": "b"}}]
)
def test_a_manifest_with_wrong_types_is_an_error_in_one_line(copy, tmp_path, capsys, change):
    manifest = json.loads((copy / MANIFEST).read_text()) | change
    (copy / MANIFEST).write_text(json.dumps(manifest))
    assert cli.main(["report", str(copy), "-o", str(tmp_path / "report.html")]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "verify" in error
    assert not (tmp_path / "report.html").exists()


def test_an_evaluation_is_shown(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("calibration.report.page.draw", lambda facts, channels: {})
    row = {"model": "a/b", "perplexity": 12.3456, "baseline": False, "perplexity_change": 0.01234}
    (tmp_path / "e.json").write_text(json.dumps({"models": [row, {"model": "c", "perplexity": 11.0}]}))
    text = Page(page(checkpoint, tmp_path / "report.html", evaluation=tmp_path / "e.json")).text
    assert "12.346" in text
    assert "+1.23%" in text


def test_a_large_model_stays_under_five_megabytes(checkpoint, tmp_path, monkeypatch):
    """80 blocks of 8192 random channels, which do not compress, take a quarter: a block has four such inputs."""
    rng = np.random.default_rng(0)
    names = [(f"model.layers.{i}.mlp.up_proj",) for i in range(80)]
    channels = [channel_statistics.Channels(n, *rng.lognormal(size=(4, 8192)).astype(np.float32)) for n in names]
    monkeypatch.setattr(channel_statistics, "read", lambda folder: channels)
    assert report(checkpoint, tmp_path / "report.html")["bytes"] < MAX_BYTES / 4


def test_outliers_and_names_of_figures():
    quiet, loud = np.ones(64, np.float32), np.ones(64, np.float32)
    loud[3] = 1375
    assert figures.outlier_ratio(loud) == 1375
    assert figures.outlier_ratio(quiet) == 1
    assert figures.kind_of(("model.layers.11.mlp.gate_proj", "model.layers.11.mlp.up_proj")) == "mlp.gate_proj, up_proj"
    assert figures.block_label(("model.layers.11.mlp.down_proj",)) == "11"
    assert figures.joined(np.arange(10.0), 4).tolist() == [2, 5, 8, 9]
