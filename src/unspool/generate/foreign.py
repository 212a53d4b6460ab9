"""Foreign modules as a call's source and backend: their inputs read with their own hooks, run as rows."""

from __future__ import annotations

import math
from collections.abc import Sequence as Items
from contextlib import AbstractContextManager
from copy import copy
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unspool.bridge.drafts import DraftRows
from unspool.bridge.module import CACHE_NAMES, Foreign, like
from unspool.bridge.probe import Verdict, judge
from unspool.bridge.ragged import RaggedModel, Shape
from unspool.bridge.rows import Record, RowsRunner
from unspool.bridge.unseen import unseen
from unspool.cache import PastKeyValues
from unspool.config import GenerationConfig, resolve
from unspool.config.lengths import end_tokens
from unspool.decode.runner import Runner
from unspool.decode.sequence import Sequence
from unspool.errors import Unsupported
from unspool.generate.call import Abilities, Backend, Exits
from unspool.generate.healing import heal_prompts
from unspool.generate.inputs import Prompts
from unspool.generate.outputs import (
    GenerateBeamDecoderOnlyOutput,
    GenerateBeamEncoderDecoderOutput,
    GenerateDecoderOnlyOutput,
    GenerateEncoderDecoderOutput,
    GenerateOutput,
)
from unspool.generate.ragged import RaggedBackend, inputs_need_rows, needs_rows
from unspool.generate.reading import Arguments, Reading


