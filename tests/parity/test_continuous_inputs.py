"""Continuous batching of requests that are told more than tokens: pictures, sound, what a decoder begins with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accounts import check_pasts_given_back, staggered
from architectures import ARCHITECTURES, MULTIMODAL, Architecture

import unspool
from unspool import ContinuousBatchingConfig
from unspool.decode.opened import BesideRunner
from unspool.decode.runner import Output
from unspool.decode.sequence import Sequence, Want, Work
from unspool.interop.patch import makes_its_start, unserved

SETTINGS: list[dict[str, Any]] = [
    {"max_new_tokens": 8},
    {"max_new_tokens": 6, "num_beams": 3},
    {"max_new_tokens": 7, "do_sample": True, "seed": 3, "repetition_penalty": 1.3},
]
QUICK = ("llava", "qwen2_vl", "git", "pix2struct", "speech_to_text", "whisper", "idefics")


def architecture(name: str) -> Architecture:
    return next(one for one in ARCHITECTURES if one.model_type == name)


def row(inputs: dict[str, Any], place: int) -> dict[str, Any]:
    """One row of a batch's inputs."""
    found = {name: value[place : place + 1] for name, value in inputs.items()}
    if "image_grid_thw" in inputs:  # patches of all rows stand below each other
        found["pixel_values"] = inputs["pixel_values"].chunk(len(inputs["input_ids"]))[place]
    return found


def requests(one: Architecture) -> list[dict[str, Any]]:
    """The first row, the second, and the first again."""
    inputs = one.inputs()
    rows = [row(inputs, place) for place in (0, 1, 0)]
    return (
        [made | {"decoder_input_ids": torch.tensor([[3, 40]])} for made in rows]
        if one.model_type == "whisper"
        else rows
    )


def endless(one: Architecture) -> Any:
    model = one.make()
    model.generation_config.eos_token_id = None
    return unspool.wrap(model)


def new(model: Any, inputs: dict[str, Any], **settings: Any) -> list[int]:
    """What `generate()` makes of one row."""
    made: list[int] = model.generate(**inputs, **settings)[0].tolist()
    return made[-settings["max_new_tokens"] :]


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(one, id=one.model_type, marks=() if one.model_type in QUICK else pytest.mark.full)
        for one in MULTIMODAL
        if one.model_type not in ("blip", "blip-2")
    ],
)
def test_requests_are_as_by_themselves(one: Architecture) -> None:
    """Among each other and, where a module reads texts too, among such; chunked, and put back for want of room."""
    model, rows = endless(one), requests(one)
    settings = [*SETTINGS]
    if not one.beams:
        settings[1] = SETTINGS[0]
    if one.model_type == "whisper":  # its own generate() knows no seed
        settings[2] = SETTINGS[2] | {"do_sample": False}
    every = [inputs | given for inputs, given in zip(rows, settings, strict=True)]
    expected = [new(model, inputs, **given) for inputs, given in zip(rows, settings, strict=True)]
    if one.model_type in ("llava", "qwen2_vl"):
        text = {"input_ids": torch.tensor([[5, 9, 4, 7]])}
        every.insert(1, text | SETTINGS[0])
        expected.insert(1, new(model, text, **SETTINGS[0]))
    for config in (
        ContinuousBatchingConfig(),
        ContinuousBatchingConfig(max_batch_tokens=4, deterministic=True),
        ContinuousBatchingConfig(num_blocks=6, page_size=16, safety_margin=0.0),
    ):
        manager = model.init_continuous_batching(continuous_batching_config=config)
        outputs = staggered(manager, every)
        for output, tokens in zip(outputs, expected, strict=True):
            assert output.error is None
            assert output.generated_tokens == tokens
            assert output.finish_reason == "length"
        check_pasts_given_back(manager)


def test_rows_put_back_see_their_picture_again() -> None:
    one = architecture("qwen2_vl")
    model, rows, given = endless(one), requests(one), {"max_new_tokens": 30}
    config = ContinuousBatchingConfig(num_blocks=5, page_size=16, safety_margin=0.0, cpu_offload_space=0.001)
    manager = model.init_continuous_batching(continuous_batching_config=config)
    outputs = staggered(manager, [inputs | given for inputs in rows])
    assert manager.metrics.preemptions > 0
    assert manager.metrics.swaps == 0, "there is nothing in their blocks to be copied"
    for output, inputs in zip(outputs, rows, strict=True):
        assert output.generated_tokens == new(model, inputs, **given)
    check_pasts_given_back(manager)


