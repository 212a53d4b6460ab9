"""A folder with `config.json` and safetensors becomes a native model."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch

from unspool.errors import CheckpointError
from unspool.models.base import Model
from unspool.models.registry import dtype_of, empty
from unspool.types import FileName
from unspool.weights.fill import Filling, fill
from unspool.weights.names import Source, Target, is_ignored, targets
from unspool.weights.quant import Reading, Stored, quantiser, reader
from unspool.weights.safetensors import SafetensorsFile

__all__ = ["load_model", "read_config"]

logger = logging.getLogger(__name__)

_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Seconds of loading before a progress bar is worth showing.
_PATIENCE = 2.0


def read_config(folder: FileName) -> dict[str, Any]:
    """Contents of a checkpoint folder's `config.json`.

    Raises:
        CheckpointError: the folder or the file is missing, or the file is not a JSON object.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder that holds config.json and model.safetensors")
    config = _read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / 'config.json'} holds no JSON object")
    return config


def load_model(
    folder: FileName,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: bool | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    pack: bool = True,
    quantize: object | None = None,
) -> Model:
    """Load a model in evaluation mode. The folder is only read.

    Tensors go one after another from disk into their final place, layout, dtype and device, so memory never holds much
    more than the weights.

    Args:
        folder: holds `config.json` and `model.safetensors`, or shards with `model.safetensors.index.json`.
        dtype: of the weights; `None` or `"auto"` keeps the checkpoint's.
        device: where the weights go.
        progress: show a bar on stderr; `None` shows it on a terminal when loading takes more than two seconds.
        config_overrides: replace entries of `config.json`.
        pack: on a CPU, exchange weights for layouts that multiply faster, bf16 for that of our own kernels where they
            are in use, else bf16 and fp32 for oneDNN's.

        quantize: format in which to keep the weights of the layers, see `weights.quant`: a name, or a
            `BitsAndBytesConfig`.

    Raises:
        CheckpointError: the folder does not hold the model it promises; the message names the file or tensor.
        Unsupported: the checkpoint is quantised in a way that cannot be read.
        ValueError: `quantize` is unknown, or the checkpoint is quantised already.
    """
    wanted = None if quantize is None else quantiser(quantize)
    folder = Path(folder)
    config = {**read_config(folder), **(config_overrides or {})}
    if wanted is not None and config.get("quantization_config"):
        raise ValueError(
            f"{folder} holds quantised weights already; leave `quantize` out, or take the unquantised model"
        )
    model = empty(config, dtype)
    with ExitStack() as stack:
        files = [stack.enter_context(SafetensorsFile(path)) for path in _weight_files(folder)]
        found = {name: file for file in files for name in file.entries}
        if not (config.get("dtype") or config.get("torch_dtype")) and dtype in (None, "auto"):
            model = model.to(_file_dtype(files))
        model.tied = model.tied and not _untied(model, found)
        stored = reader(config, found)
        plan = [
            (
                target,
                [
                    _stored(source, target, stored) or _locate(source, target, found, model, folder)
                    for source in target.sources
                ],
            )
            for target in _wanted(model)
        ]
        used = {name for _, places in plan for place in places for name in _names(place)}
        _report_extras(found, used, model, folder)
        # The largest come first: what reading one holds beside the weight is then gone before memory is full.
        plan.sort(key=lambda entry: -entry[0].parameter.nbytes)
        model.requires_grad_(not pack)
        model.packs = pack
        if model.tied:
            model.lm_head.weight = model.embedding.weight
        pool = stack.enter_context(ThreadPoolExecutor(torch.get_num_threads()))
        how = Filling(found, device, pack, wanted, pool)
        with _progress(f"Loading {folder.name}", sum(target.parameter.nbytes for target, _ in plan), progress) as bar:
            for target, places in plan:
                fill(model, target, places, how)
                bar.advance(target.parameter.nbytes)
    return model


def _wanted(model: Model) -> Iterator[Target]:
    """Parameters to be read; a tied head has none of its own."""
    return (target for target in targets(model) if not (model.tied and target.name == "lm_head.weight"))


def _stored(source: Source, target: Target, stored: Reading | None) -> Stored | None:
    """What a quantised checkpoint holds for `source`, if it is quantised."""
    if stored is None or not source.name.endswith(".weight") or len(source.shape) != 2 or target.transposed:
        return None
    shape = (source.shape[0], source.shape[1])
    return stored(source.name.removesuffix(".weight"), shape) or stored(source.bare.removesuffix(".weight"), shape)