class ForeignSource:
    """See `generate.reading.Source`. The steps and their order are those of transformers' `generate()`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.foreign = Foreign(module)
        self.unconditional: Any = module if self.foreign.from_transformers else self.foreign.alone
        self.device = self.foreign.device
        self.vocab_size: int | None = self.foreign.entry("vocab_size")
        positions = getattr(self.foreign.config, "max_position_embeddings", None)
        self.max_positions: int | None = positions if isinstance(positions, int) else None
        self.beyond: Literal["refuse", "warn", "allow"] = "allow"

    def read(self, arguments: Arguments, config: GenerationConfig, copies: int) -> Reading:
        """See `Source`; runs the encoder where there is one, and probes the module where that was not done yet."""
        reading = self.read_rows(arguments, config, copies)
        shape = (
            self.shape_for(config, arguments.assisted) if inputs_need_rows(arguments, reading.prompts) is None else None
        )
        if shape is not None:
            model = RaggedModel(self.foreign, shape)
            reading.backend = RaggedBackend(model, reading.backend, config, reading.prompts)
        return reading

    def shape_for(self, config: GenerationConfig, assisted: bool) -> Shape | None:
        """What the module's attention is asked for, where a call with such settings (and drafts) can run ragged."""
        if needs_rows(config, assisted, gives_cache=True) is not None:
            return None
        shape = self.verdict().shape
        return None if shape is None or needs_rows(config, assisted, shape.gives_cache) is not None else shape

    def verdict(self) -> Verdict:
        """Whether the module can run ragged, and why not."""
        return judge(self.foreign, self._own_path)

    def _own_path(self, ids: Tensor, mask: Tensor, new: int) -> tuple[list[Sequence], Runner]:
        """See `bridge.probe.OwnPath`."""
        config = resolve({}, None, getattr(self.module, "generation_config", None)).config
        config.use_cache, config.cache_implementation = True, None
        config.return_dict_in_generate = config.output_attentions = config.output_hidden_states = False
        reading = self.read_rows(Arguments(None, {"input_ids": ids, "attention_mask": mask}), config, 1)
        rows = [Sequence(i, list(tokens)) for i, tokens in enumerate(reading.prompts.tokens)]
        return rows, reading.backend.runner(rows, 1, new, None, forks=False)

    @torch.no_grad()
    def read_rows(self, arguments: Arguments, config: GenerationConfig, copies: int) -> Reading:
        """The same, for the module's own way of running."""
        foreign = self.foreign
        inputs = dict(arguments.rest)
        foreign.check(inputs)
        main, name, inputs = self._main_input(arguments.inputs, inputs, config)
        if config.token_healing:
            main = self._healed(main, name, inputs.get("attention_mask"), arguments.tokenizer)
        has_mask = inputs.get("attention_mask") is not None
        their = foreign.their_config(config, has_mask, main.shape[0])
        if name == "inputs_embeds" and not foreign.encoder_decoder:
            config.use_cache = True  # else nothing would tell the first step from the others
        mask_length = self._mask_and_positions(main, inputs, their, has_mask)
        inputs = foreign.encode(main, name, inputs, their)
        if foreign.encoder_decoder:
            ids, inputs = self.decoder_ids(main.shape[0], name, inputs, config, their)
        else:
            ids = main if name == "input_ids" else inputs.pop("input_ids")
        mask = inputs.get(foreign.mask_name)
        seen = rows_of(ids, mask)
        rows, inputs = self._expand(ids, inputs, copies)
        if foreign.accepts("logits_to_keep") and "logits_to_keep" not in inputs:
            inputs["logits_to_keep"] = 1
        for wanted in ("output_attentions", "output_hidden_states"):
            if getattr(config, wanted) and wanted not in inputs:
                foreign.check_records(wanted, bool(config.return_dict_in_generate))
                inputs[wanted] = True
        inputs["use_cache"] = config.use_cache
        prompts = rows_of(rows, inputs.get(foreign.mask_name))
        return Reading(
            prompts=prompts,
            seen=seen,
            backend=RowsBackend(foreign, config, their, inputs, rows, mask_length),
            past=None,
            encoder_ids=main if main.ndim == 2 and not main.is_floating_point() else None,
            padding=None if foreign.encoder_decoder or not rows.shape[1] else prompts.padding(),
            embeds=main.shape[1] if name == "inputs_embeds" and not foreign.encoder_decoder else 0,
        )

    def draft(self, arguments: Arguments, config: GenerationConfig) -> Backend:
        """See `Source`."""
        if self.foreign.encoder_decoder:
            raise Unsupported("assistant_model is an encoder-decoder, which cannot draft here; leave it out")
        return self.read(arguments, config, 1).backend

    def _main_input(
        self, given: Any, inputs: dict[str, Any], config: GenerationConfig
    ) -> tuple[Tensor, str, dict[str, Any]]:
        """What the module (of an encoder-decoder, the encoder) reads, its name, and the other inputs."""
        foreign = self.foreign
        for one in (given, inputs.get("input_ids")):
            if one is not None and not isinstance(one, (Tensor, list)):
                raise TypeError(
                    f"input_ids must be a tensor, or a list of token ids for each row, not {type(one).__name__}; "
                    "pass what the tokenizer gave as generate(**inputs)"
                )
        if isinstance(inputs.get("past_key_values"), PastKeyValues):
            raise TypeError(
                f"past_key_values comes from a call on a native model, and {type(foreign.module).__name__} is none; "
                "leave it out"
            )
        if isinstance(given, list) or isinstance(inputs.get("input_ids"), list):
            given, inputs = _from_lists(given, inputs, config.pad_token_id)
        hook = foreign.hook("_prepare_model_inputs")
        if hook is not None:
            main, name, inputs = hook(given, config.bos_token_id, inputs)
            if name == "input_ids":
                _check_ids(main)
                self._check_vocabulary(main, inputs)
            return main.to(self.device), name, {key: _moved(value, self.device) for key, value in inputs.items()}
        name = getattr(foreign.module, "main_input_name", "input_ids")
        passed = inputs.pop(name, None)
        if given is not None and passed is not None:
            raise ValueError(f"pass the prompts as `inputs` or as `{name}`, not both")
        main = passed if given is None else given
        embeds = inputs.get("inputs_embeds")
        if embeds is not None:
            if foreign.encoder_decoder and main is not None:
                raise ValueError("pass either inputs_embeds or input_ids; the encoder reads one of them")
            if not foreign.encoder_decoder:
                rows = embeds.shape[0]
                none = torch.empty(rows, 0, dtype=torch.int64)
                inputs["input_ids"] = (none if main is None else main).to(self.device)
            main, name = embeds, "inputs_embeds"
        if main is None and config.bos_token_id is None:
            raise ValueError("input_ids is empty and the model has no bos_token_id to start from; pass a prompt")
        if main is None:
            main = torch.full((1, 1), int(config.bos_token_id or 0))
        if not isinstance(main, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(main).__name__}")
        if name == "input_ids":
            _check_ids(main)
        return main.to(self.device), name, {key: _moved(value, self.device) for key, value in inputs.items()}

    def _check_vocabulary(self, ids: Tensor, inputs: dict[str, Any]) -> None:
        """Raise `ValueError` for ids that the embedding does not have; beside other inputs they may be placeholders."""
        get = self.foreign.hook("get_input_embeddings")
        table = None if get is None or set(inputs) - {"input_ids", "attention_mask"} else get()
        if not isinstance(table, nn.Embedding):
            return
        wrong = ids[(ids < 0) | (ids >= table.num_embeddings)]
        if wrong.numel():
            raise ValueError(
                f"input_ids holds token id {int(wrong[0])}, outside the model's vocabulary of {table.num_embeddings}; "
                "use the tokenizer that belongs to the model"
            )

    def _healed(self, main: Tensor, name: str, mask: Any, tokenizer: Any) -> Tensor:
        """Prompts with healed last tokens."""
        foreign = self.foreign
        if foreign.encoder_decoder or name != "input_ids":
            raise Unsupported(f"token_healing needs a decoder's input_ids, and this call reads {name}; leave it out")
        inputs = {"use_cache": False} if foreign.accepts("use_cache") else {}

        def logits(ids: Tensor) -> Tensor:
            return foreign.logits(foreign.call({"input_ids": ids, **inputs}))

        return heal_prompts(logits, rows_of(main, mask), tokenizer).rectangle

    def _mask_and_positions(self, main: Tensor, inputs: dict[str, Any], their: Any, has_mask: bool) -> int | None:
        """Fill in what the module takes and the caller left out; gives a dropped mask's width."""
        foreign = self.foreign
        takes_mask = foreign.accepts("attention_mask")
        if not has_mask and not foreign.encoder_decoder and takes_mask:
            inputs["attention_mask"] = foreign.mask(main, inputs, their)
        if foreign.encoder_decoder:
            return None
        if inputs.get("position_ids") is None and foreign.accepts("position_ids"):
            inputs["position_ids"] = foreign.positions(main, inputs)
        mask = inputs.get("attention_mask")
        if takes_mask and not foreign.by_place and mask is not None and mask.ndim == 2 and bool((mask == 1).all()):
            inputs["attention_mask"] = None
            return int(mask.shape[1])
        return None

    def decoder_ids(
        self, rows: int, name: str, inputs: dict[str, Any], config: GenerationConfig, their: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        """What an encoder-decoder's decoder begins with."""
        start = config.decoder_start_token_id
        start = config.bos_token_id if start is None else start
        if start is None:
            raise ValueError("decoder_start_token_id (or bos_token_id) must be set: the decoder has to begin somewhere")
        hook = self.foreign.hook("_prepare_decoder_input_ids_for_generation")
        if hook is not None:
            token = their._decoder_start_token_tensor
            ids, inputs = hook(rows, name, inputs, token, device=self.device)
            return ids, inputs
        begin = torch.as_tensor(start, device=self.device).reshape(-1, 1).expand(rows, 1)
        ids = inputs.pop("decoder_input_ids", None)
        if ids is None:
            return begin.contiguous(), inputs
        if bool((ids[:, :1] != begin).all()):
            ids = torch.cat([begin, ids], dim=1)
        return ids, inputs

    def _expand(self, ids: Tensor, inputs: dict[str, Any], copies: int) -> tuple[Tensor, dict[str, Any]]:
        """Ids and inputs with every row `copies` times, side by side."""
        if copies == 1:
            return ids, inputs
        hook = self.foreign.hook("_expand_inputs_for_generation")
        if hook is not None:
            # the hook writes into dicts, and outputs of an encoder, which may be the caller's
            inputs = {name: copy(value) if isinstance(value, dict) else value for name, value in inputs.items()}
            given = {"expand_size": copies, "is_encoder_decoder": self.foreign.encoder_decoder, "input_ids": ids}
            rows, inputs = hook(**given, **inputs)
            return rows, inputs
        return ids.repeat_interleave(copies, dim=0), {
            name: _repeated(value, ids.shape[0], copies) for name, value in inputs.items()
        }


_WITH_ENCODER: dict[type, type[GenerateEncoderDecoderOutput] | type[GenerateBeamEncoderDecoderOutput]] = {
    GenerateDecoderOnlyOutput: GenerateEncoderDecoderOutput,
    GenerateBeamDecoderOnlyOutput: GenerateBeamEncoderDecoderOutput,
}


class RowsBackend:
    """See `generate.call.Backend`."""

    abilities = Abilities(shares_prompts=False, traces=False, prompt_budget=None)
    positions = math.inf
    recompute_past: int | None = None
    windows: Items[int | None] = ()
    vocab: int

    def __init__(
        self,
        foreign: Foreign,
        config: GenerationConfig,
        their: Any,
        inputs: dict[str, Any],
        ids: Tensor,
        mask_length: int | None,
    ) -> None:
        self.foreign = foreign
        self.device = ids.device
        self.vocab = int(foreign.entry("vocab_size") or 2**31)  # unknown: logits will tell
        self._config, self._their, self._inputs, self._ids = config, their, inputs, ids
        self._mask_length = mask_length
        self._encoded = inputs.get("encoder_outputs")
        detailed = bool(config.return_dict_in_generate)
        heads, hidden = bool(config.output_attentions), bool(config.output_hidden_states)
        self._record = Record(heads, hidden) if detailed and (heads or hidden) else None
        self._runner: RowsRunner | None = None
        self._past_is_given = any(inputs.get(name) is not None for name in CACHE_NAMES)

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
    ) -> RowsRunner:
        """See `Backend`: makes the module's cache."""
        embeds = self._inputs.get("inputs_embeds")
        begin = self._ids.shape[1] if embeds is None or self.foreign.encoder_decoder else embeds.shape[1]
        self.foreign.cache(self._config, self._their, self._inputs, len(rows), max(begin, self._ids.shape[1]) + new - 1)
        pad, eos = self._config.pad_token_id, end_tokens(self._config)
        filler = int(pad) if pad is not None else eos[0] if eos else 0
        kind = DraftRows if drafts else RowsRunner
        self._runner = kind(
            self.foreign, rows, copies, self._ids, self._inputs, filler, self._mask_length, self._record
        )
        return self._runner

    def kwargs(self, rows: list[Sequence], new: int) -> dict[str, Any]:
        """The module's inputs beside the ids, with its cache: what a generation method of the caller's goes on from."""
        self.runner(rows, 1, new, None, forks=False)
        return dict(self._inputs)

    def exits(self) -> Exits:
        """See `Backend`."""
        raise Unsupported("contrastive search (penalty_alpha) and dola_layers need a native model; leave them out")

    def first_layers(self, layers: int) -> RowsBackend:
        """See `Backend`."""
        raise Unsupported("assistant_early_exit needs a native model; leave it out")

    def past(self, rows: list[Sequence], runner: Any, width: int) -> Any:
        """See `Backend`: the module's own cache."""
        return runner.past

    def dress(self, result: Tensor | GenerateOutput) -> Tensor | GenerateOutput:
        """See `Backend`: with the attentions and hidden states of every step, and the encoder's."""
        if isinstance(result, Tensor):
            return result
        record = self._record
        heads = None if record is None or record.attentions is None else tuple(record.attentions)
        hidden = None if record is None or record.hidden_states is None else tuple(record.hidden_states)
        assert self._runner is not None
        values = {one.name: getattr(result, one.name) for one in fields(result)}
        values["past_key_values"] = self._runner.past if self._config.use_cache else None
        if not self.foreign.encoder_decoder:
            values |= {"attentions": heads, "hidden_states": hidden}
            return type(result)(**values)
        kind = _WITH_ENCODER[type(result)]
        values |= {
            "encoder_attentions": getattr(self._encoded, "attentions", None) if heads is not None else None,
            "encoder_hidden_states": getattr(self._encoded, "hidden_states", None) if hidden is not None else None,
            "decoder_attentions": heads,
            "cross_attentions": None if heads is None or record is None else tuple(record.cross_attentions or ()),
            "decoder_hidden_states": hidden,
        }
        return kind(**{one.name: values[one.name] for one in fields(kind) if one.name in values})

    def unseen(self) -> AbstractContextManager[Any]:
        """See `Backend`."""
        return torch.no_grad() if self._past_is_given else unseen(self.foreign.module)

    def idle(self) -> None:
        """See `Backend`."""
        arguments: dict[str, Any] = {self.foreign.ids_name: self._ids.new_zeros(1, 1), "use_cache": False}
        if self._encoded is not None:
            arguments["encoder_outputs"] = self._encoded
            arguments[self.foreign.ids_name] = self._ids.new_zeros(self._ids.shape[0], 1)
        self.foreign.call(arguments)

    def fault(self, row: Sequence) -> str:
        """See `Backend`."""
        name = type(self.foreign.module).__name__
        logits = None if self._runner is None else self._runner.logits
        if logits is not None and not bool(logits[row.row].isfinite().all()):
            return f"the logits of {name} are not finite (damaged weights, or too narrow a dtype?)"
        return f"the logits of {name} are finite, so a logits processor left no token to choose"


