"""What `generate()` returns when asked for more than the tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from torch import Tensor

from unspool.decode.tops import TopLogprobs
from unspool.twins import seen_as


class ModelOutput(OrderedDict[str, Any]):
    """A dataclass that is also a dictionary and a tuple of its fields that are not `None`.

    `out.sequences`, `out["sequences"]` and `out[0]` are the same; `out.to_tuple()`, `len(out)` and iteration over keys
    leave out fields that are `None`.
    """

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` is told: this class, and transformers' of the same name where that is loaded."""
        return seen_as(type(self), ModelOutput, "transformers.generation.utils")

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if value is not None:
                super().__setitem__(field.name, value)

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in self:
            super().__setitem__(name, value)

    def __delitem__(self, key: str) -> None:
        raise TypeError(f"fields of {type(self).__name__} cannot be deleted")

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def __reduce__(self) -> tuple[Any, ...]:
        """How copies and pickles are made."""
        return _rebuilt, (type(self), {field.name: getattr(self, field.name) for field in fields(self)})  # type: ignore[arg-type]

    def to_tuple(self) -> tuple[Any, ...]:
        """Values of the fields that are not `None`, in order."""
        return tuple(super(ModelOutput, self).__getitem__(key) for key in self)


def _rebuilt(kind: type[ModelOutput], values: dict[str, Any]) -> ModelOutput:
    return kind(**values)


class Draft(NamedTuple):
    """One check of a draft: how many tokens the row had, what was drafted, and how much of it was accepted."""

    position: int
    tokens: list[int]
    accepted: int


class BeamStep(NamedTuple):
    """One step of a beam search: the beam rows that run on, the beam row that each continues, and with which token.

    Continuations that ended with this step are not among them, unless there was nothing else to run on with; the last
    step that `max_length` leaves has no entry, since all end there.
    """

    rows: list[int]
    parents: list[int]
    tokens: list[int]


@dataclass(eq=False, repr=False)
class GenerateDecoderOnlyOutput(ModelOutput):
    """Result of greedy decoding or sampling with a decoder-only model.

    Attributes:
        sequences: `[rows, columns]` int64, prompts included; rows that ended early are filled up.
        scores: per step, processed scores `[rows, vocab]` (fp32), with `output_scores=True`.
        logits: per step, the model's logits `[rows, vocab]` (fp32), with `output_logits=True`.
        attentions: per step and layer, `[rows, heads, queries, keys]`, with `output_attentions=True`.
        hidden_states: per step and layer (embeddings first), `[rows, queries, hidden]`, with
            `output_hidden_states=True`.
        past_key_values: the stored keys and values, for a follow-up call, with `use_cache=True`.
        finish_reasons: per row, `"stop"` or `"length"`.
        acceptance_rate: accepted over drafted tokens, when drafts were checked.
        drafts: per row, the drafts that were checked.
        top_logprobs: the likeliest tokens of each step, `values` and `ids` `[rows, new, k]`, by the processed scores,
            with `output_top_logprobs=k`.
        token_logprobs: `[rows, new]` log probability of each new token likewise, 0 past a row's end.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    attentions: tuple[tuple[Tensor, ...], ...] | None = None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: Any = None
    finish_reasons: list[str] | None = None
    acceptance_rate: float | None = None
    drafts: list[list[Draft]] | None = None
    top_logprobs: TopLogprobs | None = None
    token_logprobs: Tensor | None = None


@dataclass(eq=False, repr=False)
class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """Result of beam search or beam sampling with a decoder-only model.

    "Beam rows" are the `num_beams` rows of each prompt, "sequences" the `num_return_sequences` best outputs of each.

    Attributes:
        sequences: `[sequences, columns]` int64, prompts included, best first; shorter ones are filled up.
        sequences_scores: `[sequences]` fp32, sum of log probabilities over the length to the power of `length_penalty`,
            with `output_scores=True`.
        scores: per step, processed log probabilities `[beam rows, vocab]` (fp32), with `output_scores=True`.
        logits: per step, the model's logits `[beam rows, vocab]` (fp32), with `output_logits=True`.
        beam_indices: `[sequences, steps]` int32, the beam row that each token was chosen for; -1 past the end.
        attentions: per step and layer, `[beam rows, heads, queries, keys]`, with `output_attentions=True`.
        hidden_states: per step and layer (embeddings first), `[beam rows, queries, hidden]`, with
            `output_hidden_states=True`.
        past_key_values: `None` for native models: the rows that ran last need not be those that are returned. For other
            modules their cache, as transformers gives it.
        finish_reasons: per sequence, `"stop"` or `"length"`.
        top_logprobs, token_logprobs: as in `GenerateDecoderOnlyOutput`, a row for each sequence.
        beam_steps: how the beams went, step by step.
    """

    sequences: Tensor
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    attentions: tuple[tuple[Tensor, ...], ...] | None = None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: Any = None
    finish_reasons: list[str] | None = None
    top_logprobs: TopLogprobs | None = None
    token_logprobs: Tensor | None = None
    beam_steps: list[BeamStep] | None = None


@dataclass(eq=False, repr=False)
class GenerateEncoderDecoderOutput(ModelOutput):
    """Result of greedy decoding or sampling with an encoder-decoder model.

    Attributes:
        sequences: `[rows, columns]` int64, what the decoder began with included.
        scores, logits: as in `GenerateDecoderOnlyOutput`.
        encoder_attentions, encoder_hidden_states: per layer of the encoder, as it gave them.
        decoder_attentions, cross_attentions: per step and layer, `[rows, heads, queries, keys]`.
        decoder_hidden_states: per step and layer, `[rows, queries, hidden]`.
        past_key_values: the module's cache, with `use_cache=True`.
        finish_reasons: per row, `"stop"` or `"length"`.
        top_logprobs, token_logprobs: as in `GenerateDecoderOnlyOutput`.
    """

    sequences: Tensor
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    cross_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    decoder_hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: Any = None
    finish_reasons: list[str] | None = None
    top_logprobs: TopLogprobs | None = None
    token_logprobs: Tensor | None = None


@dataclass(eq=False, repr=False)
class GenerateBeamEncoderDecoderOutput(ModelOutput):
    """Result of beam search or beam sampling with an encoder-decoder model.

    Attributes:
        sequences, sequences_scores, scores, logits, beam_indices: as in `GenerateBeamDecoderOnlyOutput`.
        encoder_attentions, encoder_hidden_states, decoder_attentions, cross_attentions, decoder_hidden_states,
            past_key_values: as in `GenerateEncoderDecoderOutput`, for the beam rows.
        finish_reasons: per sequence, `"stop"` or `"length"`.
        top_logprobs, token_logprobs, beam_steps: as in `GenerateBeamDecoderOnlyOutput`.
    """

    sequences: Tensor
    sequences_scores: Tensor | None = None
    scores: tuple[Tensor, ...] | None = None
    logits: tuple[Tensor, ...] | None = None
    beam_indices: Tensor | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    cross_attentions: tuple[tuple[Tensor, ...], ...] | None = None
    decoder_hidden_states: tuple[tuple[Tensor, ...], ...] | None = None
    past_key_values: Any = None
    finish_reasons: list[str] | None = None
    top_logprobs: TopLogprobs | None = None
    token_logprobs: Tensor | None = None
    beam_steps: list[BeamStep] | None = None


GenerateOutput = (
    GenerateDecoderOnlyOutput
    | GenerateBeamDecoderOnlyOutput
    | GenerateEncoderDecoderOutput
    | GenerateBeamEncoderDecoderOutput
)
