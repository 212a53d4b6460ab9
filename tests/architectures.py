"""Tiny random models of many architectures of transformers, with inputs to generate from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

VOCAB = 97

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
}  # fmt: skip
_BART: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 128,
}  # fmt: skip
_T5: dict[str, Any] = {
    "vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
}  # fmt: skip
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False}


def _text(rows: int = 3, columns: int = 7) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCAB, (rows, columns), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[2, :1] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}


def _encoder_text() -> dict[str, Tensor]:
    """Padded on the right, as encoders are fed."""
    return {name: value.flip(1) for name, value in _text().items()}


def _unpadded() -> dict[str, Tensor]:
    """For models that have no mask, or whose state would see padding."""
    ids = _text()["input_ids"].clamp_min(3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        model_type: transformers' name of it.
        config: entries of its configuration.
        auto: the class that makes the model from a configuration.
        inputs: what to generate from.
        quick: tested by default, and not under the `full` marker alone.
        beams: transformers itself can decode it with beams.
    """

    model_type: str
    config: dict[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    inputs: Callable[[], dict[str, Any]] = _text
    quick: bool = False
    beams: bool = True

    def make(self) -> Any:
        """The model, random, in fp32 and eval mode."""
        import transformers

        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.model_type, **self.config)
        model = getattr(transformers, self.auto).from_config(config).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "conv" not in name:
                    size = 1.0 if "embed" in name or "wte" in name or "shared" in name else 0.3
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
        return model


def _decoder(
    model_type: str, quick: bool = False, inputs: Any = _text, beams: bool = True, **more: Any
) -> Architecture:
    shape = {**_SHAPE, **_TOKENS, **more}
    shape = {name: value for name, value in shape.items() if value is not None}
    return Architecture(model_type, shape, inputs=inputs, quick=quick, beams=beams)


def _gpt(model_type: str, quick: bool = False, **more: Any) -> Architecture:
    shape = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    return Architecture(model_type, {**shape, **_TOKENS, **more}, quick=quick)


def _seq2seq(model_type: str, shape: dict[str, Any], quick: bool = False, **more: Any) -> Architecture:
    return Architecture(
        model_type, {**shape, **_TOKENS, "decoder_start_token_id": 2, **more}, "AutoModelForSeq2SeqLM",
        _encoder_text, quick,
    )  # fmt: skip


_MOE: dict[str, Any] = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

