"""`generate_batch` and its kin: the methods that a model gets."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence as Items
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

from unspool.config import ContinuousBatchingConfig, GenerationConfig, resolve
from unspool.config.unknown import no_use_for
from unspool.continuous.manager import ContinuousBatchingManager
from unspool.continuous.reading import Arguments, merged_config
from unspool.continuous.requests import GenerationOutput
from unspool.decode.opened import Opener
from unspool.decode.runner import Decoder
from unspool.models.base import Model

__all__ = ["ContinuousMixin"]


class ContinuousMixin:
    """Gives a native model, or a wrapped module, its methods for continuous batching; see `unspool.load`.

    Source: `ContinuousMixin` of transformers v5.2; arguments of later versions are taken too.
    """

    generation_config: GenerationConfig

    def generate_batch(
        self,
        inputs: Items[Any],
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        num_q_padding_intervals: int = 0,
        num_kv_padding_intervals: int = 0,
        allow_block_sharing: bool = True,
        record_timestamps: bool = False,
        progress_bar: bool = True,
        *,
        attention_mask: Any = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        persistent_manager: bool = False,
        warmup: bool = True,
        **kwargs: Any,
    ) -> dict[str, GenerationOutput]:
        """Continue many prompts, as many at a time as there is room for, each until its own end.

        Args:
            inputs: prompts, a list of token ids each; or a dict of what `add_request` takes, for settings of its own
                or what a module of transformers is told besides (`{"input_ids": ids, "pixel_values": pixels}`).
            generation_config: settings of all of them; what it leaves open is the model's.
            num_q_padding_intervals, num_kv_padding_intervals: accepted for compatibility; nothing is padded.
            allow_block_sharing: share what is stored of equal beginnings.
            record_timestamps: note when each token was made.
            progress_bar: show progress, where stderr is a terminal.
            attention_mask: 1 for a prompt's tokens and 0 for what it was padded with, which is left out; `inputs` are
                then all tokens, as a tokenizer gives both.
            continuous_batching_config: sizes, limits and the scheduler.
            persistent_manager, warmup: accepted for compatibility; nothing is kept on the model or needs to be.
            kwargs: fields of `GenerationConfig`, and arguments of `ContinuousBatchingManager.add_request`.

        Returns:
            An output for each prompt by its id, in order; with `num_return_sequences=n`, n of them side by side, the
            others under `id__child#0` and so on. One that cannot be right or failed has `error`, `exception` and a
            `finish_reason`; it does not disturb the others.

        Raises:
            ValueError, TypeError: the settings of all are wrong.
            OutOfMemory: no room for keys and values.
        """
        inputs = _prompts(inputs)
        if attention_mask is not None:
            inputs = _without_padding(inputs, attention_mask)
        if not inputs:
            return {}
        arguments = {field.name for field in fields(Arguments)}
        known = resolve({name: value for name, value in kwargs.items() if name not in arguments}, None)
        if known.unused and self._served()[1] is None:
            raise ValueError(no_use_for("generate_batch()", known.unused))
        manager = self.init_continuous_batching(
            generation_config,
            allow_block_sharing=allow_block_sharing,
            continuous_batching_config=continuous_batching_config,
            wanted=self._wanted(inputs, generation_config, kwargs),
        )
        try:
            names = manager.add_requests(inputs, record_timestamps=record_timestamps, **kwargs)
            return _collect(manager, names, progress_bar)
        finally:
            manager.stop(hard_stop=True)

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        manual_eviction: bool = False,
        max_queue_size: int = 0,
        num_q_padding_intervals: int = 0,
        num_kv_padding_intervals: int = 0,
        allow_block_sharing: bool = True,
        *,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        tokenizer: Any = None,
        workload_hints: Any = None,
        wanted: int | None = None,
    ) -> ContinuousBatchingManager:
        """A manager, which is not started yet.

        Args:
            generation_config: settings of requests that bring none of their own.
            manual_eviction: see `ContinuousBatchingManager`.
            max_queue_size: most waiting requests; 0 for no limit.
            num_q_padding_intervals, num_kv_padding_intervals: accepted for compatibility; nothing is padded.
            allow_block_sharing: share what is stored of equal beginnings.
            continuous_batching_config: sizes, limits and the scheduler; the arguments before it are put on top.
            tokenizer: for stop strings of requests.
            workload_hints: accepted for compatibility.
            wanted: tokens of keys and values that are known to be enough.

        Raises:
            ValueError, TypeError: a setting is wrong.
            OutOfMemory: no room for keys and values.
        """
        given = continuous_batching_config
        if given is None and generation_config is not None:
            given = getattr(generation_config, "continuous_batching_config", None)
        values = _values(given)
        values["allow_block_sharing"] = allow_block_sharing and values.get("allow_block_sharing", True)
        if max_queue_size:
            values["max_queue_size"] = max_queue_size
        return ContinuousBatchingManager(
            self,
            generation_config,
            ContinuousBatchingConfig.from_dict(values),
            tokenizer=tokenizer,
            manual_eviction=manual_eviction,
            wanted=wanted,
        )

    def destroy_cached_continuous_batching_manager(self) -> None:
        """For compatibility: no manager is kept on a model, so there is none to destroy."""

    @contextmanager
    def continuous_batching_context_manager(
        self,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        block: bool = True,
        timeout: float | None = None,
        **kwargs: Any,
    ) -> Iterator[ContinuousBatchingManager]:
        """A started manager, which is stopped at the end of the context.

        Args:
            generation_config: settings of requests that bring none of their own.
            block, timeout: of the `stop` at the end.
            kwargs: see `init_continuous_batching`; `persistent_manager`, `warmup`, `num_q_cuda_graphs` and
                `num_kv_cuda_graphs` are accepted for compatibility.
        """
        for name in ("persistent_manager", "warmup", "num_q_cuda_graphs", "num_kv_cuda_graphs"):
            kwargs.pop(name, None)
        manager = self.init_continuous_batching(generation_config, **kwargs)
        manager.start()
        try:
            yield manager
        finally:
            manager.stop(block=block, timeout=timeout)

    def _served(self) -> tuple[Decoder | Opener, Opener | None]:
        """What computes for a manager, and what does where a request is told more than tokens, if anything can."""
        assert isinstance(self, Model), "ContinuousMixin goes in front of a native model"
        return self, None

    def _wanted(self, inputs: Items[Any], passed: Any, settings: Mapping[str, Any]) -> int | None:
        """Tokens that the prompts can grow to, all together; `None` where that cannot be told."""
        config = resolve(settings, merged_config(passed, getattr(self, "generation_config", None))).config
        if any(isinstance(prompt, Mapping) for prompt in inputs):
            return None
        if config.max_new_tokens is None and not all(hasattr(prompt, "__len__") for prompt in inputs):
            return None
        lengths = [len(prompt) for prompt in inputs if hasattr(prompt, "__len__")]
        if config.max_new_tokens is not None:
            total = sum(lengths) + len(lengths) * config.max_new_tokens
        else:
            total = sum(max(length + 20, config.max_length or 0) for length in lengths)
        return total * int(config.num_return_sequences or 1)


def _prompts(inputs: Any) -> list[Any]:
    """A call's prompts as a list, also of a tensor `[prompts, columns]`."""
    if isinstance(inputs, Mapping):
        raise TypeError(
            f"inputs must be a list of prompts, not {type(inputs).__name__}; pass tokenizer(texts).input_ids, or write "
            "[prompt] for one that is a dict"
        )
    every = inputs.tolist() if hasattr(inputs, "tolist") else inputs
    if not isinstance(every, list | tuple):
        raise TypeError(
            f"inputs must be a list of prompts, each a list of token ids, not {type(inputs).__name__}; "
            "pass tokenizer(texts).input_ids"
        )
    if every and all(isinstance(prompt, str) for prompt in every):
        raise TypeError("inputs must hold token ids, not texts; pass tokenizer(texts).input_ids")
    if every and isinstance(every[0], int):
        raise TypeError("inputs must be a list of prompts, each a list of token ids; write [prompt] for one")
    return list(every)


