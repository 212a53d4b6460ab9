"""When a row of generated tokens ends: width, time, end tokens, stop strings, confidence.

The criteria carry transformers' names and arguments; `build_criteria` makes those a config asks for. Changing scores
is `logits`; what becomes of a row that ended is `decode`.
"""

from unspool.stopping.base import StoppingCriteria, StoppingCriteriaList
from unspool.stopping.criteria import ConfidenceCriteria, EosTokenCriteria, MaxLengthCriteria, MaxTimeCriteria
from unspool.stopping.limits import Limits, build_limits
from unspool.stopping.pipeline import build_criteria
from unspool.stopping.stop_strings import StopStringCriteria

__all__ = [
    "ConfidenceCriteria",
    "EosTokenCriteria",
    "Limits",
    "MaxLengthCriteria",
    "MaxTimeCriteria",
    "StopStringCriteria",
    "StoppingCriteria",
    "StoppingCriteriaList",
    "build_criteria",
    "build_limits",
]
