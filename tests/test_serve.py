"""`vllm serve` over HTTP: with --quantization smoothquant, without it, with another value, and with another model."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import OpenAI

from calibration.evaluation.measure import engine_environment
from demo.server import free_port, vllm_serve

pytestmark = pytest.mark.slow

ARGUMENTS = ["--served-model-name", "int8", "--max-model-len", "512", "--enforce-eager", "--max-num-seqs", "8"]
ARGUMENTS += ["--kv-cache-memory-bytes", "512M"]
# Floating point answers this one with certainty; "What is the capital of France?" begins with a choice of 16 to 14 %.
QUESTION = [{"role": "user", "content": "What is the name of the capital city of France?"}]
CAPITALS = {"The capital of France is": "Paris", "The capital of Italy is": "Rome", "The capital of Japan is": "Tokyo"}
GREEDY = {"model": "int8", "temperature": 0, "max_tokens": 24}


def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="none needed", timeout=300, max_retries=0)


@pytest.fixture(scope="module")
def served(smollm2_int8, tmp_path_factory):
    """One server for all tests of this module that only send requests."""
    log = tmp_path_factory.mktemp("serve") / "log"
    with vllm_serve(smollm2_int8, "--quantization", "smoothquant", *ARGUMENTS, log=log) as url:
        yield client(url)


def test_it_answers(served):
    reply = served.chat.completions.create(messages=QUESTION, **GREEDY)
    assert "Paris" in reply.choices[0].message.content
    assert reply.choices[0].finish_reason == "stop"
    assert [m.id for m in served.models.list()] == ["int8"]


def test_a_stream_has_the_same_text_in_pieces(served):
    whole = served.chat.completions.create(messages=QUESTION, **GREEDY).choices[0].message.content
    stream = served.chat.completions.create(messages=QUESTION, stream=True, **GREEDY)
    pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 3
    assert "".join(pieces) == whole


def test_structured_output_keeps_to_the_choices(served):
    choices = ["Berlin", "Paris", "Rome"]
    extra = {"structured_outputs": {"choice": choices}}
    reply = served.chat.completions.create(messages=QUESTION, extra_body=extra, **GREEDY)
    assert reply.choices[0].message.content in choices


def test_several_prompts_in_one_request(served):
    reply = served.completions.create(prompt=list(CAPITALS), **GREEDY)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    for choice, capital in zip(reply.choices, CAPITALS.values(), strict=True):
        assert capital in choice.text


def test_several_requests_at_once(served):
    prompts = list(CAPITALS) * 4
    with ThreadPoolExecutor(len(prompts)) as pool:
        replies = list(pool.map(lambda prompt: served.completions.create(prompt=prompt, **GREEDY), prompts))
    for prompt, reply in zip(prompts, replies, strict=True):
        assert CAPITALS[prompt] in reply.choices[0].text
        assert reply.usage.completion_tokens <= GREEDY["max_tokens"]


def test_without_the_flag_the_checkpoint_names_its_format(smollm2_int8, tmp_path):
    with vllm_serve(smollm2_int8, *ARGUMENTS, log=tmp_path / "log") as url:
        reply = client(url).chat.completions.create(messages=QUESTION, **GREEDY)
    assert "Paris" in reply.choices[0].message.content
    assert "quantization=smoothquant" in (tmp_path / "log").read_text()


def refusal(model: Path, *arguments: str) -> str:
    """The output of `vllm serve`, which must end with an error."""
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(model), "--port", str(free_port()), *arguments]
    process = subprocess.run(
        [*command, "--host", "127.0.0.1", *ARGUMENTS],
        env=engine_environment() | {"COLUMNS": os.environ.get("COLUMNS", "200")},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert process.returncode != 0, process.stdout
    return process.stdout


def test_a_wrong_flag_is_refused_by_vllm(smollm2_int8):
    output = refusal(smollm2_int8, "--quantization", "fp8")
    assert "does not match" in output
    assert "smoothquant" in output


def test_for_a_floating_point_model_the_error_names_calibrate(smollm2):
    output = refusal(smollm2, "--quantization", "smoothquant")
    assert f"smoothquant calibrate {smollm2}" in output
