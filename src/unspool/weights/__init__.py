"""Checkpoints on disk: `safetensors` reads tensors straight into their place, `names` says which tensors of a file make
which parameter, `load_model` and `save_model` do it for whole models. Nothing here unpickles, and nothing writes into a
folder it reads from.
"""

from unspool.weights.loader import load_model, read_config
from unspool.weights.saver import save_model

__all__ = ["load_model", "read_config", "save_model"]
