"""A parameter gets its memory, or its packed form, and what the checkpoint's files hold for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn

from unspool.models.base import Model
from unspool.models.layers.linear import pack as pack_plain, packed_form
from unspool.models.layers.packed import Packable, WritableForm, exchange
from unspool.weights.names import Target
from unspool.weights.safetensors import SafetensorsFile

__all__ = ["fill"]


def fill(
    model: Model,
    target: Target,
    places: Sequence[str],
    files: Mapping[str, SafetensorsFile],
    device: torch.device | str,
    pack: bool,
    pool: ThreadPoolExecutor,
) -> None:
    """Read one parameter of an empty model.

    A weight that can be packed is packed while it is read, some rows at a time, so that it is never in memory twice.

    Args:
        model: its parameters are on the `meta` device; a tied head's is the embedding's.
        target: the parameter, and which tensors make it.
        places: names under which `files` hold these tensors.
        files: by name of tensor.
        device: where the parameter goes.
        pack: exchange the weight for a layout that multiplies faster, where there is one.
        pool: threads that read and pack side by side.
    """
    users, kind = _users(model, target), target.name.rpartition(".")[2]
    packable = [user for user in users if isinstance(user, Packable)] if pack and kind == "weight" else []
    form = packed_form(packable) if torch.device(device).type == "cpu" and packable else None
    if form is not None:
        _write(form, target, places, files, pool)
        exchange(packable, form)
        return
    memory = torch.empty(target.parameter.shape, dtype=target.parameter.dtype, device=device)
    parameter = nn.Parameter(memory, requires_grad=target.parameter.requires_grad)
    for user in users:
        user.register_parameter(kind, parameter)
    _read(memory, target, places, files)
    if packable:
        pack_plain(packable)


def _users(model: Model, target: Target) -> list[nn.Module]:
    """The modules that have the parameter."""
    owner = model.get_submodule(target.name.rpartition(".")[0])
    return [owner, model.lm_head] if model.tied and owner is model.embedding else [owner]


def _write(
    form: WritableForm,
    target: Target,
    places: Sequence[str],
    files: Mapping[str, SafetensorsFile],
    pool: ThreadPoolExecutor,
) -> None:
    """Read the tensors of one parameter into its packed form, one below the other."""
    dtype = target.parameter.dtype
    if target.transposed:
        whole = torch.empty(target.parameter.shape, dtype=dtype)
        files[places[0]].read_into(places[0], whole, transposed=True)
        form.write(0, whole)
        return

    def copy(at: int, name: str, first: int, count: int) -> None:
        form.write(at + first, files[name].part(name, first, count).to(dtype), threads=1)

    at, copies = 0, []
    for source, name in zip(target.sources, places, strict=True):
        copies += [pool.submit(copy, at, name, first, count) for first, count in files[name].spans(name)]
        at += source.shape[0]
    for each in copies:
        each.result()


def _read(memory: Tensor, target: Target, places: Sequence[str], files: Mapping[str, SafetensorsFile]) -> None:
    """Read the tensors of one parameter into its memory, one below the other."""
    if len(places) == 1:
        files[places[0]].read_into(places[0], memory, target.transposed)
        return
    at = 0
    for source, name in zip(target.sources, places, strict=True):
        files[name].read_into(name, memory[at : at + source.shape[0]])
        at += source.shape[0]
