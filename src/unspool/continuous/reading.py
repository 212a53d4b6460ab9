"""From the arguments of a request to what it asks for, settled and checked before it is queued."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence as Items
from copy import copy
from dataclasses import dataclass
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from unspool.config import GenerationConfig, GenerationMode, Resolved, effective_lengths, resolve
from unspool.config.fields import FIELDS
from unspool.config.mode import mode_of
from unspool.config.ranges import Check, check_number
from unspool.config.resolve import as_generation_config
from unspool.config.unknown import no_use_for
from unspool.continuous.requests import Wishes
from unspool.decode.choose.sample import key
from unspool.decode.runner import Decoder
from unspool.errors import Unsupported
from unspool.logits import as_columns, build_processors
from unspool.models.base import Model
from unspool.stopping import build_limits

__all__ = ["BEAMS", "Arguments", "Reader", "merged_config"]

_MOST_SAMPLES = 1024

BEAMS = frozenset(
    (
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
        GenerationMode.GROUP_BEAM_SEARCH,
        GenerationMode.CONSTRAINED_BEAM_SEARCH,
    )
)
_MODES = BEAMS | {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION}


@dataclass(slots=True)
class Arguments:
    """What `ContinuousBatchingManager.add_request` takes besides the prompt and settings; documented there."""

    generation_config: GenerationConfig | Mapping[str, Any] | None = None
    streaming: bool = False
    record_timestamps: bool = False
    logits_processor: Items[Any] | None = None
    stopping_criteria: Items[Any] | None = None
    prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None
    streamer: Any = None
    tokenizer: Any = None
    priority: int = 0
    deadline: float | None = None
    cache_salt: Hashable = None
    adapter_name: str | None = None
    assistant_model: Any = None
    return_logprobs: bool | None = None
    top_logprobs: int | None = None


class Reader:
    """Reads requests for one model.

    Args:
        model: what will compute them.
        base: settings of requests that bring none of their own.
        seed: makes requests without a seed repeatable, in the order of their arrival; `None` draws their seeds from
            torch's global generator.
        return_logprobs: for requests that do not say.
    """

    def __init__(self, model: Decoder, base: GenerationConfig, *, seed: int | None, return_logprobs: bool) -> None:
        self._model = model
        self._base = base
        self._seed = seed
        self._return_logprobs = return_logprobs

    def prompt(self, input_ids: Any) -> list[int]:
        """A prompt as a list of ids.

        Raises:
            TypeError: it is no list or tensor of integers.
            ValueError: it is empty, has several rows, or an id is outside the vocabulary.
        """
        ids = input_ids.tolist() if hasattr(input_ids, "tolist") else input_ids
        if isinstance(ids, list | tuple) and len(ids) == 1 and isinstance(ids[0], list):
            ids = ids[0]
        if not isinstance(ids, list | tuple):
            raise TypeError(f"input_ids must be a list of token ids, not {type(input_ids).__name__}; encode the text")
        if not ids:
            raise ValueError("input_ids is empty; a request needs at least one token to continue")
        if wrong := next((one for one in ids if not isinstance(one, int) or isinstance(one, bool)), None):
            several = "; add one request for each row" if isinstance(wrong, list) else ""
            raise TypeError(f"input_ids must hold integer token ids, not {wrong!r}{several}")
        prompt = list(ids)
        self._model.spec.check_tokens("input_ids", prompt)
        return prompt

    def wishes(self, prompt: list[int], number: int, arguments: Arguments, settings: Mapping[str, Any]) -> list[Wishes]:
        """What a request asks for, once for each of its `num_return_sequences` outputs.

        Args:
            prompt: its tokens.
            number: place in the order of arrival.
            settings: fields of `GenerationConfig`, which override those of `arguments.generation_config`.

        Raises:
            ValueError, TypeError: a setting that cannot be right.
            Unsupported: a mode this version does not have here.
        """
        resolved = resolve(settings, arguments.generation_config, self._base)
        if resolved.unused:
            raise ValueError(no_use_for("the request", resolved.unused))
        _check_arguments(arguments)
        config = resolved.config
        mode = mode_of(config, assisted=arguments.assistant_model is not None)
        self._check_mode(mode, config, arguments)
        self._set_lengths(resolved, len(prompt))
        samples = 1 if mode in BEAMS else int(config.num_return_sequences or 1)
        check_number("num_return_sequences", samples, Check(int, 1, _MOST_SAMPLES))
        if arguments.streamer is not None and int(config.num_return_sequences or 1) > 1:
            raise ValueError(
                f"streamer follows one output and there are {config.num_return_sequences}; read them with streaming"
            )
        seed = self._seed_of(config, number)
        end = None if arguments.deadline is None else monotonic() + arguments.deadline
        return [self._one(prompt, config, mode, arguments, seed, sample, end) for sample in range(samples)]

    def _check_mode(self, mode: GenerationMode, config: GenerationConfig, arguments: Arguments) -> None:
        if mode not in _MODES or config.guidance_scale not in (None, 1) or config.token_healing:
            asked = mode.value if mode not in _MODES else "token_healing" if config.token_healing else "guidance_scale"
            raise Unsupported(f"{asked} is not supported in continuous batching in this version; use generate()")
        if mode in BEAMS and arguments.top_logprobs is not None:
            raise Unsupported(f"top_logprobs are not kept in {mode.value}; leave them out")
        if arguments.assistant_model is not None:
            check_assistant(arguments.assistant_model, self._model)

    def _one(
        self,
        prompt: list[int],
        config: GenerationConfig,
        mode: GenerationMode,
        arguments: Arguments,
        seed: int,
        sample: int,
        deadline: float | None,
    ) -> Wishes:
        """Each output has processors and criteria of its own, since some remember what they saw."""
        model = self._model
        eos = config.eos_token_id
        ends = [] if eos is None else [int(one) for one in eos] if isinstance(eos, list | tuple) else [int(eos)]
        processors = build_processors(
            config,
            prompt_length=len(prompt),
            eos_token_id=torch.tensor(ends, device=model.device) if ends else None,
            device=model.device,
            custom=arguments.logits_processor,
            prefix_allowed_tokens_fn=arguments.prefix_allowed_tokens_fn,
            encoder_input_ids=torch.tensor([prompt], device=model.device),
            tokenizer=arguments.tokenizer,
            vocab_size=model.spec.vocab_size,
        )
        limits = build_limits(
            config,
            eos=ends,
            max_positions=model.spec.max_positions,
            custom=arguments.stopping_criteria,
            tokenizer=arguments.tokenizer,
        )
        names = None if arguments.adapter_name is None else [arguments.adapter_name]
        (adapter,) = model.adapters.choose(names, 1)
        told = self._return_logprobs if arguments.return_logprobs is None else arguments.return_logprobs
        return Wishes(
            config=config,
            mode=mode,
            assistant=arguments.assistant_model,
            limits=limits,
            processors=processors,
            columns=as_columns(processors),
            seed=seed,
            sample=sample,
            key=(arguments.cache_salt, adapter),
            adapter=adapter,
            priority=arguments.priority,
            deadline=deadline,
            streaming=arguments.streaming,
            record_timestamps=arguments.record_timestamps,
            streamer=arguments.streamer,
            top_logprobs=arguments.top_logprobs if arguments.top_logprobs is not None else 0 if told else None,
        )

    def _set_lengths(self, resolved: Resolved, columns: int) -> None:
        spec = self._model.spec
        lengths = effective_lengths(
            resolved,
            columns,
            max_positions=spec.max_positions,
            beyond="refuse" if spec.hard_limit else "allow" if spec.needs_extents else "warn",
        )
        resolved.config.max_length, resolved.config.min_length = lengths.max_length, lengths.min_length

    def _seed_of(self, config: GenerationConfig, number: int) -> int:
        if config.seed is not None:
            return int(config.seed)
        if not config.do_sample:
            return 0
        if self._seed is not None:
            return key(self._seed, number, 0)
        return int(torch.randint(2**62, (1,)))


def check_assistant(assistant: Any, model: Decoder) -> None:
    """Raise TypeError or ValueError unless `assistant` can draft for `model`."""
    if not isinstance(assistant, Model):
        raise TypeError(f"assistant_model must be a native model (see unspool.load), not {type(assistant).__name__}")
    if assistant.spec.vocab_size != model.spec.vocab_size:
        raise ValueError(
            f"assistant_model has a vocabulary of {assistant.spec.vocab_size} and the model one of "
            f"{model.spec.vocab_size}; they must share a tokenizer"
        )


def _check_arguments(arguments: Arguments) -> None:
    check_number("priority", arguments.priority, Check(int))
    if arguments.deadline is not None:
        check_number("deadline", arguments.deadline, Check(float, 0, open_low=True))
    if arguments.top_logprobs is not None:
        check_number("top_logprobs", arguments.top_logprobs, Check(int, 0, 1000))
    try:
        hash(arguments.cache_salt)
    except TypeError:
        raise TypeError(f"cache_salt must be hashable, e.g. a text, not {arguments.cache_salt!r}") from None
    streamer = arguments.streamer
    if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        raise TypeError(f"streamer must have put() and end(), which {type(streamer).__name__} has not")


def merged_config(passed: Any, model: Any) -> GenerationConfig:
    """A manager's settings: those of `passed`, and the model's where it leaves them open. Neither is changed."""
    own = as_generation_config("generation_config", passed)
    merged = copy(as_generation_config("the model's generation_config", model)) or GenerationConfig()
    if own is not None:
        for name in FIELDS:
            if getattr(own, name) is not None:
                setattr(merged, name, getattr(own, name))
    return merged
