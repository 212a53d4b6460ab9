"""A module's calling convention: what its `forward` takes, and transformers' generation hooks, its own or the default.

The hooks are those that transformers documents for models that generate. A module that defines one (all of transformers
do, by inheritance) is asked; for others the default here does the same for text decoders and encoder-decoders.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import cached_property
from types import SimpleNamespace
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from unspool.cache import (
    Cache,
    DynamicCache,
    EncoderDecoderCache,
    OffloadedCache,
    OffloadedStaticCache,
    QuantizedCache,
    StaticCache,
)
from unspool.cache.arrange import layer_kinds
from unspool.config import GenerationConfig
from unspool.config.fields import FIELDS
from unspool.config.unknown import ARGUMENTS, no_use_for
from unspool.errors import Unsupported

__all__ = ["CACHE_NAMES", "Foreign", "like"]

# Under these names modules take and give their past.
CACHE_NAMES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")

# Inputs that belong to the prompt: fed with it, and not again while a cache remembers them.
_PROMPT_ONLY = frozenset(
    ("pixel_values", "pixel_mask", "pixel_values_videos", "input_features", "input_values", "image_sizes", "images")
)

# Names of static caches in older versions; the configuration tells the kinds of layers.
_OLD_NAMES = {
    "sliding_window": "static",
    "hybrid": "static",
    "hybrid_chunked": "static",
    "offloaded_hybrid": "offloaded_static",
    "offloaded_hybrid_chunked": "offloaded_static",
}


class Foreign:
    """A module as the rows tier knows it.

    Attributes:
        module: as given, never changed.
        config: its configuration, or `None`.
        encoder_decoder: whether it has an encoder that is called once.
        device: of its weights.
        cache_name: the argument that its past is passed as.
        by_place: transformers before 5.4: columns to feed are told by `cache_position`, and masks are always passed.
        from_transformers: whether it is one of transformers' models, or a subclass of one.

    Raises:
        TypeError: `forward` takes no ids, so it cannot be decoded.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.config = getattr(module, "config", None)
        self.encoder_decoder = bool(_entry(self.config, "is_encoder_decoder"))
        found = next((p for p in module.parameters() if p.device.type != "meta"), None)
        own = getattr(module, "device", None)
        fallback = torch.device("cpu") if found is None else found.device
        self.device = own if isinstance(own, torch.device) and own.type != "meta" else fallback
        theirs = getattr(sys.modules.get("transformers"), "PreTrainedModel", None)
        self.from_transformers = theirs is not None and isinstance(module, theirs)
        # a wrapper's forward takes anything: its hook tells, or the module inside
        self.arguments, self.open = _arguments(module.forward)
        self._prepared: frozenset[str] | None = None  # what prepare_inputs_for_generation takes, once it was asked
        if not self.open and not self.arguments & {self.ids_name, "inputs_embeds", "input_ids"}:
            raise TypeError(
                f"{type(module).__name__}.forward takes no {self.ids_name}; generation needs "
                "forward(input_ids, attention_mask=None, past_key_values=None, use_cache=None)"
            )
        mamba = "mamba" in type(module).__name__.lower() and self.from_transformers
        self.by_place = self.hook("_get_initial_cache_position") is not None
        self.cache_name = "cache_params" if mamba else "past_key_values"

    @property
    def ids_name(self) -> str:
        """The argument that token ids are passed as in each step."""
        return "decoder_input_ids" if self.encoder_decoder else "input_ids"

    @property
    def mask_name(self) -> str:
        """The argument that the mask of these ids is passed as."""
        return "decoder_attention_mask" if self.encoder_decoder else "attention_mask"

    def accepts(self, name: str) -> bool:
        """Whether `forward` names an argument."""
        return name in self.arguments

    def entry(self, name: str) -> Any:
        """An entry of the configuration (of its decoder, where that is nested), or `None`."""
        found = _entry(self.config, name)
        return found if found is not None else _entry(self.text_config, name)

    @cached_property
    def text_config(self) -> Any:
        """The configuration of the decoder."""
        read = getattr(self.config, "get_text_config", None)
        return self.config if read is None else read(decoder=True)

    def hook(self, name: str) -> Callable[..., Any] | None:
        """A hook of the module's own, or `None`."""
        return cast("Callable[..., Any] | None", getattr(self.module, name, None))

    def their_config(self, config: GenerationConfig, has_mask: bool, rows: int) -> Any:
        """The settings as hooks read them: transformers' own class for its models, with special tokens as tensors."""
        prepare = self.hook("_prepare_special_tokens")
        if prepare is None:
            return config
        made = sys.modules["transformers"].GenerationConfig()
        for name, value in vars(config).items():
            if not name.startswith("_") and (value is not None or not hasattr(made, name)):
                setattr(made, name, value)
        counts = {"batch_size": rows} if "batch_size" in _arguments(prepare)[0] else {}
        prepare(made, has_mask, device=self.device, **counts)
        return made

    def check(self, inputs: dict[str, Any]) -> None:
        """Refuse arguments that the module has no use for.

        Raises:
            ValueError: it names them, and the nearest that there are.
        """
        validate = self.hook("_validate_model_kwargs")
        prepare = self.hook("prepare_inputs_for_generation")
        named, open_ended = _arguments(prepare) if prepare is not None else (frozenset[str](), True)
        encoded = {"inputs_embeds", "decoder_input_ids", "decoder_attention_mask", "encoder_outputs"}
        known = {*named, *self.arguments, *encoded}
        wrong = [name for name, value in inputs.items() if value is not None and name not in known]
        if validate is not None:
            try:
                validate(dict(inputs))
            except ValueError:
                if not wrong:
                    raise
            else:
                return
        elif self.open and open_ended:
            return
        if wrong:
            known = (known | {*FIELDS, *ARGUMENTS}) - {"self", "kwargs"}
            raise ValueError(no_use_for(type(self.module).__name__, wrong, known))

    def check_records(self, wanted: str, detailed: bool) -> None:
        """Raise `Unsupported` for attentions or hidden states that are to be given and the module does not know of."""
        if detailed and not self.open and not self.accepts(wanted) and not self.from_transformers:
            raise Unsupported(f"{wanted}=True: {type(self.module).__name__}.forward takes no {wanted}; leave it out")

    # What is fed in each step

    def prepare(self, ids: Tensor, inputs: dict[str, Any], fed: int | None, first: bool) -> dict[str, Any]:
        """The arguments of one `forward`.

        Args:
            ids: `[rows, columns]` everything so far, the new columns last.
            inputs: what is carried from step to step.
            fed: how many of the columns are new to the module; `None` when all are.
            first: the prompt is being fed.
        """
        hook = self.hook("prepare_inputs_for_generation")
        if hook is None:
            return self._arguments_of(ids, inputs, fed, first)
        if self._prepared is None:
            self._prepared = _arguments(hook)[0]
        names = self._prepared
        extra: dict[str, Any] = {}
        if (self.from_transformers and not self.by_place) or "next_sequence_length" in names:
            extra["next_sequence_length"] = fed
        if self.from_transformers or "is_first_iteration" in names:
            extra["is_first_iteration"] = first
        if "cache_position" in names and "cache_position" not in inputs:
            new = ids.shape[1] if fed is None else fed
            extra["cache_position"] = torch.arange(ids.shape[1] - new, ids.shape[1], device=ids.device)
        return dict(hook(ids, **extra, **inputs))

    def begin(self, columns: int, device: torch.device, inputs: dict[str, Any]) -> dict[str, Any]:
        """`inputs` as they are before the first of `columns` columns is fed."""
        hook = self.hook("_get_initial_cache_position")
        return inputs if hook is None else dict(hook(columns, device, inputs))

    def _arguments_of(self, ids: Tensor, inputs: dict[str, Any], fed: int | None, first: bool) -> dict[str, Any]:
        new = ids if fed is None else ids[:, ids.shape[1] - fed :]
        given: dict[str, Any] = {}
        embeds = inputs.get("inputs_embeds")
        if embeds is not None and not self.encoder_decoder and first:
            given["inputs_embeds"] = embeds if fed is None else embeds[:, embeds.shape[1] - fed :]
            columns = given["inputs_embeds"].shape[1]
        else:
            given[self.ids_name] = new.contiguous()
            columns = new.shape[1]
        cached = inputs.get("use_cache", False)
        for name, value in inputs.items():
            if value is None or name == "inputs_embeds" or (name in _PROMPT_ONLY and cached and not first):
                continue
            per_token = name in ("position_ids", "token_type_ids", "decoder_position_ids")
            given[name] = value[..., value.shape[-1] - columns :] if per_token else value
        return given if self.open else {name: value for name, value in given.items() if name in self.arguments}

    def call(self, arguments: dict[str, Any]) -> Any:
        """One `forward`."""
        if self.from_transformers or self.accepts("return_dict"):
            arguments["return_dict"] = True
        return self.module(**arguments)

    def alone(
        self, ids: Tensor, attention_mask: Any = None, use_cache: bool | None = None, past_key_values: Any = None
    ) -> SimpleNamespace:
        """One `forward` outside of the loop: its `logits`, and its `past_key_values` for the next."""
        if use_cache and past_key_values is None and self._takes_a_cache:
            past_key_values = DynamicCache()
        given = {
            "attention_mask": attention_mask,
            "use_cache": use_cache,
            self.cache_name: past_key_values,
        }
        taken = {
            name: value for name, value in given.items() if value is not None and (self.open or self.accepts(name))
        }
        output = self.call({self.ids_name: ids, **taken})
        past = _past(output) if use_cache else None
        return SimpleNamespace(logits=self.logits(output), past_key_values=past_key_values if past is None else past)

    def update(self, output: Any, inputs: dict[str, Any], new: int) -> dict[str, Any]:
        """What to carry into the next step, in which `new` more columns are fed."""
        hook = self.hook("_update_model_kwargs_for_generation")
        if hook is not None:
            return dict(hook(output, inputs, is_encoder_decoder=self.encoder_decoder, num_new_tokens=new))
        carried = dict(inputs)
        past = _past(output)
        if past is not None and carried.get("use_cache", True):
            carried[self.cache_name] = past
        elif carried.get(self.cache_name) is None:
            carried["use_cache"] = False  # nothing remembers the past: all of it is fed in every step
        types, places, mask = (carried.get(name) for name in ("token_type_ids", "position_ids", self.mask_name))
        if types is not None:
            carried["token_type_ids"] = torch.cat([types, types[:, -1:].expand(-1, new)], dim=1)
        if places is not None:
            following = places[..., -1:] + torch.arange(1, new + 1, device=places.device)
            carried["position_ids"] = torch.cat([places, following], dim=-1)
        if mask is not None:
            carried[self.mask_name] = torch.cat([mask, mask.new_ones(mask.shape[0], new)], dim=1)
        return carried

    def logits(self, output: Any) -> Tensor:
        """Logits `[rows, columns, vocab]` of one `forward`.

        Raises:
            TypeError: it gave none.
        """
        found = output if isinstance(output, Tensor) else _field(output, "logits", 0)
        if not isinstance(found, Tensor) or found.ndim != 3:
            shape = f" of shape {list(found.shape)}" if isinstance(found, Tensor) else ""
            raise TypeError(
                f"{type(self.module).__name__}.forward gave {type(found).__name__}{shape}; generation needs logits "
                "[rows, tokens, vocab], as the output itself, its field `logits` or its first item"
            )
        return found

    # What is set up before the first step

    def mask(self, ids: Tensor, inputs: dict[str, Any], their: Any) -> Tensor:
        """The mask of a prompt that came without one: pad tokens are padding where they cannot be anything else."""
        hook = self.hook("_prepare_attention_mask_for_generation")
        if hook is not None:
            return cast(Tensor, hook(ids, their, inputs))
        pad, eos = their.pad_token_id, their.eos_token_id
        ends = set(eos) if isinstance(eos, list | tuple) else {eos}
        text = not ids.is_floating_point() and ids.ndim == 2
        if not text or pad is None or pad in ends:
            return torch.ones(ids.shape[:2], dtype=torch.int64, device=ids.device)
        return ids.ne(pad).long()

    def positions(self, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Places of a prompt's columns in their rows."""
        hook = self.hook("_prepare_position_ids_for_generation")
        if hook is not None:
            return cast(Tensor, hook(ids, inputs))
        mask = inputs.get("attention_mask")
        if mask is None:
            past = inputs.get(self.cache_name)
            begin = 0 if past is None else past.get_seq_length()
            return torch.arange(ids.shape[1] + begin, device=ids.device)[None]
        places: Tensor = mask.long().cumsum(-1) - 1
        return places.masked_fill(mask == 0, 0)

    def encode(self, ids: Tensor, name: str, inputs: dict[str, Any], their: Any) -> dict[str, Any]:
        """`inputs` with what encoders make of the prompt; the encoder runs once."""
        hook = self.hook("_maybe_prepare_encoder_kwargs_for_generation")
        if hook is not None:
            return dict(hook(ids, inputs, name, their))
        if not self.encoder_decoder or inputs.get("encoder_outputs") is not None:
            return inputs
        hook = self.hook("_prepare_encoder_decoder_kwargs_for_generation")  # transformers 5.2
        if hook is not None:
            return dict(hook(ids, inputs, name, their))
        get = self.hook("get_encoder")
        encoder = get() if get is not None else getattr(self.module, "encoder", None)
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"{type(self.module).__name__} is an encoder-decoder without get_encoder() or .encoder")
        known, open_ended = _arguments(encoder.forward)
        others = ("decoder_", "cross_attn", "use_cache", *CACHE_NAMES)
        given = {
            key: value for key, value in inputs.items() if not key.startswith(others) and (key in known or open_ended)
        }
        return {**inputs, "encoder_outputs": encoder(**{**given, name: ids})}

    def cache(self, config: GenerationConfig, their: Any, inputs: dict[str, Any], rows: int, columns: int) -> None:
        """Put an empty cache for `rows` rows of up to `columns` columns into `inputs`, if the module takes one.

        Raises:
            ValueError: both a cache and `cache_implementation` are given, or the kind is not known.
            Unsupported: the module takes no such cache.
        """
        wanted = config.cache_implementation
        if inputs.get(self.cache_name) is not None:
            if wanted is not None:
                raise ValueError(f"cache_implementation={wanted!r} and {self.cache_name} exclude each other; pass one")
            return
        if wanted == "paged":  # rows of a continuous batch, which it asks for, have the module's own past
            wanted = their.cache_implementation = None
        if not config.use_cache:
            return
        supports = self.hook("_supports_default_dynamic_cache")
        takes = supports() if supports is not None else self._takes_a_cache
        if not takes:
            if wanted is not None:
                raise Unsupported(
                    f"cache_implementation={wanted!r}: {type(self.module).__name__} keeps its past in its own way; "
                    "leave it out"
                )
            return
        own = getattr(self.hook("_prepare_cache_for_generation"), "__func__", None)
        if own is not None and own.__module__ != "transformers.generation.utils":
            self.hook("_prepare_cache_for_generation")(their, inputs, their.get_generation_mode(), rows, columns)  # type: ignore[misc]
            return
        inputs[self.cache_name] = self._make_cache(wanted, config.cache_config, inputs, columns)

    @property
    def _takes_a_cache(self) -> bool:
        """Whether `forward` says that its past is a `Cache`; else it gets none at first, and then what it gave back."""
        parameter = inspect.signature(self.module.forward).parameters.get(self.cache_name)
        return parameter is not None and "Cache" in str(parameter.annotation)

    def empty_cache(self) -> Any:
        """A cache of the kind that the module gets when nobody asks for another."""
        return self._make_cache(None, None, {}, 0)

    def _make_cache(self, kind: str | None, options: Any, inputs: dict[str, Any], columns: int) -> Any:
        try:
            config: Any = layer_kinds(self.config)
        except (ValueError, Unsupported):
            if kind not in (None, "dynamic"):
                raise
            theirs = getattr(sys.modules.get("transformers"), "DynamicCache", None)
            if not self.from_transformers or theirs is None:
                return DynamicCache()
            return theirs(config=self.text_config)
        length = max(columns, 1)
        make: dict[str | None, Callable[[], Any]] = {
            None: lambda: DynamicCache(config=config),
            "dynamic": lambda: DynamicCache(config=config),
            "offloaded": lambda: OffloadedCache(config=config),
            "static": lambda: StaticCache(config, length),
            "offloaded_static": lambda: OffloadedStaticCache(config, length),
            "quantized": lambda: QuantizedCache(config=config, **_quantized_options(options)),
        }
        kind = _OLD_NAMES.get(kind or "", kind)
        if kind not in make:
            raise Unsupported(
                f"cache_implementation={kind!r} is not for a module's own past; take one of "
                f"{', '.join(repr(name) for name in make if name)}"
            )
        made = make[kind]()
        if not self.encoder_decoder:
            return made
        if kind in ("static", "offloaded_static"):
            length = _field(inputs["encoder_outputs"], "last_hidden_state", 0).shape[1]
            return EncoderDecoderCache(made, StaticCache(config, length))
        return EncoderDecoderCache(made, DynamicCache(config=config))

    def cannot_draft(self, rows: int) -> str | None:
        """Why several tokens of a row cannot be checked in one step and taken back; `None` when they can.

        Args:
            rows: advance together, each by its own number of tokens.
        """
        try:
            kinds = {kind for kind, _, _ in layer_kinds(self.text_config)}
        except (ValueError, Unsupported):
            kinds = {"full_attention"}
        windows = kinds & {"sliding_attention", "chunked_attention"}
        if kinds - windows - {"full_attention"}:
            return f"its {', '.join(sorted(kinds - windows - {'full_attention'}))} layers cannot go back"
        if rows == 1:
            return None
        if self.encoder_decoder or not self.accepts("attention_mask") or not self.accepts("position_ids"):
            return "its rows can only advance in step; decode one row at a time"
        return "its window counts columns, where rows come to have holes; decode one row at a time" if windows else None

    def reorder(self, past: Any, index: Tensor, alike: int | None = None) -> Any:
        """A past with its rows at places `index` `[rows]`.

        Args:
            past: the module's.
            index: a place for each row.
            alike: columns in which each row agrees with the one at its place, where that is known.

        Raises:
            Unsupported: the module's kind of past cannot be reordered.
        """
        hook = self.hook("_reorder_cache")
        if hook is not None:
            return hook(past, index)
        if alike is not None and isinstance(past, Cache):
            past.reorder_after(index, alike)
            return past
        if hasattr(past, "reorder_cache"):
            past.reorder_cache(index)
            return past
        if self.from_transformers:
            raise Unsupported(
                f"{type(self.module).__name__} keeps its past in a {type(past).__name__} that cannot be reordered; "
                "decode with num_beams=1"
            )
        try:
            return _select(past, index)
        except IndexError:
            raise Unsupported(
                f"{type(self.module).__name__} keeps a past whose tensors have not a row for each text first, as beams "
                "need; give it a method _reorder_cache(past, index), or decode with num_beams=1"
            ) from None


