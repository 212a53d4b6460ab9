"""Finding the green-list watermark: more green tokens than chance would give, as a z-score."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unspool.config.watermark import WatermarkingConfig
from unspool.logits.watermark.green import WatermarkLogitsProcessor

Numbers = NDArray[np.float64]


@dataclass
class WatermarkDetectorOutput:
    """What a `WatermarkDetector` found, one entry for each text.

    Attributes:
        num_tokens_scored: tokens that were judged.
        num_green_tokens: how many of them are green.
        green_fraction: their share.
        z_score: standard deviations that the count lies above what unmarked text has on average.
        p_value: chance of such a count in unmarked text.
        prediction: `z_score` is above the threshold: the text is marked.
        confidence: `1 - p_value`.
    """

    num_tokens_scored: Numbers | None = None
    num_green_tokens: Numbers | None = None
    green_fraction: Numbers | None = None
    z_score: Numbers | None = None
    p_value: Numbers | None = None
    prediction: NDArray[np.bool_] | None = None
    confidence: Numbers | None = None


class WatermarkDetector:
    """Tells text with the green-list watermark from other text.

    It needs the settings that the text was generated with, and the same kind of device, since each kind draws other
    lists.

    Args:
        model_config: the model's configuration, an object or a mapping with `vocab_size` and, if the model has one,
            `bos_token_id`.
        device: where the text was generated.
        watermarking_config: a `WatermarkingConfig`, or its fields as a mapping.
        ignore_repeated_ngrams: judge a token with the same context once a text, however often it comes.
        max_cache_size: lists of green tokens kept for texts to come.

    Raises:
        ValueError: a setting is out of its range or unknown.

    Source: Kirchenbauer et al., https://arxiv.org/abs/2306.04634.
    """

    def __init__(
        self,
        model_config: Any,
        device: str | torch.device,
        watermarking_config: WatermarkingConfig | Mapping[str, Any],
        ignore_repeated_ngrams: bool = False,
        max_cache_size: int = 128,
    ) -> None:
        mark = watermarking_config
        settings = dict(mark) if isinstance(mark, Mapping) else mark.to_dict()
        decoder_start = _entry(model_config, "is_encoder_decoder", False)
        start = "decoder_start_token_id" if decoder_start else "bos_token_id"
        self.bos_token_id = _entry(model_config, start, None)
        self.ignore_repeated_ngrams = ignore_repeated_ngrams
        config = WatermarkingConfig.from_dict(settings)
        config.validate()
        self.greenlist_ratio = config.greenlist_ratio
        self.processor = WatermarkLogitsProcessor(
            vocab_size=_entry(model_config, "vocab_size"), device=device, lists_kept=max_cache_size, **config.to_dict()
        )

    def __call__(
        self, input_ids: Tensor, z_threshold: float = 3.0, return_dict: bool = False
    ) -> WatermarkDetectorOutput | NDArray[np.bool_]:
        """Judge texts `[rows, width]` of token ids; a beginning-of-text token in front is left out.

        Leave out prompts and padding too: they carry no mark and dilute the rest.

        Args:
            input_ids: texts of one length.
            z_threshold: z-score above which a text counts as marked; 3 errs for about one unmarked text in 740.
            return_dict: give all that was found, and not the predictions alone.

        Returns:
            Predictions `[rows]` bool, or a `WatermarkDetectorOutput`.

        Raises:
            ValueError: only some texts begin with the beginning-of-text token, or there is no token to judge.
        """
        has_bos = input_ids[:, 0] == (-1 if self.bos_token_id is None else self.bos_token_id)
        if bool(has_bos.any()):
            if not bool(has_bos.all()):
                raise ValueError(
                    "Some texts begin with the beginning-of-text token and others do not; cut it from all of them."
                )
            input_ids = input_ids[:, 1:]
        least = self.processor.context_width + 1
        if input_ids.shape[1] < least:
            raise ValueError(
                f"With `context_width={least - 1}`, a text needs at least {least} tokens to be judged, but has "
                f"{input_ids.shape[1]}."
            )
        scored, green = self._count(input_ids)
        share = self.greenlist_ratio
        z_score = (green - share * scored) / np.sqrt(scored * share * (1 - share))
        prediction: NDArray[np.bool_] = z_score > z_threshold
        if not return_dict:
            return prediction
        p_value = 0.5 * torch.special.erfc(torch.from_numpy(z_score / np.sqrt(2))).numpy()
        return WatermarkDetectorOutput(
            num_tokens_scored=scored,
            num_green_tokens=green,
            green_fraction=green / scored,
            z_score=z_score,
            p_value=p_value,
            prediction=prediction,
            confidence=1 - p_value,
        )

    def _count(self, input_ids: Tensor) -> tuple[Numbers, Numbers]:
        """Tokens judged and green ones of each text."""
        mark = self.processor
        inside = mark.seeding_scheme == "selfhash"
        windows = input_ids.unfold(1, mark.context_width + (not inside), 1)
        texts, number, width = windows.shape
        contexts = windows if inside else windows[..., :-1]
        seeds = mark.seeds(contexts.reshape(texts * number, -1))
        hits = mark.green(seeds, windows[..., -1].flatten().tolist())
        judged = np.ones((texts, number))
        if self.ignore_repeated_ngrams:
            judged[:] = 0
            for row, text in zip(judged, windows.cpu().numpy(), strict=True):
                row[np.unique(text.reshape(number, width), axis=0, return_index=True)[1]] = 1
        counted = np.asarray(hits, dtype=np.float64).reshape(texts, number) * judged
        return judged.sum(axis=1), counted.sum(axis=1)


def _entry(config: Any, name: str, *default: Any) -> Any:
    """An entry of a mapping or an attribute of an object."""
    if isinstance(config, Mapping):
        return config.get(name, *default) if default else config[name]
    return getattr(config, name, *default)
