"""The arguments of a call that are objects of the caller's, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence as Items
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unspool.config import GenerationMode, Resolved
from unspool.config.mode import mode_of
from unspool.config.notice import warn_once

__all__ = ["Given", "PrefixFn", "mention_idle_drafting", "refuse_twice"]

PrefixFn = Callable[[int, Tensor], list[int]]


@dataclass(slots=True)
class Given:
    """See `GenerationMixin.generate`.

    Raises:
        TypeError: one of them cannot be called as it will be.
    """

    logits_processor: Items[Any] | None
    stopping_criteria: Items[Any] | None
    prefix_allowed_tokens_fn: PrefixFn | None
    assistant: Any
    streamer: Any
    negative_ids: Tensor | None
    negative_mask: Tensor | None

    def __post_init__(self) -> None:
        self.logits_processor = _listed("logits_processor", self.logits_processor, "processor(input_ids, scores)")
        self.stopping_criteria = _listed("stopping_criteria", self.stopping_criteria, "criterion(input_ids, scores)")
        function = self.prefix_allowed_tokens_fn
        if function is not None and not callable(function):
            raise TypeError(
                f"prefix_allowed_tokens_fn must be a function (row, tokens so far) -> allowed ids, not {function!r}"
            )
        streamer = self.streamer
        fits = not isinstance(streamer, type) and all(callable(getattr(streamer, n, None)) for n in ("put", "end"))
        if streamer is not None and not fits:
            hint = "; make an object of it" if isinstance(streamer, type) else ""
            raise TypeError(f"streamer must have the methods put(tokens) and end(), which {streamer!r} has not{hint}")


def _listed(name: str, value: Any, kind: str) -> list[Any] | None:
    """Callables as a list, whatever they come in: an iterator gives them only once."""
    if value is None:
        return None
    if not isinstance(value, Iterable):
        hint = f"; pass {name}=[...] with it inside" if callable(value) else ""
        raise TypeError(f"{name} must be a list of callables {kind}, not {value!r}{hint}")
    every = list(value)
    wrong = next((one for one in every if not callable(one) or isinstance(one, type)), None)
    if wrong is not None:
        hint = "; make an object of it" if isinstance(wrong, type) else ""
        raise TypeError(f"{name} holds {wrong!r}, which cannot be called as {kind}{hint}")
    return every


_MAKES: dict[str, tuple[str, ...]] = {
    "ConfidenceCriteria": ("assistant_confidence_threshold",),
    "EncoderNoRepeatNGramLogitsProcessor": ("encoder_no_repeat_ngram_size",),
    "EncoderRepetitionPenaltyLogitsProcessor": ("encoder_repetition_penalty",),
    "EosTokenCriteria": ("eos_token_id",),
    "EpsilonLogitsWarper": ("epsilon_cutoff",),
    "EtaLogitsWarper": ("eta_cutoff",),
    "ExponentialDecayLengthPenalty": ("exponential_decay_length_penalty",),
    "ForcedBOSTokenLogitsProcessor": ("forced_bos_token_id",),
    "ForcedEOSTokenLogitsProcessor": ("forced_eos_token_id",),
    "HammingDiversityLogitsProcessor": ("diversity_penalty",),
    "InfNanRemoveLogitsProcessor": ("remove_invalid_values",),
    "LogitNormalization": ("renormalize_logits",),
    "MaxLengthCriteria": ("max_new_tokens", "max_length"),
    "MaxTimeCriteria": ("max_time",),
    "MinLengthLogitsProcessor": ("min_length",),
    "MinNewTokensLengthLogitsProcessor": ("min_new_tokens",),
    "MinPLogitsWarper": ("min_p",),
    "NoBadWordsLogitsProcessor": ("bad_words_ids",),
    "NoRepeatNGramLogitsProcessor": ("no_repeat_ngram_size",),
    "PrefixConstrainedLogitsProcessor": ("prefix_allowed_tokens_fn",),
    "RepetitionPenaltyLogitsProcessor": ("repetition_penalty",),
    "SequenceBiasLogitsProcessor": ("sequence_bias",),
    "StopStringCriteria": ("stop_strings",),
    "SuppressTokensAtBeginLogitsProcessor": ("begin_suppress_tokens",),
    "SuppressTokensLogitsProcessor": ("suppress_tokens",),
    "TemperatureLogitsWarper": ("temperature",),
    "TopHLogitsWarper": ("top_h",),
    "TopKLogitsWarper": ("top_k",),
    "TopPLogitsWarper": ("top_p",),
    "TypicalLogitsWarper": ("typical_p",),
}
"""Classes of processors and criteria, ours or transformers', and the settings that make one."""


_NEUTRAL = {
    **dict.fromkeys(("encoder_repetition_penalty", "repetition_penalty", "temperature", "top_p", "typical_p"), 1.0),
    **dict.fromkeys(("min_length", "min_new_tokens", "no_repeat_ngram_size", "top_k"), 0),
}
"""Values with which a setting makes none."""


def refuse_twice(given: Given, resolved: Resolved) -> None:
    """Raise `ValueError` for a processor or criterion that a setting of the caller's asks for too.

    One of a kind that only the model's own settings ask for takes its place.
    """
    for argument in ("logits_processor", "stopping_criteria"):
        for one in getattr(given, argument) or ():
            kind = type(one)
            if not kind.__module__.startswith(("unspool.", "transformers.")):
                continue
            for name in _MAKES.get(kind.__name__, ()):
                value: Any = getattr(resolved.config, name) if resolved.caller_set(name) else None
                if name == "prefix_allowed_tokens_fn":
                    value = given.prefix_allowed_tokens_fn
                if value is not None and value is not False and value != _NEUTRAL.get(name):
                    raise ValueError(
                        f"{name}={value!r} asks for what the {kind.__name__} in {argument} does; leave one of them out"
                    )


_DRAFTING = (
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold",
    "max_matching_ngram_size",
    "assistant_lookbehind",
    "target_lookbehind",
    "assistant_ensemble_weight",
)


def mention_idle_drafting(given: Given, resolved: Resolved) -> None:
    """Remark on settings of drafts in a call without any."""
    config = resolved.config
    if config.is_assistant or mode_of(config, given.assistant is not None) is GenerationMode.ASSISTED_GENERATION:
        return
    for name in _DRAFTING:
        if resolved.caller_set(name):
            warn_once(
                f"{name} has no effect without drafts, which come with assistant_model, prompt_lookup_num_tokens or "
                "assistant_early_exit"
            )
