"""`smoothquant doctor`: the shown kernels are those that the plugin chooses, and all advice applies to the machine."""

import copy
import json

import pytest

from calibration import __main__ as cli
from calibration import doctor
from calibration.advice import table

# A machine without a fault; each test changes one fact.
SERVER = {
    "cpu": "some CPU", "x86": True, "cores": 32, "instructions": ["AMX", "AVX2"], "int8_instructions": ["AMX"],
    "memory_bytes": {"total": 2**36, "available": 2**35}, "gpus": [], "allocator": "tcmalloc",
    "vllm": {"version": "0.32.0", "supported": True, "platform": "cpu", "plugin": True}, "kernels": {},
}  # fmt: skip


def advice(**changes) -> str:
    return "\n".join(doctor.advise(copy.deepcopy(SERVER) | changes))


def gpu(capability: int) -> dict:
    return {"gpus": [{"name": "GPU", "capability": capability, "memory_bytes": 2**35}]}


@pytest.mark.parametrize(
    ("changes", "present", "absent"),
    [
        ({}, "AMX: per-token", "Preload"),
        ({"int8_instructions": [], "instructions": ["AVX2"]}, "no INT8 instructions", "AMX: per-token"),
        ({"allocator": None}, "LD_PRELOAD", "Blackwell"),
        ({"cores": 2}, "VLLM_CPU_OMP_THREADS_BIND", "Blackwell"),
        ({"cores": 1}, "--distributed-executor-backend uni", "Blackwell"),
        (gpu(70), "no INT8 tensor cores", "At batch 1"),
        (gpu(80), "At batch 1", "multiplies FP8"),
        (gpu(75), "--dtype half", "At batch 1"),
        (gpu(90), "multiplies FP8", "Preload"),
        (gpu(120), "Blackwell", "At batch 1"),
        ({"vllm": {"version": None, "supported": False, "platform": None, "plugin": False}}, "No vLLM", "VLLM_PLUGINS"),
        ({"vllm": SERVER["vllm"] | {"supported": False}}, "outside", "No vLLM"),
        ({"vllm": SERVER["vllm"] | {"plugin": False}}, "VLLM_PLUGINS", "No vLLM"),
    ],
)
def test_advice_is_given_if_it_applies(changes, present, absent):
    text = advice(**changes)
    assert present in text
    assert absent not in text
    assert all(f"{use}: " in text for use in table.USES.values())
    assert "doctor MODEL" in text


def test_this_machine_is_described_as_text_and_as_json(capsys, monkeypatch):
    """With the kernels that the plugin chooses here."""
    from vllm_smoothquant.kernels import exact, select

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    assert cli.main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["vllm"]["plugin"]
    schemes = {"--activations token", "--activations tensor", "--activations static"}
    four_bits = {"--bits 4 --activations none", "--bits 4 --activations token"}
    assert set(facts["kernels"]) == {*schemes, *four_bits, "routed experts", "routed experts, 4 bits"}
    assert facts["kernels"]["routed experts"]["kernel"] in ("int8-experts", "vLLM's choice")
    for name in schemes:
        kernel = facts["kernels"][name]["kernel"]
        assert kernel in {k.name for k in select.CANDIDATES[facts["vllm"]["platform"], 8]}, name
    if facts["vllm"]["platform"] == "cpu":
        expected = "vllm" if exact.onednn_is_exact() else "compiled"
        assert facts["kernels"]["--activations token"]["kernel"] == expected
    text = doctor.format_report(facts)
    assert facts["cpu"] in text
    assert all(f"- {line}" in text for line in facts["advice"])


def test_a_plugin_that_vllm_plugins_excludes_is_noticed(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    monkeypatch.setattr(doctor, "_platform", lambda: "cpu")
    assert doctor._vllm()["plugin"] is False