def test_texts_beside_pictures_share_their_beginnings() -> None:
    """A picture's tokens look alike whatever it shows, so nothing is shared there."""
    one = architecture("llava")
    model, inputs = endless(one), row(one.inputs(), 0)
    ids = inputs["input_ids"].repeat(1, 4)
    pixels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(6))
    pictures = [{"input_ids": ids, "pixel_values": part} for part in pixels.chunk(2)]
    text = {"input_ids": torch.arange(3, 43)[None]}
    outputs = model.generate_batch([pictures[0], text, pictures[1], text], max_new_tokens=5)
    first, plain, second, again = outputs.values()
    assert [one.usage.cached_tokens for one in (first, plain, second, again)] == [0, 0, 0, 32]
    assert plain.generated_tokens == again.generated_tokens == new(model, text, max_new_tokens=5)
    for output, told in ((first, pictures[0]), (second, pictures[1])):
        assert output.generated_tokens == new(model, told, max_new_tokens=5)
    assert first.generated_tokens != second.generated_tokens


def test_prompts_of_a_batch_bring_what_is_their_own() -> None:
    one = architecture("llava")
    model, rows = endless(one), requests(one)
    outputs = model.generate_batch(
        [rows[0] | {"max_new_tokens": 3}, rows[1], {"input_ids": [4, 5], "num_beams": 2}, [6, 7], {"request_id": "a"}],
        max_new_tokens=5,
    )
    *good, bad = outputs.values()
    expected = [
        new(model, rows[0], max_new_tokens=3),
        new(model, rows[1], max_new_tokens=5),
        new(model, {"input_ids": torch.tensor([[4, 5]])}, max_new_tokens=5, num_beams=2),
        new(model, {"input_ids": torch.tensor([[6, 7]])}, max_new_tokens=5),
    ]
    assert [one.generated_tokens for one in good] == expected
    assert bad.finish_reason == "rejected"
    shared = model.generate_batch(
        [rows[0]["input_ids"][0].tolist()], pixel_values=rows[1]["pixel_values"], max_new_tokens=5
    )
    (output,) = shared.values()
    assert output.generated_tokens == new(model, rows[0] | {"pixel_values": rows[1]["pixel_values"]}, max_new_tokens=5)


def test_padding_is_left_out() -> None:
    model = unspool.load("storyteller")[0]
    manager = model.init_continuous_batching()
    ids = torch.tensor([[0, 0, 7, 8, 9]])
    names = [
        manager.add_request(ids, attention_mask=ids > 0, max_new_tokens=4, do_sample=False),
        manager.add_request([7, 8, 9], max_new_tokens=4, do_sample=False),
    ]
    while manager.step():
        pass
    first, second = (manager.get_result(name) for name in names)
    assert first.prompt_ids == [7, 8, 9]
    assert first.generated_tokens == second.generated_tokens
    with pytest.raises(ValueError, match="attention_mask has 4 entries"):
        manager.add_request(ids, attention_mask=torch.ones(1, 4))


def test_a_picture_that_does_not_fit_fails_alone() -> None:
    """Also when it is the very first one that the module sees."""
    for name in ("llava", "git"):
        one = architecture(name)
        model, rows = endless(one), requests(one)
        wrong = rows[0] | {"pixel_values": torch.zeros(1, 5, 4, 4)}
        manager = model.init_continuous_batching()
        names = [manager.add_request(**inputs, max_new_tokens=4) for inputs in (wrong, rows[0], rows[1])]
        while manager.step():
            pass
        bad, *good = (manager.get_result(name) for name in names)
        assert bad.finish_reason == "error"
        assert "its forward raised" in bad.error
        for output, inputs in zip(good, rows[:2], strict=True):
            assert output.generated_tokens == new(model, inputs, max_new_tokens=4)
        check_pasts_given_back(manager)


def test_what_a_decoder_begins_with() -> None:
    model = unspool.wrap(architecture("t5").make())
    ids, begin = [5, 6, 7, 8], torch.tensor([[0, 9, 4]])
    manager = model.init_continuous_batching()
    name = manager.add_request(ids, decoder_input_ids=begin, max_new_tokens=6)
    while manager.step():
        pass
    output = manager.get_result(name)
    whole = model.generate(torch.tensor([ids]), decoder_input_ids=begin, max_new_tokens=6)[0].tolist()
    assert output.prompt_ids == ids
    assert output.generated_tokens == whole[3:]


