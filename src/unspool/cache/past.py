"""The keys and values a finished `generate()` hands back, to be passed into a follow-up call."""

from __future__ import annotations

from dataclasses import dataclass, field

from unspool.cache.paged import PagedStore


@dataclass(slots=True, eq=False)
class PastRow:
    """One row's tokens whose keys and values are stored: its true tokens, no padding.

    `adapter` is the one they were computed with; they are good for rows with the same one only.
    """

    tokens: list[int]
    computed: int
    blocks: list[list[int]] = field(default_factory=list)
    adapter: object | None = None


class PastKeyValues:
    """What `generate(return_dict_in_generate=True)` returns as `past_key_values`.

    Pass it back as `generate(..., past_key_values=past)` with the longer conversation as `input_ids`: tokens that are
    already stored are not computed again. A row is reused as far as its tokens agree with the new prompt, so an edited
    history gives right text, only slower; so does another adapter. The object is read, never changed, by the call it is
    passed to.

    Attributes:
        store: the blocks.
        rows: one entry per row of the call that made it.
        width: padded columns of that call's output, less the last token, which is not stored.
    """

    def __init__(self, store: PagedStore, rows: list[PastRow], width: int) -> None:
        self.store = store
        self.rows = rows
        self.width = width

    def __len__(self) -> int:
        return len(self.rows)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns stored, padding included, as transformers' caches count them; the same for every layer."""
        return self.width

    def crop(self, max_length: int) -> None:
        """Keep the first `max_length` columns; a negative number drops that many from the end.

        Raises:
            ValueError: `max_length` is beyond what is stored.
        """
        keep = max_length if max_length >= 0 else self.width + max_length
        if not 0 <= keep <= self.width:
            raise ValueError(f"crop(max_length={max_length}): {self.width} columns are stored")
        for row in self.rows:
            self.store.truncate(row, max(0, row.computed - (self.width - keep)))
            del row.tokens[row.computed :]
        self.width = keep
