"""Check that vLLM has everything that vllm_smoothquant uses, at both ends of the declared range. Needs no GPU.

    python packaging/check_vllm.py                both ends; downloads two CUDA wheels (0.3 GB each) the first time
    python packaging/check_vllm.py --installed    the installed vLLM, only read: seconds, no network
    python packaging/check_vllm.py 0.29.0         another version

It reads vLLM's sources: every `from vllm... import` of ours resolves; what we call takes the arguments that we pass;
what we override takes the arguments that vLLM passes; vLLM itself calls the compiled operators that we call with as
many arguments. Python's parser finds these uses; USED and WORDS list those that it cannot find. Without --installed it
also runs tests/helpers/cuda_stubs.py, our CUDA code on vLLM's own Python. It prints one line for each fact. If a fact
does not hold, it is repeated at the end, and the exit status is 1.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OURS = ROOT / "vllm_smoothquant"
CACHE = ROOT / ".cache" / "vllm"

# What we use of objects whose class we do not import: class -> attributes (None) and methods (with our arguments).
USED: dict[str, dict[str, list[str] | None]] = {
    "vllm.platforms.interface.Platform": {"is_cuda": [], "is_cpu": [], "get_device_capability": []},
    "vllm.platforms.interface.DeviceCapability": {"to_int": []},
    "vllm.forward_context.ForwardContext": {"slot_mapping": None},
    "vllm.config.parallel.ParallelConfig": {
        "decode_context_parallel_size": None,
        "prefill_context_parallel_size": None,
    },
    "vllm.model_executor.kernels.linear.scaled_mm.cutlass.CutlassInt8ScaledMMLinearKernel": {
        "process_weights_after_loading": ["layer"],
        "apply_weights": ["layer", "x", "bias"],
    },
    "vllm.model_executor.models.utils.WeightsMapper": {"apply_dict": ["values"], "apply_list": ["values"]},
    "vllm.model_executor.layers.linear.QKVParallelLinear": {"num_kv_head_replicas": None},
    "vllm.model_executor.layers.vocab_parallel_embedding.VocabParallelEmbedding": {
        "org_vocab_size": None,
        "num_org_embeddings_per_partition": None,
    },
}
# Source text that vLLM must contain: our code relies on each of these facts, and would not notice a change.
WORDS: dict[str, tuple[str, str]] = {
    "cutlass_scaled_mm takes its arguments in our order": (
        "vllm/_custom_ops.py",
        r"def cutlass_scaled_mm\(\s*a: [^,]+,\s*b: [^,]+,\s*scale_a: [^,]+,\s*scale_b: [^,]+,\s*"
        r"out_dtype: [^,]+,\s*bias: ",
    ),
    "triton_scaled_mm takes its arguments in our order": (
        "vllm/model_executor/layers/quantization/compressed_tensors/triton_scaled_mm.py",
        r"def triton_scaled_mm\(\s*input: [^,]+,\s*weight: [^,]+,\s*scale_a: [^,]+,\s*scale_b: [^,]+,\s*"
        r"out_dtype: [^,]+,\s*bias: ",
    ),
    "CUTLASS is CUDA's first INT8 kernel": (
        "vllm/model_executor/kernels/linear/__init__.py",
        r"_POSSIBLE_INT8_KERNELS[^=]*= \{.*?PlatformEnum\.CUDA: \[\s*CutlassInt8ScaledMMLinearKernel",
    ),
    "CUTLASS's class transposes the weight": (
        "vllm/model_executor/kernels/linear/scaled_mm/cutlass.py",
        r"torch\.nn\.Parameter\(weight\.t\(\)\.data, requires_grad=False\)",
    ),
    "the CPU class takes the AMX operator for these sizes": (
        "vllm/model_executor/kernels/linear/scaled_mm/cpu.py",
        r"N, K = weight\.size\(\).*?check_cpu_sgl_kernel\(N, K, dtype\)\s*\):"
        r"\s*self\.linear_method = self\._apply_weights_sgl",
    ),
    "norms are plain torch where Inductor compiles": (
        "vllm/platforms/cuda.py",
        r'default = \["native"\] if using_inductor else',
    ),
    "a batch's padding has slot -1 (first runner)": (
        "vllm/v1/worker/gpu_model_runner.py",
        r"slot_mapping\[num_tokens_unpadded:num_tokens_padded\]\.fill_\(-1\)",
    ),
    "slots reach the forward context (first runner)": (
        "vllm/v1/worker/gpu_model_runner.py",
        r"slot_mapping=slot_mappings,",
    ),
    "a batch's padding has slot -1 (second runner)": (
        "vllm/v1/worker/gpu/block_table.py",
        r"tl\.store\(slot_mapping_ptr \+ offset, PAD_ID, mask=offset < max_num_tokens\)",
    ),
    "slots keep their address for capture (second runner)": (
        "vllm/v1/worker/gpu/block_table.py",
        r"return self\.slot_mappings\[:, :num_tokens\]",
    ),
    "slots reach the forward context (second runner)": (
        "vllm/v1/worker/gpu/model_runner.py",
        r"slot_mapping=slot_mappings_by_layer,",
    ),
    "slots reach the forward context of a capture": (
        "vllm/v1/worker/gpu/cudagraph_utils.py",
        r"slot_mapping=slot_mappings,",
    ),
    "scaled_int8_quant gives integers, scales and zero points": (
        "vllm/_custom_ops.py",
        r"def scaled_int8_quant\(\s*input: [^,]+,\s*scale: .*?"
        r"-> tuple\[torch\.Tensor, torch\.Tensor, torch\.Tensor \| None\]",
    ),
}


class Tree:
    """vLLM's Python sources under `folder` (which holds vllm/), looked up by dotted names."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, module: str) -> Path | None:
        base = self.folder.joinpath(*module.split("."))
        return next((p for p in (base.with_suffix(".py"), base / "__init__.py") if p.is_file()), None)

    @cache  # noqa: B019  one tree lives as long as the program
    def names(self, module: str) -> dict[str, ast.AST]:
        """Top-level name -> the node that binds it, `if` and `try` included."""
        path = self.path(module)
        if path is None:
            raise KeyError(module)
        names: dict[str, ast.AST] = {}
        stack = list(ast.parse(path.read_text()).body)[::-1]
        while stack:
            node = stack.pop()
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                names.setdefault(node.name, node)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for name in ast.walk(target):
                        if isinstance(name, ast.Name):
                            names.setdefault(name.id, node)
            elif isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    # Each star has an entry of its own: "*vllm.distributed.parallel_state".
                    star = alias.name == "*" and f"*{self.origin(module, node)}"  # type: ignore[arg-type]
                    names.setdefault(star or alias.asname or alias.name, node)
            else:
                for block in ("finalbody", "orelse", "handlers", "body"):
                    stack.extend(reversed(getattr(node, block, [])))
        return names

    def origin(self, module: str, node: ast.ImportFrom) -> str:
        """The module that `from X import ...` in `module` means by X."""
        if not node.level:
            return node.module or ""
        path = self.path(module)
        package = module.split(".") if path and path.name == "__init__.py" else module.split(".")[:-1]
        return ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))

    def find(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        """Where `module.name` is defined, followed through re-exports: (module, node); None where it is not."""
        try:
            node = self.names(module).get(name)
        except KeyError:
            return None
        if isinstance(node, ast.ImportFrom):
            source = next((a.name for a in node.names if (a.asname or a.name) == name), name)
            origin = self.origin(module, node)
            return self.find(origin, source) if origin.split(".")[0] == "vllm" else (module, node)
        if node is None:
            stars = [n[1:] for n in self.names(module) if n.startswith("*vllm.")]
            starred = next(filter(None, (self.find(star, name) for star in stars)), None)
            if starred:
                return starred
            return (f"{module}.{name}", ast.Module([], [])) if self.path(f"{module}.{name}") else None
        return module, node

    def lineage(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """The class and vLLM's classes it inherits from, nearest first."""
        yield module, node
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if isinstance(base, ast.Name):
                definition = self.find(module, base.id)
                if definition and isinstance(definition[1], ast.ClassDef):
                    yield from self.lineage(definition[0], definition[1])

    def method(self, module: str, node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
        for _, cls in self.lineage(module, node):
            for member in cls.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef) and member.name == name:
                    return member  # type: ignore[return-value]
        return None

    def attribute(self, module: str, node: ast.ClassDef, name: str) -> bool:
        """Whether the class has `name`: a method, a field, or something it sets on itself."""
        for _, cls in self.lineage(module, node):
            for part in ast.walk(cls):
                if isinstance(part, ast.FunctionDef) and part.name == name:
                    return True
                if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and part.attr == name:
                    return True
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and part.target.id == name:
                    return True
        return False

    @cache  # noqa: B019
    def text(self) -> str:
        return "\n".join(p.read_text(errors="replace") for p in sorted(self.folder.glob("vllm/**/*.py")))


def takes(function: ast.FunctionDef, call: ast.Call, skip: int) -> str | None:
    """Why `function` would refuse the arguments of `call`, or None; Python fills the first `skip` parameters (self)."""
    a = function.args
    positional = [p.arg for p in a.posonlyargs + a.args][skip:]
    starred = any(isinstance(x, ast.Starred) for x in call.args)
    keywords = [k.arg for k in call.keywords if k.arg]
    if len(call.args) > len(positional) and not a.vararg and not starred:
        return f"{len(call.args)} positional arguments, takes {len(positional)}"
    unknown = [k for k in keywords if k not in positional + [p.arg for p in a.kwonlyargs]]
    if unknown and not a.kwarg:
        return f"no parameter {', '.join(unknown)}"
    if starred or any(k.arg is None for k in call.keywords):
        return None
    required = positional[: len(positional) - len(a.defaults)] if a.defaults else positional
    required += [p.arg for p, default in zip(a.kwonlyargs, a.kw_defaults, strict=True) if default is None]
    given = positional[: len(call.args)] + keywords
    missing = [p for p in required if p not in given]
    return f"missing {', '.join(missing)}" if missing else None


def accepts(ours: ast.FunctionDef, theirs: ast.FunctionDef) -> str | None:
    """Why vLLM could not call our override like its own method, or None."""
    mine = [p.arg for p in ours.args.posonlyargs + ours.args.args]
    base = [p.arg for p in theirs.args.posonlyargs + theirs.args.args]
    if ours.args.vararg and ours.args.kwarg:
        return None
    for name in base[1:] + [p.arg for p in theirs.args.kwonlyargs]:
        if name not in mine and not ours.args.kwarg:
            return f"vLLM passes {name}"
    extra = [name for name in mine[1:] if name not in base]
    if len(extra) > len(ours.args.defaults):
        return f"vLLM does not pass {', '.join(extra)}"
    return None


Fact = tuple[str, str | None]  # the fact, and why it does not hold or None


def facts(tree: Tree) -> Iterator[Fact]:
    experts = tree.find("vllm.model_executor.layers.fused_moe", "RoutedExperts")
    for file in sorted(OURS.rglob("*.py")):
        if file.parent == OURS / "experts" and experts is None:
            continue  # config.py refuses experts in integers there
        yield from facts_of_file(tree, str(file.relative_to(OURS)), ast.parse(file.read_text()))
    for path, members in USED.items():
        module, _, name = path.rpartition(".")
        definition = tree.find(module, name)
        if definition is None or not isinstance(definition[1], ast.ClassDef):
            yield path, "no such class"
            continue
        for member, arguments in members.items():
            if arguments is None:
                yield f"{path}.{member}", None if tree.attribute(*definition, member) else "no such attribute"  # type: ignore[arg-type]
                continue
            method = tree.method(definition[0], definition[1], member)
            call = ast.Call(ast.Name("f"), [ast.Constant(a) for a in arguments], [])
            why = takes(method, call, 0 if is_a(method, "staticmethod") else 1) if method else "no such method"
            yield f"{path}.{member}({', '.join(arguments)})", why
    for what, (path, pattern) in WORDS.items():
        source = tree.folder / path
        match = source.is_file() and re.search(pattern, source.read_text(), re.S)
        yield f"{what} ({path})", None if match else "text not found: read the source"


def is_a(function: ast.FunctionDef, decorator: str) -> bool:
    return any(isinstance(d, ast.Name) and d.id == decorator for d in function.decorator_list)


def facts_of_file(tree: Tree, file: str, source: ast.Module) -> Iterator[Fact]:
    imported: dict[str, tuple[str, ast.AST]] = {}
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "vllm":
                    yield f"{file}: import {alias.name}", "not checked: write `from ... import ...`"
        if not isinstance(node, ast.ImportFrom) or node.level or (node.module or "").split(".")[0] != "vllm":
            continue
        for alias in node.names:
            definition = tree.find(node.module or "", alias.name)
            if definition:
                imported[alias.asname or alias.name] = definition
            yield f"{file}: from {node.module} import {alias.name}", None if definition else "no such name"
    for node in ast.walk(source):
        if isinstance(node, ast.Call):
            yield from facts_of_call(tree, file, node, imported)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
            module, what = imported[node.value.id]
            if isinstance(what, ast.Module):
                yield (
                    f"{file}:{node.lineno}: {module}.{node.attr}",
                    None if tree.find(module, node.attr) else "no such name",
                )
        elif isinstance(node, ast.ClassDef):
            yield from facts_of_class(tree, file, node, imported)


def facts_of_call(tree: Tree, file: str, call: ast.Call, imported: dict[str, tuple[str, ast.AST]]) -> Iterator[Fact]:
    spelled = ast.unparse(call.func)
    where = f"{file}:{call.lineno}: {spelled}({', '.join(k.arg or '**' for k in call.keywords) or len(call.args)})"
    operator = re.fullmatch(r"torch\.ops\._C\.(\w+)", spelled)
    if operator:
        counts = {len(c.args) + len(c.keywords) for c in vllms_calls(tree) if ast.unparse(c.func) == spelled}
        fits = len(call.args) in counts
        yield where, None if fits else f"vLLM passes {sorted(counts) or 'it to nothing'}, we pass {len(call.args)}"
        return
    target: tuple[str, ast.AST] | None = None
    if isinstance(call.func, ast.Name):
        target = imported.get(call.func.id)
    elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        owner = imported.get(call.func.value.id)
        if owner and isinstance(owner[1], ast.Module):
            target = tree.find(owner[0], call.func.attr)
        elif owner and isinstance(owner[1], ast.ClassDef):
            method = tree.method(*owner, call.func.attr)  # type: ignore[arg-type]
            yield where, takes(method, call, int(is_a(method, "classmethod"))) if method else "no such method"
    if target is None:
        return
    module, node = target
    if isinstance(node, ast.FunctionDef):
        yield where, takes(node, call, 0)
    elif isinstance(node, ast.ClassDef):
        # A class of vLLM without an __init__ (a torch module, a dataclass) is covered by WORDS and by tests.
        method = tree.method(module, node, "__init__")
        yield where, takes(method, call, 1) if method else None


@cache
def vllms_calls(tree: Tree) -> list[ast.Call]:
    source = ast.parse((tree.folder / "vllm" / "_custom_ops.py").read_text())
    return [node for node in ast.walk(source) if isinstance(node, ast.Call)]


def facts_of_class(
    tree: Tree, file: str, ours: ast.ClassDef, imported: dict[str, tuple[str, ast.AST]]
) -> Iterator[Fact]:
    bases = [imported[b.id] for b in ours.bases if isinstance(b, ast.Name) and b.id in imported]
    for module, base in bases:
        if not isinstance(base, ast.ClassDef):
            yield f"{file}: class {ours.name}", f"{module} has no class of that name"
            continue
        mine = {m.name: m for m in ours.body if isinstance(m, ast.FunctionDef)}

        def defined(name: str, module: str = module, base: ast.ClassDef = base) -> bool:
            found = tree.method(module, base, name)
            return found is not None and not is_a(found, "abstractmethod")

        for _, cls in tree.lineage(module, base):
            for member in cls.body:
                abstract = isinstance(member, ast.FunctionDef) and any(
                    ast.unparse(d).endswith("abstractmethod") for d in member.decorator_list
                )
                if abstract:
                    yield (
                        f"{file}: {ours.name} defines {member.name}",
                        None if member.name in mine or defined(member.name) else "abstract in vLLM",
                    )
        for name, method in mine.items():
            theirs = tree.method(module, base, name)
            if theirs and name != "__init__":
                yield f"{file}: {ours.name}.{name} can stand for {base.name}'s", accepts(method, theirs)
            for node in ast.walk(method):
                called = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func
                if not called or ast.unparse(called.value) != "super()" or called.attr == "__init__":
                    continue
                parent = tree.method(module, base, called.attr)
                what = f"{file}: {ours.name}.{name} calls super().{called.attr}"
                if parent:
                    yield what, takes(parent, node, 1)
                elif name == called.attr and f".{name}(" not in tree.text():
                    yield f"{what}: this vLLM knows no such method and never calls ours", None
                else:
                    yield what, "no such method"


def ends() -> list[str]:
    """pip's requirements for both ends of the range in pyproject.toml; __init__.py must have the same range."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = [r for r in project["optional-dependencies"]["cuda"] if re.match(r"vllm\b", r)]
    bounds = re.fullmatch(r"vllm(>=([\d.]+),<[\d.]+)", requirement)
    if bounds is None or f'SUPPORTED_VLLM = "{bounds[1]}"' not in (OURS / "__init__.py").read_text():
        raise SystemExit(f"pyproject.toml says {requirement!r}; vllm_smoothquant/__init__.py must say the same range")
    return [f"vllm=={bounds[2]}", requirement]


def sources(requirement: str) -> Path:
    """A folder in .cache/vllm with the .py files of the newest CUDA wheel for `requirement`."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix=".") as folder:
        report = Path(folder, "report.json")
        pip("install", "--dry-run", "--ignore-installed", "--report", str(report), requirement)
        version = json.loads(report.read_text())["install"][0]["metadata"]["version"]
        target = CACHE / version
        if not target.is_dir():
            pip("download", "--dest", folder, f"vllm=={version}")
            (wheel,) = Path(folder).glob("vllm-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(f"{folder}/py", [n for n in archive.namelist() if n.endswith(".py")])
            os.rename(f"{folder}/py", target)
    return target


def pip(command: str, *arguments: str) -> None:
    options = ["--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([sys.executable, "-m", "pip", command, *options, *arguments], check=False)
    if done.returncode:
        raise SystemExit(f"pip found no CUDA wheel for {arguments[-1]}: is an index reachable, and is this Linux?")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="versions instead of both ends of the range")
    parser.add_argument(
        "--installed", action="store_true", help="read the installed vLLM; do not download or run anything"
    )
    args = parser.parse_args()
    if args.installed:
        spec = find_spec("vllm")
        if spec is None or spec.origin is None:
            raise SystemExit("no vLLM is installed here")
        folders = [Path(spec.origin).parent.parent]
    else:
        folders = [sources(r) for r in ([f"vllm=={v}" for v in args.versions] or ends())]
    wrong = []
    for folder in folders:
        name = "installed" if args.installed else folder.name
        held = 0
        for what, why in dict.fromkeys(facts(Tree(folder))):
            print(f"{'ok  ' if why is None else 'FAIL'}  {name}  {what}{': ' + why if why else ''}", flush=True)
            wrong += [f"{name}  {what}: {why}"] if why else []
            held += why is None
        if not args.installed:
            path = os.pathsep.join([str(folder), str(ROOT)])
            stubs = [sys.executable, str(ROOT / "tests" / "helpers" / "cuda_stubs.py")]
            done = subprocess.run(stubs, env=os.environ | {"PYTHONPATH": path}, check=False)
            wrong += [f"{name}  tests/helpers/cuda_stubs.py failed"] if done.returncode else []
        print(f"vLLM {name}: {held} facts hold")
    for line in wrong:
        print(f"differs: {line}", file=sys.stderr)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
