"""unspool turns a language model into text.

    import unspool

    model, tokenizer = unspool.load("path/to/checkpoint")
    inputs = tokenizer("Once upon a time", return_tensors="pt")
    tokens = model.generate(**inputs, max_new_tokens=50)
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))

The public names are those of transformers' generation API, importable from here. Each one is loaded when it is first
asked for, so `import unspool` by itself imports nothing else, not even torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. The imports for type checkers below say the same; a test compares the two.
_HOMES: dict[str, tuple[str, ...]] = {
    "unspool.adapters": ("AdapterMixin", "PeftModel"),
    "unspool.hub": ("AutoModelForCausalLM", "AutoTokenizer", "load"),
    "unspool.config": (
        "BitsAndBytesConfig",
        "CompileConfig",
        "ContinuousBatchingConfig",
        "GenerationConfig",
        "GenerationMode",
        "SynthIDTextWatermarkingConfig",
        "WatermarkingConfig",
    ),
    "unspool.continuous": (
        "ContinuousBatchingManager",
        "ContinuousMixin",
        "FIFOScheduler",
        "GenerationOutput",
        "Metrics",
        "PrefillFirstScheduler",
        "RequestState",
        "RequestStatus",
        "Scheduler",
        "register_scheduler",
    ),
    "unspool.generate": ("GenerationMixin",),
    "unspool.generate.outputs": (
        "GenerateBeamDecoderOnlyOutput",
        "GenerateBeamEncoderDecoderOutput",
        "GenerateDecoderOnlyOutput",
        "GenerateEncoderDecoderOutput",
    ),
    "unspool.inspection": ("Inspection", "inspect"),
    "unspool.interop.auto": (
        "AutoModelForImageTextToText",
        "AutoModelForSeq2SeqLM",
        "AutoModelForSpeechSeq2Seq",
    ),
    "unspool.interop": ("disable", "enable", "enabled", "wrap"),
    "unspool.cache": (
        "Cache",
        "DynamicCache",
        "EncoderDecoderCache",
        "OffloadedCache",
        "OffloadedStaticCache",
        "PastKeyValues",
        "QuantizedCache",
        "StaticCache",
    ),
    "unspool.decode.choose.constraints": (
        "Constraint",
        "ConstraintListState",
        "DisjunctiveConstraint",
        "PhrasalConstraint",
    ),
    "unspool.tokenization": ("BatchEncoding", "Tokenizer"),
    "unspool.logits": (
        "AlternatingCodebooksLogitsProcessor",
        "BarkEosPrioritizerLogitsProcessor",
        "BayesianDetectorConfig",
        "BayesianDetectorModel",
        "BayesianWatermarkDetectorModelOutput",
        "ClassifierFreeGuidanceLogitsProcessor",
        "DiaClassifierFreeGuidanceLogitsProcessor",
        "DiaEOSChannelFilterLogitsProcessor",
        "DiaEOSDelayPatternLogitsProcessor",
        "EncoderNoRepeatNGramLogitsProcessor",
        "EncoderRepetitionPenaltyLogitsProcessor",
        "EpsilonLogitsWarper",
        "EtaLogitsWarper",
        "ExponentialDecayLengthPenalty",
        "ForcedBOSTokenLogitsProcessor",
        "ForcedEOSTokenLogitsProcessor",
        "HammingDiversityLogitsProcessor",
        "InfNanRemoveLogitsProcessor",
        "LogitNormalization",
        "LogitsProcessor",
        "LogitsProcessorList",
        "MinLengthLogitsProcessor",
        "MinNewTokensLengthLogitsProcessor",
        "MinPLogitsWarper",
        "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor",
        "PrefixConstrainedLogitsProcessor",
        "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor",
        "SuppressTokensAtBeginLogitsProcessor",
        "SuppressTokensLogitsProcessor",
        "SynthIDTextWatermarkDetector",
        "SynthIDTextWatermarkLogitsProcessor",
        "TemperatureLogitsWarper",
        "TopHLogitsWarper",
        "TopKLogitsWarper",
        "TopPLogitsWarper",
        "TypicalLogitsWarper",
        "UnbatchedClassifierFreeGuidanceLogitsProcessor",
        "WatermarkDetector",
        "WatermarkDetectorOutput",
        "WatermarkLogitsProcessor",
        "WhisperNoSpeechDetection",
        "WhisperTimeStampLogitsProcessor",
    ),
    "unspool.stopping": (
        "ConfidenceCriteria",
        "EosTokenCriteria",
        "MaxLengthCriteria",
        "MaxTimeCriteria",
        "StopStringCriteria",
        "StoppingCriteria",
        "StoppingCriteriaList",
    ),
    "unspool.streaming": (
        "AsyncTextIteratorStreamer",
        "BaseStreamer",
        "TextIteratorStreamer",
        "TextStreamer",
    ),
    "unspool.errors": (
        "CacheFull",
        "CheckpointError",
        "ManagerStopped",
        "NonFiniteLogits",
        "OutOfMemory",
        "QueueFull",
        "RequestFailed",
        "UnspoolError",
        "Unsupported",
    ),
}

_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = ["__version__", *sorted(_HOME_OF)]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    module = _HOME_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'unspool' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if TYPE_CHECKING:
    from unspool.adapters import AdapterMixin as AdapterMixin, PeftModel as PeftModel
    from unspool.cache import (
        Cache as Cache,
        DynamicCache as DynamicCache,
        EncoderDecoderCache as EncoderDecoderCache,
        OffloadedCache as OffloadedCache,
        OffloadedStaticCache as OffloadedStaticCache,
        PastKeyValues as PastKeyValues,
        QuantizedCache as QuantizedCache,
        StaticCache as StaticCache,
    )
    from unspool.config import (
        BitsAndBytesConfig as BitsAndBytesConfig,
        CompileConfig as CompileConfig,
        ContinuousBatchingConfig as ContinuousBatchingConfig,
        GenerationConfig as GenerationConfig,
        GenerationMode as GenerationMode,
        SynthIDTextWatermarkingConfig as SynthIDTextWatermarkingConfig,
        WatermarkingConfig as WatermarkingConfig,
    )
    from unspool.continuous import (
        ContinuousBatchingManager as ContinuousBatchingManager,
        ContinuousMixin as ContinuousMixin,
        FIFOScheduler as FIFOScheduler,
        GenerationOutput as GenerationOutput,
        Metrics as Metrics,
        PrefillFirstScheduler as PrefillFirstScheduler,
        RequestState as RequestState,
        RequestStatus as RequestStatus,
        Scheduler as Scheduler,
        register_scheduler as register_scheduler,
    )
    from unspool.decode.choose.constraints import (
        Constraint as Constraint,
        ConstraintListState as ConstraintListState,
        DisjunctiveConstraint as DisjunctiveConstraint,
        PhrasalConstraint as PhrasalConstraint,
    )
    from unspool.errors import (
        CacheFull as CacheFull,
        CheckpointError as CheckpointError,
        ManagerStopped as ManagerStopped,
        NonFiniteLogits as NonFiniteLogits,
        OutOfMemory as OutOfMemory,
        QueueFull as QueueFull,
        RequestFailed as RequestFailed,
        UnspoolError as UnspoolError,
        Unsupported as Unsupported,
    )
    from unspool.generate import GenerationMixin as GenerationMixin
    from unspool.generate.outputs import (
        GenerateBeamDecoderOnlyOutput as GenerateBeamDecoderOnlyOutput,
        GenerateBeamEncoderDecoderOutput as GenerateBeamEncoderDecoderOutput,
        GenerateDecoderOnlyOutput as GenerateDecoderOnlyOutput,
        GenerateEncoderDecoderOutput as GenerateEncoderDecoderOutput,
    )
    from unspool.hub import (
        AutoModelForCausalLM as AutoModelForCausalLM,
        AutoTokenizer as AutoTokenizer,
        load as load,
    )
    from unspool.inspection import Inspection as Inspection, inspect as inspect
    from unspool.interop import disable as disable, enable as enable, enabled as enabled, wrap as wrap
    from unspool.interop.auto import (
        AutoModelForImageTextToText as AutoModelForImageTextToText,
        AutoModelForSeq2SeqLM as AutoModelForSeq2SeqLM,
        AutoModelForSpeechSeq2Seq as AutoModelForSpeechSeq2Seq,
    )
    from unspool.logits import (
        AlternatingCodebooksLogitsProcessor as AlternatingCodebooksLogitsProcessor,
        BarkEosPrioritizerLogitsProcessor as BarkEosPrioritizerLogitsProcessor,
        BayesianDetectorConfig as BayesianDetectorConfig,
        BayesianDetectorModel as BayesianDetectorModel,
        BayesianWatermarkDetectorModelOutput as BayesianWatermarkDetectorModelOutput,
        ClassifierFreeGuidanceLogitsProcessor as ClassifierFreeGuidanceLogitsProcessor,
        DiaClassifierFreeGuidanceLogitsProcessor as DiaClassifierFreeGuidanceLogitsProcessor,
        DiaEOSChannelFilterLogitsProcessor as DiaEOSChannelFilterLogitsProcessor,
        DiaEOSDelayPatternLogitsProcessor as DiaEOSDelayPatternLogitsProcessor,
        EncoderNoRepeatNGramLogitsProcessor as EncoderNoRepeatNGramLogitsProcessor,
        EncoderRepetitionPenaltyLogitsProcessor as EncoderRepetitionPenaltyLogitsProcessor,
        EpsilonLogitsWarper as EpsilonLogitsWarper,
        EtaLogitsWarper as EtaLogitsWarper,
        ExponentialDecayLengthPenalty as ExponentialDecayLengthPenalty,
        ForcedBOSTokenLogitsProcessor as ForcedBOSTokenLogitsProcessor,
        ForcedEOSTokenLogitsProcessor as ForcedEOSTokenLogitsProcessor,
        HammingDiversityLogitsProcessor as HammingDiversityLogitsProcessor,
        InfNanRemoveLogitsProcessor as InfNanRemoveLogitsProcessor,
        LogitNormalization as LogitNormalization,
        LogitsProcessor as LogitsProcessor,
        LogitsProcessorList as LogitsProcessorList,
        MinLengthLogitsProcessor as MinLengthLogitsProcessor,
        MinNewTokensLengthLogitsProcessor as MinNewTokensLengthLogitsProcessor,
        MinPLogitsWarper as MinPLogitsWarper,
        NoBadWordsLogitsProcessor as NoBadWordsLogitsProcessor,
        NoRepeatNGramLogitsProcessor as NoRepeatNGramLogitsProcessor,
        PrefixConstrainedLogitsProcessor as PrefixConstrainedLogitsProcessor,
        RepetitionPenaltyLogitsProcessor as RepetitionPenaltyLogitsProcessor,
        SequenceBiasLogitsProcessor as SequenceBiasLogitsProcessor,
        SuppressTokensAtBeginLogitsProcessor as SuppressTokensAtBeginLogitsProcessor,
        SuppressTokensLogitsProcessor as SuppressTokensLogitsProcessor,
        SynthIDTextWatermarkDetector as SynthIDTextWatermarkDetector,
        SynthIDTextWatermarkLogitsProcessor as SynthIDTextWatermarkLogitsProcessor,
        TemperatureLogitsWarper as TemperatureLogitsWarper,
        TopHLogitsWarper as TopHLogitsWarper,
        TopKLogitsWarper as TopKLogitsWarper,
        TopPLogitsWarper as TopPLogitsWarper,
        TypicalLogitsWarper as TypicalLogitsWarper,
        UnbatchedClassifierFreeGuidanceLogitsProcessor as UnbatchedClassifierFreeGuidanceLogitsProcessor,
        WatermarkDetector as WatermarkDetector,
        WatermarkDetectorOutput as WatermarkDetectorOutput,
        WatermarkLogitsProcessor as WatermarkLogitsProcessor,
        WhisperNoSpeechDetection as WhisperNoSpeechDetection,
        WhisperTimeStampLogitsProcessor as WhisperTimeStampLogitsProcessor,
    )
    from unspool.stopping import (
        ConfidenceCriteria as ConfidenceCriteria,
        EosTokenCriteria as EosTokenCriteria,
        MaxLengthCriteria as MaxLengthCriteria,
        MaxTimeCriteria as MaxTimeCriteria,
        StoppingCriteria as StoppingCriteria,
        StoppingCriteriaList as StoppingCriteriaList,
        StopStringCriteria as StopStringCriteria,
    )
    from unspool.streaming import (
        AsyncTextIteratorStreamer as AsyncTextIteratorStreamer,
        BaseStreamer as BaseStreamer,
        TextIteratorStreamer as TextIteratorStreamer,
        TextStreamer as TextStreamer,
    )
    from unspool.tokenization import BatchEncoding as BatchEncoding, Tokenizer as Tokenizer
