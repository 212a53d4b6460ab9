"""A parameter gets its memory, or its packed or quantised form, and what the checkpoint's files hold for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unspool.models.base import Model
from unspool.models.layers.linear import Linear, pack as pack_plain, packed_form
from unspool.models.layers.packed import Packable, WritableForm, exchange
from unspool.models.layers.quantised import Code, QuantisedForm
from unspool.weights.names import Target
from unspool.weights.quant import Quantiser, Stored, encode
from unspool.weights.safetensors import SafetensorsFile

__all__ = ["Filling", "fill"]


@dataclass(frozen=True, slots=True)
class Filling:
    """What is the same for all parameters of a model.

    Attributes:
        files: by name of tensor.
        device: where the parameters go.
        pack: exchange weights for layouts that multiply faster, where there are such.
        quantiser: what to quantise, and how.
        pool: threads that read and pack side by side.
    """

    files: Mapping[str, SafetensorsFile]
    device: torch.device | str
    pack: bool
    quantiser: Quantiser | None
    pool: ThreadPoolExecutor


def fill(model: Model, target: Target, places: Sequence[str | Stored], how: Filling) -> None:
    """Read one parameter of an empty model.

    A weight that can be packed or is to be quantised is so while it is read, some rows at a time, and is never in
    memory whole.

    Args:
        model: its parameters are on the `meta` device; a tied head's is the embedding's.
        target: the parameter, and which tensors make it.
        places: names under which the files hold these tensors, or what a quantised checkpoint holds instead.
        how: see there.
    """
    users, kind = _users(model, target), target.name.rpartition(".")[2]
    multiplied = kind == "weight" and any(isinstance(user, Linear) for user in users)
    packable = [user for user in users if isinstance(user, Packable)] if multiplied else []
    if packable:
        code = _stored_code(places) or _wanted_code(model, target, packable, how.quantiser)
        if code is not None:
            exchange(packable, _quantised(target, places, code, how))
            return
        form = packed_form(packable) if how.pack and torch.device(how.device).type == "cpu" else None
        if form is not None:
            _write(form, target, places, how)
            exchange(packable, form)
            return
    memory = torch.empty(target.parameter.shape, dtype=target.parameter.dtype, device=how.device)
    parameter = nn.Parameter(memory, requires_grad=target.parameter.requires_grad)
    for user in users:
        user.register_parameter(kind, parameter)
    _read(memory, target, places, how.files)
    if packable and how.pack:
        pack_plain(packable)


def _stored_code(places: Sequence[str | Stored]) -> Code | None:
    """How the checkpoint holds a weight, if it holds all of its parts alike."""
    codes = {place.code if isinstance(place, Stored) else None for place in places}
    return codes.pop() if len(codes) == 1 else None


def _wanted_code(model: Model, target: Target, users: Sequence[Packable], quantiser: Quantiser | None) -> Code | None:
    """How to quantise a weight, if it is to be."""
    if quantiser is None or any(quantiser.skips(source.name.rpartition(".")[0]) for source in target.sources):
        return None
    return quantiser.head if model.lm_head in users else quantiser.code


def _quantised(target: Target, places: Sequence[str | Stored], code: Code, how: Filling) -> QuantisedForm:
    """The quantised form of a weight, from codes or from plain rows."""
    outputs, inputs = target.parameter.shape
    form = QuantisedForm(outputs, inputs, code, target.parameter.dtype, how.device)
    if target.transposed and not isinstance(places[0], Stored):
        whole = torch.empty(outputs, inputs, dtype=target.parameter.dtype)
        how.files[places[0]].read_into(places[0], whole, transposed=True)
        form.write(0, encode(code, whole))
        return form

    def copy(at: int, name: str, first: int, count: int) -> None:
        form.write(at + first, encode(code, how.files[name].part(name, first, count)), threads=1)

    at, copies = 0, []
    for source, place in zip(target.sources, places, strict=True):
        if isinstance(place, Stored):
            form.write(at, place.codes())
        else:
            copies += [how.pool.submit(copy, at, place, first, count) for first, count in how.files[place].spans(place)]
        at += source.shape[0]
    for each in copies:
        each.result()
    return form


def _users(model: Model, target: Target) -> list[nn.Module]:
    """The modules that have the parameter."""
    owner = model.get_submodule(target.name.rpartition(".")[0])
    return [owner, model.lm_head] if model.tied and owner is model.embedding else [owner]


def _write(form: WritableForm, target: Target, places: Sequence[str | Stored], how: Filling) -> None:
    """Read the tensors of one parameter into its packed form, one below the other."""
    dtype, files = target.parameter.dtype, how.files
    if target.transposed and not isinstance(places[0], Stored):
        whole = torch.empty(target.parameter.shape, dtype=dtype)
        files[places[0]].read_into(places[0], whole, transposed=True)
        form.write(0, whole)
        return

    def copy(at: int, name: str, first: int, count: int) -> None:
        form.write(at + first, files[name].part(name, first, count).to(dtype), threads=1)

    at, copies = 0, []
    for source, place in zip(target.sources, places, strict=True):
        if isinstance(place, Stored):
            form.write(at, place.rows().to(dtype))
        else:
            copies += [how.pool.submit(copy, at, place, first, count) for first, count in files[place].spans(place)]
        at += source.shape[0]
    for each in copies:
        each.result()


def _read(memory: Tensor, target: Target, places: Sequence[str | Stored], files: Mapping[str, SafetensorsFile]) -> None:
    """Read the tensors of one parameter into its memory, one below the other."""
    at = 0
    for source, place in zip(target.sources, places, strict=True):
        rows = memory if len(places) == 1 else memory[at : at + source.shape[0]]
        if isinstance(place, Stored):
            rows.copy_(place.rows())
        else:
            files[place].read_into(place, rows, target.transposed)
        at += source.shape[0]
