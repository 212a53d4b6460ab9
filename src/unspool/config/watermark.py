"""Settings of the two watermarks. Data only: the processors that apply them live in `logits/watermark`."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, Self

from unspool.config.files import write_atomically
from unspool.config.ranges import Check, check_ranges
from unspool.types import FileName

__all__ = ["BaseWatermarkingConfig", "SynthIDTextWatermarkingConfig", "WatermarkingConfig", "watermarking_config"]

SEEDING_SCHEMES = ("lefthash", "selfhash")


class BaseWatermarkingConfig(ABC):
    """What the watermark settings have in common."""

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> Self:
        """Make the settings from a dict; `kwargs` that name a setting win, others are ignored.

        Raises:
            ValueError: `config_dict` has a key that is no setting, or lacks a required one.
        """
        names = {f.name for f in fields(cls)}  # type: ignore[arg-type]  # every subclass is a dataclass
        if unknown := sorted(set(config_dict) - names):
            raise ValueError(f"watermarking_config has no setting {unknown[0]!r}; {cls.__name__} has {sorted(names)}")
        try:
            return cls(**{**config_dict, **{key: kwargs[key] for key in kwargs.keys() & names}})
        except TypeError as error:
            raise ValueError(f"watermarking_config is not complete: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dict of their own."""
        return deepcopy(self.__dict__)

    def to_json_string(self) -> str:
        """The settings as JSON."""
        return json.dumps(self.__dict__, indent=2) + "\n"

    def to_json_file(self, json_file_path: FileName) -> None:
        """Write the settings as JSON, whole or not at all."""
        write_atomically(json_file_path, json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n")

    def update(self, **kwargs: Any) -> None:
        """Set the settings named; other keys are ignored."""
        for key, value in kwargs.items():
            if key in self.__dict__:
                setattr(self, key, value)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        """Pairs of name and value."""
        yield from self.to_dict().items()

    @abstractmethod
    def validate(self) -> None:
        """Raise ValueError or TypeError for a setting out of range."""


@dataclass
class WatermarkingConfig(BaseWatermarkingConfig):
    """A bias on pseudo-randomly chosen "green" tokens (arXiv 2306.04634)."""

    greenlist_ratio: float = 0.25
    """Share of the vocabulary that is green, 0 to 1."""
    bias: float = 2.0
    """What is added to the scores of green tokens."""
    hashing_key: int = 15485863
    """Key of the hash that chooses them (the millionth prime)."""
    seeding_scheme: str = "lefthash"
    """`"lefthash"`: the last tokens choose (Algorithm 2); `"selfhash"`: the candidate too (Algorithm 3, slower)."""
    context_width: int = 1
    """How many last tokens go into the hash, at least 1."""

    def validate(self) -> None:
        """Raise ValueError or TypeError for a setting out of range."""
        check_ranges(
            self,
            {
                "greenlist_ratio": Check(float, 0, 1),
                "bias": Check(float),
                "hashing_key": Check(int),
                "context_width": Check(int, 1),
            },
        )
        if self.seeding_scheme not in SEEDING_SCHEMES:
            raise ValueError(f"seeding_scheme must be one of {SEEDING_SCHEMES}, not {self.seeding_scheme!r}")


@dataclass
class SynthIDTextWatermarkingConfig(BaseWatermarkingConfig):
    """Tournament sampling keyed by the last tokens (SynthID-Text, doi 10.1038/s41586-024-08025-4)."""

    ngram_len: int
    """Tokens in a hashed n-gram, the candidate included; at least 2."""
    keys: list[int]
    """One key for each layer of the tournament."""
    context_history_size: int = 1024
    """Contexts remembered, so that a repeated one is not marked twice."""
    sampling_table_seed: int = 0
    """Seed of the table of random bits."""
    sampling_table_size: int = 2**16
    """Entries of that table, at most 2**24."""
    skip_first_ngram_calls: bool = False
    """Leave the tokens unmarked until a whole n-gram is known."""
    debug_mode: bool = False
    """Mark a uniform distribution instead of the model's, to test the watermark alone."""

    def validate(self) -> None:
        """Raise ValueError or TypeError for a setting out of range."""
        check_ranges(
            self,
            {
                "ngram_len": Check(int, 2),
                "context_history_size": Check(int, 1),
                "sampling_table_seed": Check(int),
                "sampling_table_size": Check(int, 1, 2**24),
            },
        )
        if not self.keys or not all(isinstance(key, int) for key in self.keys):
            raise ValueError(f"keys must be a list of at least one int, not {self.keys!r}")


def watermarking_config(values: Mapping[str, Any]) -> BaseWatermarkingConfig:
    """The class that `values` belong to: `ngram_len` or `keys` mean SynthID, else the green list."""
    synthid = "ngram_len" in values or "keys" in values
    return (SynthIDTextWatermarkingConfig if synthid else WatermarkingConfig).from_dict(values)
