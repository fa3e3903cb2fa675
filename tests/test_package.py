"""What is published: the files of sdist and wheel, and their version."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("calibration", "vllm_smoothquant")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
INFO = f"vllm_smoothquant-{VERSION}.dist-info"
# `python -m build` does the same in an environment of its own, which it has to download.
BUILD = """
from setuptools import build_meta
build_meta.build_sdist("dist")
build_meta.build_wheel("dist")
"""


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sdist and a wheel that were built from a copy of everything that setuptools could take."""
    copy = tmp_path_factory.mktemp("clone")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "site", "out", "results")
    shutil.copytree(ROOT, copy, ignore=ignored, dirs_exist_ok=True)
    done = subprocess.run([sys.executable, "-c", BUILD], cwd=copy, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return copy / "dist"


def needed() -> set[str]:
    """Every file of the packages except the pages for those who work on them."""
    files = {path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file()}
    names = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert {"calibration/report/report.js", "vllm_smoothquant/kernels/int4_tile.h"} <= names
    return {name for name in names if not name.endswith("/README.md")}


def test_the_wheel_has_the_packages_and_the_licence_and_nothing_else(dist):
    with zipfile.ZipFile(dist / f"vllm_smoothquant-{VERSION}-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
        licence = wheel.read(f"{INFO}/licenses/LICENSE")
    metadata = {"METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses/LICENSE", "top_level.txt"}
    assert names == needed() | {f"{INFO}/{name}" for name in metadata}
    assert licence == (ROOT / "LICENSE").read_bytes()


def test_the_sdist_has_what_the_wheel_is_built_from_and_nothing_else(dist):
    with tarfile.open(dist / f"vllm_smoothquant-{VERSION}.tar.gz") as sdist:
        names = {member.name.partition("/")[2] for member in sdist if member.isfile()}
    names = {name for name in names if ".egg-info/" not in name}
    written = {"PKG-INFO", "setup.cfg"}  # by setuptools
    assert names == needed() | written | {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}


def test_the_changelog_begins_with_the_version():
    assert re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == VERSION