def _quantized_options(options: Any) -> dict[str, Any]:
    """`cache_config`, of which each entry is an argument of the cache."""
    known = _arguments(QuantizedCache.__init__)[0] - {"self", "config"}
    wrong = set(options or {}) - known
    if wrong:
        raise ValueError(no_use_for("cache_config of a quantized cache", wrong, known))
    return dict(options or {})


# Of methods, by what they are made from: to read a signature takes longer than to prepare a call.
_known: WeakKeyDictionary[Any, tuple[frozenset[str], bool]] = WeakKeyDictionary()


def _arguments(function: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """Names of a function's arguments, and whether it takes any other too."""
    method = getattr(function, "__func__", None)
    if method is not None and method in _known:
        return _known[method]
    parameters = inspect.signature(function).parameters.values()
    named = frozenset(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))
    found = named, any(p.kind is p.VAR_KEYWORD for p in parameters)
    if method is not None:
        _known[method] = found
    return found


def _entry(config: Any, name: str) -> Any:
    return config.get(name) if isinstance(config, dict) else getattr(config, name, None)


def _field(output: Any, name: str, place: int) -> Any:
    """A field of an output: an attribute, an entry, or an item of a tuple."""
    if isinstance(output, dict):
        return output.get(name)
    if hasattr(output, name):
        return getattr(output, name)
    return output[place] if isinstance(output, list | tuple) and len(output) > place else None


def _past(output: Any) -> Any:
    """The past that an output brings, under whatever name."""
    if isinstance(output, Tensor):
        return None
    found = (_field(output, name, 1) for name in CACHE_NAMES)
    return next((one for one in found if one is not None), None)


def _select(past: Any, index: Tensor) -> Any:
    """Tensors `[rows, ...]` in nested lists, tuples and dicts, with their rows at places `index`."""
    if isinstance(past, Tensor):
        if past.shape[:1] != index.shape:
            raise IndexError(f"{list(past.shape)} has not {len(index)} rows")
        return past.index_select(0, index.to(past.device))
    if isinstance(past, dict):
        return {name: _select(value, index) for name, value in past.items()}
    if isinstance(past, list | tuple):
        return like(past, [_select(value, index) for value in past])
    return past


def like(container: list[Any] | tuple[Any, ...], items: list[Any]) -> Any:
    """A container of the same kind with other items: a list, a tuple, or a named one."""
    kind: Any = type(container)
    return kind(*items) if hasattr(container, "_fields") else kind(items)
