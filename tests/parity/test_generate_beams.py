"""Beam search and beam sampling against transformers' own: the same sequences, scores and origins."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, make_checkpoint
from hypothesis import given, settings, strategies as st

import unspool
from unspool.errors import NonFiniteLogits

PROMPTS = [[5, 9, 11, 3, 8, 2, 7, 44, 51, 60, 23], [17, 4], [23, 31, 31, 9, 60]]
PAD = 0
Pair = tuple[Any, Any]


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    ids = [[PAD] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


def make_pair(name: str, folder: Path) -> Pair:
    theirs = make_checkpoint(name, folder)
    return unspool.AutoModelForCausalLM.from_pretrained(folder, dtype="float32"), theirs


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return make_pair("llama", tmp_path_factory.mktemp("llama"))


def both(pair: Pair, seed: int = 3, **kwargs: Any) -> tuple[Any, Any]:
    """The same call on both sides, with the same state of the global generator."""
    defaults = {"eos_token_id": None, "pad_token_id": PAD, "return_dict_in_generate": True, "output_scores": True}
    results = []
    for model in pair:
        torch.manual_seed(seed)
        results.append(model.generate(**(defaults | kwargs)))
    return results[0], results[1]


def assert_alike(pair: Pair, ours: Any, theirs: Any) -> None:
    """The same results; rows of a prompt whose scores are equal but for rounding may stand in another order."""
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, atol=1e-4, rtol=1e-5)
    assert len(ours.scores) == len(theirs.scores)
    torch.testing.assert_close(
        pair[0].compute_transition_scores(ours.sequences, ours.scores, ours.beam_indices),
        pair[0].compute_transition_scores(theirs.sequences, theirs.scores, theirs.beam_indices),
        atol=1e-4,
        rtol=1e-4,
    )


def assert_same(ours: Any, theirs: Any) -> None:
    """The same to the last bit, where both got the same logits."""
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    assert ours.beam_indices.tolist() == theirs.beam_indices.tolist()
    assert ours.sequences_scores.tolist() == theirs.sequences_scores.tolist()
    assert len(ours.scores) == len(theirs.scores)
    assert all(mine.equal(other) for mine, other in zip(ours.scores, theirs.scores, strict=True))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A pair whose logits are looked up by the newest token: bit for bit the same on both sides, with many equals."""
    ours, theirs = make_pair("llama", tmp_path_factory.mktemp("table"))
    logits = (torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(1)) * 8).round() / 4
    forward = theirs.forward

    @functools.wraps(forward)
    def look_up(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        out = forward(input_ids=input_ids, **kwargs)
        out.logits = logits[input_ids][:, -out.logits.shape[1] :]
        return out

    theirs.forward = look_up
    ours.step = lambda batch: logits[batch.tokens if batch.keep is None else batch.tokens[batch.keep]]
    return ours, theirs


def test_alone_and_padded(pair: Pair) -> None:
    """Past the sliding window, and past the length where longrope changes its wavelengths."""
    prompts = PROMPTS[:1] if pair[0].spec.needs_extents else PROMPTS
    kwargs: dict[str, Any] = {"num_beams": 4, "max_new_tokens": 18, "do_sample": False}
    for inputs in (padded(prompts), padded(PROMPTS[:1])):
        ours, theirs = both(pair, **inputs, num_return_sequences=3, **kwargs)
        assert_alike(pair, ours, theirs)
        found = (ours.sequences, ours.scores, ours.beam_indices)
        for normalize in (False, True):
            torch.testing.assert_close(
                pair[0].compute_transition_scores(*found, normalize),
                pair[1].compute_transition_scores(*found, normalize),
            )
    ours, theirs = both(pair, **padded(prompts), return_dict_in_generate=False, output_scores=False, **kwargs)
    assert ours.tolist() == theirs.tolist()
    assert len({tuple(row) for row in ours[:, -18:].tolist()}) == len(prompts), "each prompt has a text of its own"


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    beams = draw(st.integers(2, 5))
    token = st.integers(1, VOCAB - 1)
    some: dict[str, st.SearchStrategy[Any]] = {
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "no_repeat_ngram_size": st.integers(1, 3),
        "encoder_no_repeat_ngram_size": st.integers(1, 3),
        "bad_words_ids": st.lists(st.lists(token, min_size=1, max_size=2), min_size=1, max_size=3),
        "suppress_tokens": st.lists(st.integers(40, 96), min_size=1, max_size=20),
        "min_new_tokens": st.integers(1, 6),
        "forced_eos_token_id": st.integers(1, 39),
        "forced_bos_token_id": st.integers(1, 39),
        "sequence_bias": st.just([[[11], 4.0], [[9, 60], -5.0]]),
        "renormalize_logits": st.just(True),
        "remove_invalid_values": st.just(True),
    }
    warpers: dict[str, st.SearchStrategy[Any]] = {
        "temperature": st.sampled_from([0.6, 1.5]),
        "top_k": st.integers(0, 30),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.just(0.05),
        "typical_p": st.just(0.8),
    }
    do_sample = draw(st.booleans())
    names = draw(st.lists(st.sampled_from(sorted({**some, **(warpers if do_sample else {})})), max_size=3))
    prompt = st.lists(token, min_size=1, max_size=9)
    return {
        **padded(draw(st.lists(prompt, min_size=1, max_size=3))),
        "num_beams": beams,
        "num_return_sequences": draw(st.integers(1, beams)),
        "length_penalty": draw(st.sampled_from([1.0, 0.0, -1.5, 2.0])),
        "early_stopping": draw(st.sampled_from([False, True, "never"])),
        "eos_token_id": draw(st.none() | token | st.lists(token, min_size=1, max_size=30, unique=True)),
        "pad_token_id": draw(st.sampled_from([PAD, 96])),
        "max_new_tokens": draw(st.integers(1, 14)),
        "do_sample": do_sample,
        **{name: draw({**some, **warpers}[name]) for name in names},
    }


@settings(max_examples=60, deadline=None)
@given(call=calls(), seed=st.integers(0, 100))
def test_settings(table: Pair, call: dict[str, Any], seed: int) -> None:
    ours, theirs = both(table, seed, **call)
    assert_same(ours, theirs)
    quiet, _ = both(table, seed, **call, return_dict_in_generate=False, output_scores=False)
    assert quiet.tolist() == ours.sequences.tolist(), "prompts that are settled may leave"


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_everything_recorded(name: str, tmp_path: Path) -> None:
    pair = make_pair(name, tmp_path)
    inputs = padded(PROMPTS)
    pair[1].set_attn_implementation("eager")
    kwargs: dict[str, Any] = {
        **inputs, "max_new_tokens": 4, "num_beams": 3, "do_sample": False, "output_logits": True,
        "output_attentions": True, "output_hidden_states": True,
    }  # fmt: skip
    ours, theirs = both(pair, **kwargs)
    assert_alike(pair, ours, theirs)
    chunked, _ = both((pair[0], pair[0]), **kwargs, prefill_chunk_size=4)
    for a, b in zip(chunked.hidden_states[0], ours.hidden_states[0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    real = inputs["attention_mask"].bool().repeat_interleave(3, 0)
    for step in range(4):
        torch.testing.assert_close(ours.logits[step], theirs.logits[step], atol=5e-5, rtol=5e-5)
        for name in ("hidden_states", "attentions"):
            for a, b in zip(ours[name][step], theirs[name][step], strict=True):
                assert a.shape == b.shape
                if step == 0 and name == "attentions":
                    a, b = a.transpose(1, 2), b.transpose(1, 2)
                torch.testing.assert_close(
                    a[real] if step == 0 else a, b[real] if step == 0 else b, atol=1e-4, rtol=1e-4
                )
    assert isinstance(ours, unspool.GenerateBeamDecoderOnlyOutput)
    assert ours.finish_reasons == ["length"] * len(inputs["input_ids"])
    assert set(theirs) - set(ours) == {"past_key_values"}


def test_processors_and_criteria_of_the_callers_own(table: Pair) -> None:
    widths: list[tuple[int, ...]] = []

    def shift(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        widths.append((*input_ids.shape, *scores.shape))
        return scores - (input_ids[:, -1:] % 7) * torch.arange(VOCAB) / 50

    def ends(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        assert len(scores) == input_ids.shape[1] - 11
        return input_ids[:, -1] % 5 == 0

    for do_sample in (False, True):
        for allowed in (None, lambda row, ids: [int(ids[-1]) % 31 + 3, 40 + row, 55, 60, 61, 70, 71, 72]):
            kwargs: dict[str, Any] = {
                "num_beams": 3,
                "num_return_sequences": 2,
                "max_new_tokens": 12,
                "do_sample": do_sample,
                "top_k": 0,
                "prefix_allowed_tokens_fn": allowed,
            }
            assert_same(*both(table, **padded(PROMPTS), logits_processor=[shift], stopping_criteria=[ends], **kwargs))
    half = len(widths) // 4
    assert widths[:2] == [(9, 11, 9, VOCAB), (9, 12, 9, VOCAB)]
    assert half > 3


def test_stop_strings(tiny_llama_dir: Path) -> None:
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_dir, dtype=torch.float32)
    ours, tokenizer = unspool.load(tiny_llama_dir, dtype="float32", device="cpu")
    reference = transformers.AutoTokenizer.from_pretrained(tiny_llama_dir)
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])}
    kwargs: dict[str, Any] = {
        **inputs,
        "num_beams": 4,
        "max_new_tokens": 12,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 2,
        "stop_strings": ["e", "Na"],
        "return_dict_in_generate": True,
        "output_scores": True,
    }
    mine, other = ours.generate(tokenizer=tokenizer, **kwargs), theirs.generate(tokenizer=reference, **kwargs)
    assert_alike((ours, theirs), mine, other)
    assert "stop" in mine.finish_reasons


def test_room_is_made_while_rows_share_blocks(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = padded(PROMPTS[:1] if pair[0].spec.needs_extents else [PROMPTS[0] * 3, PROMPTS[1]])
    kwargs: dict[str, Any] = {**inputs, "num_beams": 3, "max_new_tokens": 50, "do_sample": False, "eos_token_id": None}
    ample = pair[0].generate(**kwargs)
    monkeypatch.setattr("unspool.generate.paged._FIRST_ROOM", 3)
    assert pair[0].generate(**kwargs).tolist() == ample.tolist()


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Of every step, the blocks in use and the rows that use them."""
    from unspool.cache import PagedStore
    from unspool.decode.loop import Loop

    seen: list[tuple[int, int]] = []
    original = Loop._launch

    def watched(self: Any, work: Any) -> Any:
        flight = original(self, work)
        store: PagedStore = self.runner.store
        rows = [row for row in work[0].group.rows if row.blocks]
        used = store.blocks[0].count - store.blocks[0].free
        assert used == len({block for row in rows for block in row.blocks[0]}), "nothing leaks"
        seen.append((used, len(rows)))
        return flight

    monkeypatch.setattr(Loop, "_launch", watched)
    return seen


def test_prompt_memory_is_independent_of_beams(llama: Pair, stores: list[tuple[int, int]]) -> None:
    prompt = torch.randint(3, VOCAB, (1, 200), generator=torch.Generator().manual_seed(0))  # 12 blocks and a half
    peaks = {}
    for beams in (2, 4, 8):
        stores.clear()
        llama[0].generate(prompt, num_beams=beams, max_new_tokens=8, do_sample=False, eos_token_id=None)
        assert stores[0] == (12 + beams, beams)
        peaks[beams] = max(used for used, _ in stores)
    assert peaks == {beams: 12 + beams for beams in peaks}
    stores.clear()
    llama[0].generate(prompt, num_beams=8, max_new_tokens=40, do_sample=False, eos_token_id=None)
    assert max(used for used, _ in stores) <= 12 + 8 * 3


def test_peak_memory_beside_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes of keys and values of 4 beams on a prompt of 512 tokens, all that is allocated here against all in use."""
    from unspool.cache import PagedStore

    theirs = make_checkpoint("llama", tmp_path, max_position_embeddings=1024)
    ours = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    sizes: list[int] = []
    extend = PagedStore.extend

    def watched(store: PagedStore, row: Any, tokens: int) -> bool:
        sizes.append(sum(pool.nbytes for pools in (store.keys, store.values) for pool in pools.values()))
        return extend(store, row, tokens)

    monkeypatch.setattr(PagedStore, "extend", watched)
    ids = torch.randint(3, VOCAB, (1, 512), generator=torch.Generator().manual_seed(0))
    mine, other = both((ours, theirs), input_ids=ids, num_beams=4, max_new_tokens=64, do_sample=False)
    assert mine.sequences.tolist() == other.sequences.tolist()
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in other.past_key_values.layers)
    assert 0 < max(sizes) <= 0.45 * stored


def test_prompts_that_are_settled_leave(llama: Pair, stores: list[tuple[int, int]]) -> None:
    kwargs: dict[str, Any] = {"num_beams": 3, "do_sample": False, "early_stopping": True, "pad_token_id": PAD}
    free = llama[0].generate(PROMPTS, max_new_tokens=20, **kwargs | {"eos_token_id": None})
    ends = free[0, 11:14].tolist()
    stores.clear()
    out = llama[0].generate(PROMPTS, max_new_tokens=20, eos_token_id=ends, **kwargs)
    assert {rows for _, rows in stores} > {9}
    inputs = padded(PROMPTS)
    assert out.tolist() == llama[1].generate(**inputs, max_new_tokens=20, eos_token_id=ends, **kwargs).tolist()


def test_a_prompt_gets_the_same_in_any_company(llama: Pair) -> None:
    model = llama[0]
    kwargs: dict[str, Any] = {
        "num_beams": 3, "max_new_tokens": 10, "do_sample": True, "seed": 5, "top_k": 0, "eos_token_id": None,
    }  # fmt: skip
    alone = [model.generate([prompt], **kwargs)[0, len(prompt) :].tolist() for prompt in PROMPTS]
    torch.manual_seed(8)
    assert model.generate(PROMPTS, **kwargs)[:, 11:].tolist() == alone
    assert model.generate(PROMPTS, prefill_chunk_size=3, **kwargs)[:, 11:].tolist() == alone
    assert model.generate(PROMPTS, **kwargs | {"seed": 6})[:, 11:].tolist() != alone


def test_beams_take_a_past_and_give_none(llama: Pair) -> None:
    model = llama[0]
    kwargs: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    first = model.generate(PROMPTS[:1], return_dict_in_generate=True, **kwargs)
    longer = torch.cat([first.sequences, torch.tensor([[7, 8]])], 1)
    again = model.generate(
        longer, past_key_values=first.past_key_values, num_beams=3, return_dict_in_generate=True, **kwargs
    )
    assert again.sequences.tolist() == model.generate(longer, num_beams=3, **kwargs).tolist()
    assert again.past_key_values is None


class Pieces:
    """A streamer that knows rows and keeps what it gets."""

    row_aware = True

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.puts = 0

    def put(self, value: Any, live: Any = None, mask: Any = None) -> None:
        if mask is not None:
            self.rows = [[] for _ in value.tolist()]
            return
        self.puts += 1
        for row, new, alive in zip(self.rows, value, live, strict=True):
            assert alive or not new
            row += new

    def end(self) -> None:
        self.puts = -self.puts


class Plain:
    """A streamer that takes one token of each row at a time."""

    def __init__(self) -> None:
        self.columns: list[list[int]] = []

    def put(self, value: torch.Tensor) -> None:
        if value.ndim == 1:
            self.columns.append(value.tolist())

    def end(self) -> None:
        self.rows = [list(row) for row in zip(*self.columns, strict=True)]


@settings(max_examples=15, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(1, VOCAB - 1), min_size=1, max_size=6), min_size=1, max_size=3),
    eos=st.lists(st.integers(1, VOCAB - 1), max_size=12, unique=True),
    early=st.sampled_from([False, True, "never"]),
)
def test_streams_are_the_best_outputs(llama: Pair, prompts: list[list[int]], eos: list[int], early: Any) -> None:
    kwargs: dict[str, Any] = {
        **padded(prompts), "num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 16, "do_sample": False,
        "eos_token_id": eos or None, "pad_token_id": PAD, "early_stopping": early, "return_dict_in_generate": True,
    }  # fmt: skip
    width = kwargs["input_ids"].shape[1]
    out = llama[0].generate(**kwargs)
    steps = (out.beam_indices >= 0).sum(1)
    best = [row[width : width + n].tolist() for row, n in zip(out.sequences, steps, strict=True)][::2]
    by_row, plain = Pieces(), Plain()
    llama[0].generate(**kwargs, streamer=by_row)
    assert by_row.rows == best
    llama[0].generate(**kwargs, streamer=plain)
    assert [row[: len(wanted)] for row, wanted in zip(plain.rows, best, strict=True)] == best


