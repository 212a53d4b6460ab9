"""What a foreign module can do, found out by comparing a few tokens with its own path, once: run ragged, or, in rows,
be fed rows together that came at different times.

Nothing is told by names. What a module declares about itself can only spare the comparison where it would not see the
difference (a hook that looks at inputs, angles that depend on the longest row).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence as Items
from dataclasses import dataclass, replace
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from unspool.bridge.capture import Unfit
from unspool.bridge.module import Foreign
from unspool.bridge.past import is_own_cache, own_cache
from unspool.bridge.ragged import RaggedModel, Shape, look
from unspool.cache.arrange import layer_kinds
from unspool.cache.paged import BLOCK_SIZE, PagedStore
from unspool.config import resolve
from unspool.decode.loop import Loop
from unspool.decode.opened import Opener, OpenRow, Together
from unspool.decode.plan import StaticScheduler
from unspool.decode.runner import PagedRunner, Runner
from unspool.decode.sequence import Choice, Group, Sequence, Work
from unspool.errors import Unsupported

__all__ = ["Company", "OwnPath", "Verdict", "judge", "judge_together", "looks_on"]

OwnPath: TypeAlias = Callable[[Tensor, Tensor, int], tuple[list[Sequence], Runner]]
"""From ids, their mask and how many tokens follow: rows, and what runs them in the module's own way."""

_STEPS = 3  # tokens fed one by one after the prompts
_LONGEST = 256  # a window up to here is looked beyond; a longer one must be what the configuration says

# Relative distance of logits that rounding explains, by the dtype of keys and values.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 8e-2}

_WATCHED = "hooks look at what its parts are given"

