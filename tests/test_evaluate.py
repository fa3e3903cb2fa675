"""`smoothquant evaluate`: the windows, the table, refused input, and the figures of vLLM compared with PyTorch's."""

import argparse
import importlib.metadata
import json
import math
import subprocess
import sys
import time

import psutil
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from calibration import __main__ as cli
from calibration.evaluation import evaluate, measure, sizes, windows
from calibration.evaluation.evaluate_options import EvaluateOptions
from calibration.options import add_arguments, from_arguments
from calibration.pipeline import calibrate
from tests.helpers import tiny_checkpoints
from tests.helpers.reference import load_reference
from vllm_smoothquant.format.errors import SmoothQuantError

ENGINE = {"enforce_eager": True, "dtype": "float32"}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return tiny_checkpoints.save_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_checkpoints.save("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="module")
def int8(model, text, tmp_path_factory):
    output = tmp_path_factory.mktemp("int8") / "llama-int8"
    samples = {"samples": tiny_checkpoints.SAMPLES, "seq_len": tiny_checkpoints.SEQ_LEN}
    calibrate(str(model), output, dataset=str(text), quiet=True, **samples)
    return output


def with_bos():
    tokenizer = tiny_checkpoints.tokenizer()
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    return tokenizer


def windows_of(models, text, **options):
    options = {"text_column": "text", "samples": 4, "seq_len": 32, "seed": 0} | options
    return windows.token_windows([str(m) for m in models], str(text), **options)


def test_sigterm_also_stops_the_engine(model, text):
    command = [sys.executable, "-m", "calibration", "evaluate", str(model), "--text", str(text), "--seq-len", "32"]
    process = psutil.Popen([*command, "--samples", "2"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 300
    while not (engines := process.children(recursive=True)):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "smoothquant: interrupted; nothing was written"
    while any(engine.is_running() and engine.status() != psutil.STATUS_ZOMBIE for engine in engines):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_leading_tokens_are_those_of_the_tokenizer():
    assert windows.leading_tokens(tiny_checkpoints.tokenizer()) == []
    assert windows.leading_tokens(with_bos()) == [with_bos().bos_token_id]


def test_every_window_starts_with_bos_if_the_tokenizer_has_one(model, text, tmp_path):
    with_bos().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    texts, about = windows_of([tmp_path], text, samples=20)
    assert {window[0] for window in texts} == {with_bos().bos_token_id}
    assert {len(window) for window in texts} <= {31, 32}
    assert about["windows"] == 20


def test_windows_are_the_same_every_time(model, text):
    assert windows_of([model], text) == windows_of([model], text)
    assert windows_of([model], text) != windows_of([model], text, seed=1)


def test_sizes_are_the_bytes_of_the_tensors(model, int8):
    linear = sizes.linear_layers([str(model), str(int8)])
    assert len(linear) == 14  # two blocks of seven
    source, quantized = (sizes.weight_bytes(str(folder), linear) for folder in (model, int8))
    state = AutoModelForCausalLM.from_pretrained(model).state_dict()
    elements = sum(state[f"{name}.weight"].numel() for name in linear)
    rows = sum(state[f"{name}.weight"].shape[0] for name in linear)
    assert source["linear_bytes"] == 4 * elements
    assert quantized["linear_bytes"] == elements + 4 * rows
    assert quantized["disk_bytes"] == (int8 / "model.safetensors").stat().st_size


def row(name, **more):
    figures = {"perplexity": 12.5, "disk_bytes": 2 << 20, "linear_bytes": 1 << 20, "memory_bytes": 3 << 20}
    return {"model": name, "baseline": False, "kernels": [], "decode_tokens_per_second": 42.0, **figures, **more}


def test_table_has_a_row_for_every_model():
    scores = {"tasks": {"exam": {"acc": 0.5, "acc_stderr": 0.125}}}
    rows = [row("a/base", scored_tokens=99, **scores)]
    rows.append(row("b/int8", perplexity_change=0.0123, kernels=["some-kernel"], **scores))
    engine = {"vllm": "0.32.0", "dtype": "auto", "score_dtype": "auto"}
    text = {"source": "text.jsonl", "windows": 3, "seq_len": 34}
    table = evaluate.format_table({"text": text, "engine": engine, "decode": measure.DECODE, "models": rows})
    lines = table.splitlines()
    assert lines[0].endswith("exam acc")
    figures = ["12.500", "2", "MiB", "1", "MiB", "3", "MiB", "42.0", "tok/s", "0.5000", "±", "0.1250"]
    assert lines[2].split() == ["base", *figures]
    assert lines[3].split()[:3] == ["int8", "12.500", "+1.23%"]
    assert "3 windows of 34 tokens of text.jsonl" in table
    assert "int8: INT8 by some-kernel" in table
    assert "decode: 8 prompts at once" in table
    del rows[0]["decode_tokens_per_second"], rows[1]["decode_tokens_per_second"]  # --no-speed
    result = {"text": text, "engine": engine, "decode": measure.DECODE, "models": rows}
    assert "decode" not in evaluate.format_table(result)


def test_memory_in_a_dtype_that_is_not_served_is_not_shown(model, text, monkeypatch):
    """With --score-dtype, the engine of the perplexity holds the weights in another dtype than a server would."""
    figures = {"perplexity": 9.0, "memory_bytes": 1, "kernels": []}
    monkeypatch.setattr(measure, "_run_process", lambda module, requests, timeout: [dict(figures) for _ in requests])
    size = {"samples": 2, "seq_len": 32}
    for no_speed, memory in ((True, None), (False, 1)):
        options = EvaluateOptions((str(model),), text=str(text), score_dtype="float32", no_speed=no_speed, **size)
        (row,) = evaluate.evaluate(options)["models"]
        assert row.get("memory_bytes") == memory
        assert row["perplexity"] == 9.0


# --- bad input ---


def arguments(*argv):
    parser = argparse.ArgumentParser()
    add_arguments(parser, EvaluateOptions)
    return parser.parse_args(list(map(str, argv)))


def error_of(*argv) -> str:
    with pytest.raises(SmoothQuantError) as caught:
        evaluate.evaluate(from_arguments(EvaluateOptions, arguments(*argv)))
    return str(caught.value)


def test_text_and_dataset_exclude_each_other():
    assert "--text: expected one text to measure on" in error_of("model", "--text", "a", "--dataset", "b")


def test_engine_arguments_must_be_an_object():
    assert "--engine: expected a JSON object, got [1]" in error_of("model", "--engine", "[1]")


def test_missing_text_is_named(model):
    assert "/nowhere.jsonl: expected a readable file" in error_of(model, "--text", "/nowhere.jsonl")


def test_empty_text_is_named(model, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert "empty" in error_of(model, "--text", tmp_path / "empty.txt")


def test_too_little_text_is_named(model, text):
    assert "text for 9999 samples" in error_of(model, "--text", text, "--samples", "9999", "--seq-len", "32")


def test_a_window_needs_something_to_score(model, text):
    assert "--seq-len: expected at least 2, got 1" in error_of(model, "--text", text, "--seq-len", "1")


def test_missing_model_is_named(text, tmp_path):
    assert "a model with its tokenizer" in error_of(tmp_path / "nowhere", "--text", text)


def test_models_with_different_tokenizers_are_refused(model, text, tmp_path):
    other = tiny_checkpoints.tokenizer()
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((model / "config.json").read_bytes())
    assert "expected the tokenizer of" in error_of(tmp_path, "--baseline", model, "--text", text)


def test_without_vllm_the_error_names_the_installation(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(measure, "version", missing)
    assert "make venv" in error_of("model", "--text", "text")


def test_the_module_imports_without_vllm():
    code = "import sys; sys.modules['vllm'] = None; import calibration.evaluation.evaluate"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_timeout_leaves_no_process(model):
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        measure.measure(model, [[1, 2, 3]], timeout=0.5)
    request = caught.value.cmd[-2]
    assert subprocess.run(["pgrep", "-f", request], check=False, stdout=subprocess.PIPE).stdout == b""


@pytest.mark.slow
def test_a_model_that_vllm_cannot_run_is_an_error_in_one_line(model, tmp_path):
    config = json.loads((model / "config.json").read_text()) | {"architectures": ["NonesuchForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SmoothQuantError, match=r"expected a model that vLLM can run, got .*Nonesuch") as caught:
        measure.measure(tmp_path, [[1, 2, 3]], **ENGINE)
    assert "\n" not in str(caught.value)


# --- through vLLM ---


@pytest.mark.slow
def test_a_last_word_is_correct_if_all_its_tokens_are_the_likeliest(model):
    """Three passages that end with the words that PyTorch's model generates, and one with another word."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    passages = []
    for seed in range(4):
        ids = torch.randint(3, 250, (1, 20), generator=torch.Generator().manual_seed(seed))
        passages.append({"ids": network.generate(ids, max_new_tokens=3, do_sample=False)[0].tolist(), "target": 3})
    passages[1]["ids"][-2] += 1
    serve = {"prompt_tokens": 8, "new_tokens": 8, "batches": [1, 2], "repeats": 3}
    window = list(range(5, 25))
    answer = measure.measure(model, [window], passages=passages, decode=None, serve=serve, **ENGINE)
    assert (answer["last_word_accuracy"], answer["passages"]) == (0.75, 4)
    # The same engine also measures the figures of serving.
    assert 0 < answer["first_token_seconds"] < 10
    assert answer["tokens_per_second_batch_1"] > 0
    assert answer["tokens_per_second_batch_2"] > 0
    assert answer["peak_memory_bytes"] > 100 << 20  # torch alone is that large


@pytest.mark.slow
def test_all_figures_equal_pytorchs(model, int8, text, capsys):
    """The command on a float32 model and its INT8 checkpoint; all figures recomputed from logits of PyTorch models."""
    argv = ["evaluate", str(int8), "--baseline", str(model), "--text", str(text), "--samples", "4", "--seq-len", "32"]
    assert cli.main([*argv, "--dtype", "float32", "--enforce-eager", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    baseline, quantized = result["models"]

    texts, _ = windows_of([model], text)
    ids = torch.tensor(texts)
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
    expected = math.exp(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    # Both compute in float32, but in a different order.
    assert baseline["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert baseline["scored_tokens"] == 4 * 31
    assert quantized["perplexity_change"] == quantized["perplexity"] / baseline["perplexity"] - 1
    assert abs(quantized["perplexity_change"]) < 0.2
    # The vocabulary has 256 words, so the probabilities of all words are stored. vLLM computes the same as the
    # reference, except where a value lies on a rounding tie.
    with torch.no_grad():
        p, q = (m[:, :-1].float().log_softmax(-1) for m in (logits, load_reference(int8)(ids).logits))
    assert quantized["kl_divergence"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=0.05)
    # Standard errors over the four windows; a value on a rounding tie changes one window by more than the mean.
    divergences = (p.exp() * (p - q)).sum(-1).mean(-1)
    assert quantized["kl_standard_error"] == pytest.approx(float(divergences.std() / 2), rel=0.2)
    p_loss, q_loss = (-each.gather(-1, ids[:, 1:, None]).mean((1, 2)) for each in (p, q))
    expected = float((q_loss - p_loss).std() / 2) * quantized["perplexity"] / baseline["perplexity"]
    assert quantized["perplexity_change_standard_error"] == pytest.approx(expected, rel=0.2)
    assert "perplexity_change_standard_error" not in baseline
    agreement = float((p.argmax(-1) == q.argmax(-1)).float().mean())
    assert quantized["top1_agreement"] == pytest.approx(agreement, abs=2 / (4 * 31))
    assert "kl_divergence" not in baseline
    assert (baseline["kernels"], len(quantized["kernels"])) == ([], 1)
    for figures in (baseline, quantized):
        assert figures["decode_tokens_per_second"] > 0
        assert figures["memory_bytes"] > 0
    assert quantized["linear_bytes"] < 0.3 * baseline["linear_bytes"]  # of float32
    assert "llama-int8" in evaluate.format_table(result)


@pytest.mark.slow
def test_a_task_of_the_harness_is_scored_as_pytorch_scores_it(model, tmp_path):
    docs = [
        {"text": text, "choices": ["the sea", "of the town", "a house and"], "label": i % 3}
        for i, text in enumerate(("he went to", "a part", "where once stood", "it is", "she saw", "in the north"))
    ]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        "task": "endings", "dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "docs.jsonl")},
        "test_split": "train", "output_type": "multiple_choice", "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "label", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    (tmp_path / "endings.yaml").write_text(json.dumps(task))  # JSON is YAML
    metrics = measure.run_tasks(model, ["endings"], include_path=str(tmp_path), max_model_len=64, **ENGINE)

    network, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tiny_checkpoints.tokenizer()

    def loglikelihood(doc, choice):
        ids, start = tokenizer(f"{doc['text']} {choice}").input_ids, len(tokenizer(doc["text"]).input_ids)
        with torch.no_grad():
            logprobs = network(torch.tensor([ids])).logits[0].log_softmax(-1)
        return sum(float(logprobs[at - 1, ids[at]]) for at in range(start, len(ids)))

    correct = [max(range(3), key=lambda i, d=doc: loglikelihood(d, d["choices"][i])) == doc["label"] for doc in docs]
    accuracy = sum(correct) / len(docs)
    assert metrics["endings"]["acc"] == accuracy
    # The error of a mean of zeros and ones, with n - 1 as in the harness.
    assert metrics["endings"]["acc_stderr"] == pytest.approx((accuracy * (1 - accuracy) / (len(docs) - 1)) ** 0.5)
    assert 0 < sum(correct) < len(docs)  # otherwise the equality would prove little


def test_without_the_harness_the_error_names_the_installation(monkeypatch):
    monkeypatch.setattr(measure, "find_spec", lambda name: None)
    with pytest.raises(SmoothQuantError, match=r"--tasks: expected lm-evaluation-harness.*pip install 'lm-eval"):
        measure.run_tasks("model", ["arc_easy"])
