"""Quantised weights: made while a checkpoint is read (`quantize=`), or read from checkpoints that hold them.

    int8, int4, table4            plain rows become codes
    awq, bitsandbytes, compressed, fp8, gptq, torchao     what such a checkpoint holds becomes codes, without quantising
                                  again, or plain rows where there are no such codes
    stored                        what a checkpoint's reader hands to the loader

How codes are kept and multiplied is `models.layers.quantised`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from unspool.config.quantisation import BitsAndBytesConfig
from unspool.errors import Unsupported
from unspool.kernels import encode as kernel
from unspool.models.layers.quantised import FP4, INT4, INT8, NF4, Code, Codes
from unspool.weights.quant import awq, bitsandbytes, compressed, fp8, gptq, int4, int8, table4, torchao
from unspool.weights.quant.stored import Files, Stored

__all__ = ["FORMATS", "Quantiser", "Reading", "Stored", "encode", "method", "quantiser", "reader"]

FORMATS: dict[str, Code] = {
    "int8": INT8,
    "int4": INT4,
    **{f"int4-g{group}": replace(INT4, group=group) for group in (32, 64, 128)},
    "nf4": NF4,
    "fp4": FP4,
}
"""What `quantize=` takes."""


@dataclass(frozen=True, slots=True)
class Quantiser:
    """What to quantise, and how.

    Attributes:
        code: how the projections of the layers are written.
        head: how the head is, and an embedding that shares its weight; `None` leaves them.
        skipped: names of modules in the checkpoint, or their beginnings or ends, that are left as they are.
    """

    code: Code
    head: Code | None = INT8
    skipped: tuple[str, ...] = ()

    def skips(self, name: str) -> bool:
        """Whether the module of this name is left as it is."""
        return any(name.startswith(part) or name.endswith(part) for part in self.skipped)


# Checkpoints in fp8 are read; to make one of others is left to torchao.
_FP8 = (
    "; for torchao's fp8, load with transformers' TorchAoConfig(Float8WeightOnlyConfig()) and hand the model to "
    "unspool.wrap"
)


def quantiser(wanted: str | BitsAndBytesConfig | Mapping[str, Any] | object) -> Quantiser:
    """What `quantize=` or `quantization_config=` asks for: a name, or a configuration of bitsandbytes or torchao.

    Raises:
        ValueError: a format that is unknown.
        Unsupported: a configuration of another library, or of a format that is not computed with here.
    """
    if isinstance(wanted, str):
        if wanted not in FORMATS:
            also = _FP8 if wanted.startswith(("fp8", "float8")) else ""
            raise ValueError(
                f"`quantize` is {wanted!r}; use one of {', '.join(map(repr, FORMATS))}, or leave it out{also}"
            )
        return Quantiser(FORMATS[wanted])
    if _method_of(wanted) == "torchao":
        code, left = torchao.wanted(wanted)
        return Quantiser(code, None, left)
    config = BitsAndBytesConfig.of(wanted)
    skipped = ("lm_head",) if config.llm_int8_skip_modules is None else tuple(config.llm_int8_skip_modules)
    if config.load_in_8bit:
        return Quantiser(INT8, None if "lm_head" in skipped else INT8, skipped)
    code = {"nf4": NF4, "fp4": FP4}[config.bnb_4bit_quant_type]
    return Quantiser(code, None if "lm_head" in skipped else code, skipped)


def _method_of(wanted: object) -> str:
    """The method that a configuration of transformers names."""
    found = wanted.get("quant_method") if isinstance(wanted, Mapping) else getattr(wanted, "quant_method", None)
    return str(getattr(found, "value", found))


def encode(code: Code, rows: Tensor) -> Codes:
    """Quantise `rows` `[n, in]`, by the compiled kernels where they are in use."""
    if kernel.usable(rows):
        bounds, order = (None, None) if code.name in ("int8", "int4") else table4.bounds(code)
        return Codes(*kernel.encode(rows, code.group or rows.shape[1], code.bits, bounds, order))
    if code.bits == 8:
        return int8.encode(rows)
    return int4.encode(rows, code.group) if code.name == "int4" else table4.encode(rows, code)


Reading = Callable[[str, tuple[int, int]], Stored | None]
"""Gives what a quantised checkpoint holds for a module, by its name and the shape of its weight `[out, in]`."""

_READERS: dict[str, Callable[[Mapping[str, Any], Files], Any]] = {
    "awq": awq.Reader,
    "bitsandbytes": bitsandbytes.Reader,
    "compressed-tensors": compressed.Reader,
    "fp8": fp8.Reader,
    "gptq": gptq.Reader,
    "torchao": torchao.Reader,
}


def method(config: Mapping[str, Any]) -> str | None:
    """How the checkpoint with this `config.json` is quantised, if it is.

    Raises:
        Unsupported: in a way that is not read here.
    """
    settings = config.get("quantization_config")
    if not settings:
        return None
    name = str(settings.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in settings else "unknown"))
    if name not in _READERS:
        raise Unsupported(
            f"the checkpoint is quantised (method {name!r}), which cannot be read here; read are "
            f"{', '.join(sorted(_READERS))}. Take the unquantised one, with quantize='int8', 'int4' or 'nf4'"
        )
    return name


def reader(config: Mapping[str, Any], files: Files) -> Reading | None:
    """How to read the quantised modules of a checkpoint with this `config.json`; `None` where it has none.

    Raises:
        Unsupported: a format that is not read here.
    """
    name = method(config)
    if name is None:
        return None
    found: Reading = _READERS[name](config["quantization_config"], files).stored
    return found
