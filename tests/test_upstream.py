"""docs/upstream: each script still shows what its report says. Where one fails, vLLM was changed: remove its report."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "docs/upstream"
SCRIPTS = sorted(FOLDER.glob("*.py"))
RIGHT = "[32.0, 32.0, 32.0, 32.0]"


def test_each_report_has_a_script_and_a_line_in_the_readme() -> None:
    names = {path.stem for path in FOLDER.glob("*.md")} - {"README"}
    assert names == {path.stem for path in SCRIPTS}
    assert names == set(re.findall(r"\]\((\w+)\.md\)", (FOLDER / "README.md").read_text()))


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_the_script_prints_what_the_report_says(script: Path, tmp_path: Path) -> None:
    report, source = script.with_suffix(".md").read_text(), script.read_text()
    assert source.strip() in report
    assert "smoothquant" not in source
    (said,) = re.findall(r"```text\n(.*?)```", report, re.DOTALL)
    settings = {"VLLM_PLUGINS": "", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    # Without what other tests or the caller set for oneDNN.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("ONEDNN_", "DNNL_"))}
    run = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment | settings, capture_output=True, text=True
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    printed, expected = run.stdout.splitlines(), said.splitlines()
    # Freed memory holds something else in each run, so only that it is not the right output can be compared.
    if printed[-1].startswith("reloaded:"):
        assert printed.pop().split(maxsplit=1)[1] != RIGHT
        assert expected.pop().startswith("reloaded:")
    assert printed == expected
