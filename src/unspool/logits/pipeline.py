"""From a generation config to processors, in transformers' order."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unspool.config.notice import warn_once
from unspool.config.structured import STRUCTURES
from unspool.errors import Unsupported
from unspool.logits.base import LogitsProcessorList, ProcessorLike
from unspool.logits.bias import NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor
from unspool.logits.constrained import PrefixAllowedTokens, PrefixConstrainedLogitsProcessor
from unspool.logits.diversity import HammingDiversityLogitsProcessor
from unspool.logits.forced import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from unspool.logits.grammar import GrammarLogitsProcessor, compile_structure
from unspool.logits.length import (
    ExponentialDecayLengthPenalty,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)
from unspool.logits.ngram import EncoderNoRepeatNGramLogitsProcessor, NoRepeatNGramLogitsProcessor
from unspool.logits.penalties import EncoderRepetitionPenaltyLogitsProcessor, RepetitionPenaltyLogitsProcessor
from unspool.logits.sanity import InfNanRemoveLogitsProcessor, LogitNormalization
from unspool.logits.warpers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopKTopPLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from unspool.logits.watermark import watermark_processor

if TYPE_CHECKING:
    from unspool.config import GenerationConfig

logger = logging.getLogger(__name__)


def build_processors(
    config: GenerationConfig,
    *,
    prompt_length: int,
    eos_token_id: Tensor | None,
    device: str | torch.device,
    custom: Sequence[ProcessorLike] | None = None,
    prefix_allowed_tokens_fn: PrefixAllowedTokens | None = None,
    encoder_input_ids: Tensor | None = None,
    padding_lengths: Tensor | None = None,
    tokenizer: Any = None,
    vocab_size: int | None = None,
    guidance: ProcessorLike | None = None,
) -> LogitsProcessorList:
    """The processors a config asks for, with a caller's own, in the order transformers applies them.

    Args:
        config: resolved settings; `max_length` is the final one.
        prompt_length: columns of the prompt, padding included; 0 when only embeddings were given.
        eos_token_id: 1-d tensor of ids, or None. Without it the minimum-length rules have nothing to ban.
        device: where the scores will be.
        custom: the caller's processors. One of a type that the config asks for too takes its place; the others come
            after the configured ones and before the warpers.
        prefix_allowed_tokens_fn: see `PrefixConstrainedLogitsProcessor`.
        encoder_input_ids: encoder tokens `[inputs, length]` (the prompt, for decoder-only models).
        padding_lengths: left padding of each row, `[rows]`; the repetition penalty then skips these columns. None
            lets it see them, as transformers did up to 5.2.
        tokenizer: the model's; needed for `json_schema`, `regex` and `grammar` only.
        vocab_size: of the model; needed for a watermark, and for a grammar where it is more than the tokenizer's.
        guidance: what `guidance_scale` comes to; it needs the model, so the front end makes it.

    Returns:
        Processors, then the grammar mask, then (when `do_sample`) warpers, then a watermark, then normalisation.
        Settings without effect add nothing.

    Raises:
        ValueError: a setting is out of its range, or needs an eos id, a tokenizer or a vocabulary size that is not
            there; or a structure cannot be compiled (see `compile_structure`).
        Unsupported: guidance is asked for and not given.
    """
    if is_guided(config) and guidance is None:
        raise Unsupported(f"`guidance_scale` (={config.guidance_scale}) is not supported here; leave it None or set 1.")
    eos = eos_token_id
    configured = LogitsProcessorList([] if guidance is None else [guidance])
    configured += _history_processors(config, prompt_length, eos, encoder_input_ids, padding_lengths)
    configured += _length_processors(config, prompt_length, eos, device)
    if prefix_allowed_tokens_fn is not None:
        rows = (config.num_beams or 1) // (config.num_beam_groups or 1)  # groups are processed one after the other
        configured.append(PrefixConstrainedLogitsProcessor(prefix_allowed_tokens_fn, rows))
    configured += _token_processors(config, prompt_length, eos, device)
    if vocab_size is not None:
        _check_ids(configured, vocab_size, prompt_length)
    processors = _merge(configured, custom or ())
    processors += _grammar_mask(config, prompt_length, eos, tokenizer, vocab_size)
    if config.do_sample:
        processors += _warpers(config, eos)
    if config.watermarking_config is not None:
        if vocab_size is None:
            raise ValueError(
                "`watermarking_config` needs the model's `vocab_size`, to know which tokens to mark; a module of your "
                "own tells it by its `config`."
            )
        processors.append(
            watermark_processor(
                config.watermarking_config, vocab_size=vocab_size, prompt_length=prompt_length, device=device
            )
        )
    if config.renormalize_logits is True:
        processors.append(LogitNormalization())
    return processors


def warped_again(processors: LogitsProcessorList, config: GenerationConfig) -> LogitsProcessorList:
    """What transformers runs on the scores of a draft model: all processors, and those for sampling a second time.

    The drafts are a little off for it and the checked text is not, but what is drawn from a global generator depends on
    it.
    """
    again: list[ProcessorLike] = _warpers(config, None) if config.do_sample else []
    if config.renormalize_logits is True:
        again.append(LogitNormalization())
    return LogitsProcessorList([*processors, *again])


def is_guided(config: GenerationConfig) -> bool:
    """Whether `guidance_scale` changes anything."""
    return config.guidance_scale is not None and config.guidance_scale != 1


def _check_ids(processors: LogitsProcessorList, vocab_size: int, prompt_length: int) -> None:
    """Raise `ValueError` for tokens that are to be forced, biased or banned and do not exist."""
    for processor in processors:
        if isinstance(processor, SequenceBiasLogitsProcessor):
            name = "bad_words_ids" if isinstance(processor, NoBadWordsLogitsProcessor) else "sequence_bias"
            ids = [token for sequence in processor.sequence_bias for token in sequence]
        elif isinstance(processor, ForcedEOSTokenLogitsProcessor):
            name, ids = "forced_eos_token_id", processor.eos_token_id.tolist()
        elif isinstance(processor, ForcedBOSTokenLogitsProcessor) and prompt_length <= 1:
            name, ids = "forced_bos_token_id", [processor.bos_token_id]
        else:
            continue
        outside = next((token for token in ids if not 0 <= token < vocab_size), None)
        if outside is not None:
            raise ValueError(
                f"{name} names token id {outside}, outside the model's vocabulary of {vocab_size}; use the tokenizer "
                "that belongs to the model"
            )


def _history_processors(
    config: GenerationConfig,
    prompt_length: int,
    eos: Tensor | None,
    encoder_input_ids: Tensor | None,
    padding_lengths: Tensor | None,
) -> list[ProcessorLike]:
    """Biases, penalties and bans that depend on the tokens so far or on the encoder's."""
    found: list[ProcessorLike] = []
    # Callers without encoder tokens may pass a dummy filled with a negative id.
    source = encoder_input_ids
    if source is not None and (source.dim() != 2 or bool((source < 0).any())):
        source = None
    if config.sequence_bias is not None:
        found.append(SequenceBiasLogitsProcessor(config.sequence_bias))
    groups = config.num_beam_groups or 1
    if groups > 1 and config.num_beams is not None and config.diversity_penalty:
        found.append(HammingDiversityLogitsProcessor(config.diversity_penalty, config.num_beams, groups))
    if config.encoder_repetition_penalty is not None and config.encoder_repetition_penalty != 1.0:
        if source is None:
            _warn_no_source("encoder_repetition_penalty")
        else:
            found.append(EncoderRepetitionPenaltyLogitsProcessor(config.encoder_repetition_penalty, source))
    if config.repetition_penalty is not None and config.repetition_penalty != 1.0:
        padded = padding_lengths is not None and bool(padding_lengths.any())
        ignored = padding_lengths if padded else None
        found.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty, ignored))
        _warn_no_prompt("repetition_penalty", prompt_length)
    if config.no_repeat_ngram_size is not None and config.no_repeat_ngram_size > 0:
        found.append(NoRepeatNGramLogitsProcessor(config.no_repeat_ngram_size))
        _warn_no_prompt("no_repeat_ngram_size", prompt_length)
    if config.encoder_no_repeat_ngram_size is not None and config.encoder_no_repeat_ngram_size > 0:
        if source is None:
            _warn_no_source("encoder_no_repeat_ngram_size")
        else:
            found.append(EncoderNoRepeatNGramLogitsProcessor(config.encoder_no_repeat_ngram_size, source))
    if config.bad_words_ids is not None:
        found.append(NoBadWordsLogitsProcessor(config.bad_words_ids, eos))
    return found


