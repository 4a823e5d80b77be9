"""Who may import whom, read from the source; and the sizes that keep files readable."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "clusterssl"
BASE = {"errors", "files", "dist", "config", "rng", "pulse", "room", "gpu"}
MAY_IMPORT = {
    "errors": set(),
    "files": {"errors"},
    "rng": set(),
    "pulse": set(),
    "room": {"dist"},
    "gpu": set(),
    "spelling": set(),
    "words": {"spelling"},
    "early": {"errors"},
    "config": {"early", "errors", "words"},
    "rendezvous": {"errors", "files"},
    "interfaces": set(),
    "rollcall": {"errors", "interfaces", "rendezvous"},
    "dist": {"errors", "rendezvous", "rollcall"},
    "joining": {"dist", "errors", "files", "interfaces", "rendezvous", "rollcall"},
    "shared_folder": {"dist", "files"},
    "cluster": BASE,
    "data": BASE | {"early", "log", "preemption"},
    "lars_kernel": set(),
    "optim": BASE | {"lars_kernel"},
    "models": {"errors", "files"},
    "hub": {"errors", "files", "models"},
    "report": BASE,
}
OUTSIDE_ALLOWED = {part: {"torch", "torchvision"} for part in ("models", "hub", "errors", "files")}
ENTRY_SCRIPTS = sorted(ROOT.glob("*.py"))
SOURCES = sorted(PACKAGE.rglob("*.py"))
ALL = sorted({*ENTRY_SCRIPTS, *SOURCES, *(ROOT / "scripts").rglob("*.py"), *(ROOT / "tests").rglob("*.py")})


def imports(tree: ast.AST) -> Iterator[str]:
    """Absolute names of everything imported anywhere below a node; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def at_import_time(tree: ast.Module) -> Iterator[str]:
    """As `imports`, without what functions import when they are called."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            node.body = []
    yield from imports(tree)


def part_of(path: Path) -> str:
    """Layer of a module: first folder or file under the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def layers_of(tree: ast.AST) -> set[str]:
    """Layers of the package that a module imports."""
    parts = (name.split(".") for name in imports(tree))
    return {part[1] for part in parts if part[0] == "clusterssl" and len(part) > 1} - {"__version__"}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def forbidden(part: str, tree: ast.AST) -> set[str]:
    """Layers that a module of `part` imports and must not."""
    return layers_of(tree) - MAY_IMPORT[part] - {part} if part in MAY_IMPORT else set()


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_layers(path: Path) -> None:
    assert not forbidden(part_of(path), parsed(path))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_models_and_hub_need_torch_and_torchvision_only(path: Path) -> None:
    allowed = OUTSIDE_ALLOWED.get(part_of(path))
    if allowed is not None:
        roots = {root.split(".")[0] for root in at_import_time(parsed(path))}
        assert roots - set(sys.stdlib_module_names) - {"clusterssl"} <= allowed


@pytest.mark.parametrize("path", ALL, ids=name)
def test_no_back_doors(path: Path) -> None:
    found = list(imports(parsed(path)))
    roots = {root.split(".")[0] for root in found}
    scripts = {script.stem for script in ENTRY_SCRIPTS}
    assert "src" not in roots, "src is a folder, not a package"
    if "tests" not in path.parts:
        assert not roots & scripts, "nothing but tests imports an entry script, so no method imports another"
    if "tests" not in path.parts and path.stem not in ("dist", "joining", "rendezvous"):
        assert not any(root.startswith("torch.distributed") for root in found), "collectives live in dist.py"
    if path in SOURCES:
        calls = [node.func for node in ast.walk(parsed(path)) if isinstance(node, ast.Call)]
        printed = [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]
        assert not printed or path.name == "config.py", "the library logs, scripts print"


@pytest.mark.parametrize("path", ALL, ids=name)
def test_files_stay_readable(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    limit = 150 if path in ENTRY_SCRIPTS or path.parent.name == "scripts" else 300
    assert lines <= limit, f"{lines} lines, at most {limit}: split by concept"


def test_the_rule_sees_what_it_forbids() -> None:
    assert forbidden("data", ast.parse("from clusterssl.models.build import build_model")) == {"models"}
    assert forbidden("cluster", ast.parse("def f():\n    import clusterssl.data.loader")) == {"data"}
    assert forbidden("hub", ast.parse("from clusterssl import config")) == {"config"}
    assert not forbidden("data", ast.parse("from clusterssl.errors import UserError"))
    assert not list(at_import_time(ast.parse("def f():\n    import timm")))
    assert list(imports(ast.parse("import torch.distributed as d"))) == ["torch.distributed"]
