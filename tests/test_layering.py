"""Arrows point down: who may import whom (docs/architecture.md)."""

import ast
import pathlib
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).parent.parent / "gpt_jax"
# From the top. A folder imports folders of lower tiers and itself.
TIERS = [
    {"__main__"},
    {"cli", "api"},
    {"launch"},
    {"train", "serve", "explain"},
    {"evals", "reports"},
    {"convert", "decode", "scaling"},
    {"runs"},
    {"tasks", "objectives"},
    {"models", "data", "optim"},
    {"ops", "parallel"},
    {"trees"},
    {"types"},
    {"__init__"},
]
TIER = {room: number for number, tier in enumerate(TIERS) for room in tier}


def _imports(source: str) -> set[str]:
    """Every module that a source names in an import, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where an arrow points"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def _room(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "gpt_jax" and len(parts) > 1 else None


def violations(files: dict[str, str]) -> list[str]:
    """What is wrong with {path below gpt_jax/: source}."""
    wrong = []
    for path, source in files.items():
        here = pathlib.PurePath(path).parts[0].removesuffix(".py")
        if here not in TIER:
            wrong.append(f"{path}: {here} is in no tier")
            continue
        for module in _imports(source):
            there = _room(module)
            if module.split(".")[0] in ("configs", "experiments"):
                wrong.append(f"{path} imports {module}")
            elif there in TIER and there != here and TIER[there] <= TIER[here]:
                wrong.append(f"{path} imports {module}: not below {here}")
    return wrong


def test_arrows_point_down():
    files = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    assert len(files) > 40
    assert not violations(files)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/a.py", "from gpt_jax.train import loop"),  # up
        ("models/a.py", "import gpt_jax.data.order"),  # sideways
        (
            "ops/a.py",
            "def f():\n    from gpt_jax.models.transformer import Transformer",
        ),  # up, hidden in a function
        ("train/a.py", "from configs import common"),
        ("attic/a.py", ""),
    ],
)
def test_a_wrong_arrow_is_seen(path, source):
    assert violations({path: source})


def _cycle(graph: dict[str, set[str]]) -> list[str]:
    done, path = set(), []

    def visit(module: str) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        path.append(module)
        for other in sorted(graph.get(module, ())):
            if cycle := visit(other):
                return cycle
        path.pop()
        done.add(module)
        return []

    return next((cycle for module in sorted(graph) if (cycle := visit(module))), [])


def test_modules_form_no_cycle():
    graph = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(["gpt_jax", *path.relative_to(PACKAGE).with_suffix("").parts])
        graph[name] = {m for m in _imports(path.read_text()) if m.startswith("gpt_jax.")} - {name}
    assert not _cycle(graph)
    assert _cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    "module", ["gpt_jax", "gpt_jax.cli.main", "gpt_jax.runs.config_file", "gpt_jax.scaling.counts"]
)
def test_what_must_be_instant_starts_no_jax(module):
    code = f"import {module}, sys; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0


def test_no_file_is_too_long():
    long = {p.name: n for p in PACKAGE.rglob("*.py") if (n := p.read_text().count("\n")) > 350}
    assert not long