def _length_processors(
    config: GenerationConfig, prompt_length: int, eos: Tensor | None, device: str | torch.device
) -> list[ProcessorLike]:
    """The rules that keep a row from ending early; they ban eos, so they need one."""
    found: list[ProcessorLike] = []
    if eos is not None and config.min_length is not None and config.min_length > 0:
        found.append(MinLengthLogitsProcessor(config.min_length, eos, device))
    if eos is not None and config.min_new_tokens is not None and config.min_new_tokens > 0:
        found.append(MinNewTokensLengthLogitsProcessor(prompt_length, config.min_new_tokens, eos, device))
    return found


def _token_processors(
    config: GenerationConfig, prompt_length: int, eos: Tensor | None, device: str | torch.device
) -> list[ProcessorLike]:
    """Forced and suppressed tokens, repair of the scores, and the push towards eos."""
    found: list[ProcessorLike] = []
    if config.forced_bos_token_id is not None:
        found.append(ForcedBOSTokenLogitsProcessor(config.forced_bos_token_id))
    if config.forced_eos_token_id is not None:
        if config.max_length is None:
            raise ValueError("`forced_eos_token_id` needs `max_length` or `max_new_tokens`, to know the last place.")
        found.append(ForcedEOSTokenLogitsProcessor(config.max_length, config.forced_eos_token_id, device))
    if config.remove_invalid_values is True:
        found.append(InfNanRemoveLogitsProcessor())
    if config.exponential_decay_length_penalty is not None:
        if eos is None:
            raise ValueError("`exponential_decay_length_penalty` raises the eos score; set `eos_token_id` too.")
        found.append(ExponentialDecayLengthPenalty(config.exponential_decay_length_penalty, eos, prompt_length))
    if config.suppress_tokens is not None:
        found.append(SuppressTokensLogitsProcessor(config.suppress_tokens, device))
    if config.begin_suppress_tokens is not None:
        # A forced bos takes the first place, so the text begins one later.
        forced = prompt_length <= 1 and config.forced_bos_token_id is not None
        begin = prompt_length + int(forced)
        found.append(SuppressTokensAtBeginLogitsProcessor(config.begin_suppress_tokens, begin, device))
    return found


