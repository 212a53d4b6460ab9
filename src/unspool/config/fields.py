"""Every setting of a generation call, its type and its meaning. No behaviour.

The names are those of transformers v5 (the later ones of 5.23 included), so that its files load here. `None` means
"not set": the value then comes from the model's generation_config.json and, failing that, from `defaults`. A default
named below is the one used when nobody sets the field.
"""

from __future__ import annotations

from typing import Any

from unspool.config.compilation import CompileConfig
from unspool.config.continuous import ContinuousBatchingConfig
from unspool.config.watermark import BaseWatermarkingConfig

__all__ = ["FIELDS", "METADATA", "GenerationFields"]


class GenerationFields:
    """The settings, grouped as their documentation groups them."""

    # How long the output is

    max_length: int | None = None
    """Most tokens of a row, prompt included (padded columns). Default: the prompt plus 20. `max_new_tokens` wins."""
    max_new_tokens: int | None = None
    """Most tokens to generate, prompt not counted. At least 1."""
    min_length: int | None = None
    """No end-of-sequence token before this many tokens, prompt included. Default 0. `min_new_tokens` wins."""
    min_new_tokens: int | None = None
    """No end-of-sequence token before this many generated tokens."""
    early_stopping: bool | str | None = None
    """When a beam search stops. `True`: at `num_beams` finished candidates; `False` (default): when a heuristic finds
    better ones unlikely; `"never"`: only when no better one is possible."""
    max_time: float | None = None
    """Seconds after which generation stops; the step under way is finished first."""
    stop_strings: str | list[str] | None = None
    """A text, or several, that end a row as soon as its output contains one. Needs a tokenizer."""

    # Which strategy chooses the tokens

    do_sample: bool | None = None
    """`True`: draw from the distribution. `False` (default): take the most likely token."""
    num_beams: int | None = None
    """Rows that a beam search keeps for each prompt. Default 1: no beam search."""
    num_beam_groups: int | None = None
    """Groups among which `num_beams` is divided for diverse beam search (arXiv 1610.02424). Default 1."""
    diversity_penalty: float | None = None
    """What a beam pays for a token that another group chose at the same step. Default 0.0."""
    constraints: list[Any] | None = None
    """Constraint objects that a constrained beam search must satisfy."""
    force_words_ids: list[Any] | None = None
    """Token ids of words that must appear; a list of alternatives asks for one of them."""
    penalty_alpha: float | None = None
    """Weight of the degeneration penalty; above 0 with `top_k` > 1 means contrastive search (arXiv 2202.06417)."""
    dola_layers: str | list[int] | None = None
    """Layers to contrast with the last one (arXiv 2309.03883): `"low"`, `"high"` or their indices."""
    low_memory: bool | None = None
    """Accepted for old files; contrastive and beam search need no low-memory switch here."""
    use_mtp: bool | None = None
    """Draft with the model's own multi-token-prediction layers, where it has them."""
    seed: int | None = None
    """Seed of this call's own random numbers: the same text whatever else runs. `None`: torch's global generator."""

    # The key/value cache

    use_cache: bool | None = None
    """Keep keys and values between steps. Default `True`."""
    cache_implementation: str | None = None
    """Kind of cache: `"dynamic"`, `"static"`, `"offloaded"`, `"offloaded_static"`, `"quantized"` or `"paged"`."""
    cache_config: dict[str, Any] | None = None
    """Arguments of that cache."""
    max_cache_len: int | None = None
    """Length at which a static cache is made, for use by later and longer calls."""
    prefill_chunk_size: int | None = None
    """Most prompt tokens to feed at once. `None`: the whole prompt."""

    # How the scores are changed before a token is chosen

    temperature: float | None = None
    """Divides the scores: below 1 sharper, above 1 flatter. Default 1.0."""
    top_k: int | None = None
    """Keep the k most likely tokens. Default 50; 0 keeps all."""
    top_p: float | None = None
    """Keep the smallest set of likely tokens whose probabilities reach this sum. Default 1.0: all."""
    min_p: float | None = None
    """Keep tokens at least this fraction as likely as the most likely one."""
    top_h: float | None = None
    """Keep the likely tokens whose joint entropy stays within this fraction of the whole (arXiv 2509.02510)."""
    typical_p: float | None = None
    """Keep the tokens nearest to the expected information content, up to this mass (arXiv 2202.00666). Default 1.0."""
    epsilon_cutoff: float | None = None
    """Keep tokens more likely than this (arXiv 2210.15191). Default 0.0: all."""
    eta_cutoff: float | None = None
    """Keep tokens above a cutoff that falls with the entropy (arXiv 2210.15191). Default 0.0: all."""
    repetition_penalty: float | None = None
    """Above 1 makes tokens already in the row less likely (arXiv 1909.05858). Default 1.0."""
    encoder_repetition_penalty: float | None = None
    """Above 1 makes tokens that are not in the prompt less likely. Default 1.0."""
    length_penalty: float | None = None
    """A beam's score is divided by its length to this power: above 0 favours long beams. Default 1.0."""
    no_repeat_ngram_size: int | None = None
    """No n-gram of this size appears twice. Default 0: off."""
    bad_words_ids: list[list[int]] | None = None
    """Token sequences that are never completed."""
    renormalize_logits: bool | None = None
    """Take a log-softmax after all processors, so that scores are log-probabilities again."""
    forced_bos_token_id: int | None = None
    """First generated token, for models that name the output's language with it."""
    forced_eos_token_id: int | list[int] | None = None
    """Last token of a row that reaches `max_length`."""
    remove_invalid_values: bool | None = None
    """Replace NaN and infinite scores instead of failing. Default `False`."""
    exponential_decay_length_penalty: tuple[int, float] | None = None
    """`(start, factor)`: from `start` generated tokens on, the end becomes more likely by `factor` to the power."""
    suppress_tokens: list[int] | None = None
    """Tokens that are never generated."""
    begin_suppress_tokens: list[int] | None = None
    """Tokens that are not generated first."""
    sequence_bias: dict[tuple[int, ...], float] | list[Any] | None = None
    """What to add to the score of the token that completes a sequence: `{(5, 7): -2.0}` or `[[[5, 7], -2.0]]`."""
    token_healing: bool | None = None
    """Replace the last prompt token by the best token that starts with it."""
    guidance_scale: float | None = None
    """Classifier-free guidance: above 1 pulls the output toward the prompt and away from the negative prompt."""
    watermarking_config: BaseWatermarkingConfig | None = None
    """Marks the text so that it can be recognised; a dict becomes the right class."""

    # What the text must be (one of the three; they need `tokenizer=` in the call)

    json_schema: dict[str, Any] | None = None
    """JSON schema of the generated text; JSON text and pydantic models are taken too and become a dict."""
    regex: str | None = None
    """Regular expression that the whole generated text matches (Rust's syntax, without look-around)."""
    grammar: str | None = None
    """Grammar of the generated text, in llguidance's kind of Lark; its first rule is `start`."""

    # What a call returns

    num_return_sequences: int | None = None
    """Outputs for each prompt. Default 1."""
    output_attentions: bool | None = None
    """Return every layer's attention weights."""
    output_hidden_states: bool | None = None
    """Return every layer's hidden states."""
    output_scores: bool | None = None
    """Return the scores of each step after the processors. Default `False`."""
    output_logits: bool | None = None
    """Return the scores of each step as the model gave them."""
    output_top_logprobs: int | None = None
    """Return each step's so many likeliest tokens, by the scores after the processors, and the chosen token's log
    probability. Costs a few numbers a token, where `output_scores` keeps the whole vocabulary's."""
    return_dict_in_generate: bool | None = None
    """Return an object with the outputs asked for instead of the tokens alone. Default `False`."""

    # Special tokens

    pad_token_id: int | None = None
    """Fills rows that are shorter than the longest."""
    bos_token_id: int | None = None
    """Starts a row that has no prompt."""
    eos_token_id: int | list[int] | None = None
    """Ends a row; one id or several."""

    # Encoder-decoder models

    encoder_no_repeat_ngram_size: int | None = None
    """No n-gram of this size is copied from the encoder's input. Default 0: off."""
    decoder_start_token_id: int | list[int] | None = None
    """First token of the decoder, one for all rows or one for each."""

    # Drafting (assisted generation)

    is_assistant: bool | None = None
    """This model drafts for another."""
    num_assistant_tokens: int | None = None
    """Tokens drafted before each check. Default 20."""
    num_assistant_tokens_schedule: str | None = None
    """`"constant"` (default), `"heuristic"` (+2 when all were right, else -1) or `"heuristic_transient"` (reset after
    each call)."""
    assistant_confidence_threshold: float | None = None
    """Stop a draft when the draft model is less sure than this (arXiv 2405.04304). Default 0.4."""
    prompt_lookup_num_tokens: int | None = None
    """Draft this many tokens by looking for the last n-gram earlier in the row; no draft model needed."""
    max_matching_ngram_size: int | None = None
    """Longest n-gram for that search; 2 when not set."""
    assistant_early_exit: int | None = None
    """Draft with the model's own first layers, up to this one."""
    assistant_lookbehind: int | None = None
    """Draft tokens encoded again to align two tokenizers. Default 10."""
    target_lookbehind: int | None = None
    """Target tokens encoded again to align two tokenizers. Default 10."""
    assistant_ensemble_weight: float | None = None
    """In (0, 1): accept drafts against `w * target + (1 - w) * draft`. `None`: exact speculation."""
    speculation_type: str | None = None
    """Name of a special drafting scheme."""

    # Running

    compile_config: CompileConfig | None = None
    """How transformers compiles the forward pass; a dict becomes a `CompileConfig`. Checked and without effect: nothing
    is compiled in a call here. Not written by `save_pretrained`."""
    disable_compile: bool | None = None
    """Never compile by itself, which no call here does."""
    continuous_batching_config: ContinuousBatchingConfig | None = None
    """Settings of `generate_batch`; better passed to it directly."""


FIELDS: tuple[str, ...] = tuple(GenerationFields.__annotations__)
"""The names of all fields, in the order of the documentation."""

METADATA: tuple[str, ...] = ("_from_model_config", "_commit_hash", "_original_object_hash", "transformers_version")
"""Where a configuration came from: never part of equality, hash or repr."""
