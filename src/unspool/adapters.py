"""Adapters as people use them: methods of native models, and PEFT's class around one.

Their files are read in `weights/lora.py`; what they add to a step is in `models/adapters.py`.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from unspool.models.adapters import BASE
from unspool.models.base import CausalLMOutput, Model
from unspool.repositories import HubArguments, locate_adapter
from unspool.weights.lora import read_adapter

if TYPE_CHECKING:
    from unspool.generate.outputs import GenerateOutput
    from unspool.hub import CausalLM
    from unspool.types import FileName

__all__ = ["AdapterMixin", "PeftModel"]


class AdapterMixin:
    """Gives a native model its low-rank adapters; see `unspool.load`. The model's weights are never changed."""

    def load_adapter(self, path_or_id: FileName, adapter_name: str = "default", **hub: Any) -> None:
        """Load a LoRA, rsLoRA or DoRA that PEFT saved. The first one loaded becomes the active one.

        Args:
            path_or_id: a folder with `adapter_config.json` and `adapter_model.safetensors`, a repository on the Hub, or
                the built-in `"storyteller-pirate"`.
            adapter_name: what to call it in `set_adapter` and `adapter_names`.
            hub: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only` and `force_download`, as in
                `unspool.load`.

        Raises:
            ValueError: the name is taken, or none.
            FileNotFoundError: there is no such folder or repository.
            CheckpointError: the files are damaged, or the adapter is one of another model.
            Unsupported: another kind of adapter. After any of these, the model is as before.
        """
        adapters = self._native.adapters
        if not isinstance(adapter_name, str) or adapter_name in ("", BASE):
            raise ValueError(f"adapter_name={adapter_name!r} cannot name an adapter; choose another text")
        if adapter_name in adapters.loaded:
            raise ValueError(
                f"an adapter called {adapter_name!r} is loaded already; choose another adapter_name, or call "
                f"delete_adapter({adapter_name!r}) first"
            )
        folder = locate_adapter(path_or_id, hub=HubArguments(**hub))
        adapters.loaded[adapter_name] = read_adapter(folder, self._native, adapter_name)
        if adapters.active is None and len(adapters.loaded) == 1:
            adapters.active = adapter_name

    def set_adapter(self, adapter_name: str) -> None:
        """Make an adapter the one for calls that name none. Calls that run already keep theirs.

        Raises:
            ValueError: no adapter has that name.
            TypeError: several names; name adapters per row with `generate(adapter_names=[...])`.
        """
        if not isinstance(adapter_name, str):
            raise TypeError(f"set_adapter() takes one name, not {adapter_name!r}; use adapter_names= for one per row")
        if adapter_name == BASE:
            raise ValueError(f"{BASE!r} is no adapter; use disable_adapter()")
        self._native.adapters.named(adapter_name)
        self._native.adapters.active = adapter_name

    @property
    def active_adapter(self) -> str | None:
        """Name of the adapter that a call would use now which names none; `None` for the bare model."""
        current = self._native.adapters.current()
        return None if current is None else current.name

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Within `with model.disable_adapter():`, calls of this thread that name no adapter use the bare model."""
        return self._native.adapters.disabled()

    def delete_adapter(self, adapter_name: str) -> None:
        """Forget an adapter; if it is the active one, none is active then. Calls that run already keep it.

        Raises:
            ValueError: no adapter has that name.
        """
        adapters = self._native.adapters
        if adapters.named(adapter_name) is None:
            raise ValueError(f"{adapter_name!r} is no adapter that could be deleted")
        if adapters.active == adapter_name:
            adapters.active = None
        del adapters.loaded[adapter_name]

    def unload(self) -> CausalLM:
        """Forget all adapters; gives the bare model."""
        self._native.adapters.active = None
        self._native.adapters.loaded.clear()
        return cast("CausalLM", self._native)

    @property
    def _native(self) -> Model:
        assert isinstance(self, Model), "AdapterMixin goes in front of a native model"
        return self


class PeftModel:
    """A native model with an adapter, under PEFT's name and methods; what is not here is the model's own.

        model = PeftModel.from_pretrained(base_model, "path/to/adapter")
        tokens = model.generate(input_ids, max_new_tokens=50)

    As with PEFT, the adapter is loaded into the given model itself, whose weights stay as they are.

    Args:
        base_model: the model, with the adapter loaded.

    Attributes:
        base_model: as given.
    """

    def __init__(self, base_model: CausalLM) -> None:
        self.base_model = base_model

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        model_id: FileName,
        adapter_name: str = "default",
        is_trainable: bool = False,
        **hub: Any,
    ) -> PeftModel:
        """Load an adapter into a native model and make it the active one.

        Args:
            model: from `unspool.load` or `unspool.AutoModelForCausalLM`.
            model_id: the adapter; see `AdapterMixin.load_adapter`, also for `adapter_name`, `hub` and what is raised.
            is_trainable: `True` is refused: adapters here are for inference.

        Raises:
            TypeError: `model` is not native. For those of transformers, use PEFT's class and `unspool.wrap`.
        """
        if isinstance(model, PeftModel):
            model = model.base_model
        if not isinstance(model, AdapterMixin):
            raise TypeError(
                f"PeftModel takes a native model (see unspool.load), not a {type(model).__name__}; for other models "
                "use peft.PeftModel, and unspool.wrap() around it"
            )
        if is_trainable:
            raise ValueError("is_trainable=True: adapters are for inference here; train with PEFT on transformers")
        model.load_adapter(os.fspath(model_id), adapter_name, **hub)
        model.set_adapter(adapter_name)
        return cls(cast("CausalLM", model))

    def generate(self, *args: Any, **kwargs: Any) -> Tensor | GenerateOutput:
        """The model's `generate()`, through the active adapter, or those of `adapter_names`."""
        return self.base_model.generate(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> CausalLMOutput:
        """The model's plain call."""
        output: CausalLMOutput = self.base_model(*args, **kwargs)
        return output

    def get_base_model(self) -> CausalLM:
        """The model itself, adapters included."""
        return self.base_model

    def eval(self) -> PeftModel:
        """Set inference mode, which the model is in already."""
        self.base_model.eval()
        return self

    def to(self, *args: Any, **kwargs: Any) -> PeftModel:
        """Move or cast the model and its adapters."""
        self.base_model.to(*args, **kwargs)
        return self

    def __getattr__(self, name: str) -> Any:
        if name == "base_model":  # not there yet, while copying or unpickling
            raise AttributeError(name)
        return getattr(self.base_model, name)
