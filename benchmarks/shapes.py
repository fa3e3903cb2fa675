"""docs/vision.md: INT8 on a vision-language model that was trained here, so that accuracy means something.

`python -m benchmarks.shapes`. A LLaVA of 4 + 4 layers learns, in minutes on one core, to say which shape an image
shows, in which colour and where. Images and questions are made by this script; those for calibration, and those for the
score, are seen by no training step. Each recipe's checkpoint is served by vLLM's CPU backend in float32, greedily: the
share of right answers, its standard error over the questions, and of how many questions the answer differs from
floating point's. KL from floating point over the tokens of the right answers is the reference's (tests/helpers), with
its standard error over the questions. The last line printed is JSON.
"""

import itertools
import json
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image, ImageDraw

from benchmarks import training
from benchmarks.machine import describe
from calibration.evaluation.columns import standard_error
from calibration.pipeline import calibrate
from demo import assets
from tests.helpers import engine, tiny_vision
from tests.helpers.reference import load_reference

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "benchmarks" / "results" / "shapes.json"
OUTPUT = ROOT / "docs" / "vision.md"
STEPS, BATCH, LEARNING_RATE = 1200, 48, 1.5e-3
SIZE, PATCH = 32, 8
QUESTIONS, SAMPLES, COMPARED = 1000, 64, 300
COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 70, 220), "yellow": (230, 210, 50)}
SHAPES = ("circle", "square", "triangle", "cross")
PLACES = ("left", "right")
OUTLIERS, TIMES = (5, 33, 71, 140), 24.0
TOWER: dict[str, Any] = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": SIZE,
    "patch_size": PATCH, "projection_dim": 96, "model_type": "clip_vision_model",
}  # fmt: skip
TEXT: dict[str, Any] = tiny_vision.TEXT | {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6, "head_dim": 32,
    "num_key_value_heads": 2, "model_type": "llama", "max_position_embeddings": 128,
}  # fmt: skip
# Row -> (whether images are given, options of calibrate).
ROWS: dict[str, tuple[bool, dict[str, Any]]] = {
    "no smoothing, text alone": (False, {"no_smoothing": True}),
    "no smoothing": (True, {"no_smoothing": True}),
    "default, text alone": (False, {}),
    "default": (True, {}),
    "auto": (True, {"alpha": "auto"}),
    "auto, image tokens weighed by the loss": (True, {"alpha": "auto", "modality_weights": "auto"}),
    "static, text alone": (False, {"activations": "static"}),
    "static": (True, {"activations": "static"}),
    "level O3, text alone": (False, {"level": "O3", "alpha": "auto"}),
    "level O3": (True, {"level": "O3", "alpha": "auto"}),
    "level O3, image tokens weighed by the loss": (
        True, {"level": "O3", "alpha": "auto", "modality_weights": "auto"},
    ),
    "4 bits, groups of 32": (True, {"bits": 4, "group_size": 32}),
}  # fmt: skip
HEADER = """# A vision-language model that was trained

Written by `python -m benchmarks.shapes`; not by hand. {machine}

A LLaVA (CLIP tower of 4 layers, Llama of 4 layers, {parameters:.1f} million parameters) was trained here for {steps}
steps to name the shape, the colour and the place in images that a script draws. Then {outliers} channels of each norm
of the decoder were made {times:.0f} times larger and what reads them smaller, which keeps the function and gives it the
outliers that trained language models have. Calibrated on {samples} images with their answers ("text alone": on the same
questions and answers without images), scored on {questions} other questions through vLLM in float32.

| | right answers | answers that differ from floating point's | KL, millionths of a nat |
|---|---|---|---|
"""


