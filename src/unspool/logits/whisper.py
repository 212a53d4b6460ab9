"""Processors of Whisper's speech recognition: timestamps in pairs, and silence."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from unspool.logits.base import LogitsProcessor
from unspool.logits.ops import NEG_INF


class WhisperTimeStampLogitsProcessor(LogitsProcessor):
    """Keep timestamps in order and in pairs, and take one when all of them together outweigh any other token.

    Args:
        generate_config: has `no_timestamps_token_id` (the timestamps are the ids after it) and `eos_token_id` (or
            `bos_token_id`); may have `max_initial_timestamp_index`, the latest first timestamp.
        begin_index: width of `input_ids` when the first new token is chosen.
        _detect_timestamp_from_logprob: False leaves the last of the rules out; default is the config's, else True.

    Raises:
        ValueError: `begin_index` is None, or the config lacks an id.

    Source: Radford et al., https://arxiv.org/abs/2212.04356.
    """

    row_independent = True

    def __init__(
        self, generate_config: Any, begin_index: int, _detect_timestamp_from_logprob: bool | None = None
    ) -> None:
        if begin_index is None:
            raise ValueError("`begin_index` has to be the width of `input_ids` at the first new token, but is None.")
        no_timestamps = getattr(generate_config, "no_timestamps_token_id", None)
        eos = getattr(generate_config, "eos_token_id", None) or getattr(generate_config, "bos_token_id", None)
        if no_timestamps is None or eos is None:
            raise ValueError("`generate_config` needs `no_timestamps_token_id` and `eos_token_id` for timestamps.")
        self.no_timestamps_token_id = int(no_timestamps)
        self.timestamp_begin = self.no_timestamps_token_id + 1
        self.eos_token_id = int(eos)
        self.begin_index = begin_index
        self.max_initial_timestamp_index: int | None = getattr(generate_config, "max_initial_timestamp_index", None)
        detect = _detect_timestamp_from_logprob
        if detect is None:
            detect = getattr(generate_config, "_detect_timestamp_from_logprob", True)
        self._detect = bool(detect)

    def set_begin_index(self, begin_index: int) -> None:
        """Move the step that counts as the first."""
        self.begin_index = begin_index

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores with what may not come next at -inf."""
        first = self.timestamp_begin
        tokens = torch.arange(scores.shape[-1], device=scores.device)
        banned = (tokens == self.no_timestamps_token_id) | self._broken_pairs(input_ids[:, self.begin_index :], tokens)
        if input_ids.shape[1] == self.begin_index:
            banned |= tokens < first
            if self.max_initial_timestamp_index is not None:
                banned |= tokens > first + self.max_initial_timestamp_index
        processed = scores.masked_fill(banned, NEG_INF)
        if self._detect:
            logs = processed.float().log_softmax(dim=-1)
            likelier = logs[:, first:].logsumexp(dim=-1) > logs[:, :first].amax(dim=-1)
            processed[:, :first].masked_fill_(likelier.unsqueeze(-1), NEG_INF)
        return processed

    def _broken_pairs(self, ids: Tensor, tokens: Tensor) -> Tensor:
        """Which `tokens` `[vocab]` would break the pairs or the order after new tokens `ids` `[rows, new]`."""
        first = self.timestamp_begin
        rows, width = ids.shape
        if width == 0:
            return torch.zeros(rows, len(tokens), dtype=torch.bool, device=ids.device)
        stamps = ids >= first
        last = stamps[:, -1]
        opened = last & ~stamps[:, -2] if width > 1 else torch.zeros_like(last)
        place = (stamps * torch.arange(1, width + 1, device=ids.device)).amax(dim=1)
        newest = ids.gather(1, (place - 1).clamp(min=0).unsqueeze(1)).squeeze(1)
        # A closed pair's own time may not come again; an open one's may.
        least = torch.where(place > 0, newest + (~opened).long(), first)
        is_stamp = tokens >= first
        closed = (last & ~opened).unsqueeze(1) & is_stamp
        text = opened.unsqueeze(1) & (tokens < self.eos_token_id)
        return closed | text | (is_stamp & (tokens < least.unsqueeze(1)))


class WhisperNoSpeechDetection(LogitsProcessor):
    """Note the probability of silence at the first new token; the scores pass unchanged.

    Put it in front of processors that change scores.

    Args:
        no_speech_token: id of the token that stands for silence.
        begin_index: width of `input_ids` at the first new token of a transcription. Above 1, the prompt goes before
            it, and the model is asked for its own logits at the start of the transcription.
        scores_is_logprobs: the scores are log probabilities and not logits.
    """

    reads_history = False

    def __init__(self, no_speech_token: int, begin_index: int, scores_is_logprobs: bool = False) -> None:
        self.no_speech_token = no_speech_token
        self.start_of_trans_offset = begin_index
        self.begin_index = begin_index
        self.is_scores_logprobs = scores_is_logprobs
        self.model: Any = None
        self.inputs: dict[str, Any] | None = None
        self._no_speech_prob: Any = [0.0]

    def set_model(self, model: Any) -> None:
        """Name the model that is asked for logits."""
        self.model = model

    def set_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Give what the model is to be called with; `inputs` are the audio's features."""
        if self.model is None:
            raise ValueError("call `set_model` before `set_inputs`: the model prepares the inputs.")
        prepared = {**self.model.prepare_inputs_for_generation(**inputs), **inputs}
        prepared["input_features"] = prepared.pop("inputs")
        if "input_ids" not in inspect.signature(self.model.forward).parameters:
            prepared.pop("input_ids", None)
        self.inputs = prepared

    @property
    def no_speech_prob(self) -> Any:
        """Probability of silence for each row, `[rows]`; `[0.0]` before the first step."""
        return self._no_speech_prob

    def set_begin_index(self, begin_index: int) -> None:
        """Move the step that counts as the first."""
        self.begin_index = begin_index

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores as they are."""
        if input_ids.shape[1] != self.begin_index:
            return scores
        given, are_logs = scores, self.is_scores_logprobs
        if self.start_of_trans_offset > 1:
            if self.model is None or self.inputs is None:
                raise ValueError(
                    "WhisperNoSpeechDetection needs `set_model` and `set_inputs` before generation, since "
                    f"`begin_index` is {self.start_of_trans_offset}."
                )
            with torch.no_grad():
                logits = self.model(**self.inputs).logits
            given, are_logs = logits[:, self.begin_index - self.start_of_trans_offset], False
        probs = given.exp() if are_logs else given.float().softmax(dim=-1)
        self._no_speech_prob = probs[:, self.no_speech_token]
        return scores
