"""Warpers: processors that shape the distribution a token is sampled from.

Each class has transformers' name and arguments and calls one function of `ops`. `filter_value` is the score a removed
token gets; the `min_tokens_to_keep` best tokens are never removed.
"""

from __future__ import annotations

from torch import Tensor

from unspool.logits import ops
from unspool.logits.base import LogitsProcessor, check_count, check_positive
from unspool.logits.fused import top_k_top_p, top_p
from unspool.logits.ops import NEG_INF


class _Warper(LogitsProcessor):
    """A processor that looks at the scores only."""

    reads_history = False
    reads_width = False
    row_independent = True


class TemperatureLogitsWarper(_Warper):
    """Divide scores by `temperature`: above 1 more random, below 1 closer to greedy.

    Raises:
        ValueError: `temperature` is not a number above zero.
    """

    def __init__(self, temperature: float) -> None:
        advice = " For greedy decoding set `do_sample=False`." if temperature == 0 else ""
        self.temperature = check_positive("temperature", temperature, advice)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return `scores / temperature`."""
        return ops.temperature(scores, self.temperature)


class TopKLogitsWarper(_Warper):
    """Keep the `top_k` best tokens, with all ties of the last one.

    Raises:
        ValueError: `top_k` is not a strictly positive integer.
    """

    def __init__(self, top_k: int, filter_value: float = NEG_INF, min_tokens_to_keep: int = 1) -> None:
        check_count("top_k", top_k, 1)
        self.top_k = max(top_k, min_tokens_to_keep)
        self.filter_value = filter_value
        self.min_tokens_to_keep = min_tokens_to_keep

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with all but the best replaced by `filter_value`."""
        return ops.top_k(scores, self.top_k, filter_value=self.filter_value)


class TopPLogitsWarper(_Warper):
    """Keep the smallest set of best tokens whose probability reaches `top_p` (nucleus sampling).

    Raises:
        ValueError: `top_p` is outside [0, 1], or `min_tokens_to_keep` is not a strictly positive integer.
    """

    def __init__(self, top_p: float, filter_value: float = NEG_INF, min_tokens_to_keep: int = 1) -> None:
        self.top_p = _inside("top_p", top_p, "[0, 1]")
        check_count("min_tokens_to_keep", min_tokens_to_keep, 1)
        self.filter_value = filter_value
        self.min_tokens_to_keep = min_tokens_to_keep

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with everything outside the nucleus replaced by `filter_value`."""
        return top_p(scores, self.top_p, filter_value=self.filter_value, min_keep=self.min_tokens_to_keep)


class TopKTopPLogitsWarper(_Warper):
    """`TopKLogitsWarper` followed by `TopPLogitsWarper`, the same bits at a fraction of the cost.

    The pipeline puts it where both are asked for; removed tokens get -inf.

    Raises:
        ValueError: what either of the two would raise.
    """

    def __init__(self, top_k: int, top_p: float, min_tokens_to_keep: int = 1) -> None:
        check_count("top_k", top_k, 1)
        check_count("min_tokens_to_keep", min_tokens_to_keep, 1)
        self.top_k = max(top_k, min_tokens_to_keep)
        self.top_p = _inside("top_p", top_p, "[0, 1]")
        self.min_tokens_to_keep = min_tokens_to_keep

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with all but the survivors of both filters at -inf."""
        return top_k_top_p(scores, self.top_k, self.top_p, min_keep=self.min_tokens_to_keep)


