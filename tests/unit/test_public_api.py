"""The names that `unspool` offers, and what importing it costs."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import transformers

import unspool

SOURCE = Path(unspool.__file__)
HEAVY = {"huggingface_hub", "jinja2", "rich", "safetensors", "tokenizers", "transformers", "typer"}

# Public names of transformers' generation API that this version has on purpose under the same name.
SHARED = sorted(set(unspool.__all__) & set(dir(transformers)))


def imported_by(code: str) -> set[str]:
    """Top-level packages in `sys.modules` of a fresh interpreter after running `code`."""
    script = f"{code}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_import_loads_nothing_else() -> None:
    assert imported_by("import unspool") & (HEAVY | {"torch", "numpy"}) == set()


def test_names_load_little_more_than_torch() -> None:
    """What torch itself brings along does not count."""
    code = "from unspool import GenerationMixin, LogitsProcessorList, StoppingCriteriaList, TextStreamer, load"
    assert (imported_by(code) - imported_by("import torch")) & HEAVY == set()


def test_nothing_imports_transformers_on_the_way_to_a_model(tiny_llama_dir: Path) -> None:
    code = f"import unspool; unspool.load({str(tiny_llama_dir)!r})"
    assert imported_by(code) & {"transformers", "typer", "rich", "peft"} == set()


@pytest.mark.parametrize("name", unspool.__all__)
def test_every_name_can_be_imported(name: str) -> None:
    assert getattr(unspool, name) is not None
    assert name in dir(unspool)


@pytest.mark.parametrize("name", unspool.__all__)
def test_every_name_is_documented(name: str) -> None:
    value = getattr(unspool, name)
    if name != "__version__":
        doc = inspect.getdoc(value)
        assert doc
        assert len(doc.split()) >= 4


def test_type_checkers_see_the_same_names() -> None:
    """The imports under TYPE_CHECKING and the table of homes are one list, written twice."""
    (block,) = [
        node
        for node in ast.parse(SOURCE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    declared = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    homes = {name: module for module, names in unspool._HOMES.items() for name in names}
    assert declared == homes


@pytest.mark.parametrize("room", ["logits", "stopping", "streaming"])
def test_every_class_of_transformers_in_a_room_is_exported(room: str) -> None:
    offered = set(import_module(f"unspool.{room}").__all__) & set(dir(transformers))
    assert offered - set(unspool.__all__) == set()


def test_shared_names_are_the_expected_ones() -> None:
    assert len(SHARED) >= 40
    assert {"AutoModelForCausalLM", "AutoTokenizer", "GenerationConfig", "GenerationMixin"} <= set(SHARED)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'AutoModelForPoetry'"):
        _ = unspool.AutoModelForPoetry
    with pytest.raises(ImportError):
        exec("from unspool import AutoModelForPoetry")


def test_version_is_the_package_version() -> None:
    text = (SOURCE.parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(rf'^version = "{re.escape(unspool.__version__)}"$', text, re.MULTILINE)
