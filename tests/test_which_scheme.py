"""The table of advice: its figures are those of their sources, its page is its script's, its rows are complete."""

from dataclasses import replace

import pytest

from benchmarks import which_scheme
from calibration import __main__ as cli
from calibration.advice import recommend, table
from calibration.advice.claims import CLAIMS, Ours, Published
from tests.test_doctor import SERVER, gpu
from vllm_smoothquant.format.errors import SmoothQuantError

OURS = {key: claim for key, claim in CLAIMS.items() if isinstance(claim, Ours)}
ADVICE = [advice for row in table.HARDWARE.values() for advice in row.uses.values()]


@pytest.mark.parametrize("key", OURS)
def test_a_figure_of_ours_is_that_of_its_source(key):
    assert which_scheme.measured(OURS[key]) == OURS[key].value
    assert "{}" in OURS[key].text


@pytest.mark.parametrize(
    ("change", "message"),
    [({"value": "0.01"}, "read whether the advice"), ({"where": ("nothing",)}, "correct the claim")],
)
@pytest.mark.parametrize("key", ["avx2 one", "vnni 4 long"])  # in a JSON file, in a page
def test_the_script_refuses_a_figure_that_its_source_has_not(key, change, message, monkeypatch):
    monkeypatch.setitem(which_scheme.CLAIMS, key, replace(OURS[key], **change))
    with pytest.raises(SmoothQuantError, match=message):
        which_scheme.check()


def test_the_page_is_what_the_script_writes():
    assert which_scheme.OUTPUT.read_text() == which_scheme.page()


def test_the_table_is_complete_and_every_claim_is_used():
    topics = [*table.MODELS.values(), *table.AGAINST]
    used = {key for each in (*ADVICE, *topics) for key in each.claims} | set(recommend.ONLY_FOUR_BITS)
    assert used == set(CLAIMS)
    assert all(set(row.uses) == set(table.USES) for row in table.HARDWARE.values())
    assert {advice.take for advice in ADVICE} <= set(table.TAKE)
    assert set(recommend.SIZE_OF) == set(table.TAKE)
    assert all(claim.address.startswith("https://") for claim in CLAIMS.values() if isinstance(claim, Published))


def test_what_never_ran_is_said_to_be_so_and_has_no_figure_of_ours_on_speed():
    """A figure of an EPYC must not stand behind an advice for other hardware."""
    for row in table.HARDWARE.values():
        if row.ran.startswith("nothing"):
            figures = {key for advice in row.uses.values() for key in advice.claims} & set(OURS)
            assert figures <= {"loss", "loss 4"}, row.name


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (gpu(70), ["old"]), (gpu(75), ["turing"]), (gpu(80), ["a100"]), (gpu(86), ["ampere"]), (gpu(89), ["ada"]),
        (gpu(90), ["hopper"]), (gpu(100), ["blackwell"]), (gpu(120), ["blackwell"]),
        ({"gpus": [*gpu(90)["gpus"], *gpu(75)["gpus"], *gpu(90)["gpus"]]}, ["turing", "hopper"]),
        ({}, ["amx"]), ({"int8_instructions": ["AVX-512 VNNI"]}, ["vnni"]), ({"int8_instructions": []}, ["avx2"]),
        ({"int8_instructions": [], "x86": False}, ["arm"]),
    ],
)  # fmt: skip
def test_the_row_of_a_machine(changes, expected):
    assert table.hardware_of(SERVER | changes) == expected


# 100, 50 and 25 bytes: no other part of a model matters to the choice.
SIZE = {
    "kinds": ["dense"], "layers": 1, "linear_parameters": 50, "parameters": 50, "cache": {"tokens": 8, "bytes": None},
    "weight_bytes": {"stored": 100, "bf16": 100, "int8": 50, "int4": 25},
}  # fmt: skip


def takes(size: dict, memory: int, **changes) -> dict[str, str]:
    facts = SERVER | {"memory_bytes": {"total": memory, "available": memory}} | changes
    for card in facts["gpus"]:
        card["memory_bytes"] = memory
    found = recommend.recommend(facts, size, "a model")
    (row,) = found["advice"]
    assert "smoothquant calibrate 'a model' -o OUT" in recommend.format_model(found) or changes
    return {use: advice["take"] for use, advice in row["uses"].items()}


@pytest.mark.parametrize(
    ("kind", "memory", "changes", "expected"),
    [
        ("dense", 100, {}, ["int8", "int8", "int8"]),
        ("dense", 49, {}, ["w4a8", "w4a8", "w4a8"]),  # only 4 bits fit
        ("dense", 24, {}, ["int8", "int8", "int8"]),  # nothing fits: several devices
        ("dense", 100, gpu(80), ["w4a16", "int8", "int8"]),
        ("experts", 100, gpu(80), ["w4a16", "int8", "int8"]),
        ("experts", 100, gpu(90), ["w4a16", "fp8", "fp8"]),
        ("dense", 49, gpu(90), ["w4a16", "w4a16", "w4a16"]),
        ("dense", 49, {"x86": False, "int8_instructions": []}, ["int8", "int8", "int8"]),  # no kernel for 4 bits
    ],
)
def test_the_choice_goes_by_memory_and_kind(kind, memory, changes, expected):
    assert list(takes(SIZE | {"kinds": [kind]}, memory, **changes).values()) == expected


def test_a_model_that_does_not_fit_is_told_to_use_several_devices():
    facts = SERVER | {"memory_bytes": {"total": 24, "available": 24}}
    text = recommend.format_model(recommend.recommend(facts, SIZE, "M"))
    assert "--tensor-parallel-size" in text
    assert "does not fit" in text
    assert "not known from config.json" in text


def test_every_command_of_the_table_is_one_of_ours_or_of_vllm():
    for _, command in table.TAKE.values():
        program, *words = command.split()
        if program == "smoothquant":
            cli._parser(words).parse_args(words)
        else:
            assert command.startswith("vllm serve MODEL")
