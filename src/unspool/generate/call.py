"""One static call, settled: what is to be generated, by what, and what the modes share in setting it up."""

from __future__ import annotations

from collections.abc import Callable, Sequence as Items
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from unspool.config import GenerationConfig, GenerationMode
from unspool.config.mode import mode_of
from unspool.decode.choose.noise import GlobalNoise, Noise, SeededNoise
from unspool.decode.runner import Runner
from unspool.decode.sequence import Group, Sequence
from unspool.decode.tops import Tops
from unspool.generate.inputs import Prompts
from unspool.generate.outputs import GenerateOutput
from unspool.generate.recorder import Kept
from unspool.generate.stream import Stream
from unspool.generate.tracing import DraftTracer, Tracer
from unspool.logits import LogitsProcessorList
from unspool.logits.guidance import GuidanceLogitsProcessor
from unspool.models.adapters import Adapter
from unspool.stopping import Limits


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a backend can and wants.

    Attributes:
        shares_prompts: rows with the same prompt need it computed only once.
        traces: attention weights and hidden states come through the loop; otherwise the backend records them.
        past_is_rectangle: the keys and values of rows that ended go on as long as others, where they are handed back.
        prompt_budget: prompt tokens to compute in one step when the caller names no chunk; `None` takes all.
    """

    shares_prompts: bool = True
    traces: bool = True
    past_is_rectangle: bool = False
    # enough to keep matrix products at full speed and ordinary batches whole, few enough to bound activations
    prompt_budget: int | None = 8192


@dataclass(frozen=True, slots=True)
class Exits:
    """Where a decoder's hidden states can be looked at.

    Attributes:
        layers: how many layers there are; hidden states number 0 enter the first, and this many leaves the final norm.
        tied: the head's weight is the embedding's.
        head: logits `[n, vocab]` of hidden states `[n, hidden]` of any layer.
    """

    layers: int
    tied: bool
    head: Callable[[Tensor], Tensor]


class Backend(Protocol):
    """Whatever computes, as far as a call needs to know it.

    Attributes:
        abilities: see there.
        device: where tokens are chosen.
        vocab: how many tokens there are.
        positions: most tokens of a row.
        recompute_past: see `ModelSpec`.
        windows: for each layer how many keys a query sees at most, or `None` for all; empty where nothing is traced.
    """

    abilities: Abilities
    device: torch.device
    vocab: int
    positions: int | float
    recompute_past: int | None

    @property
    def windows(self) -> Items[int | None]: ...

    def runner(
        self,
        rows: list[Sequence],
        copies: int,
        new: int,
        past: Any,
        *,
        forks: bool,
        drafts: bool = False,
        alike: bool = False,
    ) -> Runner:
        """Make room for a call's rows and give what runs them.

        Args:
            rows: all rows; each `copies` of them share a prompt, of which the first alone is computed.
            copies: how many.
            new: most new tokens of a row.
            past: stored keys and values of an earlier call, or `None`; sets `computed` of the rows they serve.
            forks: rows will be made forks of each other.
            drafts: rows get several tokens in a step, and may be rewound.
            alike: forks that share a prompt will differ in their newest token alone.

        Raises:
            Unsupported: what is stored cannot be taken back, and `drafts` needs that.
        """
        ...

    def past(self, rows: list[Sequence], runner: Runner, width: int) -> Any:
        """What to hand back as `past_key_values` of `rows`, stored up to `width` padded columns."""
        ...

    def dress(self, result: Tensor | GenerateOutput) -> Tensor | GenerateOutput:
        """The result as the caller gets it, with what only the backend knows."""
        ...

    def unseen(self) -> AbstractContextManager[Any]:
        """In what the loop computes where the caller sees no tensors but ids: the least that PyTorch must note."""
        ...

    def idle(self) -> None:
        """Run the model once for nothing, because another process runs it too."""
        ...

    def fault(self, row: Sequence) -> str:
        """Say where a row's NaN came from, for an error message, after the fact."""
        ...

    def kwargs(self, rows: list[Sequence], new: int) -> dict[str, Any]:
        """The model's inputs beside the ids, for a generation method of the caller's; `new` is most new tokens."""
        ...

    def exits(self) -> Exits:
        """What it takes to look at hidden states of layers; raises `Unsupported` where that cannot be."""
        ...

    def first_layers(self, layers: int) -> Backend:
        """A backend that stops after so many layers, for drafts; raises `Unsupported` where that cannot be."""
        ...


@dataclass(slots=True)
class Assistant:
    """A draft model.

    Attributes:
        backend: computes it.
        config: its own generation settings.
        tokenizers: the model's and the draft model's, where these differ.
        adapter: its own active adapter, or `None`.
    """

    backend: Backend
    config: GenerationConfig
    tokenizers: tuple[Any, Any] | None = None
    adapter: Adapter | None = None