def _without_padding(prompts: list[Any], mask: Any) -> list[list[int]]:
    """The tokens of prompts at which their mask is not 0."""
    marks = mask.tolist() if hasattr(mask, "tolist") else mask
    rows = [prompt.tolist() if hasattr(prompt, "tolist") else prompt for prompt in prompts]
    try:
        if any(isinstance(row, Mapping) for row in rows):
            raise ValueError
        return [[t for t, m in zip(row, one, strict=True) if m] for row, one in zip(rows, marks, strict=True)]
    except (TypeError, ValueError):
        raise ValueError(
            "attention_mask must have a 0 or 1 for each token of inputs; prompts that are dicts have their own"
        ) from None


def _values(config: Any) -> dict[str, Any]:
    """The settings of a `ContinuousBatchingConfig`, ours or transformers', or of a dict."""
    if config is None:
        return {}
    if isinstance(config, Mapping):
        return dict(config)
    if not hasattr(config, "to_dict") and is_dataclass(config) and not isinstance(config, type):
        return {one.name: getattr(config, one.name) for one in fields(config)}
    if not hasattr(config, "to_dict"):
        raise TypeError(
            f"continuous_batching_config must be a ContinuousBatchingConfig or a dict, not {type(config).__name__}"
        )
    return dict(config.to_dict())


def _collect(manager: ContinuousBatchingManager, names: list[str], progress_bar: bool) -> dict[str, GenerationOutput]:
    """Step until everything is answered, and give the answers in order."""
    answers: dict[str, list[GenerationOutput]] = {name: [] for name in names}
    with _progress(len(names)) if progress_bar and sys.stderr.isatty() else nullcontext(lambda: None) as advance:
        more = True
        while more:
            more = manager.step()
            while (output := manager.get_result(timeout=0)) is not None:
                answers[output.request_id.partition("__child#")[0]].append(output)
                advance()
    return {
        output.request_id: output
        for name in names
        for output in sorted(answers[name], key=lambda one: (len(one.request_id), one.request_id))
    }


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar on stderr, and what moves it by one."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("generating", total=total)
        yield lambda: progress.advance(task)
