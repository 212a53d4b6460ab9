"""Settings for hypothesis to draw from, and when two libraries may differ."""

from __future__ import annotations

from typing import Any

import torch
from families import VOCAB
from hypothesis import strategies as st

TOKENS = st.integers(1, VOCAB - 1)


def optional(**strategies: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=strategies)


HISTORY = optional(
    repetition_penalty=st.sampled_from([0.8, 1.0, 1.4, 4.0]),
    no_repeat_ngram_size=st.integers(1, 3),
    encoder_repetition_penalty=st.sampled_from([0.7, 1.5]),
    encoder_no_repeat_ngram_size=st.integers(1, 3),
    bad_words_ids=st.lists(st.lists(TOKENS, min_size=1, max_size=2), min_size=1, max_size=3),
    sequence_bias=st.lists(
        st.tuples(st.lists(TOKENS, min_size=1, max_size=2), st.sampled_from([-5.0, 3.0])),
        min_size=1, max_size=3, unique_by=lambda pair: tuple(pair[0]),
    ).map(lambda pairs: [[tokens, bias] for tokens, bias in pairs]),
)  # fmt: skip
PLACES = optional(
    suppress_tokens=st.lists(TOKENS, min_size=1, max_size=6),
    begin_suppress_tokens=st.lists(TOKENS, min_size=1, max_size=6),
    forced_eos_token_id=TOKENS,
    forced_bos_token_id=TOKENS,
    min_new_tokens=st.integers(1, 9),
    min_length=st.integers(1, 20),
    exponential_decay_length_penalty=st.tuples(st.integers(1, 6), st.sampled_from([1.1, 1.6])),
    remove_invalid_values=st.booleans(),
    renormalize_logits=st.booleans(),
)
WARPERS = optional(
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 3, 40]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    min_p=st.sampled_from([0.02, 0.3]),
    typical_p=st.sampled_from([0.3, 0.9]),
    epsilon_cutoff=st.sampled_from([0.001, 0.05]),
    eta_cutoff=st.sampled_from([0.001, 0.05]),
    top_h=st.sampled_from([0.3, 0.8]),
)
BEAMS = optional(
    length_penalty=st.sampled_from([-1.0, 0.0, 2.0]),
    early_stopping=st.sampled_from([True, False, "never"]),
)


def tied(got: torch.Tensor, expected: torch.Tensor, logits: tuple[torch.Tensor, ...], width: int) -> bool:
    """Rows part only where two tokens' logits are equal but for the rounding of either library."""
    columns = min(got.shape[1], expected.shape[1])
    for row, (mine, theirs) in enumerate(zip(got[:, :columns], expected[:, :columns], strict=True)):
        for column in (mine != theirs).nonzero().flatten().tolist()[:1]:
            scores = logits[column - width][row]
            if (scores[mine[column]] - scores[theirs[column]]).abs() > 5e-6:
                return False
    return not torch.equal(got[:, :columns], expected[:, :columns])