# Hooks that say how a module's input is made from what was chosen; ragged steps do not ask them.
_HOOKS = (
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_prepare_model_inputs",
    "_prepare_attention_mask_for_generation",
    "_prepare_position_ids_for_generation",
    "_expand_inputs_for_generation",
    "_reorder_cache",
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What was found out about a module.

    Attributes:
        shape: what its attention is asked for, where it can run ragged; else `None`.
        reason: why it cannot; `None` where it can.
    """

    shape: Shape | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class Company:
    """With which others a row of a module may be fed in one forward.

    Attributes:
        lengths: of which lengths.
        reason: why not of any; `None` where of any.
    """

    lengths: Together
    reason: str | None


_State: TypeAlias = tuple[Any, ...]
_found: WeakKeyDictionary[nn.Module, dict[_State, Verdict]] = WeakKeyDictionary()
_REMEMBERED = 4  # states of a module: a training loop may go to and fro between two
_together: WeakKeyDictionary[nn.Module, tuple[_State, Company]] = WeakKeyDictionary()
_lock = threading.RLock()
_NO_ROOM = (MemoryError, torch.OutOfMemoryError)


def judge(foreign: Foreign, own: OwnPath) -> Verdict:
    """Whether a module can run ragged; remembered for its parts, dtypes, devices and autocasting as they are.

    Args:
        foreign: the module.
        own: its own path.
    """
    declared = _declared(foreign)
    if declared is not None:
        return Verdict(None, declared)
    state, reason = _state(foreign)
    if reason is not None:
        return Verdict(None, reason)
    known = _found.get(foreign.module, {}).get(state)
    if known is not None:
        return known
    with _lock:
        found = _found.setdefault(foreign.module, {})
        if state not in found:
            try:
                made = _probe(foreign, own)
            except _NO_ROOM as error:  # which may pass
                return Verdict(None, f"there was no memory to find out more: {error!r}")
            for oldest in list(found)[: len(found) - _REMEMBERED + 1]:
                del found[oldest]
            found[state] = made
        return found[state]


def judge_together(foreign: Foreign, opener: Opener) -> Company:
    """Which rows of a module that runs in rows can be fed together; remembered likewise.

    Args:
        foreign: the module.
        opener: opens and feeds its rows.
    """
    state, _ = _state(foreign)
    with _lock:
        known = _together.get(foreign.module)
        if known is None or known[0] != state:
            try:
                known = state, _try_together(foreign, opener)
            except _NO_ROOM as error:
                return Company("none", f"there was no memory to find out more: {error!r}")
            _together[foreign.module] = known
        return known[1]


def _try_together(foreign: Foreign, opener: Opener) -> Company:
    dtype = next((one.dtype for one in foreign.module.parameters() if one.is_floating_point()), torch.float32)
    bound = _TOLERANCE.get(dtype, 1e-3)
    devices = [foreign.device] if foreign.device.type == "cuda" else []
    lengths: Together = "none"
    reason = None
    for tried in ("equal", "any"):
        reason = _depends_on_longest(foreign) if tried == "any" else None
        if reason is not None:
            break
        try:
            with torch.no_grad(), torch.random.fork_rng(devices):
                distance = _together_and_alone(foreign, opener, tried == "any")
        except _NO_ROOM:
            raise
        except Exception as error:
            reason = f"its rows cannot be put together: {error!r}"
            break
        if not distance <= bound:
            reason = f"its logits for rows put together are not its own (they differ by {distance:.2g})"
            break
        lengths = "any" if tried == "any" else "equal"
        bound = min(bound, max(4 * distance, bound / 8))  # a place counted wrongly may show little more than rounding
    return Company(lengths, reason)


def _together_and_alone(foreign: Foreign, opener: Opener, any_length: bool) -> float:
    """How far logits of rows that join, leave and come back are from those of the same rows by themselves."""
    vocab = int(foreign.entry("vocab_size") or 0) or 64
    try:
        windows = [window for _, window, _ in layer_kinds(foreign.text_config) if window and window <= _LONGEST]
    except (ValueError, Unsupported):
        windows = []
    config = resolve({}, None, getattr(foreign.module, "generation_config", None)).config
    long = max(8, min(max(windows, default=0) + 7, opener.spec.max_positions - 12))
    lengths = (long, 3, 5) if any_length or foreign.encoder_decoder else (long, long, long)
    texts = [[_some_ids(vocab, length), _some_ids(vocab, length)[::-1]][i % 2] for i, length in enumerate(lengths)]
    steps = ([0], [1, 0], [0, 1], [2, 0], [1], [2, 1, 0]) if any_length else ([1, 0, 2], [0, 1, 2], [2, 0], [0])
    after = [_some_ids(vocab, len(steps)), _some_ids(vocab, len(steps))[::-1], [_some_ids(vocab, 1)[0]] * len(steps)]

    def begin() -> tuple[list[OpenRow], list[Work], list[list[Tensor]]]:
        forced = _Forced([])
        told = [opener.read(list(text), {}, config) for text in texts]
        seqs = [Sequence(0, tokens, inputs=inputs) for tokens, inputs in told]
        work = [Work(seq, 1, 1, Group([seq], forced, forced)) for seq in seqs]
        rows = [opener.open(seq) for seq in seqs]
        return rows, work, [[row.feed(item)] for row, item in zip(rows, work, strict=True)]

    rows, work, expected = begin()
    for which, (row, item) in enumerate(zip(rows, work, strict=True)):
        for step in range(sum(which in some for some in steps)):
            item.seq.tokens.append(after[which][step])
            expected[which].append(row.feed(item))
    rows, work, found = begin()
    for some in steps:
        for which in some:
            work[which].seq.tokens.append(after[which][len(found[which]) - 1])
        lines = opener.feed([rows[which] for which in some], [work[which] for which in some])
        for which, line in zip(some, lines, strict=True):
            found[which].append(line[None])
    return max(
        _distance(torch.cat(one).float(), torch.cat(other).float()) for one, other in zip(found, expected, strict=True)
    )


def _declared(foreign: Foreign) -> str | None:
    """What a module says of itself that settles it; cheap, since it is asked in every call."""
    module = foreign.module
    if _learned_prompt(module):
        return "PEFT puts a learned prompt before its input"
    if not foreign.from_transformers:
        return "it is not one of transformers' modules, whose attention can be answered from outside"
    if foreign.encoder_decoder:
        return "it has an encoder"
    if not foreign.accepts("position_ids"):
        return "its forward takes no position_ids"
    for name in _HOOKS:
        hook = foreign.hook(name)
        if hook is None:
            continue
        if getattr(hook, "__module__", "").partition(".")[0] not in ("transformers", "peft"):
            return f"it has a {name}() of its own"
        wrapper = getattr(hook, "__self__", module)
        if wrapper is not module and _learned_prompt(wrapper):
            return "PEFT puts a learned prompt before its input"
    states = _states(foreign)
    if states:
        return f"its {', '.join(states)} layers carry a state from token to token"
    return _depends_on_longest(foreign)


def _depends_on_longest(foreign: Foreign) -> str | None:
    rope = foreign.entry("rope_parameters")
    for one in (rope, *rope.values()) if isinstance(rope, dict) else ():
        if isinstance(one, dict) and one.get("rope_type") in ("dynamic", "longrope"):
            return f"its {one['rope_type']} rotary angles depend on the longest row"
    return None


def _state(foreign: Foreign) -> tuple[_State, str | None]:
    """What a verdict depends on (the module's parts, their dtypes and devices, its way of attending, autocasting), and
    what about the parts settles it without one."""
    parts: list[object] = []
    kinds, reason = set(), None
    if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
        reason = _WATCHED
    for part in foreign.module.modules():
        # a module that recomputes activations leaves its past out
        parts += (id(part), type(part), part.__dict__.get("gradient_checkpointing"))
        kinds |= {(one.dtype, one.device) for one in part._parameters.values() if one is not None}
        reason = reason or _settled(part)
    kind = foreign.device.type
    cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    own = (foreign.module.training, foreign.entry("_attn_implementation"), cast)
    return (hash(tuple(parts)), frozenset(kinds), *own), reason


def _settled(part: nn.Module) -> str | None:
    """What about one part of a module needs its own way."""
    own = part.__dict__
    if part._forward_pre_hooks or any(map(looks_on, part._forward_hooks.values())):
        return _WATCHED
    if (
        own.get("_compiled_call_impl") is not None
        or "_orig_mod" in part._modules
        or ("forward" in own and hasattr(own["forward"], "_torchdynamo_orig_callable"))
    ):
        return "it is compiled, for one way of attending"
    if part.training and isinstance(part, nn.Dropout) and part.p > 0:
        return "it drops out, as in training"  # with draws that depend on the rectangle
    return None


def looks_on(hook: Any) -> bool:
    """Whether a forward hook may look at what it is given, or change it.

    Those that transformers leaves where hidden states were asked for stay idle, and those that gradient checkpointing
    needs, of transformers and libraries on it, only mark the embeddings as needing gradients.
    """
    package = str(getattr(hook, "__module__", ""))
    name = str(getattr(hook, "__qualname__", "")).rpartition(".")[2]
    marks = name.startswith("make_inputs_require_grad") and package.partition(".")[0] in ("transformers", "peft", "trl")
    return not marks and package != "transformers.utils.output_capturing"


def _probe(foreign: Foreign, own: OwnPath) -> Verdict:
    devices = [foreign.device] if foreign.device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            return _compare(foreign, own)
    except _NO_ROOM:
        raise
    except Exception as error:
        said = str(error) if isinstance(error, Unfit) else f"it cannot be fed flat tokens: {error!r}"
        return Verdict(None, said)


def _compare(foreign: Foreign, own: OwnPath) -> Verdict:
    vocab = int(foreign.entry("vocab_size") or 0) or 64
    shape = look(foreign, _some_ids(vocab, 3))
    model = RaggedModel(foreign, shape)
    reason = _wrong_windows(foreign, model)
    if reason is not None:
        return Verdict(None, reason)
    windows = [layer.window for layer in model.layers if layer.window is not None and layer.window <= _LONGEST]
    long = min(max(windows, default=0) + 7, max(8, model.spec.max_positions - _STEPS - 1))
    short = max(2, min(windows, default=5) - 1)
    ids = torch.tensor([_some_ids(vocab, long), _some_ids(vocab, long)[::-1]], device=foreign.device)
    mask = torch.ones_like(ids)
    mask[1, : max(1, long - short)] = 0
    following = [_some_ids(vocab, _STEPS + 1), _some_ids(vocab, _STEPS + 1)[::-1]]
    rows, runner = own(ids, mask, _STEPS + 1)
    expected = _logits(rows, runner, following, foreign.device)
    rows = [Sequence(i, one[keep].tolist()) for i, (one, keep) in enumerate(zip(ids, mask.bool(), strict=True))]
    blocks = len(rows) * (-(-(long + _STEPS + 1) // BLOCK_SIZE) + 1)
    store = PagedStore(model.spec.groups, blocks, dtype=model.dtype, device=model.device)
    found = _logits(rows, PagedRunner(model, store, model.device, rows, forks=True), following, foreign.device)
    distance = max(_distance(one, other) for one, other in zip(found, expected, strict=True))
    tolerance = _TOLERANCE.get(model.dtype, 1e-3)
    if not distance <= tolerance:  # NaN is no agreement either
        return Verdict(None, f"its logits for flat tokens are not its own (they differ by {distance:.2g})")
    return Verdict(replace(shape, gives_cache=_gives_cache(model, store, rows, mask, runner, tolerance)), None)


def _gives_cache(
    model: RaggedModel, store: PagedStore, rows: list[Sequence], mask: Tensor, own: Runner, tolerance: float
) -> bool:
    """Whether the module's own cache can be made of what is stored."""
    try:
        made = own_cache(model.foreign, model.layers, store, rows, mask.bool())
    except (ValueError, IndexError, TypeError, RuntimeError):  # its layers are not numbered as it attends
        return False
    return is_own_cache(made, getattr(own, "past", None), tolerance)


def _some_ids(vocab: int, count: int) -> list[int]:
    """Ids that differ, away from the ends of the vocabulary, where special ones are."""
    low, high = min(3, vocab - 1), max(vocab * 3 // 4, min(3, vocab - 1) + 1)
    return [low + (7 * i * i + 5 * i) % (high - low) for i in range(count)]


def _learned_prompt(module: Any) -> bool:
    return bool(getattr(getattr(module, "active_peft_config", None), "is_prompt_learning", False))


def _states(foreign: Foreign) -> list[str]:
    """Kinds of layers that remember more of a row than keys and values; a weak one might not show in the logits."""
    try:
        kinds = {kind for kind, _, _ in layer_kinds(foreign.text_config)}
    except (ValueError, Unsupported):
        return []
    return sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention", "dummy"})


def _wrong_windows(foreign: Foreign, model: RaggedModel) -> str | None:
    """A window that attention is told must be the one that the module's own cache and masks have."""
    try:
        kinds = layer_kinds(foreign.text_config)
    except (ValueError, Unsupported):
        return None
    own = {window for _, window, _ in kinds if window is not None and window > _LONGEST}
    told = {layer.window for layer in model.layers if layer.window is not None and layer.window > _LONGEST}
    return None if own == told else f"its windows {sorted(own)} are told to attention as {sorted(told)}"


class _Forced:
    """Chooser and sink that note logits and go on with given tokens."""

    def __init__(self, following: list[list[int]]) -> None:
        self.logits: list[Tensor] = []
        self._following = following

    def choose(self, logits: Tensor, rows: Items[Sequence]) -> Choice:
        """See `Chooser`."""
        tokens = [self._following[row.row][len(self.logits)] for row in rows]
        self.logits.append(logits.float())
        return Choice(torch.tensor(tokens, device=logits.device))

    def commit(self, rows: list[Sequence], tokens: list[int], choice: Choice) -> None:
        """See `Sink`."""
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)


def _logits(rows: list[Sequence], runner: Runner, following: list[list[int]], device: torch.device) -> list[Tensor]:
    """Logits `[rows, vocab]` after the prompts and after each of the tokens that follow."""
    forced = _Forced(following)
    group = Group(rows, forced, forced)
    Loop(runner, StaticScheduler(group, runner, steps=_STEPS + 1), device=device, in_step=True).run()
    return forced.logits


def _distance(found: Tensor, expected: Tensor) -> float:
    """Largest distance of a row's logits from those expected, against how far these are from their mean."""
    spread = (expected - expected.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return float(((found - expected).norm(dim=-1) / spread.clamp_min(1e-12)).max())