def _names(place: str | Stored) -> tuple[str, ...]:
    return place.names if isinstance(place, Stored) else (place,)


def _locate(source: Source, target: Target, found: Mapping[str, SafetensorsFile], model: Model, folder: Path) -> str:
    """Name under which the checkpoint holds `source`, once its shape is as expected."""
    candidates = [source.name, source.bare]
    if model.tied and target.name == "embedding.weight":
        candidates.append("lm_head.weight")
    name = next((candidate for candidate in candidates if candidate in found), None)
    if name is None:
        raise CheckpointError(f"{folder} lacks the tensor {source.name!r} that a {model.spec.family!r} model needs")
    shape = found[name].entries[name].shape
    if shape != source.shape:
        raise CheckpointError(
            f"{found[name].path}: the tensor {name!r} has shape {list(shape)}, but config.json makes it "
            f"{list(source.shape)}"
        )
    if not found[name].entries[name].dtype.is_floating_point:
        raise CheckpointError(
            f"{found[name].path}: the tensor {name!r} holds integers where config.json speaks of no quantisation"
        )
    return name


def _untied(model: Model, found: Mapping[str, SafetensorsFile]) -> bool:
    """Whether the files hold a head of their own although the configuration ties it to the embedding."""
    embedding = next(target.sources[0] for target in targets(model) if target.name == "embedding.weight")
    name = embedding.name if embedding.name in found else embedding.bare
    if "lm_head.weight" not in found or name not in found:
        return False
    if found[name].equal(name, found["lm_head.weight"], "lm_head.weight"):
        return False
    logger.warning("lm_head.weight differs from %s although config.json ties them; both are used as they are", name)
    return True


def _report_extras(found: Mapping[str, SafetensorsFile], used: set[str], model: Model, folder: Path) -> None:
    """Warn once of tensors that nothing reads."""
    extras = sorted(name for name in found if name not in used and not is_ignored(name))
    if model.tied:
        extras = [name for name in extras if name != "lm_head.weight"]
    if extras:
        logger.warning(
            "%s holds %d tensors that a %r model does not use: %s",
            folder,
            len(extras),
            model.spec.family,
            ", ".join(extras),
        )


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    if (folder / _INDEX).is_file():
        index = _read_json(folder / _INDEX)
        table = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(table, dict) or not table:
            raise CheckpointError(f"{folder / _INDEX} has no `weight_map`")
        paths = [folder / str(name) for name in dict.fromkeys(table.values())]
        for path in paths:
            if not path.is_file() or path.parent != folder:
                raise CheckpointError(f"{folder / _INDEX} names the file {path.name!r}, which is not in the folder")
        return paths
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} has only pickled weights ({', '.join(pickles)}), which can run code when read; convert them to "
            f"safetensors, for instance with `save_pretrained` of the transformers library"
        )
    raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX}")


def _file_dtype(files: list[SafetensorsFile]) -> torch.dtype:
    """Dtype of the first floating tensor."""
    kinds = (entry.dtype for file in files for entry in file.entries.values() if entry.dtype.is_floating_point)
    return dtype_of(next(kinds, None), {})


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error


class _Bar(Protocol):
    def advance(self, count: int) -> None:
        """Count `count` more bytes as read."""
        ...


class _Quiet:
    """No bar."""

    def advance(self, count: int) -> None:
        """Nothing to show."""


class _RichBar:
    """A bar on stderr that appears only when loading has taken `patience` seconds."""

    def __init__(self, title: str, total: int, patience: float) -> None:
        self._title, self._total, self._done = title, total, 0
        self._appears = time.monotonic() + patience
        self._stack = ExitStack()
        self._update: Any = None

    def advance(self, count: int) -> None:
        """Count `count` more bytes as read."""
        self._done += count
        if self._update is None and time.monotonic() >= self._appears and self._done < self._total:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
            bar = self._stack.enter_context(Progress(*columns, console=Console(stderr=True)))
            task = bar.add_task(self._title, total=self._total)
            self._update = lambda: bar.update(task, completed=self._done)
        if self._update is not None:
            self._update()

    def close(self) -> None:
        """Leave the terminal as it was."""
        self._stack.close()


@contextmanager
def _progress(title: str, total: int, wanted: bool | None) -> Iterator[_Bar]:
    if wanted is False or (wanted is None and not sys.stderr.isatty()):
        yield _Quiet()
        return
    bar = _RichBar(title, total, 0.0 if wanted else _PATIENCE)
    try:
        yield bar
    finally:
        bar.close()
