"""A module's attention, and products of few rows, by our kernels for the length of one call.

transformers' models look their attention up by a name in their configuration. Within `answered`, every configuration
tells that thread (or task) our name, and the function behind the name hands each layer's queries, keys and values to
the answer. Nothing is written to a configuration or a module, so others use the same module meanwhile as it is.

Plain linear layers (`nn.Linear`, with a weight in bf16 on a CPU) go through our kernels in that thread too, where they
have few rows: PyTorch's products stream such weights at about half the speed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar, Token
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor, nn

from unspool.errors import Unsupported
from unspool.kernels.plain import product, usable

__all__ = ["Answer", "Unfit", "answered"]

_NAME = "unspool"

# Arguments of attention functions that do not change what the attention is.
_HARMLESS = frozenset(
    (
        "position_ids",
        "cache_position",
        "use_cache",
        "return_dict",
        "logits_to_keep",
        "position_embeddings",
        "is_causal",
        "output_hidden_states",
    )
)


class Unfit(Unsupported):
    """A layer asks for more than attention over true tokens gives."""


class Answer(Protocol):
    """Answers the layers of one forward pass, in their order."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None
    ) -> Tensor:
        """Attend `q` `[tokens, heads, dim]` to the past and `k`, `v` `[tokens, kv_heads, dim]`.

        Args:
            scale: multiplies the scores.
            window: how many tokens a query sees, itself included; `None` for all before it.
            softcap: bounds the scores.

        Returns:
            `[tokens, heads, dim of v]`.
        """
        ...


_answer: ContextVar[Answer | None] = ContextVar("unspool_answers_attention", default=None)
_lock = threading.Lock()
_users = 0
_originals: tuple[Any, Any] = (None, None)  # what tells a configuration's attention; how a linear layer multiplies


class answered:
    """Within, attention of transformers' models in this thread (or task) goes to `answer`."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._token: Token[Answer | None] | None = None

    def __enter__(self) -> None:
        _install()
        self._token = _answer.set(self._answer)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._token is not None
        _answer.reset(self._token)
        _remove()


def _install() -> None:
    global _users, _originals
    with _lock:
        if _users:
            _users += 1
            return
        base = import_module("transformers.configuration_utils").PreTrainedConfig
        import_module("transformers.modeling_utils").AttentionInterface.register(_NAME, _attention)
        _originals = vars(base)["_attn_implementation"], nn.Linear.forward
        base._attn_implementation = _told(_originals[0])
        if usable():
            nn.Linear.forward = _multiplied(_originals[1])  # type: ignore[method-assign, assignment]
        _users = 1


def _remove() -> None:
    global _users
    with _lock:
        _users -= 1
        if _users == 0:
            import_module("transformers.configuration_utils").PreTrainedConfig._attn_implementation = _originals[0]
            nn.Linear.forward = _originals[1]  # type: ignore[method-assign]


def _told(original: Any) -> property:
    """The property with our name in place of the configuration's own, where attention is answered."""
    read: Callable[[Any], Any] = original.fget

    def name(self: Any) -> Any:
        return read(self) if _answer.get() is None else _NAME

    return property(name, original.fset, original.fdel, original.__doc__)


def _multiplied(original: Callable[[nn.Linear, Tensor], Tensor]) -> Callable[[nn.Linear, Tensor], Tensor]:
    """A linear layer's forward that asks our kernels first, where attention is answered."""

    def forward(self: nn.Linear, input: Tensor) -> Tensor:
        if _answer.get() is not None:
            out = product(input, self.weight, self.bias)
            if out is not None:
                return out
        return original(self, input)

    return forward


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it: `[1, heads, tokens, dim]` in, `[1, tokens, heads, dim]` out."""
    answer = _answer.get()
    if answer is None:
        raise Unsupported(f"attn_implementation={_NAME!r} is for unspool's own calls; choose one of transformers'")
    if attention_mask is not None:
        raise Unfit("its layers make a mask of their own")
    if others.get("is_causal", True) is False or getattr(module, "is_causal", True) is False:
        raise Unfit("a layer looks at later tokens, or at another text")
    for name, given in others.items():
        if given is not None and given is not False and name not in _HARMLESS:
            raise Unfit(f"its attention takes {name}")
    if dropout:
        raise Unfit("its attention drops out, as in training")
    if query.ndim != 4 or query.shape[0] != 1 or key.shape[2] != query.shape[2]:
        raise Unfit(f"its attention is given {list(query.shape)} queries and {list(key.shape)} keys for one row")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = answer(
        query[0].transpose(0, 1), key[0].transpose(0, 1), value[0].transpose(0, 1), scale, sliding_window, softcap
    )
    return out[None], None
