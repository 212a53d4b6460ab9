"""What makes a generation configuration wrong, and what merely has no effect.

Wrong values raise; settings without effect are remarks (`idle_settings`), made once and only about what the caller set.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from unspool.config.notice import warn_once
from unspool.config.ranges import Check, check_number
from unspool.config.structured import check_structured

if TYPE_CHECKING:
    from unspool.config.fields import GenerationFields

__all__ = ["CACHE_IMPLEMENTATIONS", "RANGES", "STATIC_CACHES", "check_complete", "check_values", "idle_settings"]

STATIC_CACHES = (
    "static",
    "offloaded_static",
    # names of older releases; all mean a static cache
    "sliding_window",
    "hybrid",
    "hybrid_chunked",
    "offloaded_hybrid",
    "offloaded_hybrid_chunked",
)
CACHE_IMPLEMENTATIONS = (*STATIC_CACHES, "dynamic", "offloaded", "quantized", "paged")

RANGES: dict[str, Check] = {
    "max_length": Check(int, 1),
    "max_new_tokens": Check(int, 1),
    "min_length": Check(int, 0),
    "min_new_tokens": Check(int, 0),
    "max_time": Check(float, 0),
    "num_beams": Check(int, 1),
    "num_beam_groups": Check(int, 1),
    "diversity_penalty": Check(float, 0),
    "penalty_alpha": Check(float, 0),
    "seed": Check(int, 0, 2**64 - 1),
    "max_cache_len": Check(int, 1),
    "prefill_chunk_size": Check(int, 1),
    "temperature": Check(float, 0, hint="use do_sample=False for the most likely tokens"),
    "top_k": Check(int, 0, hint="0 switches it off"),
    "top_p": Check(float, 0, 1, hint="1.0 switches it off"),
    "min_p": Check(float, 0, 1),
    "top_h": Check(float, 0, 1, open_low=True),
    "typical_p": Check(float, 0, 1, open_low=True, hint="1.0 switches it off"),
    "epsilon_cutoff": Check(float, 0, 1),
    "eta_cutoff": Check(float, 0, 1),
    "repetition_penalty": Check(float, 0, open_low=True, hint="1.0 switches it off"),
    "encoder_repetition_penalty": Check(float, 0, open_low=True, hint="1.0 switches it off"),
    "length_penalty": Check(float),
    "no_repeat_ngram_size": Check(int, 0),
    "encoder_no_repeat_ngram_size": Check(int, 0),
    "guidance_scale": Check(float),
    "num_return_sequences": Check(int, 1),
    "output_top_logprobs": Check(int, 1, hint="None switches it off"),
    "pad_token_id": Check(int),
    "bos_token_id": Check(int),
    "forced_bos_token_id": Check(int),
    "num_assistant_tokens": Check(int, 1),
    "assistant_confidence_threshold": Check(float, 0, 1),
    "prompt_lookup_num_tokens": Check(int, 1),
    "max_matching_ngram_size": Check(int, 1),
    "assistant_early_exit": Check(int, 1),
    "assistant_lookbehind": Check(int, 0),
    "target_lookbehind": Check(int, 0),
    "assistant_ensemble_weight": Check(float, 0, 1, open_low=True, open_high=True, hint="None is exact speculation"),
}
"""Every numeric setting."""

_STRICT_ON_LOAD = ("max_new_tokens", "assistant_ensemble_weight")
"""Ranges that no file by transformers breaks, since it refuses them too. The others wait until a file is used."""

_CHOICES: dict[str, tuple[Any, ...]] = {
    "early_stopping": (True, False, "never"),
    "cache_implementation": CACHE_IMPLEMENTATIONS,
}

_BOOLS = (
    "do_sample",
    "use_cache",
    "low_memory",
    "use_mtp",
    "renormalize_logits",
    "remove_invalid_values",
    "token_healing",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "output_logits",
    "return_dict_in_generate",
    "is_assistant",
    "disable_compile",
)

_ID_LISTS = {  # name: whether one id alone is fine too
    "eos_token_id": True,
    "forced_eos_token_id": True,
    "decoder_start_token_id": True,
    "suppress_tokens": False,
    "begin_suppress_tokens": False,
}

_SCHEDULES = ("constant", "heuristic", "heuristic_transient")

_SAMPLING_ONLY: dict[str, Any] = {  # and the value that changes nothing
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "top_k": 50,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}

_BEAMS_ONLY: dict[str, Any] = {"early_stopping": False, "length_penalty": 1.0}

_OUTPUTS = ("output_attentions", "output_hidden_states", "output_scores", "output_logits")

_CALL_ARGUMENTS = (
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)


def check_values(settings: GenerationFields, caller: Collection[str] | None, *, loading: bool = False) -> None:
    """Raise for a value that is wrong whatever the model.

    Args:
        settings: The configuration, resolved or not.
        caller: The fields that the caller set; `None` means all. A sampling setting out of range that the caller did
            not set (a model's file did) is an error only when the call samples.
        loading: The values come from a file that is not used yet: raise only where transformers refuses too, so that
            each of its files loads.

    Raises:
        ValueError: a value is out of range or two contradict each other.
        TypeError: a value has the wrong type.
    """
    for name, check in RANGES.items():
        value = getattr(settings, name)
        if value is None or (loading and name not in _STRICT_ON_LOAD):
            continue
        if name in _SAMPLING_ONLY and settings.do_sample is not True and caller is not None and name not in caller:
            continue
        check_number(name, value, check)
    for name, allowed in _CHOICES.items():
        value = getattr(settings, name)
        if value is not None and value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, not {value!r}")
    if settings.watermarking_config is not None:
        settings.watermarking_config.validate()
    if settings.compile_config is not None:
        settings.compile_config.validate()
    if not loading:
        _check_types(settings)
        if settings.do_sample is True and settings.temperature == 0:
            raise ValueError(
                "temperature must be greater than 0 to sample; use do_sample=False for the likeliest tokens"
            )
    _check_return_sequences(settings)
    _check_forced(settings)
    for name in _CALL_ARGUMENTS:
        if hasattr(settings, name):
            raise ValueError(f"{name} is no setting of GenerationConfig; pass it to generate() itself")


def check_complete(settings: GenerationFields, caller: Collection[str]) -> None:
    """Raise for contradictions that only show once every field has its value.

    Args:
        settings: The resolved configuration.
        caller: The fields that the caller set; a penalty without groups in a model's file is left alone.

    Raises:
        ValueError: beams and groups do not fit, or a strategy lacks what it needs.
    """
    beams, groups = settings.num_beams or 1, settings.num_beam_groups or 1
    constrained = settings.constraints is not None or settings.force_words_ids is not None
    if groups > 1:
        if beams % groups:
            raise ValueError(f"num_beams ({beams}) must be a multiple of num_beam_groups ({groups})")
        if settings.do_sample:
            raise ValueError("num_beam_groups > 1 does not go with do_sample=True; leave one of them out")
        if not settings.diversity_penalty:
            raise ValueError("num_beam_groups > 1 needs a diversity_penalty above 0, else all groups are the same")
    elif settings.diversity_penalty and "diversity_penalty" in caller:
        raise ValueError(
            f"diversity_penalty={settings.diversity_penalty} needs num_beam_groups of at least 2, and num_beams to "
            "divide among them"
        )
    if constrained:
        for name, wrong, wanted in (
            ("num_beams", beams == 1, "at least 2"),
            ("num_beam_groups", groups > 1, "1"),
            ("do_sample", bool(settings.do_sample), "False"),
        ):
            if wrong:
                raise ValueError(f"constraints and force_words_ids need {name} to be {wanted}")
    _check_contrasts(settings, caller)


def _check_contrasts(settings: GenerationFields, caller: Collection[str]) -> None:
    """Contrastive search and DoLa, where the caller asks for them, do not go with other strategies."""
    alpha, layers = settings.penalty_alpha, settings.dola_layers
    others: dict[str, bool] = {
        "num_beams": (settings.num_beams or 1) > 1,
        "constraints": settings.constraints is not None,
        "force_words_ids": settings.force_words_ids is not None,
        "prompt_lookup_num_tokens": settings.prompt_lookup_num_tokens is not None,
        "assistant_early_exit": settings.assistant_early_exit is not None,
        "use_mtp": bool(settings.use_mtp),
    }
    if alpha and "penalty_alpha" in caller:
        for name, wrong in (*others.items(), ("do_sample", bool(settings.do_sample)), ("dola_layers", bool(layers))):
            if wrong:
                raise ValueError(
                    f"penalty_alpha={alpha} (contrastive search) does not go with {name}={getattr(settings, name)!r}; "
                    "leave one of them out"
                )
        if (settings.top_k or 0) < 2:
            raise ValueError(
                f"penalty_alpha={alpha} (contrastive search) chooses among top_k candidates and top_k is "
                f"{settings.top_k}; it must be at least 2"
            )
    if layers is not None and "dola_layers" in caller:
        contrastive = bool(alpha) and (settings.top_k or 0) > 1 and not settings.do_sample
        for name, wrong in (*others.items(), ("penalty_alpha", contrastive)):
            if wrong:
                raise ValueError(
                    f"dola_layers={layers!r} does not go with {name}={getattr(settings, name)!r}; leave one of them out"
                )
        if settings.repetition_penalty is None or settings.repetition_penalty < 1.2:
            warn_once("dola_layers tends to repeat; a repetition_penalty of at least 1.2 is advised")


def idle_settings(settings: GenerationFields, caller: Collection[str] | None, *, strict: bool) -> dict[str, str]:
    """Settings that have no effect, each with a sentence that says why.

    The sentences name no values, so that a server with many requests says each only once.

    Args:
        settings: The configuration.
        caller: The fields to look at; `None` for all.
        strict: Count an unset `do_sample`, `num_beams` or `return_dict_in_generate` as off. Without it only a field
            that really is off counts, since an unset one may still be filled from the model's file.
    """
    found = {
        **_idle_sampling(settings, strict),
        **_idle_beams(settings, strict),
        **_idle_cache(settings, strict),
        **_idle_outputs(settings, strict),
    }
    if settings.pad_token_id is not None and settings.pad_token_id < 0:
        found["pad_token_id"] = "pad_token_id is negative, so rows cannot be padded with it"
    return {name: text for name, text in found.items() if caller is None or name in caller}


def _idle_sampling(settings: GenerationFields, strict: bool) -> dict[str, str]:
    off = settings.do_sample is not True if strict else settings.do_sample is False
    if not off:
        return {}
    contrastive = bool(settings.penalty_alpha)
    return {
        name: f"{name} has no effect without do_sample=True"
        for name, neutral in _SAMPLING_ONLY.items()
        if getattr(settings, name) not in (None, neutral)
        and not (name == "top_k" and contrastive)
        # temperature=0 is how many ask for greedy decoding, which is what they get
        and not (name == "temperature" and settings.temperature == 0 and not strict)
    }


def _idle_beams(settings: GenerationFields, strict: bool) -> dict[str, str]:
    off = (settings.num_beams or 1) == 1 if strict else settings.num_beams == 1
    return {
        name: f"{name} has no effect with num_beams=1"
        for name, neutral in _BEAMS_ONLY.items()
        if off and getattr(settings, name) not in (None, neutral)
    }


def _idle_cache(settings: GenerationFields, strict: bool) -> dict[str, str]:
    found = {
        name: f"{name} has no effect with use_cache=False"
        for name in ("cache_implementation", "cache_config")
        if settings.use_cache is False and getattr(settings, name) is not None
    }
    if settings.cache_config and settings.cache_implementation != "quantized" and not strict:
        found["cache_config"] = "cache_config has no effect without cache_implementation='quantized'"
    if settings.compile_config is not None and not strict:
        found["compile_config"] = "compile_config has no effect: nothing is compiled in a call"
    if settings.max_cache_len is not None and settings.cache_implementation not in STATIC_CACHES and not strict:
        found["max_cache_len"] = "max_cache_len has no effect without a static cache"
    return found


def _idle_outputs(settings: GenerationFields, strict: bool) -> dict[str, str]:
    off = settings.return_dict_in_generate is not True if strict else settings.return_dict_in_generate is False
    return {
        name: f"{name} has no effect without return_dict_in_generate=True"
        for name in (*_OUTPUTS, "output_top_logprobs")
        if off and getattr(settings, name)
    }


def _check_types(settings: GenerationFields) -> None:
    for name in _BOOLS:
        value = getattr(settings, name)
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"{name} must be True, False or None, not {value!r}")
    for name, one_is_fine in _ID_LISTS.items():
        value = getattr(settings, name)
        many = value if isinstance(value, list | tuple) else [value] if one_is_fine else [None]
        if value is not None and not all(isinstance(item, int) and not isinstance(item, bool) for item in many):
            raise TypeError(f"{name} must be {'an int or ' if one_is_fine else ''}a list of ints, not {value!r}")
    stops = settings.stop_strings
    texts = [stops] if isinstance(stops, str) else stops
    if texts is not None and not (isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts)):
        raise TypeError(f"stop_strings must be a str or a list of them, not {stops!r}")
    if texts is not None and "" in texts:
        raise ValueError("stop_strings must not contain an empty text, which would stop at once")
    layers = settings.dola_layers
    some = isinstance(layers, list | tuple) and layers and all(type(one) is int and one >= 0 for one in layers)
    if layers is not None and layers not in ("low", "high") and not some:
        raise ValueError(f'dola_layers must be "low", "high" or a list of layer numbers from 0 on, not {layers!r}')
    schedule = settings.num_assistant_tokens_schedule
    if schedule is not None and schedule not in _SCHEDULES:
        raise ValueError(f"num_assistant_tokens_schedule must be one of {_SCHEDULES}, not {schedule!r}")
    check_structured(settings)


def _check_return_sequences(settings: GenerationFields) -> None:
    asked, beams = settings.num_return_sequences or 1, settings.num_beams or 1
    if asked == 1:
        return
    if beams == 1 and settings.do_sample is not True:
        raise ValueError(
            f"num_return_sequences={asked} needs do_sample=True or num_beams: greedy text is always the same"
        )
    if 1 < beams < asked:
        raise ValueError(f"num_return_sequences ({asked}) must not exceed num_beams ({beams})")


def _check_forced(settings: GenerationFields) -> None:
    suppressed = set(settings.suppress_tokens or ())
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        forced = getattr(settings, name)
        ids = set(forced) if isinstance(forced, list | tuple) else {forced} - {None}
        if ids and ids <= suppressed:
            raise ValueError(
                f"{name}={forced} is also in suppress_tokens, so no token could be chosen; drop one of them"
            )
