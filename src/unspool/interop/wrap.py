"""`unspool.wrap`: an object with our `generate()` around a module that stays as it is."""

from __future__ import annotations

from typing import Any

from torch import nn

from unspool.bridge.ragged import RaggedModel
from unspool.continuous import ContinuousMixin
from unspool.decode.opened import Opener
from unspool.decode.runner import Decoder
from unspool.errors import Unsupported
from unspool.generate.foreign import ForeignSource
from unspool.generate.mixin import GenerationMixin
from unspool.generate.native import NativeSource
from unspool.generate.opened import RowsModel
from unspool.generate.reading import Source
from unspool.generate.report import Report, report_on
from unspool.interop import patch
from unspool.interop.versions import check_version
from unspool.models.base import Model

__all__ = ["Wrapped", "wrap"]


def wrap(model: nn.Module) -> Wrapped:
    """Give a module our `generate()`, without changing it.

        model = unspool.wrap(AutoModelForCausalLM.from_pretrained("gpt2"))
        model.generate(**inputs, max_new_tokens=50)

    Args:
        model: a model of transformers or PEFT, or any `nn.Module` whose `forward` takes
            `(input_ids, attention_mask=, past_key_values=, use_cache=, position_ids=)` or some of these, and gives
            logits `[rows, tokens, vocab]` (itself, as a field `logits` or as its first item).

    Returns:
        An object that has `generate()` and is the module in all else: attributes read and set there are the module's.

    Raises:
        TypeError: not a module.
        Unsupported: the loaded transformers is older than 5.2.
    """
    if isinstance(model, Wrapped):
        return model
    if not isinstance(model, nn.Module):
        raise TypeError(f"wrap() takes a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(model, Model):
        check_version()
    return Wrapped(model)


class Wrapped(GenerationMixin, ContinuousMixin):
    """A module with our `generate()` and continuous batching; see `wrap`."""

    def __init__(self, module: nn.Module) -> None:
        object.__setattr__(self, "_module", module)

    def __getattr__(self, name: str) -> Any:
        if name == "_module":  # not there yet while the object is made or copied
            raise AttributeError(name)
        return getattr(self._module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._module, name)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._module)})

    def __repr__(self) -> str:
        return f"Wrapped({self._module!r})"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        return self._module(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> Wrapped:
        """Move the module; see `torch.nn.Module.to`."""
        self._module.to(*args, **kwargs)
        return self

    def eval(self) -> Wrapped:
        """Put the module into inference mode; see `torch.nn.Module.eval`."""
        self._module.eval()
        return self

    def train(self, mode: bool = True) -> Wrapped:
        """Put the module into training mode; see `torch.nn.Module.train`."""
        self._module.train(mode)
        return self

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Continue prompts; see `GenerationMixin.generate` for the arguments.

        A module with a `generate()` of its own kind (Whisper's long form, MusicGen, PEFT's adapters) runs that, with
        our decoding inside.
        """
        module = self._module
        if patch.is_plain(module):
            return super().generate(*args, **kwargs)
        with patch.inside():
            return module.generate(*args, **kwargs)

    def unspool_report(self) -> Report:
        """In which tier the module runs, and why not in a faster one; a call may still need a slower one.

        A module of PEFT is told as the one inside, which does the work.
        """
        return report_on(self._inner())

    def _served(self) -> tuple[Decoder | Opener, Opener | None]:
        """What computes for a manager, and what does for requests that are told more than tokens.

        Raises:
            Unsupported: the module generates in a way of its own.
        """
        module = self._inner()
        if isinstance(module, Model):
            return module, None
        source = ForeignSource(module)
        reason = patch.unserved(module)
        if reason is not None:
            raise Unsupported(f"continuous batching of {type(module).__name__}: {reason}; use generate()")
        shape = source.verdict().shape
        rows = RowsModel(source, None if shape is None else shape.vocab, makes_its_start=patch.makes_its_start(module))
        return (rows if shape is None else RaggedModel(source.foreign, shape)), rows

    def _inner(self) -> nn.Module:
        """The module; of one of PEFT's the one inside, where that does all the work."""
        module: Any = self._module
        settings = getattr(module, "active_peft_config", None)
        inner: nn.Module = module if settings is None or settings.is_prompt_learning else module.get_base_model()
        return inner

    def _source(self) -> Source:
        module = self._module
        return NativeSource(module) if isinstance(module, Model) else ForeignSource(module)
