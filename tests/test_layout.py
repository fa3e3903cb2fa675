"""The layout: allowed imports, no import circles, a README in each folder, no long file."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PACKAGES = ("calibration", "vllm_smoothquant")

FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]

# Unit (a folder or a file of a package) -> level. A unit imports only itself and units of its package on lower levels.
LEVELS = {
    "calibration.__main__": 11,
    "calibration.__init__": 11,
    "calibration.pipeline": 10,
    "calibration.from_pretrained": 10,
    "calibration.footprint": 10,
    "calibration.report": 10,
    "calibration.checkpoint": 9,
    "calibration.smoothing": 8,
    "calibration.rounding": 7,
    "calibration.observation": 6,
    "calibration.rotation": 5,
    "calibration.discovery": 4,
    "calibration.evaluation": 5,
    "calibration.doctor": 4,
    "calibration.running": 3,
    "calibration.inputs": 4,
    "calibration.recipe": 3,
    "calibration.advice": 1,
    "calibration.options": 2,
    "vllm_smoothquant.__init__": 5,
    "vllm_smoothquant.config": 4,
    "vllm_smoothquant.linear": 3,
    "vllm_smoothquant.experts": 3,
    "vllm_smoothquant.loading": 2,
    "vllm_smoothquant.kernels": 2,
    "vllm_smoothquant.bloom": 1,
    "vllm_smoothquant.adapters": 1,
    "vllm_smoothquant.hidden_states": 1,
    "vllm_smoothquant.format": 0,
}

# Units of calibration -> what they may import of the plugin besides `format`: the choice of kernels, to report it.
PLUGIN_USERS = {
    "calibration.doctor": {"vllm_smoothquant.__init__", "vllm_smoothquant.kernels"},
    "calibration.evaluation": {"vllm_smoothquant.linear"},
}

FORBIDDEN = {"vllm_smoothquant": {"transformers"}, "vllm_smoothquant.format": {"vllm"}}

MAX_LINES = 350


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {module_of(path): path for path in FILES}


def unit_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def imports(path: Path) -> Iterator[str]:
    """Every module that `path` imports, also inside functions. A package of ours is named with `.__init__`."""
    package = module_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{name}.{alias.name}"
                inside = [m for m in (full, name, f"{full}.__init__", f"{name}.__init__") if m in MODULES]
                yield inside[0] if inside else name


IMPORTS = {module_of(path): set(imports(path)) for path in FILES}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_down(module: str) -> None:
    unit = unit_of(module)
    for imported in IMPORTS[module] & MODULES.keys():
        target = unit_of(imported)
        if target == unit:
            continue
        if unit.split(".")[0] == target.split(".")[0]:
            assert LEVELS[target] < LEVELS[unit], f"{module} imports {imported}"
        else:
            assert unit.startswith("calibration"), f"{module} imports {imported}"
            allowed = {"vllm_smoothquant.format"} | PLUGIN_USERS.get(unit, set())
            assert target in allowed, f"{module} imports {imported}"
    for package, names in FORBIDDEN.items():
        if module.startswith(package):
            assert not {name.split(".")[0] for name in IMPORTS[module]} & names, module


def test_no_circle() -> None:
    """Each file comes after all files that it imports in some order; otherwise prepare() raises CycleError."""
    TopologicalSorter({module: IMPORTS[module] & MODULES.keys() - {module} for module in MODULES}).prepare()


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_no_file_is_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=lambda folder: folder.name)
def test_each_folder_has_a_readme(folder: Path) -> None:
    assert (folder / "README.md").is_file()
