"""Vision-language models: calibrated with images, towers in floating point, served as the plain reference computes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from tqdm import tqdm

import calibration.from_pretrained  # noqa: F401 (registers the format in transformers)
from calibration.checkpoint.convert import convert
from calibration.checkpoint.verify import verify
from calibration.discovery.linears import NO_TEXT
from calibration.inputs import images
from calibration.inputs.model import load
from calibration.inputs.text import load_samples
from calibration.observation.absmax import watching_absmax
from calibration.observation.observe import BATCH_SIZE, BY_BLOCKS, observe_samples
from calibration.observation.resume import temporary_store
from calibration.options import Options
from calibration.pipeline import calibrate, observe_model, smooth
from calibration.running.forward import forward
from calibration.smoothing.search import _Search
from tests.helpers import tiny_checkpoints, tiny_vision, vision_engine
from tests.helpers.reference import load_reference
from vllm_smoothquant.format.errors import SmoothQuantError

OPTIONS = {"samples": 8, "seq_len": 32, "quiet": True, "rotation": "none"}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return tiny_vision.save_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def folders(tmp_path_factory, pictures) -> Callable[[str], tuple[Path, Path]]:
    """(source, checkpoint) of a family, made by the first call."""
    root = tmp_path_factory.mktemp("vision")

    def get(name: str) -> tuple[Path, Path]:
        source, checkpoint = root / name, root / f"{name}-int8"
        if not checkpoint.exists():
            tiny_vision.save(name, source)
            calibrate(str(source), checkpoint, dataset=str(pictures), alpha="auto", **OPTIONS)
        return source, checkpoint

    return get


def names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def logits(model: torch.nn.Module, folder: Path, picture: int = 0) -> torch.Tensor:
    with torch.no_grad():
        return model(**vision_engine.inputs(folder, picture)).logits


@pytest.mark.parametrize("name", tiny_vision.FAMILIES)
def test_a_family_is_calibrated(name: str, folders) -> None:
    """The decoder in INT8 and the tower not; every file and name that the source has; verify finds no fault."""
    source, checkpoint = folders(name)
    record = json.loads((checkpoint / "smoothquant.json").read_text())
    assert len(record["quantized"]) == 14
    assert all("vision" not in layer and "visual" not in layer for layer in record["quantized"])
    towers = [layer for layer, why in record["kept"].items() if why == NO_TEXT]
    assert len(towers) >= 10
    assert set(towers) | {"lm_head"} >= record["kept"].keys()
    assert record["calibration"]["images"] == OPTIONS["samples"]
    scales = (".weight_scale", ".input_scale", ".smoothing_factor")
    assert {name for name in names(checkpoint) if not name.endswith(scales)} == names(source)
    for file in source.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            assert (checkpoint / file.name).read_bytes() == file.read_bytes(), file.name
    assert verify(checkpoint).faults == []


@pytest.mark.parametrize("name", tiny_vision.FAMILIES)
def test_smoothing_keeps_the_function_with_an_image(name: str, folders, pictures, tmp_path) -> None:
    """Powers of two change no bit of a weight's mantissa; only sums may be rounded elsewhere."""
    source, _ = folders(name)
    smooth(str(source), tmp_path / "smoothed", dataset=str(pictures), alpha=0.5, samples=8, seq_len=32, quiet=True)
    load = transformers.AutoModelForImageTextToText.from_pretrained
    before, after = (logits(load(folder).eval(), source) for folder in (source, tmp_path / "smoothed"))
    assert float((before - after).abs().max()) <= 1e-5 * float(before.abs().max())


@pytest.mark.parametrize("name", ["gemma3-vl", "qwen3-vl", "llava"])
def test_transformers_and_compressed_tensors(name: str, folders, tmp_path) -> None:
    """from_pretrained computes as the reference; a conversion there and back gives the same weights."""
    source, checkpoint = folders(name)
    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    assert torch.equal(logits(model, source), logits(load_reference(checkpoint), source))
    plain = tmp_path / "plain"
    calibrate(str(source), plain, dataset=str(tiny_checkpoints.save_text(tmp_path / "t.jsonl")), alpha=0.5, **OPTIONS)
    convert(plain, tmp_path / "theirs", "compressed-tensors")
    convert(tmp_path / "theirs", tmp_path / "back", "smoothquant")
    first, last = (safe_open(folder / "model.safetensors", "pt") for folder in (plain, tmp_path / "back"))
    assert set(first.keys()) == set(last.keys())
    assert all(torch.equal(first.get_tensor(key), last.get_tensor(key)) for key in first.keys())  # noqa: SIM118


