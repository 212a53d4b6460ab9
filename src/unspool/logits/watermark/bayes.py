"""Finding the SynthID-Text watermark: a small model weighs a text's g-values for and against the mark.

The model has one number for each layer and each pair of layers; it is trained on g-values of marked and unmarked texts,
and told by `labels` which is which.

Source: Dathathri et al., https://doi.org/10.1038/s41586-024-08025-4, on the Bayesian score.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unspool.config.files import find_file, read_json, write_atomically
from unspool.errors import CheckpointError
from unspool.logits.watermark.synthid import SynthIDTextWatermarkLogitsProcessor
from unspool.types import FileName

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass
class BayesianDetectorConfig:
    """Settings of a `BayesianDetectorModel`.

    Attributes:
        watermarking_depth: layers of the tournament, the number of keys.
        base_rate: share of marked texts expected beforehand.
        model_name: the model whose texts it was trained on, for whoever loads it.
        watermarking_config: fields of the `SynthIDTextWatermarkingConfig` of those texts, for whoever loads it.
    """

    watermarking_depth: int | None = None
    base_rate: float = 0.5
    model_name: str | None = None
    watermarking_config: dict[str, Any] | None = None

    def set_detector_information(self, model_name: str, watermarking_config: dict[str, Any]) -> None:
        """Note which model and watermark the detector is for."""
        self.model_name = model_name
        self.watermarking_config = watermarking_config

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dict of their own."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make the settings from a dict; entries that are no settings are ignored, as files hold more."""
        names = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in names})


@dataclass
class BayesianWatermarkDetectorModelOutput:
    """What a `BayesianDetectorModel` says; fields by name, or by place among those that are there.

    Attributes:
        loss: mean of the texts' losses and the weights' penalty, when there are labels.
        posterior_probabilities: chance that each text is marked, `[rows]`.
    """

    loss: Tensor | None = None
    posterior_probabilities: Tensor | None = None

    def __getitem__(self, key: int | str) -> Tensor:
        there = {"loss": self.loss, "posterior_probabilities": self.posterior_probabilities}
        known = {name: value for name, value in there.items() if value is not None}
        return known[key] if isinstance(key, str) else list(known.values())[key]


class BayesianDetectorWatermarkedLikelihood(nn.Module):
    """Likelihood of g-values in marked text, layer by layer, given those of the layers before.

    Args:
        watermarking_depth: layers.
    """

    def __init__(self, watermarking_depth: int) -> None:
        super().__init__()
        self.watermarking_depth = watermarking_depth
        self.beta = nn.Parameter(-2.5 + 0.001 * torch.randn(1, 1, watermarking_depth))
        self.delta = nn.Parameter(0.001 * torch.randn(1, 1, watermarking_depth, watermarking_depth))

    def forward(self, g_values: Tensor) -> Tensor:
        """Return `[rows, n-grams, layers]` likelihoods of `g_values` (0 or 1) of the same shape."""
        # Whether two different tokens met in a layer's match: a logistic regression on the layers before.
        met = F.linear(g_values.to(self.delta.dtype), self.delta[0, 0].tril(-1)) + self.beta
        two = met.sigmoid()
        return 0.5 * ((g_values + 0.5) * two + (1 - two))


