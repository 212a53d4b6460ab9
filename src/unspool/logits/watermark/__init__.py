"""Watermarks in generated text: two processors that leave one, and what finds it again.

`green`: a bias on tokens that a hash picks, found by `detector` as a z-score. `synthid`: tournament sampling, found by
`bayes` with a small trained model. Their settings are `config.watermark`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from unspool.config.watermark import SynthIDTextWatermarkingConfig, WatermarkingConfig
from unspool.logits.base import LogitsProcessor
from unspool.logits.watermark.bayes import (
    BayesianDetectorConfig,
    BayesianDetectorModel,
    BayesianWatermarkDetectorModelOutput,
    SynthIDTextWatermarkDetector,
)
from unspool.logits.watermark.detector import WatermarkDetector, WatermarkDetectorOutput
from unspool.logits.watermark.green import WatermarkLogitsProcessor
from unspool.logits.watermark.synthid import SynthIDTextWatermarkLogitsProcessor

if TYPE_CHECKING:
    from unspool.config.watermark import BaseWatermarkingConfig

__all__ = [
    "BayesianDetectorConfig",
    "BayesianDetectorModel",
    "BayesianWatermarkDetectorModelOutput",
    "SynthIDTextWatermarkDetector",
    "SynthIDTextWatermarkLogitsProcessor",
    "WatermarkDetector",
    "WatermarkDetectorOutput",
    "WatermarkLogitsProcessor",
    "watermark_processor",
]


def watermark_processor(
    config: BaseWatermarkingConfig, *, vocab_size: int, prompt_length: int, device: str | torch.device
) -> LogitsProcessor:
    """The processor that `config` asks for.

    Args:
        config: which watermark.
        vocab_size: of the model.
        prompt_length: columns of the prompt, padding included.
        device: where the scores will be.

    Raises:
        TypeError: `config` is of another class.
    """
    if isinstance(config, WatermarkingConfig):
        return WatermarkLogitsProcessor(vocab_size=vocab_size, device=device, **config.to_dict())
    if isinstance(config, SynthIDTextWatermarkingConfig):
        return SynthIDTextWatermarkLogitsProcessor(device=device, prompt_length=prompt_length, **config.to_dict())
    raise TypeError(
        "`watermarking_config` has to be a WatermarkingConfig or a SynthIDTextWatermarkingConfig, not a "
        f"{type(config).__name__}."
    )
