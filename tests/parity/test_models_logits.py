"""Logits of native models against transformers', on checkpoints it wrote itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, VOCAB, make_checkpoint
from torch import Tensor

from unspool.models.base import Batch, Model
from unspool.weights import load_model

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
LONGROPE = {
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 256,
    "original_max_position_embeddings": 32,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.3, 1.6],
        "long_factor": [1.5, 2.0, 4.0, 8.0],
    },
}


def ids_of(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


class Naive:
    """The shortest possible attention over flat rows: one loop per row and query."""

    def __init__(self, model: Model, lengths: list[int]) -> None:
        self.lengths = lengths
        self.windows = {layer: group.window for group in model.spec.groups for layer in group.layers}

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float | None = None
    ) -> Tensor:
        window, fold = self.windows[layer], q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(fold, 1), v.repeat_interleave(fold, 1)
        out, first = [], 0
        for length in self.lengths:
            for i in range(first, first + length):
                low = first if window is None else max(first, i - window + 1)
                scores = torch.einsum("hd,lhd->hl", q[i], k[low : i + 1]) * scale
                out.append(torch.einsum("hl,lhd->hd", scores.softmax(-1), v[low : i + 1]).flatten())
            first += length
        return torch.stack(out)


def flat_step(model: Model, rows: list[Tensor], **more: Any) -> Tensor:
    lengths = [len(row) for row in rows]
    positions = torch.cat([torch.arange(n) for n in lengths])
    extents = torch.cat([torch.full((n,), n) for n in lengths])
    with torch.inference_mode():
        return model.step(Batch(torch.cat(rows), positions, Naive(model, lengths), extents=extents, **more))


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Model]:
    folder = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(request.param, folder), load_model(folder, dtype="float32")


@pytest.mark.parametrize("length", [1, 2, 7, 90])
def test_logits_equal(pair: tuple[Any, Model], length: int) -> None:
    theirs, ours = pair
    ids = ids_of(2, length)
    with torch.no_grad():
        expected, got = theirs(ids).logits, ours(ids).logits
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(got, expected, **CLOSE)


def test_logits_equal_where_gradients_are_kept(pair: tuple[Any, Model]) -> None:
    theirs, ours = pair
    ids = ids_of(2, 20)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits.detach(), **CLOSE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(pair: tuple[Any, Model], side: str) -> None:
    theirs, ours = pair
    ids, mask = ids_of(3, 15), torch.ones(3, 15, dtype=torch.long)
    for row, pads in ((1, 4), (2, 13)):
        mask[row, slice(0, pads) if side == "left" else slice(15 - pads, 15)] = 0
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask).logits
        got = ours(ids, attention_mask=mask).logits
    true = mask.bool()
    torch.testing.assert_close(got[true], expected[true], **CLOSE)
    assert got.isfinite().all()


def test_positions_given(pair: tuple[Any, Model]) -> None:
    theirs, ours = pair
    ids, mask = ids_of(2, 9), torch.tensor([[1] * 9, [0] * 3 + [1] * 6])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
        got = ours(ids, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


def test_several_texts_packed_in_one_row(pair: tuple[Any, Model]) -> None:
    theirs, ours = pair
    ids, positions = ids_of(1, 12), torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]])
    with torch.no_grad():
        packed = ours(ids, position_ids=positions).logits
        apart = torch.cat([ours(part).logits for part in ids.split([5, 3, 4], dim=1)], dim=1)
        expected = theirs(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(packed, apart, **CLOSE)
    torch.testing.assert_close(packed, expected, **CLOSE)


def test_hidden_states_attentions_and_loss(pair: tuple[Any, Model]) -> None:
    theirs, ours = pair
    theirs.set_attn_implementation("eager")
    ids = ids_of(2, 13)
    labels = ids.clone()
    labels[0, :5] = -100
    with torch.no_grad():
        expected = theirs(ids, labels=labels, output_hidden_states=True, output_attentions=True)
        got = ours(ids, labels=labels, output_hidden_states=True, output_attentions=True)
    theirs.set_attn_implementation("sdpa")
    assert got.hidden_states is not None and got.attentions is not None
    for mine, other in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-5)
    for mine, other in zip(got.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(mine, other, **CLOSE)
    torch.testing.assert_close(got.loss, expected.loss, **CLOSE)
    assert got["logits"] is got.logits and got[0] is got.loss


def test_logits_to_keep(pair: tuple[Any, Model]) -> None:
    _, ours = pair
    ids = ids_of(2, 11)
    with torch.no_grad():
        every = ours(ids).logits
        torch.testing.assert_close(ours(ids, logits_to_keep=2).logits, every[:, -2:], **CLOSE)
        torch.testing.assert_close(ours(ids, logits_to_keep=torch.tensor([0, 7])).logits, every[:, [0, 7]], **CLOSE)


def test_step_on_flat_rows_equals_the_plain_call(pair: tuple[Any, Model]) -> None:
    theirs, ours = pair
    rows = [ids_of(1, n, seed=n)[0] for n in (9, 1, 40, 3)]
    trace: list[Tensor] = []
    got = flat_step(ours, rows, trace=trace)
    with torch.no_grad():
        expected = torch.cat([theirs(row[None]).logits[0] for row in rows])
        states = [theirs(row[None], output_hidden_states=True).hidden_states for row in rows]
    torch.testing.assert_close(got, expected, **CLOSE)
    assert len(trace) == ours.spec.layers + 1
    for mine, others in zip(trace, zip(*states, strict=True), strict=True):
        torch.testing.assert_close(mine, torch.cat([other[0] for other in others]), atol=1e-4, rtol=1e-5)
    keep = torch.tensor([8, 9, 49])
    torch.testing.assert_close(flat_step(ours, rows, keep=keep), expected[keep], **CLOSE)


def test_gradients_equal(tmp_path: Path) -> None:
    theirs = make_checkpoint("qwen3", tmp_path)
    ours = load_model(tmp_path, dtype="float32").requires_grad_(True).train()
    ids = ids_of(2, 10)
    theirs(ids, labels=ids).loss.backward()
    ours(ids, labels=ids).loss.backward()
    qkv = ours.get_parameter("layers.0.attention.qkv.weight").grad
    attention = theirs.model.layers[0].self_attn
    expected = torch.cat([part.weight.grad for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
    torch.testing.assert_close(qkv, expected, atol=1e-5, rtol=1e-4)
    norms = ours.get_parameter("layers.1.attention.norm.weight").grad
    other = theirs.model.layers[1].self_attn
    torch.testing.assert_close(
        norms, torch.cat([other.q_norm.weight.grad, other.k_norm.weight.grad]), atol=1e-5, rtol=1e-4
    )
    assert all(parameter.grad is not None for parameter in ours.parameters())


# Each goes far beyond the length the model was first trained on.
ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, by lengths": {"factor": None, "original_max_position_embeddings": 16, "truncate": False},
    "yarn, mscale": {
        "factor": 40.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.1,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn, attention_factor": {"factor": 4.0, "original_max_position_embeddings": 32, "attention_factor": 0.8},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_scalings_at_long_positions(name: str, tmp_path: Path) -> None:
    rope = {"rope_type": name.split(",")[0], "rope_theta": 5000.0, **ROPES[name]}
    theirs = make_checkpoint("llama", tmp_path, max_position_embeddings=64, rope_parameters=rope)
    ours = load_model(tmp_path, dtype="float32")
    for length in (200, 40):
        ids = ids_of(1, length)
        theirs = type(theirs).from_pretrained(tmp_path)  # its dynamic scaling remembers the longest text
        with torch.no_grad():
            torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize("length", [20, 32, 33, 120])
def test_longrope_on_both_sides_of_the_switch(length: int, tmp_path: Path) -> None:
    theirs = make_checkpoint("phi3", tmp_path, **LONGROPE)
    ours = load_model(tmp_path, dtype="float32")
    assert ours.spec.needs_extents
    ids = ids_of(2, length)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **CLOSE)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_depend_on_the_own_row_only(kind: str, tmp_path: Path) -> None:
    if kind == "longrope":
        make_checkpoint("phi3", tmp_path, **LONGROPE)
    else:
        make_checkpoint("llama-rope-dynamic", tmp_path)
    ours = load_model(tmp_path, dtype="float32")
    rows = [ids_of(1, n, seed=n)[0] for n in (100, 10, 32, 33)]
    together = flat_step(ours, rows)
    apart = torch.cat([flat_step(ours, [row]) for row in rows])
    torch.testing.assert_close(together, apart, **CLOSE)


@pytest.mark.parametrize("name", ["mistral", "qwen2-window", "phi3"])
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33])
def test_windows(name: str, window: int, tmp_path: Path) -> None:
    theirs = make_checkpoint(name, tmp_path, sliding_window=window)
    ours = load_model(tmp_path, dtype="float32")
    ids, mask = ids_of(2, 32), torch.ones(2, 32, dtype=torch.long)
    mask[1, :5] = 0
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **CLOSE)
        expected = theirs(ids, attention_mask=mask).logits
        torch.testing.assert_close(ours(ids, attention_mask=mask).logits[mask.bool()], expected[mask.bool()], **CLOSE)


VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 24}),
    ("llama", {"hidden_act": "gelu_pytorch_tanh", "num_key_value_heads": 1}),
    ("mistral", {"sliding_window": None, "head_dim": 8}),
    ("qwen2-window", {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"attention_bias": True, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2, "tie_word_embeddings": False}),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 5, "attention_bias": True}),
    ("granite", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("olmo2", {"attention_bias": True, "num_key_value_heads": 1}),
    ("gpt2", {"tie_word_embeddings": False, "n_inner": 100, "activation_function": "relu"}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"scale_attn_weights": False}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "")
def test_config_variants(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    theirs = make_checkpoint(name, tmp_path, **changes)
    ours = load_model(tmp_path, dtype="float32")
    ids = ids_of(2, 21)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, **CLOSE)
        torch.testing.assert_close(ours(ids[:1, :1]).logits, theirs(ids[:1, :1]).logits, **CLOSE)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_as_close_to_fp32_as_transformers(pair: tuple[Any, Model], dtype: str, tmp_path: Path) -> None:
    theirs, _ = pair
    theirs.save_pretrained(tmp_path)
    low = type(theirs).from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    ours = load_model(tmp_path, dtype=dtype)
    assert ours.dtype == getattr(torch, dtype)
    with torch.no_grad():
        for rows, length in ((2, 30), (1, 1), (3, 1)):
            ids = ids_of(rows, length)
            exact = theirs(ids).logits
            mistake = (ours(ids).logits.float() - exact).abs()
            usual = (low(ids).logits.float() - exact).abs()
            assert mistake.mean() <= 1.3 * usual.mean() + 1e-4
            assert mistake.max() <= 2 * usual.max() + 1e-3