DECODERS = [
    _decoder("llama", quick=True),
    _decoder("mistral", sliding_window=6, quick=True),
    _decoder("mixtral", **_MOE),
    _decoder("qwen2"),
    _decoder("qwen2_moe", shared_expert_intermediate_size=32, **_MOE),
    _decoder("qwen3"),
    _decoder("qwen3_moe", **_MOE),
    _decoder(
        "qwen3_next",
        inputs=_unpadded,
        shared_expert_intermediate_size=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        **_MOE,
    ),
    _decoder("gemma"),
    _decoder("gemma2", sliding_window=6, query_pre_attn_scalar=8),
    _decoder("gemma3_text", sliding_window=6, query_pre_attn_scalar=8, quick=True),
    _decoder("phi"),
    _decoder("phi3"),
    _gpt("gpt2", quick=True),
    _gpt("gpt_bigcode"),
    _gpt("gptj", rotary_dim=4),
    _gpt("codegen", rotary_dim=4),
    _gpt("openai-gpt"),
    _gpt("ctrl", dff=64),
    _decoder("gpt_neo", num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=6),
    _decoder("gpt_neox"),
    _decoder("gpt_oss", sliding_window=6, **_MOE),
    _decoder("opt", ffn_dim=64, word_embed_proj_dim=32),
    _decoder("bloom", n_layer=2, n_head=4, quick=True),
    _decoder("falcon", head_dim=None),
    Architecture(
        "mpt", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, **_TOKENS}
    ),
    _decoder("stablelm"),
    _decoder("starcoder2"),
    _decoder("cohere"),
    _decoder("cohere2", sliding_window=6),
    _decoder("olmo"),
    _decoder("olmo2"),
    _decoder("olmo3", sliding_window=6),
    _decoder("olmoe", **_MOE),
    _decoder("granite"),
    _decoder("granitemoe", **_MOE),
    _decoder("glm"),
    _decoder("glm4"),
    _decoder("nemotron"),
    _decoder("persimmon"),
    _decoder("smollm3", no_rope_layers=[1, 0]),
    _decoder("ernie4_5"),
    _decoder("exaone4", sliding_window=6, sliding_window_pattern=2),
    _decoder("arcee"),
    _decoder("apertus"),
    _decoder("helium"),
    _decoder("seed_oss"),
    _decoder("hunyuan_v1_dense"),
    _decoder(
        "deepseek_v2",
        head_dim=None,
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        **_MOE,
    ),
    _decoder(
        "deepseek_v3",
        head_dim=None,
        num_key_value_heads=4,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
        **_MOE,
    ),
    _decoder("xglm", num_layers=2, attention_heads=4, d_model=32, ffn_dim=64),
    _decoder("biogpt"),
    _decoder("bert-generation", is_decoder=True),
    _decoder("mamba", inputs=_unpadded, state_size=8, quick=True),
    _decoder("mamba2", inputs=_unpadded, state_size=8, num_heads=8, n_groups=2, expand=2),
    _decoder("falcon_mamba", inputs=_unpadded, state_size=8),
    _decoder(
        "jamba", inputs=_unpadded, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False, mamba_d_state=8
    ),
    _decoder("bamba", inputs=_unpadded, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8),
    _decoder("falcon_h1", inputs=_unpadded, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8),
    _decoder("lfm2", layer_types=["conv", "full_attention"], inputs=_unpadded),
    _decoder(
        "recurrent_gemma",
        inputs=_unpadded,
        lru_width=32,
        attention_window_size=6,
        block_types=["recurrent", "attention"],
    ),
    _decoder("rwkv", inputs=_unpadded, attention_hidden_size=32, context_length=128, beams=False),
    _decoder("xlnet", max_position_embeddings=None, inputs=_unpadded, d_model=32, n_layer=2, n_head=4, d_inner=64),
]

SEQ2SEQ = [
    _seq2seq("t5", _T5, quick=True, decoder_start_token_id=0),
    _seq2seq("mt5", _T5, decoder_start_token_id=0),
    _seq2seq("umt5", _T5, decoder_start_token_id=0),
    _seq2seq("longt5", _T5, local_radius=4, decoder_start_token_id=0),
    _seq2seq("switch_transformers", _T5, num_experts=2, decoder_start_token_id=0),
    _seq2seq("bart", _BART, quick=True, forced_eos_token_id=2),
    _seq2seq("mbart", _BART),
    _seq2seq("plbart", _BART),
    _seq2seq("pegasus", _BART),
    _seq2seq("pegasus_x", _BART, block_size=4, num_global_tokens=2),
    _seq2seq("bigbird_pegasus", _BART, attention_type="original_full"),
    _seq2seq("marian", _BART, decoder_vocab_size=VOCAB),
    _seq2seq("blenderbot", _BART),
    _seq2seq("blenderbot-small", _BART),
    _seq2seq("m2m_100", _BART),
    _seq2seq(
        "led", _BART, attention_window=4, max_encoder_position_embeddings=128, max_decoder_position_embeddings=128
    ),
    _seq2seq(
        "prophetnet",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "num_encoder_layers": 2,
            "num_decoder_layers": 2,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "encoder_ffn_dim": 64,
            "decoder_ffn_dim": 64,
            "max_position_embeddings": 128,
        },
    ),
    _seq2seq(
        "t5gemma",
        {"encoder": {**_SHAPE, "sliding_window": 6}, "decoder": {**_SHAPE, "sliding_window": 6}, "vocab_size": VOCAB},
    ),
]

_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8, "projection_dim": 32,
}  # fmt: skip
_IMAGE = 96
"""Stands for one patch of an image among the tokens."""


def _pixels(rows: int = 2, size: int = 16) -> Tensor:
    return torch.randn(rows, 3, size, size, generator=torch.Generator().manual_seed(4))


