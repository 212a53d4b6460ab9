"""`ContinuousBatchingManager`: requests come at any time, and each gets one result."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator, Callable, Hashable, Iterator, Mapping, Sequence as Items
from contextlib import AbstractContextManager
from itertools import count
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from unspool.config import ContinuousBatchingConfig, GenerationConfig
from unspool.config.ranges import Check, check_number
from unspool.continuous.arrival import check_fits, check_name, states_of
from unspool.continuous.assembly import make_engine
from unspool.continuous.metrics import Metrics
from unspool.continuous.outbox import Outbox
from unspool.continuous.reading import Arguments, Reader, merged_config
from unspool.continuous.requests import GenerationOutput, RequestState, RequestStatus, Usage
from unspool.continuous.view import Watch
from unspool.continuous.worker import Worker
from unspool.decode.opened import Opener
from unspool.decode.runner import Decoder

__all__ = ["ContinuousBatchingManager", "RequestStream"]

logger = logging.getLogger("unspool")


class ContinuousBatchingManager:
    """Generates for requests that come and go, together, each with settings of its own.

        with model.init_continuous_batching() as manager:
            request_id = manager.add_request(tokens, max_new_tokens=50)
            print(manager.get_result(request_id).generated_tokens)

    Every request that got an id gets one final `GenerationOutput`, whatever happens: `finish_reason` is `"stop"`,
    `"length"`, `"cancelled"`, `"deadline"`, `"rejected"` or `"error"`. All methods may be called from any thread.

    Without `start()` (or `with`), nothing runs by itself; call `step()` as often as you like.

    Args:
        model: a native model (see `unspool.load`), or a wrapped module (see `unspool.wrap`). It is left as it is.
        generation_config: settings of requests that bring none of their own; what it leaves open is the model's.
        continuous_batching_config: sizes, limits and the scheduler.
        tokenizer: for stop strings of requests.
        manual_eviction: remember which blocks a request had, so that `evict_request_from_cache` can forget them.
            What is stored of ended requests is kept as long as there is room in any case.
        wanted: tokens of keys and values that are known to be enough, or `None`.

    Raises:
        ValueError, TypeError: a setting is wrong.
        Unsupported: the module generates in a way of its own.
        OutOfMemory: no room for keys and values.

    Source: `ContinuousBatchingManager` of transformers v5.2.
    """

    def __init__(
        self,
        model: Any,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        continuous_batching_config: ContinuousBatchingConfig | None = None,
        *,
        tokenizer: Any = None,
        manual_eviction: bool = False,
        wanted: int | None = None,
    ) -> None:
        if not hasattr(model, "_served"):
            raise TypeError(f"a manager serves models of unspool.load and unspool.wrap, not a {type(model).__name__}")
        config = continuous_batching_config or ContinuousBatchingConfig()
        served, opener = model._served()
        self.model = model
        self.generation_config = merged_config(generation_config, getattr(model, "generation_config", None))
        self.continuous_batching_config = config
        self.manual_eviction = manual_eviction
        self._tokenizer = tokenizer
        self._decoder: Decoder | Opener = served
        self._reader = Reader(
            served, opener, self.generation_config, seed=config.seed, return_logprobs=config.return_logprobs
        )
        self._outbox = Outbox()
        self._ids = count()
        self._engine = make_engine(served, opener, config, self._outbox, wanted)
        self._engine.remembers = manual_eviction
        self._worker = Worker(
            self._engine,
            max_queue_size=config.max_queue_size,
            max_queued_tokens=config.max_queued_tokens,
            watchdog=config.watchdog_timeout,
        )
        # The thread knows the worker and not the manager, so a manager that nobody holds any more ends its thread.
        self._finalizer = weakref.finalize(self, self._worker.abandon)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop(hard_stop=kind is not None)

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.stop, hard_stop=kind is not None)  # other tasks go on until it is done

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Outputs as they come, until every request is answered and the thread has nothing more to give."""
        while self._outbox.live or self.is_running():
            output = self.get_result(timeout=None if self._outbox.live else 0.05)
            if output is not None:
                yield output
            elif not self._outbox.live:
                return
        while (output := self._outbox.take()) is not None:
            yield output

    @property
    def metrics(self) -> Metrics:
        """What it has done, in numbers."""
        return self._worker.metrics()

    def watch(self, every: float = 0.5, *, clear: bool = False) -> Watch:
        """Show `metrics` in the terminal (on stderr) while the returned context is open.

            with manager, manager.watch():
                outputs = list(manager)

        Args:
            every: seconds between two looks.
            clear: take it away at the end instead of leaving the last one.

        Raises:
            ValueError, TypeError: `every` is no number of seconds.
        """
        check_number("every", every, Check(float, 0.05, 3600))
        return Watch(self._worker.metrics, every=every, clear=clear)

    @property
    def fatal_error(self) -> BaseException | None:
        """Why it failed as a whole, or `None`."""
        return self._worker.fatal

    def start(self) -> None:
        """Start the thread that generates; again after `stop`, if need be.

        Raises:
            ManagerStopped: the manager failed, or belongs to another process.
        """
        if self.is_running():
            logger.warning("the manager's thread is running already")
        self._worker.start()

    def is_running(self) -> bool:
        """Whether the thread is alive and well."""
        return self._worker.is_running()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """Take no further requests, and end the thread when those there are have been answered.

        Args:
            block: wait for that.
            timeout: most seconds to wait; the thread goes on ending afterwards.
            keep_for_next_session: accepted for compatibility: a stopped manager can always be started again.
            hard_stop: answer all requests as cancelled, now, with the tokens they have.
        """
        self._worker.stop("abort" if hard_stop else "drain")
        if block:
            self.join(timeout)

    def warmup(self) -> None:
        """For compatibility: what there is to set up is set up when the manager is made, so nothing is left to do."""

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """For compatibility: attention is never switched on the model, so there is nothing to do.

        Args:
            model, auto_switch_to_flash: accepted.
        """

    def destroy(self) -> None:
        """Stop for good, answer all requests as cancelled, and give back the memory of keys and values now.

        Dropping the last reference to a manager does the same.
        """
        self.stop(hard_stop=True)
        self._worker.close()
        self._finalizer.detach()

    def join(self, timeout: float | None = None) -> None:
        """Wait for the thread to end, for at most `timeout` seconds."""
        if not self._worker.join(timeout):
            logger.warning("the manager's thread has not ended within %s seconds", timeout)

    def step(self) -> bool:
        """Without a thread: take one step; `False` when there was nothing to do.

        Raises:
            RuntimeError: the thread takes the steps.
        """
        return self._worker.step()

    def pause(self) -> AbstractContextManager[None]:
        """Hold generation between two steps while the returned context is open; requests may come meanwhile."""
        return self._worker.pause()

    def add_request(
        self,
        input_ids: Any = None,
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        *,
        generation_config: GenerationConfig | Mapping[str, Any] | None = None,
        logits_processor: Items[Any] | None = None,
        stopping_criteria: Items[Any] | None = None,
        prefix_allowed_tokens_fn: Callable[[int, Tensor], list[int]] | None = None,
        streamer: Any = None,
        tokenizer: Any = None,
        priority: int = 0,
        deadline: float | None = None,
        assistant_model: Any = None,
        cache_salt: Hashable = None,
        adapter_name: str | None = None,
        return_logprobs: bool | None = None,
        top_logprobs: int | None = None,
        prompt_logprobs: int | None = None,
        negative_prompt_ids: Any = None,
        negative_prompt_attention_mask: Any = None,
        assistant_tokenizer: Any = None,
        **kwargs: Any,
    ) -> str:
        """Queue a prompt. With `num_return_sequences=n` there are n outputs, the others under `id__child#0` and so on.

        Args:
            input_ids: token ids, a list or a tensor of one row; an `attention_mask` says which of them are padding.
                Modules of transformers may be told something else besides, or instead: `pixel_values`,
                `input_features` and the like by the names that their `generate()` has, with one row each.
            request_id: its name; made up if not given.
            max_new_tokens: most tokens to make; also any other field of `GenerationConfig` as a keyword.
            streaming: give an output after every token, not only the last.
            record_timestamps: note when each token was made.
            generation_config: settings of this request; what it leaves open is the manager's.
            logits_processor, stopping_criteria, prefix_allowed_tokens_fn: of your own, as in `generate()`. They see
                this request alone, as one row; when one raises, this request fails.
            streamer: gets the prompt, each token, and the end, in the generating thread.
            tokenizer: for `stop_strings`, grammars, `token_healing` and drafts of another tokenizer; the manager's if
                not given.
            priority: higher goes first, with a scheduler that looks at it.
            deadline: seconds from now after which it ends with what it has.
            assistant_model: a smaller native model that drafts tokens, as in `generate()`; one with another tokenizer
                takes `tokenizer` and `assistant_tokenizer` too.
            cache_salt: only requests with an equal one share stored prefixes with it; name a tenant here.
            adapter_name: a loaded adapter's name, or `"__base__"` for none; the model's active one if not given.
            return_logprobs: give the log-probability of each token.
            top_logprobs: give those of so many likeliest tokens too; by default `output_top_logprobs` of the settings.
            prompt_logprobs: give the log-probability of each token of the prompt, and of so many likeliest in its place
                (0 for none). The prompt is then computed anew, also where it is stored.
            negative_prompt_ids: what `guidance_scale` steers away from, with `negative_prompt_attention_mask`; by
                default the prompt's last token.

        With `token_healing`, the prompt is computed once more here, in the calling thread.

        Returns:
            The request's id.

        Raises:
            ValueError, TypeError: the request cannot be right, or can never fit; nothing was queued.
            Unsupported: a mode that this version has in `generate()` only.
            QueueFull: too much waits.
            ManagerStopped: no request is taken any more.
        """
        self._worker.check_open()
        if request_id is not None:
            check_name(request_id)
        arguments = Arguments(
            generation_config=generation_config,
            streaming=streaming,
            record_timestamps=record_timestamps,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            streamer=streamer,
            tokenizer=self._tokenizer if tokenizer is None else tokenizer,
            priority=priority,
            deadline=deadline,
            assistant_model=assistant_model,
            cache_salt=cache_salt,
            adapter_name=adapter_name,
            return_logprobs=return_logprobs,
            top_logprobs=top_logprobs,
            prompt_logprobs=prompt_logprobs,
            negative_prompt_ids=negative_prompt_ids,
            negative_prompt_attention_mask=negative_prompt_attention_mask,
            assistant_tokenizer=assistant_tokenizer,
        )
        settings = kwargs if max_new_tokens is None else {"max_new_tokens": max_new_tokens, **kwargs}
        number, every = self._reader.read(input_ids, arguments, settings)
        check_fits(every[0], self._engine)
        name = self._new_name() if request_id is None else request_id
        self._submit(states_of(name, number, every, self._decoder, self._engine.plain))
        return name

    def add_requests(
        self,
        inputs: Items[Any],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **kwargs: Any,
    ) -> list[str]:
        """Queue many prompts, and give their ids in order; see `add_request`.

        A prompt is a list of token ids, or a dict of what `add_request` takes, whose entries go before those of all.

        One that cannot be right, or finds the queue full, gets a result at once, with `finish_reason="rejected"` and
        the exception; the others are queued.

        Raises:
            ManagerStopped: no request is taken any more.
        """
        names = []
        common = {
            "max_new_tokens": max_new_tokens,
            "streaming": streaming,
            "record_timestamps": record_timestamps,
            **kwargs,
        }
        for prompt in inputs:
            name = self._new_name()
            one = dict(prompt) if isinstance(prompt, Mapping) else {"input_ids": prompt}
            try:
                if "request_id" in one:
                    raise ValueError("request_id is for add_request(), which takes one request")
                self.add_request(request_id=name, **{**common, **one})
            except Exception as error:
                self._worker.check_open()
                self._reject(name, one.get("input_ids"), error)
            names.append(name)
        return names

    def cancel_request(self, request_id: str) -> bool:
        """Cancel a request and its other outputs; they end with what they have, before the next step.

        Returns:
            Whether there was anything to cancel: `False` for a request that is over or unknown.
        """
        names = [name for name in self._outbox.names(request_id) if self._outbox.is_live(name)]
        for name in names:
            self._worker.cancel(name)
        return bool(names)

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """The next output, of one request or of any; waits for it.

        Args:
            request_id: whose; `None` takes any that nobody follows with `request_id_iter`.
            timeout: most seconds to wait.

        Returns:
            The output, or `None` when the time is over, or none can come any more (no thread runs).

        Raises:
            ValueError: `request_id` is unknown, or its last output was taken already.
        """
        if timeout is not None:
            check_number("timeout", timeout, Check(float))
        if request_id is not None:
            self._check_known(request_id)
        return self._outbox.wait(request_id, timeout, self._worker.hopeless)

    def request_id_iter(self, request_id: str) -> RequestStream:
        """A request's outputs as they come, until its last; for `for` and for `async for`.

        Cancelling the task that reads it cancels the request.

        Raises:
            ValueError: `request_id` is unknown, or its last output was taken already.
        """
        if not self._outbox.claim(request_id):
            self._check_known(request_id)
        return RequestStream(self, request_id)

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], Any]) -> None:
        """Give a request's outputs to `callback`, in the running event loop if there is one, else in the thread.

        Raises:
            ValueError: `request_id` is unknown, or its last output was taken already.
            TypeError: `callback` cannot be called.
        """
        if not callable(callback):
            raise TypeError(f"callback must be callable, not {callback!r}")
        handler = callback
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            pass  # there is none: the generating thread calls it
        else:

            def handler(output: GenerationOutput) -> None:
                loop.call_soon_threadsafe(callback, output)

        if not self._outbox.handle(request_id, handler):
            self._check_known(request_id)

    def evict_request_from_cache(self, request_id: str) -> None:
        """Forget what is stored of a request that ended, as far as nobody else uses it.

        It does something with `manual_eviction` only: else room is made when it is needed.

        Raises:
            ValueError: the request is not over.
        """
        if self._outbox.is_live(request_id):
            raise ValueError(f"request_id={request_id!r} is not over; cancel it first")
        with self._worker.pause():
            self._engine.evict(request_id)

    def _submit(self, states: list[RequestState]) -> None:
        opened: list[str] = []
        parents = self._engine.parents
        try:
            for name in [one.request_id for state in states for one in (state, *state.children)]:
                if not self._outbox.open(name):
                    raise ValueError(f"request_id={name!r} is in use: that request lives, or its result was not taken")
                opened.append(name)
            parents.update((child.request_id, state.request_id) for state in states for child in state.children)
            self._worker.submit(states)
        except BaseException:
            for name in opened:
                self._outbox.forget(name)
                parents.pop(name, None)
            raise

    def _reject(self, name: str, prompt: Any, error: Exception) -> None:
        """Answer a request that was not queued."""
        ids = [one for one in prompt if isinstance(one, int)] if isinstance(prompt, list | tuple) else []
        self._outbox.open(name)
        self._outbox.put(
            GenerationOutput(
                name,
                prompt_ids=ids,
                error=str(error),
                status=RequestStatus.FAILED,
                finish_reason="rejected",
                exception=error,
                usage=Usage(len(ids)),
            )
        )

    def _new_name(self) -> str:
        """A name that nobody has chosen."""
        return next(name for name in (f"req_{number}" for number in self._ids) if not self._outbox.knows(name))

    def _check_known(self, request_id: str) -> None:
        if not self._outbox.knows(request_id):
            raise ValueError(f"request_id={request_id!r} is unknown, or its last result was taken already")


class RequestStream:
    """The outputs of one request, as they come; see `ContinuousBatchingManager.request_id_iter`."""

    def __init__(self, manager: ContinuousBatchingManager, request_id: str) -> None:
        self._manager = manager
        self._request_id = request_id
        self._over = False

    def __iter__(self) -> Iterator[GenerationOutput]:
        return self

    def __next__(self) -> GenerationOutput:
        manager = self._manager
        output = None if self._over else manager._outbox.wait(self._request_id, None, manager._worker.hopeless)
        if output is None:
            raise StopIteration
        self._over = output.is_finished()
        return output

    def __aiter__(self) -> AsyncIterator[GenerationOutput]:
        return self

    async def __anext__(self) -> GenerationOutput:
        manager = self._manager
        output = None
        if not self._over:
            try:
                output = await manager._outbox.wait_async(self._request_id, manager._worker.hopeless)
            except BaseException:  # the reading task was cancelled
                self._over = True
                manager.cancel_request(self._request_id)
                raise
        if output is None:
            raise StopAsyncIteration
        self._over = output.is_finished()
        return output
