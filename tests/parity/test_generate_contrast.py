"""Contrastive search and DoLa: what transformers 4.49 gave (`make_contrast_v4.py`), a naive loop, and what is ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from families import make_checkpoint
from torch.nn import functional as F

import unspool
from unspool.decode.choose.dola import early_layers
from unspool.decode.runner import PagedRunner
from unspool.errors import NonFiniteLogits, Unsupported

STORED = json.loads((Path(__file__).parent / "fixtures" / "contrast_v4.json").read_text())
PROMPTS = [[5, 9, 11, 3, 8], [17, 4], [23, 31, 31]]
SEARCH: dict[str, Any] = {"penalty_alpha": 0.6, "top_k": 4}
DOLA: dict[str, Any] = {"dola_layers": [0, 2, 5]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    made = {}
    for kind in tiny.CONFIGS:
        folder = tmp_path_factory.mktemp(kind)
        tiny.save(folder, kind)
        made[kind] = unspool.AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    return made


@pytest.fixture(scope="module")
def deep(models: dict[str, Any]) -> Any:
    return models["deep"]


def generate(model: Any, call: dict[str, Any], **more: Any) -> Any:
    kwargs = tiny.arguments({k: v for k, v in call.items() if k not in ("model", "seed")}, unspool)
    torch.manual_seed(call.get("seed", 0))
    return model.generate(**{"eos_token_id": None, "pad_token_id": 0, "max_new_tokens": 8, **kwargs, **more})


@pytest.mark.parametrize("number", range(len(STORED)))
def test_what_transformers_4_gave(models: dict[str, Any], number: int) -> None:
    call, wanted = STORED[number]["call"], STORED[number]["result"]
    model = models[call["model"]]
    out = generate(model, call, return_dict_in_generate=True, output_scores=True, output_logits=True)
    assert out.sequences.tolist() == wanted["sequences"]
    chunk = 3 if number % 4 == 0 else None
    assert generate(model, call, prefill_chunk_size=chunk).tolist() == wanted["sequences"], "rows that ended may leave"
    torch.testing.assert_close(tiny.sums(out.scores), wanted["scores"], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(tiny.sums(out.logits), wanted["logits"], rtol=1e-3, atol=1e-2)


def test_the_stored_calls_are_worth_it() -> None:
    calls = [one["call"] for one in STORED]
    rows = [one["result"]["sequences"] for one in STORED]
    assert {call["model"] for call in calls} == set(tiny.CONFIGS)
    assert sum("penalty_alpha" in call and len(call["prompts"]) > 1 for call in calls) > 20
    assert sum("do_sample" in call for call in calls) > 15
    assert {str(call["dola_layers"]) for call in calls if "dola_layers" in call} > {"low", "high"}
    assert sum(len(row) < len(call["prompts"][0]) + call["max_new_tokens"] for call, (row, *_) in zip(calls, rows, strict=True)) > 15  # fmt: skip # noqa: E501


def states(model: Any, tokens: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits of the last token, and every layer's hidden states, without a cache."""
    out = model(torch.tensor([tokens]), output_hidden_states=True)
    return out.logits[0, -1], [layer[0] for layer in out.hidden_states]


def searched(model: Any, tokens: list[int], alpha: float, k: int, new: int, scale: float = 1.0) -> list[int]:
    """Contrastive search, one whole forward pass for each candidate; guided against the last token of the prompt."""
    negative = tokens[-1:]
    made: list[int] = []
    for _ in range(new):
        logits, hidden = states(model, tokens + made)
        if scale != 1.0:
            other = states(model, negative + made)[0].log_softmax(-1)
            logits = other + scale * (logits.log_softmax(-1) - other)
        chances, found = logits.softmax(-1).topk(k)
        scores = []
        for chance, token in zip(chances.tolist(), found.tolist(), strict=True):
            newest = states(model, [*tokens, *made, token])[1][-1][-1]
            likeness = F.cosine_similarity(hidden[-1], newest[None], dim=-1).max()
            scores.append((1 - alpha) * chance - alpha * float(likeness))
        made.append(found.tolist()[scores.index(max(scores))])
    return made