@dataclass(slots=True)
class Call:
    """Everything a call needs, settled.

    Attributes:
        backend: computes.
        config: resolved settings.
        prompts: one entry per row to decode; rows that share a prompt stand side by side.
        copies: how many rows share each prompt.
        processors: logits processors in order.
        limits: when rows end.
        filler: token in the columns of rows that ended.
        stream: the streamer's entrance, or `None`.
        past: stored keys and values of an earlier call, or `None`.
        foreign: processors or criteria of the caller's own take part.
        assistant: the draft model, or `None`.
        synced: other processes run their share of the same model, and all as often; see `generate.synced`.
        negative: the negative prompts of all rows and their mask, when guidance adds rows for them.
        kept: scores and logits that were asked for.
        tracer: takes attentions and hidden states, or `None`.
    """

    backend: Backend
    config: GenerationConfig
    prompts: Prompts
    copies: int
    processors: LogitsProcessorList
    limits: Limits
    filler: int
    stream: Stream | None
    past: Any
    foreign: bool
    assistant: Assistant | None = None
    negative: tuple[Tensor, Tensor] | None = None
    synced: bool = False
    kept: Kept = field(init=False)
    tracer: Tracer | DraftTracer | None = field(init=False)

    def __post_init__(self) -> None:
        config = self.config
        number = config.output_top_logprobs
        self.kept = Kept(
            scores=[] if self.detailed and config.output_scores else None,
            logits=[] if self.detailed and config.output_logits else None,
            tops=Tops(number, len(self.prompts.tokens)) if self.detailed and number else None,
            beams=[] if self.detailed else None,
        )
        heads, hidden = bool(config.output_attentions), bool(config.output_hidden_states)
        wanted = self.detailed and (heads or hidden) and self.backend.abilities.traces
        self.tracer = None
        if wanted and self.mode is GenerationMode.ASSISTED_GENERATION:
            self.tracer = DraftTracer(len(self.prompts.tokens), self.copies, heads, hidden, self.backend.windows)
        elif wanted:
            self.tracer = Tracer(len(self.prompts.tokens), self.copies, heads, hidden)

    @property
    def mode(self) -> GenerationMode:
        """The strategy that the settings mean."""
        return mode_of(self.config, assisted=self.assistant is not None)

    @property
    def guidance(self) -> GuidanceLogitsProcessor | None:
        """The processor that gets the logits of rows' other halves, or `None`."""
        return next((one for one in self.processors if isinstance(one, GuidanceLogitsProcessor)), None)

    @property
    def detailed(self) -> bool:
        """Whether an output object is wanted."""
        return bool(self.config.return_dict_in_generate)

    @property
    def every_row(self) -> bool:
        """Whether somebody must see every row in every step, those that ended too."""
        recorded = self.tracer is not None or self.kept.scores is not None or self.kept.logits is not None
        whole = self.detailed and self.backend.abilities.past_is_rectangle
        return recorded or whole or not self.processors.row_independent

    @property
    def steps(self) -> int:
        """Most new tokens of a row."""
        return self.limits.max_columns - self.prompts.rectangle.shape[1]

    def rows(self) -> list[Sequence]:
        """A row for each prompt."""
        embeds: Items[Tensor | None] = self.prompts.embeds or [None] * len(self.prompts.tokens)
        adapters: Items[Adapter | None] = self.prompts.adapters or [None] * len(self.prompts.tokens)
        parts = enumerate(zip(self.prompts.tokens, embeds, adapters, strict=True))
        return [Sequence(i, list(tokens), embeds=own, adapter=adapter) for i, (tokens, own, adapter) in parts]

    def twins(self, rows: list[Sequence], candidates: int = 1) -> list[Sequence] | None:
        """For each row the first that shares its prompt; `None` where each is computed by itself.

        `rows` hold `candidates` for each of the call's.
        """
        copies = self.copies * candidates
        if copies == 1 or not self.backend.abilities.shares_prompts:
            return None
        return [rows[i - i % copies] for i in range(len(rows))]

    def noise(self) -> Noise | None:
        """Where sampling noise comes from; `None` when nothing is drawn."""
        if not self.config.do_sample:
            return None
        if self.config.seed is not None:
            return SeededNoise(self.config.seed, self.copies, self.backend.device)
        return GlobalNoise(len(self.prompts.tokens), self.backend.device)


@dataclass(slots=True)
class Setup:
    """How a mode decodes a call.

    Attributes:
        group: its rows, how they are decided and where the tokens go.
        result: makes the result once all rows have ended.
        forks: rows become forks of each other.
        in_step: each step must be committed before the next is planned.
        keep_finished: rows that ended are fed until all have.
        gives_past: the result holds the keys and values of the rows.
        candidates: rows for each of the call's, which differ in their newest token alone.
        ahead: steps besides one for each new token.
    """

    group: Group
    result: Callable[[Runner], Tensor | GenerateOutput]
    forks: bool
    in_step: bool
    keep_finished: bool
    gives_past: bool = True
    candidates: int = 1
    ahead: int = 0
