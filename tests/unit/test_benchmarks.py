"""What the benchmarks measure with is what they say it is."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import unspool

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkpoints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """``benchmarks/checkpoints.py``, imported as its scripts import it, with a cache of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("checkpoints")
    monkeypatch.delitem(sys.modules, "checkpoints")
    monkeypatch.setattr(module, "CACHE", tmp_path)
    return module


@pytest.mark.parametrize(("dtype", "length"), [(torch.float32, 48), (torch.bfloat16, 144)])
def test_the_copier_says_its_prompt_again(checkpoints: ModuleType, dtype: torch.dtype, length: int) -> None:
    model, tokenizer = unspool.load(checkpoints.copier(length), dtype=dtype)
    draw = torch.Generator().manual_seed(0)
    few = torch.randint(3, 12, (length - 1,), generator=draw)
    once = 3 + torch.randperm(2045, generator=draw)[: length - 1]
    ids = torch.nn.functional.pad(torch.stack([few, once]), (0, 1), value=tokenizer.eos_token_id)
    given = {"do_sample": False, "max_new_tokens": 200}  # it ends by itself
    assert model.generate(ids, **given)[:, length:].tolist() == ids.tolist()
    drafted = model.generate(ids, **given, prompt_lookup_num_tokens=10, return_dict_in_generate=True)
    assert drafted.sequences[:, length:].tolist() == ids.tolist()
    wrong = [any(draft.accepted < len(draft.tokens) for draft in row) for row in drafted.drafts]
    assert wrong == [True, False]  # nine tokens alone lead astray, tokens said once do not
