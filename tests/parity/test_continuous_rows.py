"""Continuous batching of modules that run in rows: encoder-decoders, states, and modules with ways of their own."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import transformers
from accounts import check_pasts_given_back, staggered
from architectures import ARCHITECTURES
from families import make_model
from shells import Masked, Plain, Tuples
from torch import Tensor, nn

import unspool
from unspool import ContinuousBatchingConfig, GenerationConfig
from unspool.continuous.requests import GenerationOutput

LENGTHS = (7, 3, 11, 1, 7)


def architecture(name: str) -> Any:
    return next(one for one in ARCHITECTURES if one.model_type == name).make()


def prompts(*lengths: int) -> list[list[int]]:
    drawn = torch.Generator().manual_seed(8)
    return [torch.randint(3, 97, (length,), generator=drawn).tolist() for length in lengths]


def favour_odd(input_ids: Tensor, scores: Tensor) -> Tensor:
    return scores + 0.3 * (torch.arange(scores.shape[1]) % 2)


SETTINGS: list[dict[str, Any]] = [
    {"max_new_tokens": 6},
    {"max_new_tokens": 9, "do_sample": True, "seed": 3, "temperature": 1.2, "top_k": 20, "top_p": 0.9},
    {"max_new_tokens": 5, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 3},
    {"max_new_tokens": 8, "num_beams": 3},
    {"max_new_tokens": 7, "logits_processor": [favour_odd], "encoder_repetition_penalty": 1.3},
]


def alone(model: Any, text: list[int], one: dict[str, Any]) -> list[int]:
    """What `generate()` makes of one prompt."""
    made: list[int] = model.generate(torch.tensor([text]), **one)[0].tolist()
    encoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return made[1:] if encoder else made[len(text) :]


def told(texts: list[list[int]], settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Requests of texts, with the settings of each."""
    return [{"input_ids": text, **one} for text, one in zip(texts, settings, strict=True)]


@pytest.mark.parametrize("name", ["t5", "bart", "mamba", "bloom", "falcon_h1"])
def test_requests_are_as_by_themselves(name: str) -> None:
    """Of every kind, coming at different steps; in chunks, and put back for want of room, too."""
    model = unspool.wrap(architecture(name))
    texts = prompts(*LENGTHS)
    expected = [alone(model, text, one) for text, one in zip(texts, SETTINGS, strict=True)]
    for config in (
        ContinuousBatchingConfig(),
        ContinuousBatchingConfig(max_batch_tokens=4),
        ContinuousBatchingConfig(num_blocks=4, page_size=16, scheduler_type="prefill_first"),
    ):
        manager = model.init_continuous_batching(continuous_batching_config=config)
        outputs = staggered(manager, told(texts, SETTINGS))
        for text, output, tokens in zip(texts, outputs, expected, strict=True):
            assert output.error is None
            assert output.prompt_ids == text
            assert output.generated_tokens == tokens[: len(output.generated_tokens)]
            assert len(output.generated_tokens) == len(tokens) or output.finish_reason == "stop"
        check_pasts_given_back(manager)


class Counted:
    """How many rows each forward of a module is given."""

    def __init__(self, module: nn.Module) -> None:
        self.rows: list[int] = []
        module.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("decoder_input_ids", kwargs.get("input_ids", args[0] if args else None))
        self.rows.append(ids.shape[0])


def in_company(model: Any, counted: Counted, **config: Any) -> tuple[list[GenerationOutput], list[int]]:
    """Three requests that begin two steps after each other, and how many rows each forward had."""
    manager = model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig(**config))
    staggered(manager, told(prompts(4, 5), [{"max_new_tokens": 6}] * 2))  # the module is looked at first
    counted.rows.clear()
    outputs = staggered(manager, told(prompts(9, 3, 6), [{"max_new_tokens": 12, "eos_token_id": None}] * 3))
    check_pasts_given_back(manager)
    return outputs, counted.rows


