"""The doors of the house: who may import whom, and what the stub says of the native module."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import asyncckpt
from asyncckpt import _native

PACKAGE = Path(asyncckpt.__file__).parent
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> Iterator[str]:
    """Absolute names of everything that a module imports, lazily or not."""
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{stem}.{alias.name}"


GRAPH = {name_of(path): set(imports_of(path)) for path in MODULES}

PURE = {
    "asyncckpt.nodes",
    "asyncckpt.plan",
    "asyncckpt.packing",
    "asyncckpt.parts",
    "asyncckpt.shards",
    "asyncckpt.trial",
} | {name for name in GRAPH if name.startswith(("asyncckpt.planners", "asyncckpt.layouts"))}


def users_of(target: str) -> set[str]:
    return {
        name for name, found in GRAPH.items() if any(i == target or i.startswith(target + ".") for i in found)
    }


def test_the_graph_is_seen() -> None:
    assert "asyncckpt.commit" in users_of("asyncckpt.formats.manifest")
    assert len(GRAPH) > 20


def test_only_snapshot_and_restore_open_the_engine() -> None:
    """The survey is no engine: it looks at tensors, and is native for its speed alone."""
    rooms = {"asyncckpt.snapshot", "asyncckpt.restore", "asyncckpt.survey"}
    assert users_of("asyncckpt._native") == rooms


def test_only_the_front_door_sees_the_checkpointer() -> None:
    users = users_of("asyncckpt.checkpointer")
    assert {name for name in users if not name.startswith("asyncckpt.integrations")} == {"asyncckpt"}


def test_only_an_integration_knows_a_framework() -> None:
    for framework in ("megatron", "rlinf", "ray", "lightning", "transformers"):
        users = {name for name, found in GRAPH.items() if any(i.split(".")[0] == framework for i in found)}
        assert {name for name in users if not name.startswith("asyncckpt.integrations")} == set()


@pytest.mark.parametrize("room", [name for name in GRAPH if ".formats" in name or name in PURE])
def test_pure_rooms_do_no_io(room: str) -> None:
    forbidden = ("os", "threading", "socket", "subprocess", "shutil", "tempfile")
    used = {found.split(".")[0] for found in GRAPH[room]}
    assert not used & set(forbidden)


@pytest.mark.parametrize("room", [name for name in GRAPH if ".formats" in name])
def test_formats_know_no_room_above_them(room: str) -> None:
    above = {
        i for i in GRAPH[room] if i.startswith("asyncckpt") and ".formats" not in i and ".errors" not in i
    }
    assert not above


def test_only_the_checkpointer_packs_and_only_packing_sees_the_kernels() -> None:
    assert users_of("asyncckpt.packing") == {"asyncckpt.checkpointer"}
    assert users_of("asyncckpt.kernels") == {"asyncckpt.packing"}
    assert users_of("cupy") == {"asyncckpt.kernels"}


def test_a_trial_knows_nothing_but_numbers() -> None:
    assert {found.split(".")[0] for found in GRAPH["asyncckpt.trial"]} == {"__future__"}


def test_cupy_is_imported_where_it_is_needed_and_not_before() -> None:
    tree = ast.parse((PACKAGE / "kernels.py").read_text())
    assert not [node for node in tree.body if isinstance(node, ast.Import) and node.names[0].name == "cupy"]


def test_only_those_who_agree_know_the_other_ranks() -> None:
    assert users_of("asyncckpt.ranks") == {
        "asyncckpt.checkpointer",
        "asyncckpt.committer",
        "asyncckpt.loader",
        "asyncckpt.meeting",
        "asyncckpt.transfer",
    }


def test_commit_and_lease_know_nothing_of_torch() -> None:
    for room in ("commit", "node_root", "nodes", "steps", "lease", "filesystem", "formats.manifest", "parts"):
        assert not {i for i in GRAPH[f"asyncckpt.{room}"] if i.split(".")[0] in ("torch", "numpy")}


INTEGRATIONS = [name for name in GRAPH if name.startswith("asyncckpt.integrations.")]


def test_nobody_needs_an_integration() -> None:
    inside = {"asyncckpt.integrations", *INTEGRATIONS}
    assert INTEGRATIONS
    assert users_of("asyncckpt.integrations") <= inside


@pytest.mark.parametrize("room", INTEGRATIONS)
def test_an_integration_comes_in_by_the_doors_for_it_and_imports_a_framework_when_used(room: str) -> None:
    ours = {found for found in GRAPH[room] if found.startswith("asyncckpt")}
    doors = (
        "checkpointer",
        "errors",
        "formats",
        "integrations",
        "layouts",
        "sections",
        "shards",
        "shared",
        "steps",
        "tree",
    )
    assert all(found.count(".") == 1 or found.split(".")[1] in doors for found in ours)
    tree = ast.parse(next(path for path in MODULES if name_of(path) == room).read_text())
    tree.body = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    at_once = {
        alias.name.split(".")[0] for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }
    at_once |= {
        (node.module or "").split(".")[0]
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and not node.level
    }
    assert at_once <= {"__future__", "torch", "numpy", *sys.stdlib_module_names}


def test_the_stub_names_what_the_engine_has() -> None:
    stub = ast.parse((PACKAGE / "_native.pyi").read_text())
    named = {node.name for node in stub.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    assert named == {name for name in dir(_native) if not name.startswith("__")}
    for node in stub.body:
        if isinstance(node, ast.ClassDef):
            members = {m.name for m in node.body if isinstance(m, (ast.FunctionDef, ast.ClassDef))}
            exposed = getattr(_native, node.name)
            inherited = (
                set(dir(RuntimeError))
                if isinstance(exposed, type) and issubclass(exposed, RuntimeError)
                else set()
            )
            real = {name for name in set(dir(exposed)) - inherited if not name.startswith("_")}
            assert members - {"__init__"} == real, node.name