def contrasted(model: Any, tokens: list[int], layers: list[int], new: int) -> list[int]:
    """DoLa, one whole forward pass for each token."""
    made: list[int] = []
    for _ in range(new):
        logits, hidden = states(model, tokens + made)
        last = logits.log_softmax(-1)
        early = [model.lm_head(hidden[layer][-1:])[0].log_softmax(-1) for layer in layers]
        apart = []
        for one in early:
            mean = (last.exp() + one.exp()) / 2
            apart.append(sum(float((mean * (mean.log() - each)).sum()) for each in (last, one)))
        score = last - early[apart.index(max(apart))]
        score[last.exp() < 0.1 * last.exp().max()] = -torch.inf
        made.append(int(score.argmax()))
    return made


@torch.no_grad()
@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_a_naive_loop_gives_the_same(models: dict[str, Any], kind: str) -> None:
    model = models[kind]
    out = generate(model, {"prompts": PROMPTS, **SEARCH})
    assert out[:, 5:].tolist() == [searched(model, prompt, 0.6, 4, 8) for prompt in PROMPTS]
    layers = [0, 1] if kind == "llama" else [0, 2, 5]
    out = generate(model, {"prompts": PROMPTS, "dola_layers": layers})
    assert out[:, 5:].tolist() == [contrasted(model, prompt, layers, 8) for prompt in PROMPTS]


@torch.no_grad()
def test_the_built_in_model(capsys: Any) -> None:
    model, tokenizer = unspool.load("storyteller", dtype="float32")
    prompts = [tokenizer(text).input_ids for text in ("Once upon a time", "The dog", "Far away, behind the hills")]
    kwargs: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    out = model.generate(prompts, penalty_alpha=0.5, top_k=3, **kwargs)
    width = max(map(len, prompts))
    assert out[:, width:].tolist() == [searched(model, prompt, 0.5, 3, 12) for prompt in prompts]
    out = model.generate(prompts, dola_layers="high", **kwargs)
    assert out[:, width:].tolist() == [contrasted(model, prompt, [3, 5], 12) for prompt in prompts]


@torch.no_grad()
def test_a_text_that_is_computed_anew_is_compared_anew(tmp_path: Path) -> None:
    """Past 24 tokens this model's wavelengths change, and with them all hidden states."""
    make_checkpoint("phi3-longrope", tmp_path)
    model = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    prompts = [[3 + i % 7 for i in range(20)], [40, 41, 42]]
    for eos in (None, [11]):
        out = generate(model, {"prompts": prompts, **SEARCH, "eos_token_id": eos}, max_new_tokens=9)
        for prompt, row in zip(prompts, out[:, 20:].tolist(), strict=True):
            wanted = searched(model, prompt, 0.6, 4, 9)
            ends = [place for place, token in enumerate(wanted) if token in (eos or [])]
            assert row[: ends[0] + 1 if ends else 9] == (wanted[: ends[0] + 1] if ends else wanted)


@torch.no_grad()
def test_guidance_beside_them(deep: Any) -> None:
    out = generate(deep, {"prompts": PROMPTS, **SEARCH}, guidance_scale=1.8)
    assert out[:, 5:].tolist() == [searched(deep, prompt, 0.6, 4, 8, scale=1.8) for prompt in PROMPTS]
    plain = generate(deep, {"prompts": PROMPTS, **DOLA})
    guided = generate(deep, {"prompts": PROMPTS, **DOLA}, guidance_scale=1.8)
    assert guided.tolist() != plain.tolist()
    for i, prompt in enumerate(PROMPTS):
        alone = generate(deep, {"prompts": [prompt], **DOLA}, guidance_scale=1.8)
        assert alone[0, len(prompt) :].tolist() == guided[i, 5:].tolist()


@pytest.mark.parametrize("mode", [SEARCH, DOLA, DOLA | {"do_sample": True}], ids=["search", "dola", "sampled"])
def test_a_row_is_the_same_in_any_company(deep: Any, mode: dict[str, Any]) -> None:
    free = generate(deep, {"prompts": PROMPTS, **mode, "max_new_tokens": 14}, seed=5)
    ends = [int(free[0, 8]), int(free[1, 12])]
    kwargs: dict[str, Any] = {**mode, "eos_token_id": ends, "pad_token_id": 60, "max_new_tokens": 14}
    whole = generate(deep, {"prompts": PROMPTS, **kwargs}, seed=5).tolist()
    assert len({tuple(row).index(60) if 60 in row else 99 for row in whole}) > 1, "they end at different times"
    seen = generate(deep, {"prompts": PROMPTS, **kwargs}, seed=5, return_dict_in_generate=True, output_logits=True)
    assert seen.sequences.tolist() == whole
    for prompt, row in zip(PROMPTS, whole, strict=True):
        alone = generate(deep, {"prompts": [prompt], **kwargs}, seed=5)[0].tolist()
        assert row[5 - len(prompt) :][: len(alone)] == alone
        assert set(row[5 - len(prompt) + len(alone) :]) <= {60}