def _check_ids(ids: Tensor) -> None:
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"input_ids must be integers [rows, columns], not {ids.dtype} of {list(ids.shape)}")


def rows_of(ids: Tensor, mask: Tensor | None) -> Prompts:
    """Ids as prompts; true tokens are those that `mask` keeps."""
    if mask is None or mask.shape != ids.shape:
        return Prompts(ids, torch.ones_like(ids, dtype=torch.bool), ids.tolist())
    true = mask.bool()
    return Prompts(ids, true, [row[keep].tolist() for row, keep in zip(ids, true, strict=True)])


def _from_lists(given: Any, inputs: dict[str, Any], pad: int | None) -> tuple[Tensor, dict[str, Any]]:
    """Prompts given as lists of ids, as a rectangle padded on the left, and its mask."""
    rows = given if given is not None else inputs["input_ids"]
    if not rows or not all(isinstance(row, list) and row for row in rows):
        raise ValueError("input_ids as a list must hold one non-empty list of token ids per row")
    columns = max(map(len, rows))
    filler = 0 if pad is None else pad
    ids = torch.tensor([[filler] * (columns - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (columns - len(row)) + [1] * len(row) for row in rows])
    return ids, {"attention_mask": mask, **{name: one for name, one in inputs.items() if name != "input_ids"}}


def _moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _repeated(value: Any, rows: int, times: int) -> Any:
    """A tensor `[rows, ...]` (or a dict or output of them) with every row `times` times; anything else as it is."""
    if isinstance(value, Tensor):
        return value.repeat_interleave(times, dim=0) if value.ndim and value.shape[0] == rows else value
    if isinstance(value, dict):
        value = copy(value)
        for name in value:
            value[name] = _repeated(value[name], rows, times)
    if isinstance(value, list | tuple):
        return like(value, [_repeated(one, rows, times) for one in value])
    return value
