"""The house's plan as a table: which room may import which, and where each third-party package may appear.

Imports point only down (docs/architecture.md). Imports for type checkers and imports inside functions count too: they
are knowledge of another room all the same.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import unspool

ROOT = Path(unspool.__file__).parent

# Below every other room; everybody may import them.
GROUND = {"errors", "types", "twins"}

# Room -> the rooms it may import, besides itself and the ground. "models.base" admits that one module of a room.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "types": set(),
    "twins": set(),
    "config": set(),
    "cache": {"config"},
    "attention": {"config", "cache", "kernels"},
    "logits": {"config", "kernels"},
    "stopping": {"config"},
    "streaming": {"config"},
    "tokenization": set(),
    "kernels": set(),
    "models": {"config", "attention", "cache.layout", "kernels"},
    "weights": {"config", "models", "kernels"},
    "bridge": {"config", "models.base", "models.adapters", "attention", "cache", "decode", "kernels"},
    "decode": {"config", "models.base", "models.adapters", "cache", "attention", "kernels", "logits", "stopping"},
    "generate": {
        "config",
        "models.base",
        "models.adapters",
        "cache",
        "attention",
        "logits",
        "stopping",
        "streaming",
        "decode",
        "bridge",
    },
    "continuous": {
        "config",
        "models.base",
        "models.adapters",
        "cache",
        "attention",
        "kernels",
        "logits",
        "stopping",
        "streaming",
        "decode",
    },
    "adapters": {"*"},
    "inspection": {"generate.outputs"},
    "interop": {"*"},
    "hub": {"*"},
    "repositories": set(),
    "server": {"*"},
    "cli": {"*"},
    "__main__": {"*"},
    "": {"*"},  # unspool/__init__.py
}

# Third-party package -> the rooms that may import it. A package that is not named here may be imported nowhere.
THIRD_PARTY: dict[str, set[str]] = {
    "torch": {"*"},
    "numpy": {"*"},
    "typing_extensions": {"*"},
    "safetensors": {"weights", "bridge", "logits"},  # logits: detectors of watermarks
    "tokenizers": {"tokenization"},
    "jinja2": {"tokenization", "inspection"},
    "huggingface_hub": {"repositories", "config", "tokenization", "generate"},
    "packaging": {"generate"},  # comes with huggingface_hub
    "rich": {"cli", "continuous", "inspection", "weights"},
    "typer": {"cli"},
    "transformers": {"bridge", "interop"},
    "peft": {"bridge"},
    "llguidance": {"logits"},
}


class Import(NamedTuple):
    """One import statement: where it stands and the dotted name that it loads."""

    file: Path
    line: int
    target: str

    @property
    def room(self) -> str:
        """The room that imports; the top-level `__init__` is the room without a name."""
        return room_of(".".join(self.file.relative_to(ROOT).with_suffix("").parts))

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT.parent)}:{self.line} imports {self.target}"


def room_of(module: str) -> str:
    """Room of a module's name below `unspool`: `cache.paged` lies in `cache`, `__init__` in the nameless room."""
    first = module.split(".")[0]
    return "" if first == "__init__" else first


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def is_module(dotted: str) -> bool:
    """Whether a dotted name below `unspool` is a file or folder here, and not a name inside one."""
    path = ROOT.joinpath(*dotted.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def imports(file: Path) -> Iterator[Import]:
    """Every import in a file; `from unspool.cache import layout` is told as `unspool.cache.layout`."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = ("unspool", *file.relative_to(ROOT).parent.parts)
                package = package[: len(package) - node.level + 1]
                base = ".".join((*package, base)) if base else ".".join(package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                inner = full.removeprefix("unspool.")
                yield Import(file, node.lineno, full if full != inner and is_module(inner) else base)


def everything() -> list[Import]:
    return [found for file in modules() for found in imports(file)]


def allowed(found: Import) -> bool:
    """Whether the room table lets this import of another room stand."""
    module = found.target.removeprefix("unspool.")
    room = room_of(module)
    admitted = ROOMS[found.room] | GROUND | {found.room}
    return "*" in admitted or room in admitted or any(module == a or module.startswith(a + ".") for a in admitted if a)


def test_every_folder_is_a_room_of_the_table() -> None:
    found = {room_of(".".join(file.relative_to(ROOT).with_suffix("").parts)) for file in modules()}
    assert found - ROOMS.keys() == set()


def test_imports_point_down() -> None:
    wrong = [str(found) for found in everything() if found.target.startswith("unspool.") and not allowed(found)]
    assert wrong == []


def test_rooms_import_each_other_in_no_circle() -> None:
    below: dict[str, set[str]] = {room: set() for room in ROOMS}
    for room, admitted in ROOMS.items():
        below[room] = {a.split(".")[0] for a in admitted if a != "*"} - {room}
    while leaves := [room for room, rest in below.items() if not rest]:
        for leaf in leaves:
            del below[leaf]
        below = {room: rest - set(leaves) for room, rest in below.items()}
    assert below == {}


def test_the_two_front_ends_do_not_know_each_other() -> None:
    assert "continuous" not in ROOMS["generate"]
    assert "generate" not in ROOMS["continuous"]


def test_third_party_packages_stay_in_their_rooms() -> None:
    wrong = []
    for found in everything():
        package = found.target.split(".")[0]
        if package in sys.stdlib_module_names or package == "unspool":
            continue
        rooms = THIRD_PARTY.get(package, set())
        if "*" not in rooms and found.room not in rooms:
            wrong.append(str(found))
    assert wrong == []


def test_nothing_unpickles() -> None:
    """No `torch.load` and no `pickle` on any path: weights come from safetensors alone."""
    wrong = [str(found) for found in everything() if found.target.split(".")[0] in {"pickle", "dill", "joblib"}]
    for file in modules():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                wrong.append(f"{file.relative_to(ROOT.parent)}:{node.lineno} calls torch.load")
    assert wrong == []


@pytest.mark.parametrize("file", modules(), ids=lambda file: str(file.relative_to(ROOT)))
def test_every_module_says_what_it_holds(file: Path) -> None:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert docstring is not None
    assert len(docstring.split()) >= 4, f"{file.name}: {docstring!r} says nothing"