def _picture_and_text(patches: int = 4) -> Callable[[], dict[str, Any]]:
    """Two prompts of different lengths, each with one image of so many patches."""

    def make() -> dict[str, Any]:
        text = torch.randint(3, _IMAGE, (2, 6), generator=torch.Generator().manual_seed(1))
        ids = torch.cat([torch.full((2, 1), 1), torch.full((2, patches), _IMAGE), text], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": _pixels()}

    return make


def _several_pictures(patches: int) -> Callable[[], dict[str, Any]]:
    """The same for models that take any number of images a row: here one."""

    def make() -> dict[str, Any]:
        return {**_picture_and_text(patches)(), "pixel_values": _pixels()[:, None]}

    return make


def _looked_at() -> dict[str, Any]:
    """Text whose every token may look at its row's image."""
    ids = torch.randint(3, _IMAGE, (2, 7), generator=torch.Generator().manual_seed(1))
    seen = torch.ones(2, 7, 1, dtype=torch.int64)
    mask = torch.ones_like(ids)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": _pixels()[:, None], "image_attention_mask": seen}


def _picture_apart() -> dict[str, Any]:
    """A picture whose patches see each other, as their token types tell."""
    inputs = _picture_and_text(4)()
    return {**inputs, "token_type_ids": (inputs["input_ids"] == _IMAGE).long()}


def _qwen_picture() -> dict[str, Any]:
    made = _picture_and_text(4)()
    start = torch.full((2, 1), 95)
    ids = torch.cat([made["input_ids"][:, :1], start, made["input_ids"][:, 1:]], dim=1)
    pixels = torch.randn(2 * 16, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(4))
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]), "mm_token_type_ids": (ids == _IMAGE).int(),
    }  # fmt: skip


def _pixels_alone() -> dict[str, Any]:
    return {"pixel_values": _pixels()}


def _sound() -> dict[str, Any]:
    """Log mel features `[rows, mels, frames]`."""
    return {"input_features": torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(4))}


def _frames() -> dict[str, Any]:
    """Features `[rows, frames, mels]` with a mask."""
    mask = torch.ones(2, 32, dtype=torch.int64)
    mask[1, 24:] = 0
    return {"input_features": _sound()["input_features"].transpose(1, 2)[:, :32], "attention_mask": mask}


def _wave() -> dict[str, Any]:
    return {"input_values": torch.randn(2, 4000, generator=torch.Generator().manual_seed(4))}


def _flat_patches() -> dict[str, Any]:
    patches = torch.randn(2, 6, 14, generator=torch.Generator().manual_seed(4))
    patches[..., :2] = torch.tensor([[1, 1], [1, 2], [1, 3], [2, 1], [2, 2], [2, 3]])
    return {"flattened_patches": patches, "attention_mask": torch.ones(2, 6)}


_TEXT = {**_SHAPE, **_TOKENS, "model_type": "llama"}
_SIGHT = "AutoModelForImageTextToText"