def test_samples_of_one_prompt_with_dola(deep: Any) -> None:
    kwargs: dict[str, Any] = {**DOLA, "do_sample": True, "temperature": 2.0, "max_new_tokens": 12}
    several = generate(deep, {"prompts": PROMPTS, **kwargs}, num_return_sequences=2)
    written_out = generate(deep, {"prompts": [prompt for prompt in PROMPTS for _ in range(2)], **kwargs})
    assert several.tolist() == written_out.tolist()
    assert several[0].tolist() != several[1].tolist()
    seeded = generate(deep, {"prompts": PROMPTS, **kwargs}, seed=5)
    alone = [generate(deep, {"prompts": [prompt], **kwargs}, seed=5) for prompt in PROMPTS]
    assert [row[5:] for row in seeded.tolist()] == [
        one[0, len(prompt) :].tolist() for prompt, one in zip(PROMPTS, alone, strict=True)
    ]


def test_everything_recorded(deep: Any) -> None:
    for mode in (SEARCH, DOLA):
        out = generate(
            deep, {"prompts": PROMPTS, **mode}, max_new_tokens=5, return_dict_in_generate=True, output_scores=True,
            output_logits=True, output_attentions=True, output_hidden_states=True, output_top_logprobs=2,
        )  # fmt: skip
        assert isinstance(out, unspool.GenerateDecoderOnlyOutput)
        assert out.sequences.tolist() == generate(deep, {"prompts": PROMPTS, **mode}, max_new_tokens=5).tolist()
        assert out.finish_reasons == ["length"] * 3
        assert [len(layers) for layers in out.hidden_states] == [9] * 5
        assert out.token_logprobs.shape == (3, 5)
        chosen = torch.stack(out.scores, 1).log_softmax(-1).gather(2, out.sequences[:, 5:, None])[..., 0]
        torch.testing.assert_close(out.token_logprobs, chosen)
        for i, prompt in enumerate(PROMPTS):
            text = prompt + out.sequences[i, 5:].tolist()
            plain = deep(torch.tensor([text]), output_hidden_states=True, output_attentions=True)
            for layer in range(9):
                parts = [step[layer][i] for step in out.hidden_states]
                made = torch.cat([parts[0][5 - len(prompt) :], *parts[1:]])
                torch.testing.assert_close(made, plain.hidden_states[layer][0, : len(text) - 1], atol=1e-4, rtol=1e-4)
            for step in range(5):
                keys = len(prompt) + step
                weights = out.attentions[step][3][i][:, -1:, -keys:]
                wanted = plain.attentions[3][0, :, keys - 1 : keys, :keys]
                torch.testing.assert_close(weights, wanted, atol=1e-5, rtol=1e-4)
                torch.testing.assert_close(out.logits[step][i], plain.logits[0, keys - 1], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("mode", [SEARCH, DOLA], ids=["search", "dola"])
@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_what_was_stored_serves_a_later_call(deep: Any, mode: dict[str, Any], ended: bool, recorded: bool) -> None:
    free = generate(deep, {"prompts": PROMPTS, **mode})
    eos = int(free[1, 7]) if ended else None
    out = generate(
        deep, {"prompts": PROMPTS, **mode, "eos_token_id": eos}, return_dict_in_generate=True, output_logits=recorded
    )
    past = out.past_key_values
    assert past.get_seq_length() == out.sequences.shape[1] - 1
    longer = [prompt + row[5:] + [3] for prompt, row in zip(PROMPTS, free.tolist(), strict=True)]
    kept = [row.computed for row in past.rows]
    again = generate(deep, {"prompts": longer}, past_key_values=past)
    assert again.tolist() == generate(deep, {"prompts": longer}).tolist()
    assert kept == [row.computed for row in past.rows]
    assert min(kept) > 2
    assert kept[0] == len(PROMPTS[0]) + 7 or ended


@pytest.mark.parametrize("mode", [SEARCH, DOLA], ids=["search", "dola"])
def test_prompts_as_embeddings_and_a_cache_of_eight_bits(deep: Any, mode: dict[str, Any]) -> None:
    kwargs: dict[str, Any] = {**mode, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    ids = torch.tensor([PROMPTS[0], PROMPTS[0][::-1]])
    wanted = deep.generate(ids, **kwargs)[:, 5:]
    assert deep.generate(inputs_embeds=deep.embedding(ids), **kwargs).tolist() == wanted.tolist()
    near = deep.generate(ids, cache_implementation="quantized", **kwargs)[:, 5:]
    assert near[:, :2].tolist() == wanted[:, :2].tolist()
    assert near.shape == wanted.shape


def test_criteria_and_streams_see_every_token_in_turn(deep: Any) -> None:
    seen: list[tuple[int, int]] = []
    put: list[list[int]] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            put.append(value.tolist())

        def end(self) -> None:
            put.append([])

    def enough(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        seen.append((input_ids.shape[1], len(scores)))
        return torch.full((len(input_ids),), input_ids.shape[1] == 9)

    asked: list[int] = []

    def process(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        asked.append(input_ids.shape[1])
        return scores

    out = generate(
        deep, {"prompts": PROMPTS, **SEARCH}, stopping_criteria=[enough], logits_processor=[process],
        streamer=Streamer(), return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert seen == [(6, 1), (7, 2), (8, 3), (9, 4)]
    assert asked == [5, 6, 7, 8], "nothing is proposed after the end"
    assert put[1:] == [*out.sequences[:, 5:].T.tolist(), []]
    assert out.finish_reasons == ["stop"] * 3


def test_a_banned_token_is_never_taken(deep: Any) -> None:
    allowed = [7, 9]
    call = {"prompts": [[7, 9, 7, 9, 7]], "penalty_alpha": 0.95, "top_k": 6, "max_new_tokens": 12}
    out = generate(deep, call, prefix_allowed_tokens_fn=lambda row, ids: allowed)
    assert set(out[0, 5:].tolist()) <= set(allowed)


def test_the_prompt_is_stored_once(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks: list[int] = []
    room: list[int] = []
    original = PagedRunner.run

    def watched(self: Any, work: Any, want: Any) -> Any:
        output = original(self, work, want)
        peaks.append(self.store.blocks[0].count - self.store.blocks[0].free)
        room.append(self.store.blocks[0].count)
        return output

    monkeypatch.setattr(PagedRunner, "run", watched)
    prompt = [3 + i % 50 for i in range(100)]  # 6 blocks and a part
    for k in (4, 20):
        peaks.clear(), room.clear()
        generate(deep, {"prompts": [prompt], "penalty_alpha": 0.6, "top_k": k}, max_new_tokens=60)
        assert peaks[0] == 7
        assert peaks[1] == 6 + k
        assert max(peaks) <= 10 + k
        assert set(room) == {10 + k}, "room is for one text and the candidates' blocks"


def test_room_grows_with_the_text(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    call = {"prompts": PROMPTS, **SEARCH, "max_new_tokens": 90}
    wanted = generate(deep, call).tolist()
    monkeypatch.setattr("unspool.generate.paged._FIRST_ROOM", 4)
    assert generate(deep, call).tolist() == wanted


def test_only_what_is_wanted_is_computed(deep: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No attention weights for hidden states, and early layers' logits for the tokens that choose."""
    head, sizes = deep.lm_head.forward, []
    monkeypatch.setattr(deep.lm_head, "forward", lambda hidden: (sizes.append(len(hidden)), head(hidden))[1])
    kept: list[tuple[int, list[int]]] = []
    original = PagedRunner.run

    def watched(self: Any, work: Any, want: Any) -> Any:
        output = original(self, work, want)
        kept.append((len(output.weights), [layer for layer, some in enumerate(output.hidden) if len(some)]))
        return output

    monkeypatch.setattr(PagedRunner, "run", watched)
    generate(deep, {"prompts": PROMPTS, **DOLA}, max_new_tokens=3)
    assert sizes == [3, 9] * 3
    assert kept == [(0, [0, 2, 5])] * 3
    kept.clear()
    generate(deep, {"prompts": PROMPTS, **SEARCH}, max_new_tokens=2)
    assert kept == [(0, [8])] * 3
    kept.clear()
    generate(deep, {"prompts": PROMPTS}, max_new_tokens=1, return_dict_in_generate=True, output_hidden_states=True)
    assert kept == [(0, list(range(9)))]


@pytest.mark.parametrize(
    ("asked", "layers", "tied", "found"),
    [
        ("low", 6, False, [0, 2]),
        ("low", 6, True, [2]),
        ("high", 6, True, [3, 5]),
        ("low", 4, True, [2]),
        ("low", 2, True, [1]),
        ("low", 1, True, [0]),
        ("low", 3, True, [2]),
        ("high", 1, True, [0]),
        ("low", 48, False, list(range(0, 20, 2))),
        ("low", 48, True, list(range(2, 20, 2))),
        ("high", 48, True, list(range(28, 48, 2))),
        ([1, 4], 6, True, [1, 4]),
    ],
)
def test_which_layers(asked: Any, layers: int, tied: bool, found: list[int]) -> None:
    assert early_layers(asked, layers, tied) == found


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (SEARCH | {"num_beams": 3}, "penalty_alpha=0.6.*num_beams=3"),
        (SEARCH | {"do_sample": True}, "penalty_alpha=0.6.*do_sample=True"),
        (SEARCH | {"prompt_lookup_num_tokens": 3}, "penalty_alpha=0.6.*prompt_lookup_num_tokens=3"),
        (SEARCH | {"dola_layers": "low"}, "penalty_alpha=0.6.*dola_layers='low'"),
        (SEARCH | {"num_return_sequences": 2}, "num_return_sequences=2"),
        (SEARCH | {"top_k": 1}, "penalty_alpha=0.6.*top_k is 1"),
        (SEARCH | {"top_k": None}, "penalty_alpha=0.6.*top_k is None"),
        (SEARCH | {"top_k": 62}, "top_k=62.*61 tokens"),
        ({"dola_layers": "low", "num_beams": 2}, "dola_layers='low'.*num_beams=2"),
        ({"dola_layers": "low", "assistant_early_exit": 1}, "dola_layers='low'.*assistant_early_exit=1"),
        ({"dola_layers": "middle"}, "dola_layers must be.*'middle'"),
        ({"dola_layers": []}, r"dola_layers must be.*\[\]"),
        ({"dola_layers": [1, -1]}, r"dola_layers must be.*-1"),
        ({"dola_layers": [1, 8]}, "names layer 8; the model has 8"),
    ],
)
def test_mistakes(deep: Any, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any], text: str) -> None:
    monkeypatch.setattr(deep, "step", None, raising=False)  # nothing may be computed
    with pytest.raises(ValueError, match=text):
        generate(deep, {"prompts": PROMPTS, **wrong})


def test_other_things_that_do_not_go_with_them(deep: Any, tmp_path: Path) -> None:
    past = generate(deep, {"prompts": PROMPTS}, return_dict_in_generate=True).past_key_values
    with pytest.raises(ValueError, match=r"penalty_alpha.*past_key_values"):
        generate(deep, {"prompts": PROMPTS, **SEARCH}, past_key_values=past)
    for mode, name in ((SEARCH, "penalty_alpha"), (DOLA, "dola_layers")):
        with pytest.raises(ValueError, match=f"assistant_model.*{name}"):
            generate(deep, {"prompts": PROMPTS, **mode}, assistant_model=deep)
        with pytest.raises(Unsupported, match=f"{name}.*native model"):
            generate(unspool.wrap(make_checkpoint("llama", tmp_path)), {"prompts": PROMPTS, **mode})


def test_nothing_to_choose_is_said(tmp_path: Path) -> None:
    tiny.save(tmp_path, "deep")
    broken = unspool.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    with pytest.raises(NonFiniteLogits, match=r"row 1.*position 4.*processor"):
        generate(broken, {"prompts": PROMPTS, **SEARCH}, logits_processor=[_nothing_for_row_1])
    broken.layers[6].mlp_norm.weight.data[3] = float("nan")
    for mode in (SEARCH, DOLA):
        with pytest.raises(NonFiniteLogits, match=r"row 0.*layer 6"):
            generate(broken, {"prompts": PROMPTS, **mode})


def _nothing_for_row_1(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    return scores.index_fill(0, torch.tensor([1]), -torch.inf) if input_ids.shape[1] == 7 else scores
