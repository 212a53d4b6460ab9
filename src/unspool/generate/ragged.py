"""Foreign modules over our own store as a call's backend, and which calls they can take."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import fields
from typing import Any

from torch import Tensor

from unspool.bridge.past import own_cache
from unspool.bridge.ragged import RaggedModel
from unspool.bridge.unseen import unseen
from unspool.config import GenerationConfig
from unspool.decode.runner import PagedRunner
from unspool.decode.sequence import Sequence
from unspool.generate.call import Abilities, Backend, Exits
from unspool.generate.inputs import Prompts
from unspool.generate.outputs import GenerateOutput
from unspool.generate.paged import PagedBackend
from unspool.generate.reading import Arguments

__all__ = ["RaggedBackend", "inputs_need_rows", "needs_rows"]


class RaggedBackend(PagedBackend):
    """See `generate.call.Backend`.

    Args:
        model: the module, fed flat tokens.
        rows: the same in its own way, for what needs that.
        config, prompts: of the call.
    """

    abilities = Abilities(past_is_rectangle=True)

    def __init__(self, model: RaggedModel, rows: Backend, config: GenerationConfig, prompts: Prompts) -> None:
        super().__init__(model)
        self._model = model
        self._rows = rows
        self._config, self._prompts = config, prompts
        self._run: tuple[list[Sequence], PagedRunner] | None = None

    def runner(self, rows: list[Sequence], *args: Any, **kwargs: Any) -> PagedRunner:
        """See `Backend`."""
        runner = super().runner(rows, *args, **kwargs)
        self._run = rows, runner
        return runner

    def past(self, rows: list[Sequence], runner: Any, width: int) -> None:
        """See `Backend`: `dress` adds it."""

    def dress(self, result: Tensor | GenerateOutput) -> Tensor | GenerateOutput:
        """See `Backend`: with the module's own kind of cache."""
        if isinstance(result, Tensor) or not self._config.use_cache:
            return result
        assert self._run is not None
        rows, runner = self._run
        mask = self._prompts.mask
        made = own_cache(self._model.foreign, self._model.layers, runner.store, rows[: len(mask)], mask)
        values = {one.name: getattr(result, one.name) for one in fields(result)}
        return type(result)(**{**values, "past_key_values": made})

    def unseen(self) -> AbstractContextManager[Any]:
        """See `Backend`."""
        return unseen(self._model.foreign.module)

    def idle(self) -> None:
        """See `Backend`."""
        self._rows.idle()

    def kwargs(self, rows: list[Sequence], new: int) -> dict[str, Any]:
        """See `Backend`: the module's own, with its own cache."""
        return self._rows.kwargs(rows, new)

    def exits(self) -> Exits:
        """See `Backend`."""
        return self._rows.exits()

    def first_layers(self, layers: int) -> Backend:
        """See `Backend`."""
        return self._rows.first_layers(layers)


def needs_rows(config: GenerationConfig, assisted: bool, gives_cache: bool) -> str | None:
    """Why what is asked for comes from the module's own cache or outputs; `None` when it need not.

    Args:
        config: of the call.
        assisted: drafts are checked, of which the module's own outputs would have to be cut up.
        gives_cache: see `bridge.ragged.Shape`.
    """
    traced = config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states)
    if traced and not assisted:
        return "output_attentions and output_hidden_states are its own outputs"
    if config.return_dict_in_generate and config.use_cache and not gives_cache:
        return "return_dict_in_generate returns its own past_key_values"
    if not config.use_cache:
        return "use_cache=False feeds all columns in every step"
    if config.cache_implementation not in (None, "paged"):  # ours is paged
        return f"cache_implementation={config.cache_implementation!r} is for its own cache"
    return None


def inputs_need_rows(arguments: Arguments, prompts: Prompts) -> str | None:
    """Why a call's inputs must go through the module's own; `None` when they need not."""
    given = {name for name, value in arguments.rest.items() if value is not None}
    others = given - {"input_ids", "attention_mask"}
    if others:
        return f"{', '.join(sorted(others))} go through its own forward"
    if not prompts.rectangle.shape[1] or not bool(prompts.mask[:, -1].all()):
        return "a prompt is empty, or padded on the right"
    return None