def test_images_reach_the_statistics(folders, pictures, tmp_path) -> None:
    """The largest inputs are those of texts and images; the reference runs the model row by row."""
    source, _ = folders("qwen2-vl")
    calibrate(str(source), tmp_path / "out", dataset=str(pictures), save_stats=tmp_path / "stats", **OPTIONS)
    model = transformers.AutoModelForImageTextToText.from_pretrained(source).eval()
    processor = transformers.AutoProcessor.from_pretrained(source)
    layer, seen = "model.language_model.layers.1.self_attn.q_proj", []
    model.get_submodule(layer).register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().amax((0, 1))))
    text = []
    for line in (pictures / "metadata.jsonl").read_text().splitlines():
        row = json.loads(line)
        content = [{"type": "image"}, {"type": "text", "text": row["text"]}]
        prompt = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
        image = images.Image.open(pictures / row["file_name"])
        tensors = processor(text=[prompt], images=[[image]], return_tensors="pt")
        with torch.no_grad():
            model(**tensors)
        text.append(tensors["input_ids"][0])
    with safe_open(tmp_path / "stats", "pt") as file:
        observed = file.get_tensor(layer)
    rows = torch.stack(seen).amax(0)
    # The texts are observed once more without images, at other positions and in other company.
    assert bool((observed >= rows * (1 - 1e-5)).all())
    assert float((observed > rows * (1 + 1e-5)).float().mean()) < 0.8


def test_a_tower_runs_once_for_each_image(folders, pictures) -> None:
    """Not again for each decoder block; and the ranges are those of whole passes, bit for bit."""
    source, _ = folders("qwen3-vl")
    model = load(str(source))
    options = {"text_column": "text", "samples": 8, "seq_len": 32, "seed": 0, "quiet": True}
    samples = load_samples(str(pictures), model.tokenizer, model=str(source), config=model.model.config, **options)
    names = [name for name, module in model.model.named_modules() if "proj" in name and "language_model" in name]
    runs, network = [], model.model
    network.get_submodule("model.visual.patch_embed").register_forward_pre_hook(lambda module, args: runs.append(1))
    with temporary_store() as store:
        absmax, _, passes = observe_samples(network, names, [], samples, store, quiet=True)
    assert passes == BY_BLOCKS
    assert len(runs) == len(samples.images) + 1  # and once in the trial
    with watching_absmax(network, names) as whole, torch.no_grad():
        for batch in samples.batches(BATCH_SIZE):
            forward(network, batch)
    assert all(torch.equal(absmax[name], whole[name]) for name in names)


def test_image_tokens_are_weighed_by_the_gradient_of_the_loss(folders, pictures, tmp_path) -> None:
    """The reference differentiates the whole model, weights and all, one sample after the other."""
    source, _ = folders("llava")
    options = OPTIONS | {"samples": 3, "alpha": "auto", "modality_weights": "auto", "dataset": str(pictures)}
    observation = observe_model(Options(model=str(source), output=str(tmp_path / "out"), **options))
    token, rows = observation.samples.image_token, observation.samples.images
    model = transformers.AutoModelForImageTextToText.from_pretrained(source).eval().requires_grad_(True)
    blocks = {f"model.language_model.layers.{i}": model.model.language_model.layers[i] for i in range(2)}
    outputs: dict[str, list[torch.Tensor]] = {name: [] for name in blocks}
    for name, block in blocks.items():
        block.register_forward_hook(lambda module, args, z, name=name: outputs[name].append(z) or z.retain_grad())
    losses, count = [], 0
    for row in rows:
        logits, ids = model(**row).logits[0, :-1], row["input_ids"][0, 1:]
        losses.append(torch.nn.functional.cross_entropy(logits[ids != token], ids[ids != token], reduction="sum"))
        count += int((ids != token).sum())
    (sum(losses) / count).backward()
    for name, found in outputs.items():
        image, text = [], []
        for z, row in zip(found, rows, strict=True):
            size, is_image = z.grad.abs().mean(-1)[0], row["input_ids"][0] == token
            image.append(size[is_image])
            text.append(size[~is_image])
        expected = float(torch.cat(image).mean() / torch.cat(text).mean())
        assert observation.image_weights[name] == pytest.approx(expected, rel=1e-3), name
        assert abs(expected - 1) > 0.1, "a weight of 1 would show nothing"
    # In the search a text token counts 1, an image token as the ratio says, and what fills up a row nothing.
    search = _Search(observation, observation.search_batch, {}, (), tqdm(disable=True), False)
    ids = observation.search_batch["input_ids"]
    layer = "model.language_model.layers.1.mlp.up_proj"
    weights = search.weights_of(layer, torch.zeros(*ids.shape, 8))
    mask = observation.search_batch["attention_mask"].bool()
    assert torch.equal(weights == 0, ~mask)
    assert bool((weights[mask & (ids != token)] == 1).all())
    ratio = torch.tensor(observation.image_weights["model.language_model.layers.1"])
    assert torch.allclose(weights[ids == token], ratio)


