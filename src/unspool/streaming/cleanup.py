"""Tidying of spaces as text streams: what `clean_up_tokenization_spaces=True` does to a text, done piece by piece."""

from __future__ import annotations

from typing import Any

__all__ = ["CLEAN_UP_RULES", "CleanUp", "clean_up", "tokenizer_cleans"]

# Applied one after the other over the whole text, as the decoders of WordPiece tokenizers do.
CLEAN_UP_RULES: tuple[tuple[str, str], ...] = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)

_PROBE = "a . b ? c ! d , e ' f n't g 'm h 's i 've j 're k"


def clean_up(text: str) -> str:
    """`text` with the spaces before punctuation and English contractions removed."""
    for old, new in CLEAN_UP_RULES:
        text = text.replace(old, new)
    return text


class CleanUp:
    """`clean_up` for a text that arrives in pieces: the outputs, joined, equal `clean_up` of the joined inputs.

    Each rule is a stage of its own that holds back only the characters that may still be the start of its pattern, so
    the cost is linear and at most a few characters wait.
    """

    def __init__(self) -> None:
        self._held = [""] * len(CLEAN_UP_RULES)

    def push(self, text: str) -> str:
        """Add `text` and return what can no longer change."""
        for stage, (old, new) in enumerate(CLEAN_UP_RULES):
            text = self._held[stage] + text
            done, start = "", 0
            while (at := text.find(old, start)) >= 0:
                done += text[start:at] + new
                start = at + len(old)
            rest = text[start:]
            keep = _overlap(rest, old)
            self._held[stage] = rest[len(rest) - keep :]
            text = done + rest[: len(rest) - keep]
        return text

    def finish(self) -> str:
        """Return what was held back; the next `push` starts a new text."""
        text = ""
        for stage, (old, new) in enumerate(CLEAN_UP_RULES):
            text = (self._held[stage] + text).replace(old, new)
            self._held[stage] = ""
        return text


def _overlap(text: str, pattern: str) -> int:
    """Length of the longest end of `text` that is the start of `pattern`, the whole pattern excluded."""
    return next(
        (size for size in range(min(len(pattern) - 1, len(text)), 0, -1) if pattern.startswith(text[-size:])), 0
    )


def tokenizer_cleans(tokenizer: Any) -> bool | None:
    """Find out, by trying, what a tokenizer's `decode` does when it is asked to clean up spaces.

    Returns:
        `True` if it applies `clean_up`, `False` if it ignores the switch (tokenizers of the BPE kind do),
        `None` if it does something else or does not let us find out.
    """
    if not hasattr(tokenizer, "encode"):
        return None
    ids = tokenizer.encode(_PROBE, add_special_tokens=False)
    raw = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    cleaned = tokenizer.decode(ids, clean_up_tokenization_spaces=True)
    if clean_up(raw) != raw:
        return {raw: False, clean_up(raw): True}.get(cleaned)
    # The vocabulary or the decoder leaves nothing to clean in the probe: go by what the tokenizer says of itself.
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    own = getattr(tokenizer, "clean_up_tokenization", None)
    if own is None or type(model).__name__ == "BPE":
        return None
    return True if own(_PROBE) == clean_up(_PROBE) else None