class BayesianDetectorModel(nn.Module):
    """Chance that a text is marked, from its g-values.

    Args:
        config: `watermarking_depth` must be set.

    Raises:
        ValueError: the depth is missing, or `base_rate` does not lie between 0 and 1.
    """

    def __init__(self, config: BayesianDetectorConfig) -> None:
        super().__init__()
        depth = config.watermarking_depth
        if not isinstance(depth, int) or depth < 1:
            raise ValueError(f"`watermarking_depth` has to be the number of keys, at least 1, but is {depth!r}.")
        if not 0.0 < config.base_rate < 1.0:
            raise ValueError(f"`base_rate` has to lie between 0 and 1, but is {config.base_rate}.")
        self.config = config
        self.watermarking_depth = depth
        self.base_rate = config.base_rate
        self.likelihood_model_watermarked = BayesianDetectorWatermarkedLikelihood(depth)
        self.prior = nn.Parameter(torch.tensor([config.base_rate]))

    def forward(
        self,
        g_values: Tensor,
        mask: Tensor,
        labels: Tensor | None = None,
        loss_batch_weight: float = 1,
        return_dict: bool = False,
    ) -> tuple[Tensor, ...] | BayesianWatermarkDetectorModelOutput:
        """Judge texts by their g-values.

        Args:
            g_values: 0 or 1, `[rows, n-grams, layers]`.
            mask: which n-grams count, `[rows, n-grams]`.
            labels: 1 for marked texts and 0 for others, `[rows]` floats, to train.
            loss_batch_weight: weight of the penalty on the size of `delta`.
            return_dict: give a `BayesianWatermarkDetectorModelOutput` and not a tuple.

        Returns:
            `(probabilities,)` or `(probabilities, loss)`, the probabilities `[rows]`.
        """
        likelihoods = self.likelihood_model_watermarked(g_values)
        unmarked = torch.full_like(likelihoods, 0.5)
        odds = likelihoods.clamp(min=1e-30).log() - unmarked.log()
        prior = self.prior.clamp(1e-5, 1 - 1e-5)
        out = (prior.log() - (1 - prior).log() + (odds * mask[..., None]).sum(dim=(1, 2))).sigmoid()
        loss = None
        if labels is not None:
            penalty = (self.likelihood_model_watermarked.delta**2).sum() * loss_batch_weight
            loss = F.binary_cross_entropy(out.clamp(1e-5, 1 - 1e-5), labels) + penalty
        if return_dict:
            return BayesianWatermarkDetectorModelOutput(loss=loss, posterior_probabilities=out)
        return (out,) if loss is None else (out, loss)

    def save_pretrained(self, save_directory: FileName) -> None:
        """Write `config.json` and `model.safetensors` to a folder, which is made if need be."""
        from safetensors.torch import save_file

        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        values = {"architectures": [type(self).__name__], **self.config.to_dict()}
        save_file({name: value.contiguous() for name, value in self.state_dict().items()}, folder / _WEIGHTS)
        write_atomically(folder / _CONFIG, json.dumps(values, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: FileName, **kwargs: Any) -> Self:
        """Read a detector from a folder or a Hub repository, ours or transformers'.

        Args:
            pretrained_model_name_or_path: folder or repository.
            kwargs: `cache_dir`, `force_download`, `local_files_only`, `token`, `revision`, `subfolder` for the Hub.

        Raises:
            FileNotFoundError: a file is missing.
            CheckpointError: the files are no detector.
        """
        from safetensors.torch import load_file

        source = pretrained_model_name_or_path
        model = cls(BayesianDetectorConfig.from_dict(read_json(find_file(source, _CONFIG, **kwargs))))
        try:
            model.load_state_dict(load_file(find_file(source, _WEIGHTS, **kwargs)))
        except RuntimeError as error:
            raise CheckpointError(f"{source} does not hold the weights of a {cls.__name__}: {error}") from error
        return model.eval()


class EndsText(Protocol):
    """What is asked of a tokenizer."""

    eos_token_id: int | None


class SynthIDTextWatermarkDetector:
    """Tells text with the SynthID-Text watermark from other text.

    Args:
        detector_module: trained on texts with the same keys.
        logits_processor: with the settings that the texts were generated with.
        tokenizer: knows the end token; what stands after it is not judged.
    """

    def __init__(
        self,
        detector_module: BayesianDetectorModel,
        logits_processor: SynthIDTextWatermarkLogitsProcessor,
        tokenizer: EndsText,
    ) -> None:
        self.detector_module = detector_module
        self.logits_processor = logits_processor
        self.tokenizer = tokenizer

    def __call__(self, tokenized_outputs: Tensor) -> tuple[Tensor, ...] | BayesianWatermarkDetectorModelOutput:
        """Return `(probabilities,)`, the chance that each of the texts `[rows, width]` is marked; `[rows]`."""
        mark, ids = self.logits_processor, tokenized_outputs
        eos = self.tokenizer.eos_token_id
        mask = mark.compute_context_repetition_mask(ids)
        if eos is not None:
            mask = mask & mark.compute_eos_token_mask(ids, eos)[:, mark.ngram_len - 1 :]
        out: tuple[Tensor, ...] = self.detector_module(mark.compute_g_values(ids), mask)
        return out