def test_streams_give_what_is_agreed_before_the_end(llama: Pair) -> None:
    streamer = Pieces()
    llama[0].generate(
        PROMPTS[:1], num_beams=2, max_new_tokens=40, do_sample=False, eos_token_id=None, streamer=streamer
    )
    assert len(streamer.rows[0]) == 40
    assert streamer.puts < -3


@pytest.mark.parametrize(
    ("wrong", "kind", "text"),
    [
        ({"num_return_sequences": 5}, ValueError, r"num_return_sequences \(5\).*num_beams \(4\)"),
        ({"num_beams": 0}, ValueError, "num_beams"),
        ({"num_beams": 2.5}, TypeError, "num_beams"),
        ({"early_stopping": "sometimes"}, (TypeError, ValueError), "early_stopping"),
        ({"length_penalty": "long"}, (TypeError, ValueError), "length_penalty"),
    ],
)
def test_mistakes(llama: Pair, wrong: dict[str, Any], kind: Any, text: str) -> None:
    with pytest.raises(kind, match=text):
        llama[0].generate(PROMPTS, **{"num_beams": 4, "max_new_tokens": 3, **wrong})


def test_nothing_to_choose_is_said(tmp_path: Path) -> None:
    ours, _ = make_pair("llama", tmp_path)
    ours.layers[1].mlp_norm.weight.data[3] = float("nan")
    for do_sample in (False, True):
        with pytest.raises(NonFiniteLogits, match=r"row 0.*layer 1"):
            ours.generate(PROMPTS, num_beams=2, max_new_tokens=3, do_sample=do_sample)
