"""Our decoding behind transformers' own methods: for every model (`enable`), or within one call (`inside`).

Methods of transformers' `GenerationMixin` are replaced, `generate`, `_sample`, `_beam_search` and those for continuous
batching, while somebody wants it, and put back after. Models that bring a `generate()` of their own (Whisper, MusicGen,
…) come in through the inner ones, with what they prepared. What only transformers can do is left to it.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import fields
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from unspool.bridge.module import Foreign
from unspool.config import GenerationConfig, GenerationMode, Resolved, resolve
from unspool.config.mode import mode_of
from unspool.continuous import ContinuousMixin
from unspool.errors import Unsupported
from unspool.generate.foreign import ForeignSource
from unspool.generate.mixin import GenerationMixin
from unspool.generate.report import report_on
from unspool.interop import inner
from unspool.interop.notes import note
from unspool.interop.versions import check_version
from unspool.logits import is_guided

__all__ = ["disable", "enable", "enabled", "inside", "is_plain", "makes_its_start", "unserved"]

# Methods for continuous batching, which transformers' `GenerationMixin` inherits.
_CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
_METHODS = ("generate", "_sample", "_beam_search", *_CONTINUOUS)
# A model that replaces one of these prepares or decodes in a way of its own: it runs its own `generate()`, and what we
# decode is what that asks for.
_OWN_WAY = (
    "_sample",
    "_beam_search",
    "_prefill",
    "_has_unfinished_sequences",
    "_get_logits_processor",
    "_get_stopping_criteria",
    "_prepare_generation_config",
    "_prepare_generated_length",
    "_validate_generation_mode",
    "_extract_generation_mode_kwargs",
)
# Inputs that are text alone, and what goes with them.
_TEXT = {"input_ids", "attention_mask", "tokenizer", "assistant_tokenizer"}
# And one that replaces one of these needs its own loop too.
_OWN_LOOP = ("_prefill", "_has_unfinished_sequences")

_lock = threading.Lock()
_originals: dict[str, Callable[..., Any]] = {}
_inherited: dict[str, bool] = {}
_users = 0
_everywhere = False
_here: ContextVar[bool] = ContextVar("unspool_decodes_here", default=False)


def enable() -> None:
    """Put our `generate()` behind that of every transformers model, also of those made before.

    So `model.generate(...)`, `pipeline(...)`, `PeftModel.generate` and whatever calls them decode with unspool; results
    pass `isinstance` checks against transformers' output classes. `generate_batch` and the managers for continuous
    batching are unspool's too, and `model.unspool_report()` tells how a model is run. What unspool cannot do for a
    model is left to transformers. Calling it twice changes nothing.

    Raises:
        Unsupported: transformers is not installed, or is older than 5.2.
    """
    global _everywhere
    with _lock:
        if not _everywhere:
            _install()
            _everywhere = True


def disable() -> None:
    """Undo `enable`: transformers is as it was. Calling it twice changes nothing."""
    global _everywhere
    with _lock:
        if _everywhere:
            _everywhere = False
            _remove()


@contextmanager
def enabled() -> Iterator[None]:
    """`enable` within a `with` block; what was enabled before stays so after."""
    before = _everywhere
    enable()
    try:
        yield
    finally:
        if not before:
            disable()


@contextmanager
def inside() -> Iterator[None]:
    """Decode transformers' models with unspool within a `with` block, in this thread alone."""
    if "transformers" not in sys.modules:  # nobody's model can be one
        yield
        return
    with _lock:
        _install()
    token = _here.set(True)
    try:
        yield
    finally:
        _here.reset(token)
        with _lock:
            _remove()


def is_plain(module: nn.Module) -> bool:
    """Whether a module has no `generate()` but transformers' own, so that ours can stand in for it."""
    if "generate" in vars(module):
        return False
    found = getattr(type(module), "generate", None)
    theirs = (_originals.get("generate"), getattr(_base(), "generate", None))
    return found is None or (found in theirs and _own(module, _OWN_WAY) is None)


def unserved(module: nn.Module) -> str | None:
    """Why a module has no continuous batching of ours; `None` where it has."""
    verdict = ForeignSource(module).verdict()
    if verdict.shape is not None:
        return None
    if not makes_its_start(module) and not _is_ours_or_plain(module):
        return f"it runs in rows, because {verdict.reason}, and generates in a way of its own"
    own = any(hasattr(part, "_setup_cache") for part in module.modules())  # as RecurrentGemma's layers have
    return "it keeps its past in itself, of one call at a time" if own else None


def makes_its_start(module: nn.Module) -> bool:
    """Whether a module writes what its encoder hears or sees, and its own `generate()` chooses what it begins with.

    So does Whisper's, for a language and a task.
    """
    foreign = Foreign(module)
    reads_more = getattr(module, "main_input_name", "input_ids") != "input_ids"
    return reads_more and foreign.encoder_decoder and foreign.from_transformers and not _is_ours_or_plain(module)


def _is_ours_or_plain(module: nn.Module) -> bool:
    return getattr(type(module), "generate", None) is GenerationMixin.generate or is_plain(module)


def _base() -> Any:
    """transformers' `GenerationMixin`, where that is loaded."""
    return getattr(sys.modules.get("transformers.generation.utils"), "GenerationMixin", None)


def _own(module: nn.Module, names: tuple[str, ...]) -> str | None:
    """The first of `names` that a model defines anew, over transformers' `GenerationMixin`."""
    base = _base()
    kinds = type(module).__mro__[: type(module).__mro__.index(base)] if base in type(module).__mro__ else ()
    return next((name for name in names if any(name in vars(kind) for kind in kinds)), None)