def test_what_cannot_be_is_said_at_once() -> None:
    llava, listener, teller = (endless(architecture(name)) for name in ("llava", "whisper", "t5"))
    pixels, sound = torch.zeros(1, 3, 16, 16), requests(architecture("whisper"))[0]["input_features"]
    pictures, hearing, reading = (one.init_continuous_batching() for one in (llava, listener, teller))
    seen = {"input_ids": [4], "pixel_values": pixels}
    masked = {"input_ids": [4, 5], "attention_mask": [0, 1], "pixel_values": pixels}
    heard = {"input_features": sound, "decoder_input_ids": [3]}
    hidden = {"input_ids": [4], "decoder_input_ids": [0, 1], "decoder_attention_mask": [[0, 1]]}
    for manager, error, told, given in (
        (pictures, ValueError, "input_ids is missing", {}),
        (pictures, ValueError, "no use for: pixel_value ", {"input_ids": [4], "pixel_value": pixels}),
        (pictures, ValueError, "input_ids holds token id", seen | {"input_ids": [10**6]}),
        (pictures, ValueError, "attention_mask has 2", masked),
        (pictures, unspool.Unsupported, "inputs_embeds", {"inputs_embeds": torch.zeros(1, 2, 32)}),
        (pictures, unspool.Unsupported, "past_key_values", {"input_ids": [4], "past_key_values": ((),)}),
        (pictures, unspool.Unsupported, "guidance_scale with .* and pixel_values", seen | {"guidance_scale": 2.0}),
        (pictures, unspool.Unsupported, "prompt_lookup", seen | {"prompt_lookup_num_tokens": 2}),
        (hearing, unspool.Unsupported, "pass that as decoder_input_ids", {"input_features": sound}),
        (hearing, ValueError, "input_features is missing", {"decoder_input_ids": [3]}),
        (hearing, ValueError, "add one request for each row", heard | {"input_features": sound.repeat(2, 1, 1)}),
        (reading, ValueError, "decoder_attention_mask", hidden),
    ):
        with pytest.raises(error, match=told):
            manager.add_request(max_new_tokens=3, **given)
        assert not manager.step()
    with pytest.raises(ValueError, match="no use for: pixel_values"):
        unspool.load("storyteller")[0].init_continuous_batching().add_request([4], pixel_values=pixels)


@pytest.mark.parametrize("name", ["blip", "blip-2"])
def test_modules_with_a_way_of_their_own_are_refused(name: str) -> None:
    model = architecture(name).make()
    assert not makes_its_start(model)
    assert "a way of its own" in str(unserved(model))
    with pytest.raises(unspool.Unsupported, match="a way of its own; use generate"):
        unspool.wrap(model).init_continuous_batching()


def test_codecs_are_refused() -> None:
    """MusicGen chooses a token for each of its codebooks in a row, and makes sound of them."""
    import transformers

    shape: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"model_type": "t5", "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 99}
    codec = {
        "model_type": "encodec",
        "hidden_size": 16,
        "num_filters": 4,
        "codebook_size": 32,
        "upsampling_ratios": [2],
    }
    config = transformers.MusicgenConfig(
        text_encoder=text, audio_encoder=codec, decoder={**shape, "vocab_size": 32, "ffn_dim": 16, "num_codebooks": 2}
    )
    model = transformers.MusicgenForConditionalGeneration(config).eval()
    with pytest.raises(unspool.Unsupported, match="a way of its own; use generate"):
        unspool.wrap(model).init_continuous_batching()


def test_a_step_of_parts_of_prompts_has_no_logits() -> None:
    """Of a text and of a picture's prompt, neither of which chooses a token yet."""

    class Computes:
        def run(self, work: list[Work], want: Want) -> Output:
            count = sum(item.keep for item in work)
            return Output(torch.arange(count * 5.0).view(count, 5), [], [])

    text, told = Sequence(0, [4, 5, 6, 7]), Sequence(0, [4, 5, 6, 7])
    told.inputs = {"pixel_values": torch.zeros(1)}
    groups: Any = [object(), object()]
    runner = BesideRunner(Computes(), Computes())  # type: ignore[arg-type]
    for keep in (0, 1):
        work = [Work(row, 2, keep, group) for row, group in zip((text, told), groups, strict=True)]
        assert runner.run(work, Want()).logits.shape == (2 * keep, 5)