@pytest.mark.parametrize("name", ["mistral", "bloom", "mamba", "t5", "bart", "masked", "tuples", "plain"])
def test_one_forward_serves_all_rows(name: str) -> None:
    """Those that can be padded join at once; BART and a forward of ids alone take rows of one length together."""
    shells: dict[str, type[nn.Module]] = {"masked": Masked, "tuples": Tuples, "plain": Plain}
    inner = make_model("mistral") if name == "mistral" else None
    module = inner or (shells[name](make_model("llama")) if name in shells else architecture(name))
    model = unspool.wrap(module)
    counted = Counted(module)  # hooks make modules run in rows, which could run otherwise
    outputs, rows = in_company(model, counted)
    equal = name in ("bart", "plain")
    assert max(rows) == (1 if equal else 3)
    if not equal:
        assert len(rows) == 16 + 2
    for text, output in zip(prompts(9, 3, 6), outputs, strict=True):
        tokens = alone(model, text, {"max_new_tokens": 12, "eos_token_id": None})
        assert output.generated_tokens == tokens
    outputs, rows = in_company(model, counted, deterministic=True)
    assert max(rows) == 1
    for output in outputs:
        tokens = alone(model, output.prompt_ids, {"max_new_tokens": 12, "eos_token_id": None})
        assert output.generated_tokens == tokens


@pytest.mark.parametrize("name", ["bart", "plain"])
def test_rows_of_one_length_share_a_forward(name: str) -> None:
    """Beams, and requests that begin together."""
    module = architecture(name) if name == "bart" else Plain(make_model("llama"))
    model, counted = unspool.wrap(module), Counted(module)
    texts = prompts(6, 6)
    found = model.generate_batch(texts, max_new_tokens=7, eos_token_id=None, num_beams=3)
    assert 6 in counted.rows
    for text, output in zip(texts, found.values(), strict=True):
        assert output.generated_tokens == alone(
            model, text, {"max_new_tokens": 7, "eos_token_id": None, "num_beams": 3}
        )


