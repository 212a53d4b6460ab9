"""Everything that changes next-token scores before a token is chosen.

`ops` holds the arithmetic as pure functions whose parameters are numbers or per-row columns; the processor classes,
one file for each family, carry transformers' names and arguments; `grammar` masks what breaks a schema or grammar;
`pipeline` puts them in order for a config.
Choosing a token from the scores is `decode/choose`; ending a row is `stopping`.
"""

from unspool.logits.base import LogitsProcessor, LogitsProcessorList
from unspool.logits.bias import NoBadWordsLogitsProcessor, SequenceBiasLogitsProcessor
from unspool.logits.codec import (
    AlternatingCodebooksLogitsProcessor,
    BarkEosPrioritizerLogitsProcessor,
    ClassifierFreeGuidanceLogitsProcessor,
    DiaClassifierFreeGuidanceLogitsProcessor,
    DiaEOSChannelFilterLogitsProcessor,
    DiaEOSDelayPatternLogitsProcessor,
)
from unspool.logits.columns import Column, as_columns, run_column
from unspool.logits.constrained import PrefixConstrainedLogitsProcessor
from unspool.logits.diversity import HammingDiversityLogitsProcessor
from unspool.logits.forced import (
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
)
from unspool.logits.grammar import GrammarLogitsProcessor
from unspool.logits.guidance import UnbatchedClassifierFreeGuidanceLogitsProcessor
from unspool.logits.length import (
    ExponentialDecayLengthPenalty,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
)
from unspool.logits.ngram import EncoderNoRepeatNGramLogitsProcessor, NoRepeatNGramLogitsProcessor
from unspool.logits.penalties import EncoderRepetitionPenaltyLogitsProcessor, RepetitionPenaltyLogitsProcessor
from unspool.logits.pipeline import build_processors, is_guided, warped_again
from unspool.logits.sanity import InfNanRemoveLogitsProcessor, LogitNormalization
from unspool.logits.warpers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from unspool.logits.watermark import (
    BayesianDetectorConfig,
    BayesianDetectorModel,
    BayesianWatermarkDetectorModelOutput,
    SynthIDTextWatermarkDetector,
    SynthIDTextWatermarkLogitsProcessor,
    WatermarkDetector,
    WatermarkDetectorOutput,
    WatermarkLogitsProcessor,
)
from unspool.logits.whisper import WhisperNoSpeechDetection, WhisperTimeStampLogitsProcessor

__all__ = [
    "Column",
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
    "GrammarLogitsProcessor",
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
    "as_columns",
    "build_processors",
    "run_column",
    "is_guided",
    "warped_again",
]