def _install() -> None:
    global _users
    _users += 1
    if _users > 1:
        return
    try:
        base = import_module("transformers.generation.utils").GenerationMixin
        check_version()
    except ImportError as error:
        _users -= 1
        raise Unsupported("transformers is not installed: pip install 'unspool[transformers]'") from error
    except Unsupported:
        _users -= 1
        raise
    for name in _METHODS:
        _originals[name] = getattr(base, name)
        _inherited[name] = name not in vars(base)
        setattr(base, name, _replacement(name, _originals[name]))
    base.unspool_report = report_on


def _remove() -> None:
    global _users
    _users -= 1
    if _users == 0:
        base = _base()
        del base.unspool_report
        for name in _METHODS:
            original = _originals.pop(name)
            if _inherited.pop(name):
                delattr(base, name)
            else:
                setattr(base, name, original)


def _wanted() -> bool:
    return _everywhere or _here.get()


def _replacement(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
    """What stands for one of transformers' methods; it outlives the patch in calls that have begun."""
    run = _generate if name == "generate" else _batch if name in _CONTINUOUS else _decode
    signature = inspect.signature(original)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _wanted():
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        del given["self"]
        found = run(self, given, name)
        return original(self, *args, **kwargs) if found is None else found

    return method


def _generate(module: Any, given: dict[str, Any], name: str) -> Any:
    """A whole call; `None` leaves it to transformers."""
    from unspool.interop.wrap import Wrapped

    rest = given.pop("kwargs", {})
    reason = _declined(module, given, rest)
    if reason is not None:
        return note(type(module).__name__, reason)
    rest.pop("trust_remote_code", None)
    return _theirs_alone(GenerationMixin.generate(Wrapped(module), **given, **rest))


def _batch(module: Any, given: dict[str, Any], name: str) -> Any:
    """A method for continuous batching; `None` leaves it to transformers."""
    from unspool.interop.wrap import Wrapped

    reason = unserved(module)
    if reason is not None:
        return note(type(module).__name__, reason)
    rest = given.pop("kwargs", {})
    return getattr(ContinuousMixin, name)(Wrapped(module), **given, **rest)


def _decode(module: Any, given: dict[str, Any], name: str) -> Any:
    """A call that transformers prepared; `None` leaves it to transformers."""
    own = _own(module, _OWN_LOOP)
    reason = inner.declined(given) if own is None else f"it has a {own}() of its own"
    if reason is not None:
        return note(type(module).__name__, reason)
    return _theirs_alone(inner.decode(module, given, beams=name == "_beam_search"))


def _theirs_alone(result: Any) -> Any:
    """A result with the fields that transformers gives it: its callers may walk over all of them."""
    if isinstance(result, Tensor):
        return result
    theirs = getattr(sys.modules["transformers.generation.utils"], type(result).__name__)
    known = {one.name for one in fields(theirs)}
    return type(result)(**{one.name: getattr(result, one.name) for one in fields(result) if one.name in known})


def _declined(module: Any, given: dict[str, Any], rest: dict[str, Any]) -> str | None:
    """Why a call is left to transformers' own `generate()`; `None` when it is not."""
    own = _own(module, _OWN_WAY)
    if own is not None:
        return f"it has a {own}() of its own"
    if given.get("custom_generate") is not None:
        return "custom_generate is written for what transformers prepares"
    if rest.get("cache_implementation") == "paged":
        return "cache_implementation='paged' asks for transformers' continuous batching"
    try:
        resolved = resolve(rest, given.get("generation_config"), getattr(module, "generation_config", None))
    except Unsupported as error:
        return str(error)
    config = resolved.config
    mode = mode_of(config, given.get("assistant_model") is not None)
    if mode in (GenerationMode.CONTRASTIVE_SEARCH, GenerationMode.DOLA_GENERATION):
        return f"{mode.value} needs the hidden states of a native model"
    return _cannot_draft(module, given, resolved) if mode is GenerationMode.ASSISTED_GENERATION else None


def _cannot_draft(module: Any, given: dict[str, Any], resolved: Resolved) -> str | None:
    """Why drafts are left to transformers; `None` when they are not."""
    assistant, config, inputs = given.get("assistant_model"), resolved.config, resolved.unused
    if config.assistant_early_exit is not None or config.use_mtp:
        return "assistant_early_exit and use_mtp draft with the model's own parts"
    foreign = Foreign(module)
    if assistant is not None and (foreign.encoder_decoder or Foreign(assistant).encoder_decoder):
        return "the assistant of an encoder-decoder shares its encoder"
    traced = config.return_dict_in_generate and (config.output_attentions or config.output_hidden_states)
    if (traced or is_guided(config)) and not (_is_ragged(module, config) and inputs.keys() <= _TEXT):
        return "its drafts can be guided, and their attentions and hidden states told, in ragged calls only"
    ids = given.get("inputs", inputs.get("input_ids"))
    rows = ids.shape[0] * int(config.num_return_sequences or 1) if isinstance(ids, Tensor) else 1
    both = (module,) if assistant is None else (module, assistant)
    return next((reason for one in both if (reason := _cannot_go_back(one, rows, config)) is not None), None)


def _is_ragged(module: Any, config: GenerationConfig) -> bool:
    """Whether drafts of a module are checked over our own store."""
    return ForeignSource(module).shape_for(config, assisted=True) is not None


def _cannot_go_back(module: Any, rows: int, config: GenerationConfig) -> str | None:
    """Why rows of a module cannot lose tokens again; `None` when they can."""
    reason = Foreign(module).cannot_draft(rows)
    return None if reason is None or _is_ragged(module, config) else reason