def test_a_chat_with_images(folders, pictures, tmp_path) -> None:
    """Image parts say where the images are; a column of paths is read relative to its file."""
    source, _ = folders("llava")
    rows = [
        {
            "image": [f"{i}.png", f"{i + 1}.png"],
            "messages": [
                {"role": "user", "content": [
                    {"type": "text", "text": "first "}, {"type": "image"}, {"type": "text", "text": " then "},
                    {"type": "image"},
                ]},
                {"role": "assistant", "content": [{"type": "text", "text": "two pictures, both with a rectangle"}]},
            ],
        }
        for i in range(4)
    ]  # fmt: skip
    (pictures / "chats").mkdir()
    for path in pictures.glob("*.png"):
        shutil.copyfile(path, pictures / "chats" / path.name)
    file = pictures / "chats" / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = calibrate(str(source), tmp_path / "out", dataset=str(file), **OPTIONS | {"samples": 4})
    assert record["calibration"]["images"] == 4
    file.write_text(json.dumps(rows[0] | {"image": ["0.png"]}) + "\n")
    with pytest.raises(SmoothQuantError, match=r"row 1: expected as many image parts .*\(1\), got 2"):
        calibrate(str(source), tmp_path / "two", dataset=str(file), **OPTIONS | {"samples": 1})
    file.write_text(json.dumps(rows[0] | {"image": ["0.png", "none.png"]}) + "\n")
    with pytest.raises(SmoothQuantError, match="row 1: expected an image that can be read"):
        calibrate(str(source), tmp_path / "two", dataset=str(file), **OPTIONS | {"samples": 1})
    with pytest.raises(SmoothQuantError, match="expected 2 rows with images, got 1"):
        calibrate(str(source), tmp_path / "two", dataset=str(file), **OPTIONS | {"samples": 2})
    shutil.rmtree(pictures / "chats")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_what_is_missing_is_said(folders, pictures, tmp_path, capsys) -> None:
    """Text for a model that reads images, images for one that does not, and a processor that cannot be loaded."""
    source, _ = folders("llava")
    options = OPTIONS | {"quiet": False}
    text = tiny_checkpoints.save_text(tmp_path / "text.jsonl")
    calibrate(str(source), tmp_path / "text-alone", dataset=str(text), **options)
    assert "no images, so the ranges of image tokens are not observed" in capsys.readouterr().err
    llama = tiny_checkpoints.save("llama", tmp_path / "llama")
    calibrate(str(llama), tmp_path / "llama-int8", dataset=str(pictures), **options)
    assert "the images of 'image' are left out: the model reads text alone" in capsys.readouterr().err
    bare = tmp_path / "bare"
    shutil.copytree(source, bare)
    (bare / "processor_config.json").unlink()
    with pytest.raises(SmoothQuantError, match="bare: expected a processor for images that transformers can load"):
        calibrate(str(bare), tmp_path / "none", dataset=str(pictures), **options)
    assert not (tmp_path / "none").exists()


def test_samples_of_unequal_length_are_filled_up() -> None:
    """Tokens are padded on the right, everything else is joined; rows with other image shapes are left out."""

    def row(tokens: int, patches: int = 4) -> dict[str, torch.Tensor]:
        ids = torch.arange(1, tokens + 1)[None]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.ones(1, patches)}

    batch = images.together([row(3), row(5), row(4, patches=8)], 100)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 0, 0], [1, 2, 3, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert batch["pixel_values"].shape == (2, 4)
    assert len(images.together([row(3), row(3), row(3)], 5)["input_ids"]) == 2


@pytest.mark.slow
def test_vllm_serves_every_family_with_an_image(folders) -> None:
    """float32, every log-probability of a prompt with an image, against the reference on the same files.

    Both compute the same integers. Sums of attention and norms differ by about 1e-6; a value near a tie of the
    rounding may then be rounded the other way, and change the rest of its prompt by a part of the rounding error. Two
    independent roundings would differ by sqrt(2) times that error, so that half of it is allowed.
    """
    sources, checkpoints = zip(*(folders(name) for name in tiny_vision.FAMILIES), strict=True)
    served = vision_engine.answers(checkpoints)
    for name, source, checkpoint, answer in zip(tiny_vision.FAMILIES, sources, checkpoints, served, strict=True):
        exact = transformers.AutoModelForImageTextToText.from_pretrained(source).eval()
        reference = load_reference(checkpoint)
        for picture, (ids, logprobs) in zip(vision_engine.PICTURES, answer, strict=True):
            tensors = vision_engine.inputs(checkpoint, picture)
            if name == "gemma3-vl":
                # vLLM's attention on a CPU is causal within an image as well, that of the floating-point model too.
                tensors.pop("token_type_ids")
            assert ids == tensors["input_ids"][0].tolist(), name
            with torch.no_grad():
                a, b = (model(**tensors).logits[0, :-1].log_softmax(-1) for model in (reference, exact))
            assert float((a - logprobs).abs().mean()) < 0.5 * float((a - b).abs().mean()), (name, picture)
        same = len(answer[0][0]) == len(answer[1][0])
        assert not same or float((answer[0][1] - answer[1][1]).abs().max()) > 0.1, f"{name}: no image was read"
