"""`smoothquant doctor`: what it says is what the plugin would do, and each piece of advice comes when it applies."""

import copy
import json

import pytest

from calibration import __main__ as cli
from calibration import doctor

# A machine with everything: what is wrong is what each test changes.
SERVER = {
    "cpu": "some CPU", "x86": True, "cores": 32, "instructions": ["AMX", "AVX2"], "int8_instructions": ["AMX"],
    "memory_bytes": {"total": 2**36, "available": 2**35}, "gpus": [], "allocator": "tcmalloc",
    "vllm": {"version": "0.32.0", "supported": True, "platform": "cpu", "plugin": True}, "kernels": {},
}  # fmt: skip


def advice(**changes) -> str:
    facts = copy.deepcopy(SERVER) | changes
    return "\n".join(text for applies, text in doctor.ADVICE if applies(facts))


def gpu(capability: int) -> dict:
    return {"gpus": [{"name": "GPU", "capability": capability, "memory_bytes": 2**35}]}


@pytest.mark.parametrize(
    ("changes", "said", "unsaid"),
    [
        ({}, "AMX: per-token", "Preload"),
        ({"int8_instructions": [], "instructions": ["AVX2"]}, "no INT8 instructions", "AMX: per-token"),
        ({"allocator": None}, "LD_PRELOAD", "Blackwell"),
        ({"cores": 2}, "VLLM_CPU_OMP_THREADS_BIND", "Blackwell"),
        (gpu(70), "no INT8 tensor cores", "At batch 1"),
        (gpu(80), "At batch 1", "multiplies FP8"),
        (gpu(90), "multiplies FP8", "Preload"),
        (gpu(120), "Blackwell", "At batch 1"),
        ({"vllm": {"version": None, "supported": False, "platform": None, "plugin": False}}, "No vLLM", "VLLM_PLUGINS"),
        ({"vllm": SERVER["vllm"] | {"supported": False}}, "outside", "No vLLM"),
        ({"vllm": SERVER["vllm"] | {"plugin": False}}, "VLLM_PLUGINS", "No vLLM"),
    ],
)
def test_advice_comes_when_it_applies(changes, said, unsaid):
    text = advice(**changes)
    assert said in text
    assert unsaid not in text
    assert "Scheme:" in text


def test_this_machine_is_told_in_words_and_in_json(capsys, monkeypatch):
    """With the kernels the plugin itself would choose."""
    from vllm_smoothquant.kernels import exact, select

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["vllm"]["plugin"]
    assert set(facts["kernels"]) == {"--activations token", "--activations tensor", "--activations static"}
    for name, found in facts["kernels"].items():
        assert found["kernel"] in {k.name for k in select.CANDIDATES[facts["vllm"]["platform"]]}, name
    exact = exact.onednn_is_exact() if facts["vllm"]["platform"] == "cpu" else None
    if exact is not None:
        # With VNNI, it depends on what is faster on this machine.
        expected = {"vllm", "vnni"} if exact else {"avx2"}
        assert facts["kernels"]["--activations token"]["kernel"] in expected
    text = doctor.format_report(facts)
    assert facts["cpu"] in text
    assert all(f"- {line}" in text for line in facts["advice"])


def test_a_plugin_left_out_is_noticed(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setattr(doctor, "_platform", lambda: "cpu")
    assert doctor._vllm()["plugin"] is False
