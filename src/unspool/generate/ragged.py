"""Foreign modules over our own store as a call's backend, and which calls they can take."""

from __future__ import annotations

from typing import Any

from unspool.bridge.ragged import RaggedModel
from unspool.config import GenerationConfig
from unspool.decode.sequence import Sequence
from unspool.generate.call import Abilities, Backend, Exits
from unspool.generate.inputs import Prompts
from unspool.generate.paged import PagedBackend
from unspool.generate.reading import Arguments

__all__ = ["RaggedBackend", "needs_rows"]


class RaggedBackend(PagedBackend):
    """See `generate.call.Backend`.

    Args:
        model: the module, fed flat tokens.
        rows: the same in its own way, for what needs that.
    """

    abilities = Abilities(traces=False, inference_mode=False)

    def __init__(self, model: RaggedModel, rows: Backend) -> None:
        super().__init__(model)
        self._rows = rows

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


def needs_rows(arguments: Arguments, config: GenerationConfig, prompts: Prompts) -> str | None:
    """Why a call must go through the module's own inputs, cache or outputs; `None` when it need not."""
    given = {name for name, value in arguments.rest.items() if value is not None}
    others = given - {"input_ids", "attention_mask"}
    if others:
        return f"{', '.join(sorted(others))} go through its own forward"
    if config.return_dict_in_generate:
        return "return_dict_in_generate returns its own past_key_values"
    if not config.use_cache:
        return "use_cache=False feeds all columns in every step"
    if config.cache_implementation is not None:
        return f"cache_implementation={config.cache_implementation!r} is for its own cache"
    if not prompts.rectangle.shape[1] or not bool(prompts.mask[:, -1].all()):
        return "a prompt is empty, or padded on the right"
    return None
