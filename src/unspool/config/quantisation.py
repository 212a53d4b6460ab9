"""`BitsAndBytesConfig`, with transformers' names: which weights to quantise while a model is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from unspool.errors import Unsupported

__all__ = ["BitsAndBytesConfig"]


@dataclass
class BitsAndBytesConfig:
    """How `AutoModelForCausalLM.from_pretrained(quantization_config=...)` quantises a model while it loads.

    Names and defaults are transformers'. The layers' projections are quantised, the embedding and the head are not.

    Attributes:
        load_in_8bit: eight bits, a scale for every output.
        load_in_4bit: four bits, a scale for every 64 inputs.
        bnb_4bit_quant_type: `"nf4"` or `"fp4"`.
        llm_int8_skip_modules: names of modules to leave as they are; `None` leaves the head.
        bnb_4bit_compute_dtype: accepted; activations have the model's dtype, and sums are fp32.
        bnb_4bit_use_double_quant: accepted; scales of four-bit weights always take 16 bits here.
        bnb_4bit_quant_storage, llm_int8_threshold, llm_int8_enable_fp32_cpu_offload, llm_int8_has_fp16_weight:
            accepted, and without effect: they say how bitsandbytes works inside.

    Raises:
        ValueError: both or neither of the two sizes, or an unknown type.
    """

    load_in_8bit: bool = False
    load_in_4bit: bool = False
    llm_int8_threshold: float = 6.0
    llm_int8_skip_modules: list[str] | None = None
    llm_int8_enable_fp32_cpu_offload: bool = False
    llm_int8_has_fp16_weight: bool = False
    bnb_4bit_compute_dtype: Any = None
    bnb_4bit_quant_type: str = "fp4"
    bnb_4bit_use_double_quant: bool = False
    bnb_4bit_quant_storage: Any = None
    quant_method: str = field(default="bitsandbytes", init=False)

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("`load_in_8bit` and `load_in_4bit` are both set; choose one")
        if not self.load_in_8bit and not self.load_in_4bit:
            raise ValueError("neither `load_in_8bit` nor `load_in_4bit` is set; choose one")
        if self.bnb_4bit_quant_type not in ("nf4", "fp4"):
            raise ValueError(f"`bnb_4bit_quant_type` is {self.bnb_4bit_quant_type!r}; use 'nf4' or 'fp4'")
        skipped = self.llm_int8_skip_modules
        if skipped is not None and (isinstance(skipped, str) or not all(isinstance(name, str) for name in skipped)):
            raise ValueError(f"`llm_int8_skip_modules` is {skipped!r}; it must be a list of names of modules")

    @classmethod
    def of(cls, config: object) -> BitsAndBytesConfig:
        """The same from this class, transformers' own, or a dictionary of its fields.

        Raises:
            Unsupported: the configuration of another method.
            ValueError: as for the class.
        """
        if isinstance(config, cls):
            return config
        entries = config if isinstance(config, Mapping) else getattr(config, "to_dict", dict)()
        method = entries.get("quant_method")
        method = getattr(method, "value", method) or ("bitsandbytes" if _names(cls) & set(entries) else None)
        if method != "bitsandbytes":
            raise Unsupported(
                f"quantization_config of {type(config).__name__} (method {method!r}) is not supported; use "
                f"BitsAndBytesConfig, TorchAoConfig, or unspool.load(..., quantize='int8', 'int4' or 'nf4')"
            )
        return cls(**{name: value for name, value in entries.items() if name in _names(cls)})

    def to_dict(self) -> dict[str, Any]:
        """Its fields by name, dtypes as text."""
        entries = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            name: str(value).removeprefix("torch.") if name in ("bnb_4bit_compute_dtype",) and value else value
            for name, value in entries.items()
        }


def _names(cls: type[BitsAndBytesConfig]) -> set[str]:
    return {entry.name for entry in fields(cls) if entry.init}
