"""docs/embeddings.md: how far INT8 moves the embeddings of a real model.

`python -m benchmarks.embeddings`. No package contains an embedding model, so that SmolLM2-135M-Instruct without its
head serves as one, with the files of sentence-transformers beside it (mean pooling, normalised). Passages of articles
that calibration did not see are embedded by vLLM (`runner="pooling"`, float32), by the model and by its INT8
checkpoints. Cosine: of a passage's two embeddings. Neighbour: whether the nearest other passage is the same. The last
line is JSON.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer

from benchmarks.machine import describe
from calibration.pipeline import calibrate
from demo import assets
from tests.helpers import engine, tiny_checkpoints

OUTPUT = Path(__file__).parent.parent / "docs" / "embeddings.md"
PASSAGES, WORDS = 200, 60
ROWS: dict[str, dict[str, Any]] = {
    "no smoothing": {"no_smoothing": True}, "default": {}, "alpha auto": {"alpha": "auto"},
    "static, alpha auto": {"activations": "static", "alpha": "auto"},
}  # fmt: skip
HEADER = """# Embeddings

Written by `python -m benchmarks.embeddings`; not by hand. {machine}

SmolLM2-135M-Instruct without its head, mean pooling, as an embedding model: {passages} passages of {words} words from
articles that calibration did not see, embedded by vLLM in float32 by the model and by its INT8 checkpoint. *Cosine* of
a passage's two embeddings: mean and smallest. *Neighbour*: share of passages whose nearest other passage is the same.

| | cosine, mean | cosine, smallest | neighbour |
|---|---|---|---|
"""


def save_model(folder: Path) -> Path:
    source = assets.model_dir()
    AutoModel.from_pretrained(source, dtype="auto").save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    tiny_checkpoints.save_pooling(folder, "mean_tokens", AutoConfig.from_pretrained(source).hidden_size)
    return folder


def passages() -> list[str]:
    """The beginnings of parts of the evaluation articles, the same number from each."""
    texts = [json.loads(line)["text"].split() for line in assets.evaluation_text().read_text().splitlines()]
    each = -(-PASSAGES // len(texts))
    found = [" ".join(words[i * 400 : i * 400 + WORDS]) for words in texts for i in range(each)]
    return [text for text in found if text][:PASSAGES]


def embeddings(folder: Path) -> torch.Tensor:
    """float32 [passages, channels], normalised, by vLLM in a process of its own."""
    return engine.elsewhere(_embed, [str(folder)], {"VLLM_LOGGING_LEVEL": "ERROR"})[0]


def _embed(folder: str) -> torch.Tensor:
    from vllm import LLM

    llm = LLM(folder, runner="pooling", dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=16)
    found = [torch.tensor(answer.outputs.embedding) for answer in llm.embed(passages(), use_tqdm=False)]
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


def neighbours(vectors: torch.Tensor) -> torch.Tensor:
    return (vectors @ vectors.t()).fill_diagonal_(-1).argmax(1)


def main() -> None:
    text, figures = HEADER.format(machine=describe(), passages=len(passages()), words=WORDS), {}
    with tempfile.TemporaryDirectory() as temporary:
        source = save_model(Path(temporary, "model"))
        exact = embeddings(source)
        for row, options in ROWS.items():
            output = Path(temporary, row.replace(" ", "-").replace(",", ""))
            data = str(assets.calibration_text())
            calibrate(str(source), output, dataset=data, samples=16, seq_len=512, quiet=True, **options)
            got = embeddings(output)
            cosine = (exact * got).sum(1)
            same = float((neighbours(exact) == neighbours(got)).float().mean())
            figures[row] = [float(cosine.mean()), float(cosine.min()), same]
            text += f"| {row} | {figures[row][0]:.5f} | {figures[row][1]:.5f} | {same:.1%} |\n"
            print(row, figures[row], file=sys.stderr, flush=True)
    OUTPUT.write_text(text)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
