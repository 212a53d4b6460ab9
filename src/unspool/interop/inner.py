"""Our loop in the place of transformers' `_sample` and `_beam_search`, with everything prepared by its `generate()`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from unspool.bridge.module import Foreign
from unspool.config import GenerationConfig
from unspool.config.lengths import end_tokens
from unspool.config.resolve import as_generation_config
from unspool.decode.choose.beam_rules import beam_filler
from unspool.generate.call import Call
from unspool.generate.foreign import RowsBackend, rows_of
from unspool.generate.outputs import GenerateOutput
from unspool.generate.static import run
from unspool.generate.stream import Stream
from unspool.logits import LogitsProcessorList
from unspool.stopping.limits import limits_of

__all__ = ["declined", "decode"]


def declined(bound: dict[str, Any]) -> str | None:
    """Why a prepared call is left to transformers' own loop; `None` when it is not."""
    if bound.get("synced_gpus"):
        return "synced_gpus keeps several processes in step"
    if bound["generation_config"].is_assistant:
        return "it drafts for another model"
    ids = bound["input_ids"]
    return None if isinstance(ids, Tensor) and ids.ndim == 2 else "its ids are no [rows, columns]"


def decode(module: nn.Module, bound: dict[str, Any], *, beams: bool) -> Tensor | GenerateOutput:
    """Decode what transformers prepared.

    Args:
        module: its model.
        bound: the arguments of `_sample` or `_beam_search` by name; the model's inputs are `model_kwargs`.
        beams: it is the latter.
    """
    their = bound["generation_config"]
    config = _settings(their)
    ids: Tensor = bound["input_ids"]
    inputs = dict(bound.get("model_kwargs", {}))
    foreign = Foreign(module)
    limits = limits_of(bound["stopping_criteria"])
    config.max_length = limits.max_columns
    eos = end_tokens(config)
    pad = config.pad_token_id
    prompts = rows_of(ids, inputs.get(foreign.mask_name))
    copies = int(config.num_beams or 1) if beams else 1
    streamer = bound.get("streamer")
    call = Call(
        backend=RowsBackend(foreign, config, their, inputs, ids, getattr(their, "_mask_length", None)),
        config=config,
        prompts=prompts,
        copies=copies,
        processors=LogitsProcessorList(bound["logits_processor"]),
        limits=limits,
        filler=beam_filler(config, eos) if beams else pad if pad is not None else eos[0] if eos else 0,
        stream=None if streamer is None else Stream(_AfterPrompt(streamer), prompts),
        past=None,
        foreign=True,
    )
    with torch.no_grad():
        result = run(call)
    if streamer is not None:
        streamer.end()
    return result


class _AfterPrompt:
    """A streamer that was given the prompt already."""

    def __init__(self, streamer: Any) -> None:
        self._streamer = streamer
        self._begun = False
        self.row_aware = getattr(streamer, "row_aware", False)

    def put(self, *args: Any, **kwargs: Any) -> None:
        if self._begun:
            self._streamer.put(*args, **kwargs)
        self._begun = True


def _settings(their: Any) -> GenerationConfig:
    """transformers' settings as ours, with what it has done already left out."""
    config = as_generation_config("generation_config", their)
    assert config is not None
    config.cache_implementation = None  # the cache is made
    for name in ("max_new_tokens", "min_new_tokens"):
        setattr(config, name, None)
    for name, default in (("use_cache", True), ("do_sample", False), ("num_beams", 1), ("num_return_sequences", 1)):
        if getattr(config, name) is None:
            setattr(config, name, default)
    if their._pad_token_tensor is not None:
        config.pad_token_id = int(their._pad_token_tensor)
    if their._eos_token_tensor is not None:
        config.eos_token_id = their._eos_token_tensor.tolist()
    return config
