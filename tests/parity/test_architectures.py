"""Models of many architectures of transformers, decoded by our loop: the tokens are those of their own `generate()`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, Architecture

import unspool
from unspool.interop.patch import is_plain

DOCS = Path(__file__).parents[2] / "docs" / "bridge.md"
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 30, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
    "no cache": {"use_cache": False},
}
HEAD = "| model | runs | our loop decodes | modes |\n|---|---|---|---|\n"
WHOLE, INSIDE = "the whole call", "inside its own `generate()`"


@pytest.fixture(
    scope="module",
    params=[pytest.param(one, id=one.model_type, marks=() if one.quick else pytest.mark.full) for one in ARCHITECTURES],
)
def made(request: pytest.FixtureRequest) -> tuple[Architecture, Any]:
    return request.param, request.param.make()


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_transformers(made: tuple[Architecture, Any], mode: str, steps: list[int]) -> None:
    architecture, model = made
    if mode == "beams" and not architecture.beams:
        pytest.skip("transformers has no beams for it")
    before = {name: id(value) for name, value in vars(model).items()}
    torch.manual_seed(3)
    expected = model.generate(**architecture.inputs(), max_new_tokens=8, **MODES[mode])
    assert steps == []
    torch.manual_seed(3)
    found = unspool.wrap(model).generate(**architecture.inputs(), max_new_tokens=8, **MODES[mode])
    assert torch.equal(found, expected)
    assert steps
    assert {name: id(value) for name, value in vars(model).items()} == before


@pytest.mark.parametrize("beams", [1, 2])
def test_outputs_are_transformers(made: tuple[Architecture, Any], beams: int) -> None:
    architecture, model = made
    if beams > 1 and not architecture.beams:
        pytest.skip("transformers has no beams for it")
    wanted = {
        "return_dict_in_generate": True, "output_scores": True, "output_logits": True, "output_hidden_states": True,
        "max_new_tokens": 4, "num_beams": beams,
    }  # fmt: skip
    expected = model.generate(**architecture.inputs(), **wanted)
    found = unspool.wrap(model).generate(**architecture.inputs(), **wanted)
    assert isinstance(found, type(expected))
    for name, value in expected.items():
        same(name, getattr(found, name), value)


def same(name: str, found: Any, expected: Any) -> None:
    """Nested tensors agree; a cache is compared by its length."""
    if isinstance(expected, torch.Tensor):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, msg=lambda text: f"{name}: {text}")
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected), name
        for one, other in zip(found, expected, strict=True):
            same(name, one, other)
    elif hasattr(expected, "is_linear") and not all(expected.is_linear):
        assert found.get_seq_length() == expected.get_seq_length()


def line(architecture: Architecture) -> str:
    """A row of the table in the docs: how the calls above are decoded."""
    model = architecture.make()
    report = unspool.wrap(model).unspool_report()
    text_alone = set(architecture.inputs()) <= {"input_ids", "attention_mask"}
    tier = report.tier if text_alone or report.reason else "rows: its inputs are not text alone"
    tier += f": {report.reason}" if report.reason else ""
    way = WHOLE if is_plain(model) else INSIDE
    modes = "greedy, sampling, beams" if architecture.beams else "greedy, sampling"
    return f"| `{architecture.model_type}` | {tier} | {way} | {modes} |"


def table() -> list[str]:
    """The rows in the docs."""
    return re.findall(r"^\| `.+\|$", DOCS.read_text(encoding="utf-8").partition(HEAD)[2], re.MULTILINE)


def test_the_table_in_the_docs_is_what_these_tests_find(made: tuple[Architecture, Any]) -> None:
    """`PYTHONPATH=tests python tests/parity/test_architectures.py` writes it anew."""
    if f"transformers {transformers.__version__.rpartition('.')[0]}" not in DOCS.read_text(encoding="utf-8"):
        pytest.skip("the docs are about another version of transformers")
    assert line(made[0]) == table()[ARCHITECTURES.index(made[0])]


def test_the_table_is_whole() -> None:
    assert len(table()) == len(ARCHITECTURES)
    assert sum("| ragged |" in row for row in table()) >= 40


if __name__ == "__main__":
    before, head, after = DOCS.read_text(encoding="utf-8").partition(HEAD)
    for row in table():
        after = after.replace(f"{row}\n", "")
    rows = "".join(f"{line(one)}\n" for one in ARCHITECTURES)
    DOCS.write_text(f"{before}{head}{rows}{after}", encoding="utf-8")
