"""What a call is read from: the seam between the public method and the kinds of model it serves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from unspool.config import GenerationConfig
from unspool.generate.call import Backend
from unspool.generate.inputs import Prompts


class Arguments:
    """The call's keyword arguments that are no settings.

    Raises:
        TypeError: a tokenizer is none.

    Attributes:
        inputs: what was passed as `inputs`.
        tokenizer: as passed.
        assistant_tokenizer: as passed.
        rest: the model's inputs by name.
        assisted: drafts are to be checked.
    """

    def __init__(self, inputs: Any, unused: dict[str, Any], assisted: bool = False) -> None:
        self.inputs = inputs
        self.assisted = assisted
        self.rest = dict(unused)
        self.tokenizer = self.rest.pop("tokenizer", None)
        self.assistant_tokenizer = self.rest.pop("assistant_tokenizer", None)
        for name in ("tokenizer", "assistant_tokenizer"):
            given = getattr(self, name)
            if given is not None and (isinstance(given, type) or not callable(getattr(given, "decode", None))):
                raise TypeError(f"{name} must be a tokenizer, such as unspool.load() gives with a model, not {given!r}")
        self.rest.pop("use_model_defaults", None)  # transformers takes it; it changes nothing here


@dataclass(slots=True)
class Reading:
    """A call's inputs, as a model reads them.

    Attributes:
        prompts: one entry per row to decode; rows that share a prompt stand side by side.
        seen: one entry per prompt.
        backend: computes.
        past: stored keys and values of an earlier call, or `None`.
        encoder_ids: tokens that processors of the encoder's look at (of a decoder, its prompts), or `None`.
        padding: columns before each row's first true token, `[rows]`, or `None`.
        embeds: columns of a prompt given as embeddings and not among `prompts`.
    """

    prompts: Prompts
    seen: Prompts
    backend: Backend
    past: Any
    encoder_ids: Tensor | None
    padding: Tensor | None
    embeds: int = 0


class Source(Protocol):
    """A model, as far as the public method needs to know it before a call is settled.

    Attributes:
        device: where tokens are chosen.
        vocab_size: width of the logits; `None` when the model does not say.
        max_positions: positions the model was made for, or `None`.
        beyond: what to do past them; see `effective_lengths`.
        module: a foreign module, or `None`.
        unconditional: what guidance runs by itself, called as transformers' models are; `None` where rows can be added
            to the batch.
    """

    device: torch.device
    vocab_size: int | None
    max_positions: int | None
    beyond: Literal["refuse", "warn", "allow"]
    module: Any
    unconditional: Any

    def read(self, arguments: Arguments, config: GenerationConfig, copies: int) -> Reading:
        """Check and read the call's inputs, for `copies` rows of each prompt."""
        ...

    def draft(self, arguments: Arguments, config: GenerationConfig) -> Backend:
        """What drafts for another model's rows, which are the inputs."""
        ...