def _grammar_mask(
    config: GenerationConfig, prompt_length: int, eos: Tensor | None, tokenizer: Any, vocab_size: int | None
) -> list[ProcessorLike]:
    """The mask of what the text must be: after all that raises scores, before what keeps the best of them."""
    kind = next((name for name in STRUCTURES if getattr(config, name) is not None), None)
    if kind is None:
        return []
    ends = [] if eos is None else eos.tolist()
    grammar = compile_structure(kind, getattr(config, kind), tokenizer=tokenizer, eos=ends, vocab_size=vocab_size)
    return [GrammarLogitsProcessor(grammar, prompt_length, config.num_beams or 1, config.num_beam_groups or 1)]


def _warpers(config: GenerationConfig, eos: Tensor | None) -> list[ProcessorLike]:
    """What shapes the distribution before a draw."""
    keep = 1
    if config.num_beams is not None and config.num_beams > 1:
        # Beams need a token besides every eos to go on with.
        keep = 2 if eos is None else eos.shape[0] + 1
    found: list[ProcessorLike] = []
    if config.temperature is not None and config.temperature != 1.0:
        found.append(TemperatureLogitsWarper(config.temperature))
    if config.top_h is not None:
        found.append(TopHLogitsWarper(config.top_h))
    top_k = config.top_k or None
    top_p = config.top_p if config.top_p is not None and config.top_p < 1.0 else None
    if top_k is not None and top_p is not None:
        found.append(TopKTopPLogitsWarper(top_k, top_p, min_tokens_to_keep=keep))
    elif top_k is not None:
        found.append(TopKLogitsWarper(top_k, min_tokens_to_keep=keep))
    elif top_p is not None:
        found.append(TopPLogitsWarper(top_p, min_tokens_to_keep=keep))
    if config.min_p is not None:
        found.append(MinPLogitsWarper(config.min_p, min_tokens_to_keep=keep))
    if config.typical_p is not None and config.typical_p < 1.0:
        found.append(TypicalLogitsWarper(config.typical_p, min_tokens_to_keep=keep))
    if config.epsilon_cutoff is not None and 0.0 < config.epsilon_cutoff < 1.0:
        found.append(EpsilonLogitsWarper(config.epsilon_cutoff, min_tokens_to_keep=keep))
    if config.eta_cutoff is not None and 0.0 < config.eta_cutoff < 1.0:
        found.append(EtaLogitsWarper(config.eta_cutoff, min_tokens_to_keep=keep))
    return found


def _merge(configured: LogitsProcessorList, custom: Sequence[ProcessorLike]) -> LogitsProcessorList:
    """Configured processors, each replaced by the caller's of its kind; then the caller's others."""
    merged = LogitsProcessorList()
    for processor in configured:
        own = next((candidate for candidate in custom if _same_kind(candidate, processor)), None)
        if own is not None:
            logger.warning(
                "The given %s replaces the one that the generation settings ask for.", type(processor).__name__
            )
        merged.append(processor if own is None else own)
    merged += [candidate for candidate in custom if all(candidate is not present for present in merged)]
    return merged


def _same_kind(candidate: object, processor: object) -> bool:
    """The same class, or transformers' class of the same name."""
    given, ours = type(candidate), type(processor)
    return given is ours or (given.__name__ == ours.__name__ and given.__module__.startswith("transformers."))


def _warn_no_source(name: str) -> None:
    warn_once(f"`{name}` needs the tokens of an encoder's input, and there are none; it is ignored.")


def _warn_no_prompt(name: str, prompt_length: int) -> None:
    if prompt_length == 0:
        warn_once(f"`{name}` sees new tokens only: the prompt was given as embeddings, without `input_ids`.")
