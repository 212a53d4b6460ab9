"""Our caches inside transformers' own models: the logits are those that the model gives with its own cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from families import make_model
from torch import Tensor

import unspool
from unspool.cache.layers import DynamicLayer, SlidingLayer
from unspool.cache.quantized import QuantizedLayer

FAMILIES = ["llama", "mistral", "qwen2-window", "gpt2"]
STEPS = [5, 1, 1, 3, 1, 4, 1, 1]


def feed(model: Any, past: Any, ids: Tensor, steps: list[int]) -> Tensor:
    """Logits of `ids` `[rows, columns]`, fed in pieces of the given lengths."""
    found, at = [], 0
    with torch.no_grad():
        for step in steps:
            out = model(ids[:, at : at + step], past_key_values=past, use_cache=True)
            assert out.past_key_values is past
            found.append(out.logits)
            at += step
    return torch.cat(found, dim=1)


def tokens(rows: int = 2, columns: int = sum(STEPS)) -> Tensor:
    return torch.randint(0, 97, (rows, columns), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return make_model(request.param)


def kinds(config: Any) -> dict[str, Any]:
    return {
        "plain": unspool.DynamicCache(),
        "dynamic": unspool.DynamicCache(config=config),
        "static": unspool.StaticCache(config=config, max_cache_len=40),
        "offloaded": unspool.OffloadedCache(config=config),
        "offloaded static": unspool.OffloadedStaticCache(config, 40),
    }


@pytest.mark.parametrize("kind", ["plain", "dynamic", "static", "offloaded", "offloaded static"])
def test_logits_are_those_of_the_models_own_cache(model: Any, kind: str) -> None:
    ids = tokens()
    theirs = transformers.StaticCache if "static" in kind else transformers.DynamicCache
    extra = {"max_cache_len": 40} if "static" in kind else {}
    expected = feed(model, theirs(config=model.config, **extra), ids, STEPS)
    past = kinds(model.config)[kind]
    torch.testing.assert_close(feed(model, past, ids, STEPS), expected, rtol=1e-5, atol=1e-5)
    assert past.get_seq_length() == ids.shape[1]


def test_a_window_stores_no_more_than_it_sees() -> None:
    model = make_model("mistral")
    past = unspool.DynamicCache(config=model.config)
    feed(model, past, tokens(), STEPS)
    assert {layer.keys.shape[-2] for layer in past.layers} == {model.config.sliding_window - 1}


@pytest.mark.parametrize("name", ["DynamicCache", "StaticCache", "QuantizedCache", "EncoderDecoderCache"])
def test_isinstance_holds_for_both_libraries(name: str) -> None:
    config = make_model("llama").config
    made = {
        "DynamicCache": lambda: unspool.DynamicCache(),
        "StaticCache": lambda: unspool.StaticCache(config, 8),
        "QuantizedCache": lambda: unspool.QuantizedCache(config=config),
        "EncoderDecoderCache": lambda: unspool.EncoderDecoderCache(unspool.DynamicCache(), unspool.DynamicCache()),
    }[name]()
    assert isinstance(made, getattr(unspool, name))
    assert isinstance(made, getattr(transformers, name))
    assert isinstance(made, transformers.Cache)
    assert type(copy.deepcopy(made)) is type(made)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_rows_and_tokens_can_be_moved(name: str) -> None:
    """Reordering, repeating, selecting and cropping give what feeding the resulting tokens gives."""
    model = make_model(name)
    ids = tokens()
    past = unspool.DynamicCache(config=model.config)
    past.activate_past_recording()
    feed(model, past, ids[:, :9], [9])
    past.reorder_cache(torch.tensor([1, 0]))
    past.batch_repeat_interleave(2)
    past.batch_select_indices(torch.tensor([0, 3]))
    past.crop(-2)
    assert past.get_seq_length() == 7
    rows = ids.flip(0)
    found = feed(model, past, rows[:, 7:], [1, 9])
    expected = feed(model, transformers.DynamicCache(config=model.config), rows, [7, 1, 9])[:, 7:]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_legacy_form_round_trip() -> None:
    model = make_model("gpt2")
    ids = tokens()
    past = unspool.DynamicCache()
    feed(model, past, ids[:, :6], [6])
    again = unspool.DynamicCache.from_legacy_cache(past.to_legacy_cache())
    torch.testing.assert_close(feed(model, again, ids[:, 6:], [3]), feed(model, past, ids[:, 6:], [3]))


def test_reset_makes_it_new() -> None:
    model = make_model("llama")
    ids = tokens()
    for past in kinds(model.config).values():
        first = feed(model, past, ids[:, :8], [6, 2])
        past.reset()
        assert past.get_seq_length() == 0
        torch.testing.assert_close(feed(model, past, ids[:, :8], [6, 2]), first)


def test_gradients_flow_through_the_cache() -> None:
    layer = DynamicLayer()
    keys = torch.randn(1, 2, 3, 4, requires_grad=True)
    layer.update(keys, keys)
    seen, _ = layer.update(torch.randn(1, 2, 1, 4), torch.randn(1, 2, 1, 4))
    seen.sum().backward()
    assert keys.grad is not None
    assert bool((keys.grad == 1).all())


def test_a_step_copies_no_past() -> None:
    layer = DynamicLayer()
    with torch.inference_mode():
        layer.update(torch.randn(1, 2, 30, 256), torch.randn(1, 2, 30, 256))
        layer.update(torch.randn(1, 2, 1, 256), torch.randn(1, 2, 1, 256))
        place = layer.keys.data_ptr()  # type: ignore[union-attr]
        for _ in range(50):
            layer.update(torch.randn(1, 2, 1, 256), torch.randn(1, 2, 1, 256))
    assert layer.keys is not None
    assert layer.keys.data_ptr() == place
    with torch.no_grad():  # what was made in inference mode is copied, not written to
        layer.update(torch.randn(1, 2, 1, 256), torch.randn(1, 2, 1, 256))
    assert layer.keys.shape[-2] == 82


def test_a_window_cannot_bring_back_what_it_dropped() -> None:
    layer = SlidingLayer(4)
    layer.update(torch.randn(1, 1, 9, 2), torch.randn(1, 1, 9, 2))
    with pytest.raises(ValueError, match="activate_past_recording"):
        layer.crop(-1)


@pytest.mark.parametrize(("bits", "tolerance"), [(8, 0.01), (4, 0.11), (2, 0.55)])
def test_quantised_tokens_are_near_and_recent_ones_exact(bits: int, tolerance: float) -> None:
    torch.manual_seed(0)
    keys, values = torch.rand(2, 3, 100, 16), torch.rand(2, 3, 100, 16)
    layer = QuantizedLayer(bits, q_group_size=16, residual_length=20)
    for begin, end in [(0, 60), (60, 61), (61, 99), (99, 100)]:
        seen_keys, seen_values = layer.update(keys[:, :, begin:end], values[:, :, begin:end])
    assert (seen_keys - keys).abs().max() < tolerance / 2 + 1e-6
    assert (seen_values - values).abs().max() < tolerance / 2 + 1e-6
    assert torch.equal(seen_keys[:, :, -20:], keys[:, :, -20:])
    assert layer.get_seq_length() == 100


def test_quantised_codes_do_not_drift() -> None:
    """A token is quantised once: moving rows and tokens about changes nothing of what is restored."""
    torch.manual_seed(0)
    keys = torch.randn(2, 2, 96, 8)
    layer = QuantizedLayer(4, q_group_size=8, residual_length=8)
    layer.update(keys, keys)
    before, _ = layer.update(keys[:, :, :1], keys[:, :, :1])
    for _ in range(3):
        layer.reorder_cache(torch.tensor([1, 0]))
    layer.crop(-1)
    after, _ = layer.update(keys[:, :, :1].flip(0), keys[:, :, :1].flip(0))
    assert torch.equal(after, before.flip(0))
    layer.crop(37)
    assert layer.get_seq_length() == 37
    cut, _ = layer.update(keys[:, :, :1], keys[:, :, :1])
    assert torch.equal(cut[:, :, :37], before.flip(0)[:, :, :37])


def test_quantised_cache_is_smaller_and_close() -> None:
    model = make_model("llama")
    ids = tokens(columns=64)
    plain = unspool.DynamicCache(config=model.config)
    expected = feed(model, plain, ids, [60, 1, 1, 1, 1])
    past = unspool.QuantizedCache(backend="quanto", config=model.config, nbits=8, q_group_size=16, residual_length=8)
    found = feed(model, past, ids, [60, 1, 1, 1, 1])
    torch.testing.assert_close(found, expected, rtol=0.0, atol=0.2)
    stored = sum(layer.stored_bytes for layer in past.layers)
    assert stored < 0.6 * sum(2 * layer.keys.numel() * 4 for layer in plain.layers)


def test_encoder_decoder() -> None:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=97, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    encoded = model.get_encoder()(tokens())

    def run(past: Any) -> Tensor:
        found = []
        with torch.no_grad():
            for step in tokens(columns=6).split([2, 1, 1, 2], dim=1):
                out = model(encoder_outputs=encoded, decoder_input_ids=step, past_key_values=past, use_cache=True)
                found.append(out.logits)
        return torch.cat(found, dim=1)

    theirs = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    ours = unspool.EncoderDecoderCache(unspool.DynamicCache(), unspool.DynamicCache())
    torch.testing.assert_close(run(ours), run(theirs))
    assert ours.get_seq_length() == 6
    assert ours.is_updated == {0: True, 1: True}
    ours.reorder_cache(torch.tensor([1, 0]))
    ours.crop(-1)
    assert ours.get_seq_length() == 5
    assert ours.cross_attention_cache.get_seq_length() == tokens().shape[1]


@pytest.mark.parametrize("name", ["mamba", "jamba", "falcon_h1"])
def test_recurrent_layers(name: str) -> None:
    shape: dict[str, Any] = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }  # fmt: skip
    more: dict[str, dict[str, Any]] = {
        "mamba": {"intermediate_size": 64, "state_size": 8},
        "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 2, "use_mamba_kernels": False,
                  "mamba_d_state": 8},
        "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8},
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **{**shape, **more[name]})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    key = "cache_params" if name == "mamba" else "past_key_values"

    def run(past: Any) -> Tensor:
        with torch.no_grad():
            parts = [
                model(part, **{key: past}, use_cache=True).logits for part in tokens(columns=8).split([5, 1, 1, 1], 1)
            ]
        return torch.cat(parts, dim=1)

    theirs, ours = transformers.DynamicCache(config=config), unspool.DynamicCache(config=config)
    torch.testing.assert_close(run(ours), run(theirs))
    ours.reorder_cache(torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="cannot go back"):
        ours.crop(-1)


def test_mistakes_are_named() -> None:
    config = make_model("mistral").config
    with pytest.raises(unspool.Unsupported, match="sliding_attention"):
        unspool.QuantizedCache(config=config)
    with pytest.raises(ValueError, match="max_cache_len=0"):
        unspool.StaticCache(config, 0)
    with pytest.raises(ValueError, match="nbits=3"):
        QuantizedLayer(nbits=3)
    with pytest.raises(ValueError, match="num_hidden_layers"):
        unspool.DynamicCache(config={})
    past = unspool.StaticCache({"num_hidden_layers": 1}, 4)
    with pytest.raises(ValueError, match="max_cache_len=4"):
        past.update(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2), 0)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2-window"])
def test_reordering_after_a_common_part(name: str) -> None:
    """Rows that share their first columns need only the rest reordered."""
    model = make_model(name)
    ids = tokens()
    ids[1, :8] = ids[0, :8]
    plain, ours = unspool.DynamicCache(config=model.config), unspool.DynamicCache(config=model.config)
    for past in (plain, ours):
        feed(model, past, ids[:, :11], [8, 1, 2])
    place = torch.tensor([1, 1])
    plain.reorder_cache(place)
    ours.reorder_after(place, 8)
    torch.testing.assert_close(feed(model, ours, ids[:, 11:], [1, 3]), feed(model, plain, ids[:, 11:], [1, 3]))