def test_a_forward_that_fails_for_many_is_done_again_for_each() -> None:
    module = architecture("bloom")
    model, texts = unspool.wrap(module), prompts(5, 7, 4)
    settings = {"max_new_tokens": 8, "eos_token_id": None}
    expected = [alone(model, text, settings) for text in texts]
    tokens = [token for one in (expected[0], expected[2]) for token in one]
    fatal = next(i for i, token in enumerate(expected[1]) if i > 2 and token not in tokens)

    def refuses(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if bool((kwargs["input_ids"] == expected[1][fatal]).any()):
            raise RuntimeError("not this one")

    module.register_forward_pre_hook(refuses, with_kwargs=True)
    manager = model.init_continuous_batching()
    outputs = staggered(manager, told(texts, [settings] * 3))
    assert "not this one" in outputs[1].error
    assert outputs[1].generated_tokens == expected[1][: fatal + 1]
    assert [outputs[0].generated_tokens, outputs[2].generated_tokens] == [expected[0], expected[2]]
    check_pasts_given_back(manager)


def test_rows_put_back_are_computed_again() -> None:
    model = unspool.wrap(architecture("t5"))
    texts, settings = prompts(5, 6, 7), {"max_new_tokens": 40, "eos_token_id": None}
    config = ContinuousBatchingConfig(num_blocks=5, page_size=16, safety_margin=0.0)
    manager = model.init_continuous_batching(continuous_batching_config=config)
    outputs = staggered(manager, told(texts, [settings] * 3))
    assert manager.metrics.preemptions > 0
    for text, output in zip(texts, outputs, strict=True):
        assert output.generated_tokens == alone(model, text, settings)
    check_pasts_given_back(manager)


def test_one_that_fails_does_so_alone() -> None:
    """In its forward, in a processor of its own, or on NaN."""

    def raises(input_ids: Tensor, scores: Tensor) -> Tensor:
        raise RuntimeError("mine")

    class Fragile(nn.Module):
        """No cache and no mask; takes no 5, and has nothing to say after 6."""

        config = None

        def __init__(self) -> None:
            super().__init__()
            self.inner = make_model("llama")

        def forward(self, input_ids: Tensor) -> Tensor:
            if bool((input_ids == 5).any()):
                raise RuntimeError("no fives")
            logits: Tensor = self.inner(input_ids).logits
            return logits * float("nan") if bool((input_ids == 6).any()) else logits

    model = unspool.wrap(Fragile())
    settings = GenerationConfig(max_new_tokens=4, suppress_tokens=[5, 6])
    manager = model.init_continuous_batching(settings)
    names = [manager.add_request(text) for text in ([7, 8, 9], [7, 5], [4, 6, 3], [11])]
    names.append(manager.add_request([9, 9], logits_processor=[raises]))
    while manager.step():
        pass
    good, fives, sixes, other, own = (manager.get_result(name, timeout=0) for name in names)
    assert "no fives" in fives.error
    assert "not finite" in sixes.error
    assert "mine" in own.error
    for output in (good, other):
        made = model.generate(torch.tensor([output.prompt_ids]), settings)[0, len(output.prompt_ids) :]
        assert output.generated_tokens == made.tolist()
    check_pasts_given_back(manager)


def test_what_ended_leaves_no_memory() -> None:
    """Cancelled in the middle, or over: the module's past goes with the request, and the rest with the manager."""
    model = unspool.wrap(architecture("mamba"))
    manager = model.init_continuous_batching()
    first, second = (manager.add_request(text, max_new_tokens=30) for text in prompts(4, 6))
    for _ in range(3):
        manager.step()
    opened = manager._engine.room.store.opened
    assert len(opened) == 2
    pasts = [weakref.ref(past) for past in opened.values()]
    manager.cancel_request(first)
    manager.step()
    assert len(opened) == 1
    manager.cancel_request(second)
    manager.step()
    check_pasts_given_back(manager)
    del manager
    gc.collect()
    assert [past() for past in pasts] == [None, None]


def cross_bytes(model: Any, read: int, fed: int) -> int:
    """What a row of T5 holds whose encoder read so many tokens and whose decoder was fed so many."""
    config = model.config
    keys = 2 * config.num_decoder_layers * config.num_heads * config.d_kv * (read + fed) * 4
    encoded, mask, ids = read * config.d_model * 4, read * 8, (fed + 1) * 8
    return keys + encoded + mask + ids


def test_cross_attention_is_counted_and_given_back() -> None:
    """Written once: a step adds a token of the decoder's own to each row, and beams read one copy."""
    model = unspool.wrap(architecture("t5"))
    first, second = prompts(40, 25)
    manager = model.init_continuous_batching()
    assert manager.metrics.past_bytes == 0
    names = [manager.add_request(text, max_new_tokens=9, eos_token_id=None) for text in (first, second)]
    manager.step()
    opened = manager._engine.room.store.opened
    alone = manager.metrics.past_bytes
    assert abs(alone - cross_bytes(model, 40, 1) - cross_bytes(model, 25, 1)) <= 200, "small things besides"
    manager.step()  # in one rectangle now, as wide as the longer one
    together = manager.metrics.past_bytes
    assert abs(together - 2 * cross_bytes(model, 40, 2)) <= 200
    manager.step()
    assert manager.metrics.past_bytes - together == cross_bytes(model, 0, 3) * 2 - cross_bytes(model, 0, 2) * 2
    manager.cancel_request(names[0])
    manager.step()
    assert len(opened) == 1
    assert manager.metrics.past_bytes < together / 2 + 200
    while manager.step():
        pass
    assert manager.metrics.past_bytes == 0
    beams = manager.add_request(first, max_new_tokens=9, num_beams=4, eos_token_id=None)
    manager.step()
    assert len(opened) == 4
    assert manager.metrics.past_bytes <= cross_bytes(model, 40, 1) * 4 - 3 * 40 * model.config.d_model * 4 + 200
    manager.cancel_request(beams)
    manager.step()
    assert manager.metrics.past_bytes == 0
    check_pasts_given_back(manager)


def test_pasts_that_take_much_bound_how_many_begin() -> None:
    model, texts = unspool.wrap(architecture("t5")), prompts(5, 6, 7)
    settings = {"max_new_tokens": 6, "eos_token_id": None}
    config = ContinuousBatchingConfig(max_memory_percent=1e-9)
    manager = model.init_continuous_batching(continuous_batching_config=config)
    names = [manager.add_request(text, **settings) for text in texts]
    manager.step()  # nobody knows yet what a past takes
    assert manager.metrics.running == 3
    while manager.step():
        assert manager.metrics.running <= 1
    assert manager.metrics.preemptions == 2
    for name, text in zip(names, texts, strict=True):
        assert manager.get_result(name).generated_tokens == alone(model, text, settings)
    check_pasts_given_back(manager)


def test_several_outputs_and_streams() -> None:
    model = unspool.wrap(architecture("t5"))
    (text,) = prompts(6)
    outputs = model.generate_batch(
        [text], do_sample=True, seed=5, num_return_sequences=3, max_new_tokens=6, top_logprobs=2
    )
    assert len(outputs) == 3
    assert len({tuple(one.generated_tokens) for one in outputs.values()}) > 1
    assert all(len(one.logprobs) == len(one.generated_tokens) for one in outputs.values())
    beams = model.generate_batch([text], num_beams=4, num_return_sequences=2, max_new_tokens=6)
    ids = model.generate(torch.tensor([text]), num_beams=4, num_return_sequences=2, max_new_tokens=6)[:, 1:]
    for output, row in zip(beams.values(), ids.tolist(), strict=True):
        assert output.generated_tokens == row[: len(output.generated_tokens)]
    with model.init_continuous_batching() as manager:
        name = manager.add_request(text, max_new_tokens=5, streaming=True)
        told = [output.generated_tokens for output in manager.request_id_iter(name)]
    assert told[-1] == alone(model, text, {"max_new_tokens": 5})


@pytest.mark.parametrize("name", ["t5", "bloom", "mamba"])
def test_paged_is_what_they_keep(name: str) -> None:
    """The setting that asks transformers for continuous batching gives what that gives."""
    model = unspool.wrap(architecture(name))
    for settings in ({"max_new_tokens": 6}, {"max_new_tokens": 6, "num_beams": 2}):
        found = [alone(model, text, settings | {"cache_implementation": "paged"}) for text in prompts(5, 8)]
        outputs = model.generate_batch(prompts(5, 8), **settings, cache_implementation="paged").values()
        for tokens, output in zip(found, outputs, strict=True):
            assert output.generated_tokens == tokens[: len(output.generated_tokens)]
        assert found == [alone(model, text, settings) for text in prompts(5, 8)]


def test_what_rows_cannot_do_is_refused() -> None:
    manager = unspool.wrap(architecture("bloom")).init_continuous_batching()
    for settings in (
        {"guidance_scale": 1.5},
        {"prompt_lookup_num_tokens": 2},
        {"penalty_alpha": 0.6, "top_k": 3},
        {"prompt_logprobs": 1},
        {"token_healing": True},
    ):
        with pytest.raises(unspool.Unsupported):
            manager.add_request([4, 5, 6], max_new_tokens=3, **settings)
    assert not manager.step()
    with pytest.raises(unspool.Unsupported, match="keeps its past in itself"):
        unspool.wrap(architecture("recurrent_gemma")).init_continuous_batching()


def test_enabling_serves_modules_in_rows_too() -> None:
    model, texts = architecture("t5"), prompts(5, 8)
    config = transformers.GenerationConfig(
        max_new_tokens=6, do_sample=False, eos_token_id=2, pad_token_id=0, decoder_start_token_id=0
    )
    with unspool.enabled():
        outputs = model.generate_batch(inputs=texts, generation_config=config)
    for text, output in zip(texts, outputs.values(), strict=True):
        expected = model.generate(torch.tensor([text]), generation_config=config)[0, 1:].tolist()
        assert output.generated_tokens == expected[: len(output.generated_tokens)]
