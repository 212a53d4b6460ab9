"""From the arguments of a request to what it asks for, settled and checked before it is queued."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping, Sequence as Items
from copy import copy
from dataclasses import dataclass
from itertools import count
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from unspool.config import GenerationConfig, GenerationMode, Resolved, effective_lengths, resolve
from unspool.config.fields import FIELDS
from unspool.config.lengths import end_tokens
from unspool.config.mode import mode_of
from unspool.config.ranges import Check, check_number
from unspool.config.resolve import as_generation_config
from unspool.config.unknown import no_use_for
from unspool.continuous.modes import BEAMS
from unspool.continuous.requests import Wishes
from unspool.decode.choose.noise import key
from unspool.decode.draft.vocabularies import read_tokenizers
from unspool.decode.healing import heal_tokens
from unspool.decode.opened import Opener
from unspool.decode.runner import Decoder, logits_alone
from unspool.errors import Unsupported
from unspool.logits import as_columns, build_processors, is_guided
from unspool.logits.guidance import GuidanceLogitsProcessor
from unspool.models.base import Model
from unspool.stopping import build_limits

__all__ = ["Arguments", "Reader", "merged_config"]

_MOST_SAMPLES = 1024


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
    prompt_logprobs: int | None = None
    negative_prompt_ids: Any = None
    negative_prompt_attention_mask: Any = None
    assistant_tokenizer: Any = None


class Reader:
    """Reads requests for one model.

    Args:
        model: what will compute them.
        opener: what will compute those that are told more than tokens, or `None`.
        base: settings of requests that bring none of their own.
        seed: makes requests without a seed repeatable, in the order of their arrival; `None` draws their seeds from
            torch's global generator.
        return_logprobs: for requests that do not say.
    """

    def __init__(
        self,
        model: Decoder | Opener,
        opener: Opener | None,
        base: GenerationConfig,
        *,
        seed: int | None,
        return_logprobs: bool,
    ) -> None:
        self._model = model
        self._opener = opener
        self._base = base
        self._seed = seed
        self._return_logprobs = return_logprobs
        self._numbers = count()
        self._lock = threading.Lock()

    def _tokens(self, name: str, value: Any) -> list[int]:
        """One row of token ids, checked, as a list."""
        ids = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(ids, list | tuple) and len(ids) == 1 and isinstance(ids[0], list):
            ids = ids[0]
        if not isinstance(ids, list | tuple):
            raise TypeError(f"{name} must be a list of token ids, not {type(value).__name__}; encode the text")
        if not ids:
            raise ValueError(f"{name} is empty; a request needs at least one token to continue")
        if wrong := next((one for one in ids if not isinstance(one, int) or isinstance(one, bool)), None):
            several = "; add one request for each row" if isinstance(wrong, list) else ""
            raise TypeError(f"{name} must hold integer token ids, not {wrong!r}{several}")
        tokens = list(ids)
        self._model.spec.check_tokens(name, tokens)
        return tokens

    def read(self, input_ids: Any, arguments: Arguments, settings: Mapping[str, Any]) -> tuple[int, list[Wishes]]:
        """A request's place in the order of arrival, and what it asks for, once for each of its outputs.

        Beams are one set of rows, whatever the number of their outputs.

        Args:
            input_ids: its prompt.
            settings: fields of `GenerationConfig`, which override those of `arguments.generation_config`, and what a
                module is told beside the tokens.

        Raises:
            ValueError, TypeError: something that cannot be right.
            Unsupported: settings that make no sense here.
        """
        resolved = resolve(settings, arguments.generation_config, self._base)
        ids = self._prompt(input_ids, resolved.unused)
        _check_arguments(arguments)
        config = resolved.config
        mode = mode_of(config, assisted=arguments.assistant_model is not None)
        refuse_settings(config, mode, self._model.device)
        prompt, inputs = self._begin(ids, resolved.unused, config, mode)
        self._set_lengths(resolved, len(prompt))
        samples = 1 if mode in BEAMS else int(config.num_return_sequences or 1)
        check_number("num_return_sequences", samples, Check(int, 1, _MOST_SAMPLES))
        if arguments.streamer is not None and int(config.num_return_sequences or 1) > 1:
            raise ValueError(
                f"streamer follows one output and there are {config.num_return_sequences}; read them with streaming"
            )
        read = _Read(
            config,
            mode,
            self._healed(prompt, config, arguments),
            prompt if ids is None else ids,
            inputs,
            self._negative(prompt, config, arguments),
            self._tokenizers(mode, arguments),
            None if arguments.deadline is None else monotonic() + arguments.deadline,
        )
        with self._lock:  # numbers and seeds in the order of arrival
            number = next(self._numbers)
            seed = self._seed_of(config, number)
        return number, [self._one(read, arguments, seed, sample) for sample in range(samples)]

    def _prompt(self, ids: Any, inputs: dict[str, Any]) -> list[int] | None:
        """The prompt's tokens, without those that its mask leaves out; the mask is taken out of `inputs`.

        `None` where a request has none, and something else in their place.
        """
        if ids is None and self._opener is not None:
            return None
        tokens = self._tokens("input_ids", ids)
        mask = inputs.pop("attention_mask", None)
        if mask is None:
            return tokens
        marks = torch.as_tensor(mask).flatten().tolist()
        if len(marks) != len(tokens) or (inputs and not all(marks)):
            raise ValueError(
                f"attention_mask has {len(marks)} entries, {sum(map(bool, marks))} of them 1, and input_ids "
                f"{len(tokens)} tokens; a request has true tokens only, so leave out its padding"
            )
        return [token for token, mark in zip(tokens, marks, strict=True) if mark]

    def _begin(
        self, ids: list[int] | None, inputs: dict[str, Any], config: GenerationConfig, mode: GenerationMode
    ) -> tuple[list[int], Mapping[str, Any] | None]:
        """What is continued, and what the module is told beside it."""
        opener = self._opener
        if opener is None or (ids is not None and not inputs and opener is not self._model):
            if inputs:
                raise ValueError(no_use_for("the request", inputs))
            assert ids is not None
            return ids, None
        wanted = {
            "guidance_scale": is_guided(config),
            "token_healing": config.token_healing,
            "assistant_model or prompt_lookup_num_tokens": mode is GenerationMode.ASSISTED_GENERATION,
        }
        for what, asked in wanted.items():
            if asked:
                told = f" and {', '.join(sorted(inputs))}" if inputs else ""
                raise Unsupported(
                    f"{what} with {opener.spec.family}{told}, which runs in rows, is for generate() alone"
                )
        return opener.read(ids, inputs, config)

    def _healed(self, prompt: list[int], config: GenerationConfig, arguments: Arguments) -> list[int]:
        """The prompt, with its last token healed where that is asked for."""
        if not config.token_healing:
            return prompt
        model = self._model
        assert not isinstance(model, Opener), "refused before"
        (adapter,) = model.adapters.choose(_names(arguments), 1)

        def next_logits(rows: list[list[int]]) -> Tensor:
            return torch.cat([logits_alone(model, row, adapter) for row in rows])

        (healed,) = heal_tokens(next_logits, [prompt], arguments.tokenizer)
        return healed

    def _negative(self, prompt: list[int], config: GenerationConfig, arguments: Arguments) -> list[int] | None:
        """The negative prompt's tokens, where there is guidance."""
        if not is_guided(config):
            if arguments.negative_prompt_ids is not None:
                raise ValueError("negative_prompt_ids are for guidance, which is off; set guidance_scale too")
            return None
        if arguments.negative_prompt_ids is None:
            return prompt[-1:]
        tokens = self._tokens("negative_prompt_ids", arguments.negative_prompt_ids)
        if arguments.negative_prompt_attention_mask is None:
            return tokens
        mask = torch.as_tensor(arguments.negative_prompt_attention_mask).flatten().tolist()
        if len(mask) != len(tokens):
            raise ValueError(
                f"negative_prompt_attention_mask has {len(mask)} entries and negative_prompt_ids {len(tokens)}; they "
                "must be alike"
            )
        return [token for token, kept in zip(tokens, mask, strict=True) if kept]

    def _tokenizers(self, mode: GenerationMode, arguments: Arguments) -> tuple[Any, Any] | None:
        """The two tokenizers of a request whose draft model has another one than the model."""
        assistant, other = arguments.assistant_model, arguments.assistant_tokenizer
        if assistant is None:
            if other is not None:
                raise ValueError("assistant_tokenizer belongs to an assistant_model, which is missing; pass both")
            return None
        if not isinstance(assistant, Model):
            raise TypeError(
                f"assistant_model must be a native model (see unspool.load), not {type(assistant).__name__}"
            )
        if mode is not GenerationMode.ASSISTED_GENERATION:
            return None
        ours, theirs = self._model.spec.vocab_size, assistant.spec.vocab_size
        found: tuple[Any, Any] | None = read_tokenizers(arguments.tokenizer, other, ours, theirs)
        return found

    def _one(self, read: _Read, arguments: Arguments, seed: int, sample: int) -> Wishes:
        """Each output has processors and criteria of its own, since some remember what they saw."""
        model, config, prompt = self._model, read.config, read.prompt
        ends = end_tokens(config)
        scale = float(config.guidance_scale or 1.0)
        source = read.given if read.inputs is None or "input_ids" in read.inputs else None
        processors = build_processors(
            config,
            prompt_length=len(prompt),
            eos_token_id=torch.tensor(ends, device=model.device) if ends else None,
            device=model.device,
            custom=arguments.logits_processor,
            prefix_allowed_tokens_fn=arguments.prefix_allowed_tokens_fn,
            encoder_input_ids=None if source is None else torch.tensor([source], device=model.device),
            tokenizer=arguments.tokenizer,
            vocab_size=model.spec.vocab_size,
            guidance=None if read.negative is None else GuidanceLogitsProcessor(scale),
        )
        limits = build_limits(
            config,
            eos=ends,
            max_positions=model.spec.max_positions,
            custom=arguments.stopping_criteria,
            tokenizer=arguments.tokenizer,
        )
        (adapter,) = model.adapters.choose(_names(arguments), 1)
        told = self._return_logprobs if arguments.return_logprobs is None else arguments.return_logprobs
        top = config.output_top_logprobs if arguments.top_logprobs is None else arguments.top_logprobs
        return Wishes(
            prompt=prompt,
            config=config,
            mode=read.mode,
            assistant=arguments.assistant_model,
            tokenizers=read.tokenizers,
            negative=read.negative,
            limits=limits,
            processors=processors,
            columns=as_columns(processors),
            seed=seed,
            sample=sample,
            key=(arguments.cache_salt, adapter),
            adapter=adapter,
            priority=arguments.priority,
            deadline=read.deadline,
            streaming=arguments.streaming,
            record_timestamps=arguments.record_timestamps,
            streamer=arguments.streamer,
            top_logprobs=top if top is not None else 0 if told else None,
            prompt_logprobs=arguments.prompt_logprobs,
            inputs=read.inputs,
            given=read.given,
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
        return int(torch.randint(2**62, (1,), device="cpu"))


@dataclass(slots=True)
class _Read:
    """What the outputs of a request have in common; see `Wishes`."""

    config: GenerationConfig
    mode: GenerationMode
    prompt: list[int]
    given: list[int]
    inputs: Mapping[str, Any] | None
    negative: list[int] | None
    tokenizers: tuple[Any, Any] | None
    deadline: float | None


def refuse_settings(config: GenerationConfig, mode: GenerationMode, device: torch.device) -> None:
    """Raise `Unsupported` for settings that make no sense where requests share a step and a store."""
    for name, why in _ALONE.items():
        if getattr(config, name):
            raise Unsupported(f"{name} is for generate() alone: {why}")
    for name in ("use_mtp", "speculation_type"):
        if mode is GenerationMode.ASSISTED_GENERATION and getattr(config, name):
            raise Unsupported(
                f"{name}={getattr(config, name)!r}: drafts here come from an assistant_model, prompt_lookup_num_tokens "
                "or assistant_early_exit; leave it out, or use one of these"
            )
    kind = config.cache_implementation
    if kind == "quantized" or (kind in ("offloaded", "offloaded_static") and device.type != "cpu"):
        raise Unsupported(
            f"cache_implementation={kind!r} cannot be one request's own: all requests share one store; leave it out"
        )


_ALONE = {
    "output_attentions": "kernels that give attention weights would change how every request beside it is computed",
    "output_hidden_states": "what is found stored of a prompt has none; leave it out, or call generate()",
}


def _names(arguments: Arguments) -> list[str] | None:
    return None if arguments.adapter_name is None else [arguments.adapter_name]


def _check_callables(name: str, given: Any) -> None:
    """Raise `TypeError` for what is not a list of things to be called."""
    if given is None:
        return
    if not isinstance(given, list | tuple):
        raise TypeError(f"{name} must be a list of callables, not {given!r}")
    for one in given:
        if not callable(one):
            raise TypeError(f"{name} must hold callables, not {one!r}")


def _check_arguments(arguments: Arguments) -> None:
    check_number("priority", arguments.priority, Check(int))
    if arguments.deadline is not None:
        check_number("deadline", arguments.deadline, Check(float, 0, open_low=True))
    for name in ("top_logprobs", "prompt_logprobs"):
        if (number := getattr(arguments, name)) is not None:
            check_number(name, number, Check(int, 0, 1000))
    for name in ("streaming", "record_timestamps", "return_logprobs"):
        if (value := getattr(arguments, name)) not in (True, False, None):
            raise TypeError(f"{name} must be True or False, not {value!r}")
    try:
        hash(arguments.cache_salt)
    except TypeError:
        raise TypeError(f"cache_salt must be hashable, e.g. a text, not {arguments.cache_salt!r}") from None
    for name in ("logits_processor", "stopping_criteria"):
        _check_callables(name, getattr(arguments, name))
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
