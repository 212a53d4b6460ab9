"""Models of many architectures of transformers, decoded by our loop: the tokens are those of their own `generate()`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
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


def test_the_table_in_the_docs_is_what_these_tests_find() -> None:
    rows = re.findall(r"^\| `([\w.-]+)` \| (.+?) \| (.+?) \|$", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert [name for name, _, _ in rows] == [one.model_type for one in ARCHITECTURES]
    for (_, way, modes), architecture in zip(rows, ARCHITECTURES, strict=True):
        assert ("beams" in modes) == architecture.beams
        if architecture.quick:
            assert way == (WHOLE if is_plain(architecture.make()) else INSIDE)