def example(seed: int) -> tuple[Image.Image, str, str]:
    """(image, question, answer) number `seed`."""
    rng = random.Random(seed)
    colour, shape, place = rng.choice(list(COLOURS)), rng.choice(SHAPES), rng.choice(PLACES)
    grey = rng.randint(0, 90)
    image = Image.new("RGB", (SIZE, SIZE), (grey, grey, grey))
    size = rng.randint(8, 13)
    left = rng.randint(0, SIZE // 2 - size - 1) + (SIZE // 2 if place == "right" else 0)
    top = rng.randint(0, SIZE - size - 1)
    draw, fill = ImageDraw.Draw(image), tuple(c + rng.randint(-20, 20) for c in COLOURS[colour])
    box = (left, top, left + size, top + size)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([(left, top + size), (left + size, top + size), (left + size // 2, top)], fill=fill)
    else:
        third = size // 3
        draw.rectangle((left, top + third, left + size, top + size - third), fill=fill)
        draw.rectangle((left + third, top, left + size - third, top + size), fill=fill)
    question, answer = rng.choice((("which shape", shape), ("which colour", colour), ("which side", place)))
    return image, question, answer


def processor() -> Any:
    size = {"height": SIZE, "width": SIZE}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=size)
    made = transformers.LlavaProcessor(
        images, tiny_vision.tokenizer(), patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )  # fmt: skip
    made.chat_template = tiny_vision.TEMPLATE.format(image="<image>")
    return made


def messages(question: str, answer: str | None, image: bool = True) -> list[dict[str, Any]]:
    parts = [{"type": "image"}] * image + [{"type": "text", "text": question}]
    asked = [{"role": "user", "content": parts}]
    return asked if answer is None else [*asked, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


def model_dir() -> Path:
    """The folder of the trained model."""
    target = assets.CACHE / f"LLaVA-shapes-{STEPS}"
    if not target.is_dir():
        with assets.made(target) as folder:
            torch.manual_seed(0)
            config = transformers.LlavaConfig(
                text_config=TEXT, vision_config=TOWER, image_token_index=tiny_vision.ID["<image>"], image_seq_length=16
            )
            model = train(transformers.LlavaForConditionalGeneration(config))
            insert_outliers(model)
            tiny_vision.save_folder("llava", model, processor(), folder)
    return target


def train(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    training.fit(model.parameters(), losses(model), STEPS, LEARNING_RATE, weight_decay=0.05)
    return model.eval()


def losses(model: transformers.PreTrainedModel) -> Iterator[torch.Tensor]:
    made = processor()
    for step in itertools.count():
        examples = [example(10_000_000 + step * BATCH + i) for i in range(BATCH)]
        texts = [made.apply_chat_template(messages(q, a), tokenize=False) for _, q, a in examples]
        inputs = made(
            text=texts, images=[[image] for image, _, _ in examples], return_tensors="pt", padding=True,
            padding_side="right",
        )  # fmt: skip
        # Only the answer is learnt: what follows the last ": ".
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for row, (_, _, answer) in zip(labels, examples, strict=True):
            row[: int((row != -100).sum()) - len(answer) - 1] = -100  # a byte is a token; the end is one more
        yield model(**inputs, labels=labels).loss


def insert_outliers(model: Any) -> None:
    """Make channels of the norms larger and the columns that read them smaller: the function stays."""
    with torch.no_grad():
        for block in model.model.language_model.layers:
            attention, mlp = block.self_attn, block.mlp
            for norm, readers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[list(OUTLIERS)] *= TIMES
                for reader in readers:
                    reader.weight[:, list(OUTLIERS)] /= TIMES


def save_examples(folder: Path, first: int, count: int) -> Path:
    """Images with chats, as `datasets` reads a folder of images."""
    folder.mkdir()
    rows = []
    for number in range(count):
        image, question, answer = example(first + number)
        image.save(folder / f"{number}.png")
        rows.append({"file_name": f"{number}.png", "messages": messages(question, answer)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def save_texts(path: Path, first: int, count: int) -> Path:
    rows = [messages(q, a, image=False) for _, q, a in map(example, range(first, first + count))]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def answers(folder: Path) -> list[str]:
    """What the model in `folder` answers, by vLLM in a process of its own."""
    return engine.elsewhere(_answers, [str(folder)], {"VLLM_LOGGING_LEVEL": "ERROR"})[0]


def _answers(folder: str) -> list[str]:
    from vllm import LLM, SamplingParams

    made = transformers.AutoProcessor.from_pretrained(folder)
    llm = LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=16,
        limit_mm_per_prompt={"image": 1}, enable_prefix_caching=False,
    )  # fmt: skip
    requests = []
    for number in range(QUESTIONS):
        image, question, _ = example(number)
        text = made.apply_chat_template(messages(question, None), add_generation_prompt=True, tokenize=False)
        requests.append({"prompt": text, "multi_modal_data": {"image": image}})
    sampling = SamplingParams(max_tokens=10, temperature=0.0, stop=["\n"], skip_special_tokens=False)
    outputs = llm.generate(requests, sampling, use_tqdm=False)
    return [o.outputs[0].text.partition("\n")[0].strip() for o in outputs]


def divergences(model: torch.nn.Module, exact: torch.nn.Module) -> list[float]:
    """KL of `model` from `exact` in nats per token of the right answer, for each of some questions."""
    made, found = processor(), []
    for number in range(COMPARED):
        image, question, answer = example(number)
        text = made.apply_chat_template(messages(question, answer), tokenize=False)
        inputs = made(text=[text], images=[[image]], return_tensors="pt")
        last = slice(-len(answer) - 2, -1)  # what predicts the answer and its end
        with torch.no_grad():
            p, q = (net(**inputs).logits[0, last].log_softmax(-1) for net in (exact, model))
        found.append(float((p.exp() * (p - q)).sum(-1).mean()))
    return found


def page(figures: dict[str, Any]) -> str:
    text = HEADER.format(
        machine=figures["machine"], steps=STEPS, outliers=len(OUTLIERS), times=TIMES, samples=SAMPLES,
        questions=QUESTIONS, parameters=figures["parameters"] / 1e6,
    )  # fmt: skip
    for row, (right, differs, *kl) in figures["rows"].items():
        error = (right * (1 - right) / QUESTIONS) ** 0.5
        cells = f"{differs:.1%} | {1e6 * kl[0]:.2f} ± {1e6 * kl[1]:.2f}" if kl else "|"
        text += f"| {row} | {right:.1%} ± {error:.1%} | {cells} |\n"
    return text


def main() -> None:
    """Train if need be, measure all rows and write the page."""
    folder = model_dir()
    right = [example(number)[2] for number in range(QUESTIONS)]
    exact = answers(folder)
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    figures: dict[str, Any] = {
        "machine": describe(), "parameters": sum(p.numel() for p in model.parameters()),
        "rows": {"floating point": [sum(map(str.__eq__, exact, right)) / QUESTIONS, 0.0]},
    }  # fmt: skip
    print(figures, file=sys.stderr)
    with tempfile.TemporaryDirectory() as temporary:
        images = save_examples(Path(temporary, "images"), 5_000_000, SAMPLES)
        texts = save_texts(Path(temporary, "texts.jsonl"), 5_000_000, 4 * SAMPLES)
        for row, (with_images, options) in ROWS.items():
            output = Path(temporary, row.replace(" ", "-").replace(",", ""))
            data, samples = (images, SAMPLES) if with_images else (texts, SAMPLES)
            calibrate(
                str(folder), output, dataset=str(data), samples=samples, seq_len=32, text_column="messages", quiet=True,
                **options,
            )  # fmt: skip
            got = answers(output)
            share = [sum(map(str.__eq__, got, right)) / QUESTIONS, sum(map(str.__ne__, got, exact)) / QUESTIONS]
            kl = divergences(load_reference(output), model)
            figures["rows"][row] = [*share, statistics.fmean(kl), standard_error(kl)]
            print(f"{row}: {figures['rows'][row]}", file=sys.stderr, flush=True)
    FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
    OUTPUT.write_text(page(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