MULTIMODAL = [
    Architecture(
        "llava",
        {
            "text_config": _TEXT,
            "vision_config": {**_VISION, "model_type": "clip_vision_model"},
            "image_token_index": _IMAGE,
            "image_token_id": _IMAGE,
            "image_seq_length": 4,
        },
        _SIGHT,
        _picture_and_text(4),
        quick=True,
    ),
    Architecture(
        "paligemma",
        {
            "text_config": {**_TEXT, "model_type": "gemma"},
            "vision_config": {**_VISION, "model_type": "siglip_vision_model"},
            "image_token_index": _IMAGE,
            "image_token_id": _IMAGE,
            "projection_dim": 32,
            "hidden_size": 32,
        },
        _SIGHT,
        _picture_and_text(4),
    ),
    Architecture(
        "gemma3",
        {
            "text_config": {**_TEXT, "model_type": "gemma3_text", "sliding_window": 6, "query_pre_attn_scalar": 8},
            "vision_config": {**_VISION, "model_type": "siglip_vision_model", "patch_size": 4},
            "mm_tokens_per_image": 4,
            "image_token_index": _IMAGE,
            "image_token_id": _IMAGE,
        },
        _SIGHT,
        _picture_apart,
    ),
    Architecture(
        "idefics",
        {
            **_SHAPE,
            **_TOKENS,
            "additional_vocab_size": 0,
            "cross_layer_interval": 1,
            "vision_config": {**_VISION, "embed_dim": 32},
        },
        _SIGHT,
        _looked_at,
    ),
    Architecture(
        "idefics2",
        {
            "text_config": {**_TEXT, "model_type": "mistral"},
            "vision_config": _VISION,
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 2,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            },
            "image_token_id": _IMAGE,
        },
        _SIGHT,
        _several_pictures(2),
    ),
    Architecture(
        "idefics3",
        {"text_config": _TEXT, "vision_config": _VISION, "scale_factor": 2, "image_token_id": _IMAGE},
        _SIGHT,
        _several_pictures(1),
    ),
    Architecture(
        "qwen2_vl",
        {
            "text_config": {
                **_TEXT,
                "model_type": "qwen2_vl_text",
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {
                "depth": 2,
                "embed_dim": 32,
                "hidden_size": 32,
                "num_heads": 4,
                "patch_size": 8,
                "mlp_ratio": 2,
            },
            "image_token_id": _IMAGE,
            "video_token_id": 94,
            "vision_start_token_id": 95,
            "vision_end_token_id": 93,
        },
        _SIGHT,
        _qwen_picture,
    ),
    Architecture(
        "qwen2_5_vl",
        {
            "text_config": {
                **_TEXT,
                "model_type": "qwen2_5_vl_text",
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            },
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "out_hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 4,
                "patch_size": 8,
                "fullatt_block_indexes": [1],
                "window_size": 32,
            },
            "image_token_id": _IMAGE,
            "video_token_id": 94,
            "vision_start_token_id": 95,
            "vision_end_token_id": 93,
        },
        _SIGHT,
        _qwen_picture,
    ),
    Architecture(
        "git",
        {**_SHAPE, **_TOKENS, "vision_config": _VISION},
        _SIGHT,
        lambda: {**_pixels_alone(), "input_ids": torch.tensor([[1, 5], [1, 7]])},
    ),
    Architecture(
        "blip",
        {
            "text_config": {**_SHAPE, **_TOKENS, "encoder_hidden_size": 32, "is_decoder": True, "sep_token_id": 2},
            "vision_config": _VISION,
        },
        _SIGHT,
        _pixels_alone,
        beams=False,
    ),
    Architecture(
        "blip-2",
        {
            "text_config": {**_SHAPE, **_TOKENS, "model_type": "opt", "ffn_dim": 64, "word_embed_proj_dim": 32},
            "vision_config": _VISION,
            "qformer_config": {**_SHAPE, "encoder_hidden_size": 32, "cross_attention_frequency": 1},
            "num_query_tokens": 3,
            "image_token_index": _IMAGE,
        },
        _SIGHT,
        _pixels_alone,
    ),
    Architecture(
        "pix2struct",
        {
            "text_config": {
                "vocab_size": VOCAB,
                "hidden_size": 32,
                "d_kv": 8,
                "d_ff": 64,
                "num_layers": 2,
                "num_heads": 4,
                **_TOKENS,
                "decoder_start_token_id": 0,
            },
            "vision_config": {
                "hidden_size": 32,
                "d_kv": 8,
                "d_ff": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "patch_embed_hidden_size": 12,
                "seq_len": 16,
            },
        },
        _SIGHT,
        _flat_patches,
    ),
    Architecture(
        "whisper",
        {
            **_BART,
            **_TOKENS,
            "num_mel_bins": 8,
            "max_source_positions": 32,
            "max_target_positions": 64,
            "decoder_start_token_id": 3,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
        "AutoModelForSpeechSeq2Seq",
        _sound,
        quick=True,
    ),
    Architecture(
        "speech_to_text",
        {
            **_BART,
            **_TOKENS,
            "input_feat_per_channel": 8,
            "max_source_positions": 64,
            "max_target_positions": 64,
            "decoder_start_token_id": 2,
            "conv_channels": 16,
            "num_conv_layers": 1,
            "conv_kernel_sizes": [3],
        },
        "AutoModelForSpeechSeq2Seq",
        _frames,
    ),
    Architecture(
        "moonshine",
        {
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "encoder_num_hidden_layers": 2,
            "decoder_num_hidden_layers": 2,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "max_position_embeddings": 128,
            **_TOKENS,
            "decoder_start_token_id": 1,
        },
        "AutoModelForSpeechSeq2Seq",
        _wave,
    ),
]

ARCHITECTURES = [*DECODERS, *SEQ2SEQ, *MULTIMODAL]
