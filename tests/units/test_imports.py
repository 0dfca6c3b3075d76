"""The layout: one direction of imports, no cycle, each driver imported in one file, short files and functions."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {"server": {"server", "agents", "stores"}, "agents": {"agents", "stores"}, "stores": {"stores"}}
MODULES = sorted(path.relative_to(ROOT) for package in ALLOWED for path in (ROOT / package).rglob("*.py"))
NAMES = {".".join(("agent_chat", *path.with_suffix("").parts)).removesuffix(".__init__"): path for path in MODULES}

DRIVERS = {
    "motor": {"stores/mongo/store.py"},
    "pymongo": {"stores/mongo/store.py"},
    "bson": {"stores/mongo/store.py", "stores/mongo/native.py"},
    "redis": {"stores/redis/connection.py"},
    "mcp": {
        "agents/mcp/connection.py",
        "agents/mcp/process.py",
        "agents/mcp/tools.py",
        "agents/mcp/transport.py",
        "agents/demo_tools.py",
    },
    "anthropic": {"agents/claude/agent.py"},
    "sse_starlette": {"server/http/sse.py"},
    "obstore": {"stores/blobs.py"},
    "kreuzberg": {"server/files/reader.py"},
    "pypdfium2": {"server/files/reader.py"},
}
ENVIRONMENT = {"server/settings.py"}

TOP = {"server", "agents", "stores", "tests", "web_demo", "pyproject.toml", "Procfile", "README.md"}
BESIDE = {"LICENSE", "*.lock"}


@cache
def tree(module: Path) -> ast.Module:
    return ast.parse((ROOT / module).read_text(encoding="utf-8"), str(module))


@cache
def imports(module: Path) -> frozenset[str]:
    """The dotted names that a module imports, wherever in it, with relative ones made absolute."""
    return frozenset(_imports(module))


def _imports(module: Path) -> Iterator[str]:
    for node in ast.walk(tree(module)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=None | str() as source, names=names, level=level):
                above = [".".join(module.parts[:-level])] if level else []
                whole = ".".join(above + ([source] if source else []))
                yield whole
                yield from (f"{whole}.{alias.name}" for alias in names)


def nodes_run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes outside functions and outside `if TYPE_CHECKING:`."""
    yield node
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.If(test=ast.Name(id="TYPE_CHECKING")):
                continue
        yield from nodes_run_on_import(child)


def modules_loaded_by(module: Path) -> Iterator[str]:
    """Our modules that importing this one imports, by their dotted names."""
    for node in nodes_run_on_import(tree(module)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str() as source, names=names, level=0):
                inner = [f"{source}.{alias.name}" for alias in names]
                yield from (name if name in NAMES else source for name in inner)
            case ast.ImportFrom():
                raise AssertionError(f"{module} has a relative import")


def packages(module: Path) -> set[str]:
    """The packages that a module imports from: our own by their folder, others by their first name."""
    return {name.removeprefix("agent_chat.").split(".")[0] for name in imports(module)}


def reads_environment(module: Path) -> bool:
    """True if it says os.environ, os.environb or os.getenv, or imports one of them from os."""
    words = {"environ", "environb", "getenv", "getenvb"}
    for node in ast.walk(tree(module)):
        match node:
            case ast.Attribute(value=ast.Name(id="os"), attr=attr) if attr in words:
                return True
            case ast.ImportFrom(module="os", names=names) if words & {alias.name for alias in names}:
                return True
    return False


def test_there_are_modules_to_look_at() -> None:
    assert {module.parts[0] for module in MODULES} == set(ALLOWED)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_imports_run_one_way(module: Path) -> None:
    ours = packages(module) & {"server", "agents", "stores", "tests", "web_demo"}
    assert ours <= ALLOWED[module.parts[0]]


def test_imports_have_no_cycle() -> None:
    graph = {name: set(modules_loaded_by(module)) & NAMES.keys() for name, module in NAMES.items()}
    assert all(graph[name] for name in ("agent_chat.server.app", "agent_chat.agents.registry"))
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


@pytest.mark.parametrize("driver", DRIVERS)
def test_each_driver_is_met_in_its_own_file(driver: str) -> None:
    met_in = {str(module) for module in MODULES if driver in packages(module)}
    assert met_in <= DRIVERS[driver]


def test_the_environment_is_read_by_the_settings() -> None:
    assert {str(module) for module in MODULES if reads_environment(module)} <= ENVIRONMENT


def test_only_stores_open_and_the_tests_know_which_backend_is_in_use() -> None:
    backend = re.compile(r"agent_chat\.stores\.(sqlite|mongo|embedded|redis)\b.*")
    outside = [module for module in MODULES if not re.match(r"stores/(open|sqlite|mongo|embedded|redis)", str(module))]
    knowing = {str(module) for module in outside if any(backend.fullmatch(name) for name in imports(module))}
    assert knowing == set()


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_files_and_functions_are_short(module: Path) -> None:
    assert len((ROOT / module).read_text(encoding="utf-8").splitlines()) <= 400
    functions = [node for node in ast.walk(tree(module)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert [node.name for node in functions if (node.end_lineno or 0) - node.lineno >= 60] == []


def test_the_visible_top_level_is_what_the_design_allows() -> None:
    ignored = [line.rstrip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line]
    visible = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    visible = {name for name in visible if not any(fnmatch(name, pattern) for pattern in ignored)}
    assert {name for name in visible if not any(fnmatch(name, pattern) for pattern in BESIDE)} == TOP


def test_tests_import_from_support_not_from_each_other() -> None:
    """And no two of their files share a name."""
    tests = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py"))
    wrong = [
        f"{module}: {name}"
        for module in [*tests, *(path.relative_to(ROOT) for path in (ROOT / "tests" / "support").rglob("*.py"))]
        for name in imports(module)
        if re.match(r"tests\..*\b(test_\w+|conftest)\b", name)
    ]
    assert wrong == []
    assert len({path.name for path in tests}) == len(tests)


def test_the_service_loads_nothing_of_http() -> None:
    loaded = subprocess.run(
        [sys.executable, "-c", "import sys, agent_chat.server.ai_chat_service; print(*sys.modules, sep='\\n')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=50,
    ).stdout.split()
    assert "agent_chat.server.runs.runner" in loaded
    http = re.compile(r"(starlette|uvicorn|sse_starlette|websockets|agent_chat\.server\.http)(\..*)?")
    assert [name for name in loaded if http.fullmatch(name)] == []
