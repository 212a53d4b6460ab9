"""Beam choosers from settings."""

from __future__ import annotations

from collections.abc import Sequence as Items

import torch
from torch import Tensor

from unspool.config import GenerationConfig
from unspool.decode.choose.beam import BeamChooser, BeamRules, Ends
from unspool.decode.choose.constraints import Progress, read_constraints
from unspool.decode.choose.groups import GroupBeamChooser
from unspool.decode.choose.noise import Noise
from unspool.logits import LogitsProcessorList
from unspool.stopping import Limits

__all__ = ["Beams", "beam_chooser", "beam_filler"]

Beams = BeamChooser | GroupBeamChooser


def beam_filler(config: GenerationConfig, eos: list[int]) -> int:
    """What follows the end of a finished beam. As in transformers, 0 as pad counts as none, but not for groups."""
    pad = config.pad_token_id
    if _grouped(config) and pad is not None:
        return int(pad)
    return (pad or eos[0]) if eos else -1


def beam_chooser(
    config: GenerationConfig,
    limits: Limits,
    prompts: Tensor,
    tokens: Items[list[int]],
    *,
    processors: LogitsProcessorList,
    noise: Noise | None,
    filler: int,
    vocab: int,
    every_row: bool = False,
    scores: list[Tensor] | None = None,
    keep_scores: bool = False,
    keep_logits: bool = False,
) -> Beams:
    """The chooser that the settings ask for.

    Args:
        config: resolved settings.
        limits: when candidates end.
        prompts: `[prompts * beams, columns]`, what processors see; rows of a prompt side by side.
        tokens: the true tokens of each of these rows.
        processors: in order.
        noise: where sampling noise comes from; `None` chooses the best.
        filler: what follows the end of a finished sequence.
        vocab: how many tokens there are.
        every_row: rows of prompts that are settled are fed on until all are.
        scores: where processed scores are kept, for criteria that look at them, or `None`.
        keep_scores, keep_logits: hand the processed scores, the raw logits on with the choice.
    """
    beams, groups = int(config.num_beams or 1), config.num_beam_groups or 1
    eos = config.eos_token_id
    ends = list(eos) if isinstance(eos, list | tuple) else [] if eos is None else [eos]
    longest = config.max_length if config.max_length is not None else limits.max_columns
    rules = BeamRules(
        beams=beams,
        candidates=max(2, 1 + len(ends)) * (beams // groups),
        length_penalty=1.0 if config.length_penalty is None else float(config.length_penalty),
        early_stopping=config.early_stopping or False,
        max_new=int(longest) - prompts.shape[1],
        filler=filler,
    )
    end = Ends(
        torch.tensor(sorted(limits.eos), dtype=torch.int64, device=prompts.device),
        limits.max_columns,
        limits.criteria,
        scores,
    )
    keep = {"keep_scores": keep_scores, "keep_logits": keep_logits}
    if not _grouped(config):
        together = every_row or not limits.criteria.row_independent
        return BeamChooser(prompts, processors or None, noise, rules, end, together=together, **keep)
    return GroupBeamChooser(
        prompts,
        processors or None,
        rules,
        end,
        groups=groups,
        close=(ends or sorted(limits.eos) or [-1])[0],
        progress=_progress(config, tokens, beams, vocab),
        together=every_row,
        number=int(config.num_return_sequences or 1),
        **keep,
    )


def _grouped(config: GenerationConfig) -> bool:
    """Whether rows are decided as transformers 4 did, which knew groups and constraints."""
    constrained = config.constraints is not None or config.force_words_ids is not None
    return constrained or (config.num_beam_groups or 1) > 1


def _progress(config: GenerationConfig, tokens: Items[list[int]], beams: int, vocab: int) -> Progress | None:
    """What constraints there are, and how far the prompts have come with them."""
    if config.constraints is None and config.force_words_ids is None:
        return None
    return Progress(read_constraints(config.constraints, config.force_words_ids, vocab), list(tokens[::beams]), beams)
