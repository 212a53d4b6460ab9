"""The settings of generation: `GenerationConfig` and what goes into it, how they merge, which lengths they mean.

Data, checks and files only: nothing here knows a model, and nothing imports torch. How a setting acts is the business
of the room that applies it.

    fields, defaults       every setting with its meaning; what it is when nobody sets it
    generation             `GenerationConfig`: the object and its file
    checks, ranges         which values are wrong, which have no effect
    mode                   which strategy a set of settings means
    resolve, lengths       the settings and the lengths of one call
    watermark, compilation, continuous     nested settings
    quantisation           which weights to quantise while a model is loaded
"""

from unspool.config.compilation import CompileConfig
from unspool.config.continuous import ContinuousBatchingConfig
from unspool.config.defaults import default_generation_params
from unspool.config.generation import GenerationConfig
from unspool.config.lengths import Lengths, effective_lengths
from unspool.config.mode import GenerationMode
from unspool.config.notice import warn_once
from unspool.config.quantisation import BitsAndBytesConfig
from unspool.config.resolve import Resolved, as_generation_config, resolve
from unspool.config.watermark import BaseWatermarkingConfig, SynthIDTextWatermarkingConfig, WatermarkingConfig

__all__ = [
    "BaseWatermarkingConfig",
    "BitsAndBytesConfig",
    "CompileConfig",
    "ContinuousBatchingConfig",
    "GenerationConfig",
    "GenerationMode",
    "Lengths",
    "Resolved",
    "SynthIDTextWatermarkingConfig",
    "WatermarkingConfig",
    "as_generation_config",
    "default_generation_params",
    "effective_lengths",
    "resolve",
    "warn_once",
]