class MinPLogitsWarper(_Warper):
    """Remove tokens less probable than `min_p` times the best token.

    Raises:
        ValueError: `min_p` is outside [0, 1], or `min_tokens_to_keep` is not a strictly positive integer.
    """

    def __init__(self, min_p: float, filter_value: float = NEG_INF, min_tokens_to_keep: int = 1) -> None:
        self.min_p = _inside("min_p", min_p, "[0, 1]")
        check_count("min_tokens_to_keep", min_tokens_to_keep, 1)
        self.filter_value = filter_value
        self.min_tokens_to_keep = min_tokens_to_keep

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with improbable tokens replaced by `filter_value`."""
        return ops.min_p(scores, self.min_p, filter_value=self.filter_value, min_keep=self.min_tokens_to_keep)


class TopHLogitsWarper(_Warper):
    """Keep best tokens while their summed entropy is within `top_h` times that of the hundred best.

    Raises:
        ValueError: `top_h` is outside (0, 1].
    """

    def __init__(self, top_h: float, filter_value: float = NEG_INF) -> None:
        self.top_n = 100
        self.top_h = _inside("top_h", top_h, "(0, 1]")
        self.filter_value = filter_value

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with tokens past the entropy budget replaced by `filter_value`."""
        return ops.top_h(scores, self.top_h, filter_value=self.filter_value, top_n=self.top_n)


class TypicalLogitsWarper(_Warper):
    """Keep the tokens whose surprise is nearest the entropy, up to probability `mass` (locally typical sampling).

    Raises:
        ValueError: `mass` is outside (0, 1), or `min_tokens_to_keep` is not a strictly positive integer.
    """

    def __init__(self, mass: float = 0.9, filter_value: float = NEG_INF, min_tokens_to_keep: int = 1) -> None:
        self.mass = _inside("typical_p", mass, "(0, 1)")
        check_count("min_tokens_to_keep", min_tokens_to_keep, 1)
        self.filter_value = filter_value
        self.min_tokens_to_keep = min_tokens_to_keep

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with untypical tokens replaced by `filter_value`."""
        return ops.typical_p(scores, self.mass, filter_value=self.filter_value, min_keep=self.min_tokens_to_keep)


class EpsilonLogitsWarper(_Warper):
    """Remove tokens of probability below `epsilon`.

    Raises:
        ValueError: `epsilon` is outside (0, 1), or `min_tokens_to_keep` is below 1.
    """

    def __init__(self, epsilon: float, filter_value: float = NEG_INF, min_tokens_to_keep: int = 1) -> None:
        self.epsilon = _inside("epsilon_cutoff", epsilon, "(0, 1)")
        check_count("min_tokens_to_keep", int(min_tokens_to_keep), 1)
        self.filter_value = filter_value
        self.min_tokens_to_keep = int(min_tokens_to_keep)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with improbable tokens replaced by `filter_value`."""
        return ops.epsilon_cutoff(
            scores, self.epsilon, filter_value=self.filter_value, min_keep=self.min_tokens_to_keep
        )


class EtaLogitsWarper(_Warper):
    """Remove tokens of probability below a bound that falls with the entropy of the row.

    The bound is `min(epsilon, sqrt(epsilon) * exp(-entropy))`. `device` is accepted for transformers' sake: the
    computation happens where the scores are.

    Raises:
        ValueError: `epsilon` is outside (0, 1), or `min_tokens_to_keep` is below 1.
    """

    def __init__(
        self, epsilon: float, filter_value: float = NEG_INF, min_tokens_to_keep: int = 1, device: str = "cpu"
    ) -> None:
        self.epsilon = _inside("eta_cutoff", epsilon, "(0, 1)")
        check_count("min_tokens_to_keep", int(min_tokens_to_keep), 1)
        self.filter_value = filter_value
        self.min_tokens_to_keep = int(min_tokens_to_keep)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with improbable tokens replaced by `filter_value`."""
        return ops.eta_cutoff(scores, self.epsilon, filter_value=self.filter_value, min_keep=self.min_tokens_to_keep)


def _inside(name: str, value: float, interval: str) -> float:
    """`value` as a float, or ValueError unless it lies in `interval`, an interval of 0 and 1 in the usual notation."""
    number = float(value)
    low = number >= 0 if interval[0] == "[" else number > 0
    high = number <= 1 if interval[-1] == "]" else number < 1
    if not (low and high):
        raise ValueError(f"`{name}` has to be a number in {interval}, but is {value!r}.")
    return number
