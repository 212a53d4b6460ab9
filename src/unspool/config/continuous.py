"""Settings of continuous batching. Data only; names and defaults of transformers 5.23."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, fields
from typing import Any, Self

from unspool.config.compilation import CompileConfig
from unspool.config.notice import warn_once
from unspool.config.ranges import Check, check_ranges

__all__ = ["ContinuousBatchingConfig"]

_RANGES: dict[str, Check] = {
    "page_size": Check(int, 4),
    "num_blocks": Check(int, 1, 2**24),
    "max_batch_tokens": Check(int, 1),
    "max_memory_percent": Check(float, 0, 1, open_low=True),
    "max_requests_per_batch": Check(int, 1, 65536),
    "max_blocks_per_request": Check(int, 0),
    "q_padding_interval_size": Check(int, 0),
    "kv_padding_interval_size": Check(int, 0),
    "default_compile_level": Check(int, 0, 3),
    "safety_margin": Check(float, 0, 1),
    "seed": Check(int, 0, 2**64 - 1),
    "cpu_offload_space": Check(float, 0),
    "cpu_offload_space_safety_threshold": Check(float, 0, 1),
    "max_queue_size": Check(int, 0),
    "max_queued_tokens": Check(int, 0),
    "watchdog_timeout": Check(float, 0, open_low=True),
    "cpu_group_timeout": Check(float, 0, open_low=True),
}


@dataclass
class ContinuousBatchingConfig:
    """Settings of `generate_batch` and of the continuous batching manager. `None` means "found out at start".

    Raises:
        ValueError, TypeError: a setting is out of range or of the wrong type.
    """

    page_size: int = 256
    """Tokens of one layer in a page of the cache, at least 4."""
    num_blocks: int | None = None
    """Blocks in the cache."""
    max_batch_tokens: int | None = None
    """Most tokens in one step."""
    max_memory_percent: float | None = None
    """Share (0 to 1) of the free device memory that the cache may take; 0.9, or 0.8 with logits processors."""
    max_requests_per_batch: int | None = None
    """Most requests in one step."""
    max_blocks_per_request: int | None = None
    """Width of the block table of the decode path; 0 turns that path off."""
    allow_block_sharing: bool = True
    """Share the blocks of equal prefixes where the model allows it."""
    use_async_batching: bool | None = None
    """Prepare the next step on the host while the device runs this one."""
    use_cuda_graph: bool | tuple[bool, bool] | None = None
    """CUDA graphs, for both paths or for (prefill, decode)."""
    q_padding_interval_size: int = 0
    """Queries are padded to a multiple of this for CUDA graphs; 0 chooses."""
    kv_padding_interval_size: int = 0
    """Keys are padded to a multiple of this for CUDA graphs; 0 chooses."""
    varlen_compile_config: CompileConfig | None = None
    """Compilation of the prefill path."""
    decode_compile_config: CompileConfig | None = None
    """Compilation of the decode path."""
    default_compile_level: int = 0
    """0 to 3: how much to compile where no config is given; higher is faster and warms up longer."""
    scheduler_type: str = "fifo"
    """Which scheduler orders the requests."""
    safety_margin: float | None = None
    """Share of the blocks kept free for running requests before new prompts start."""
    return_logprobs: bool = False
    """Return each generated token's log-probability."""
    seed: int | None = None
    """Seed of requests that bring none of their own."""
    auto_switch_to_flash: bool = True
    """Use a flash attention library when one is installed."""
    cpu_offload_space: float | None = 0.0
    """GiB of host memory for the cache of evicted requests; 0 for none, `None` for as much as the threshold allows."""
    cpu_offload_space_safety_threshold: float = 0.8
    """Largest share of the host's memory for that."""
    max_queue_size: int = 0
    """Most waiting requests; 0 for no limit."""
    max_queued_tokens: int = 0
    """Most prompt tokens of waiting requests together; 0 for no limit."""
    deterministic: bool | None = None
    """Tokens and log-probabilities of a request are the same bits whatever else runs, and however it is cut; `None` is
    `True` for native models on a CPU, where it costs nothing with the compiled kernels, and `False` elsewhere."""
    watchdog_timeout: float | None = 600.0
    """Seconds a single step may take before its requests are told that it stalled; `None` waits for ever."""
    per_request_processors: bool = False
    """Accepted for compatibility: every request may always bring its own settings."""
    drop_unsupported_processors: bool = True
    """Leave out processors that cannot run, with a warning, instead of refusing."""
    disable_nccl_graph_mixing: bool = True
    """Turn off NCCL's guard for mixed graph launches under tensor parallelism."""
    cpu_group_timeout: float | None = 300.0
    """Seconds after which a host-side exchange between ranks fails; `None` waits for ever."""
    use_default_compile_configs: bool | None = None
    """Old name: `True` is `default_compile_level=3`, `False` is 0."""
    max_cached_graphs: int | None = None
    """Old setting without effect."""
    block_size: int | None = None
    """Old name of `page_size`."""

    def __post_init__(self) -> None:
        for name in ("varlen_compile_config", "decode_compile_config"):
            value = getattr(self, name)
            if isinstance(value, Mapping):
                setattr(self, name, CompileConfig.from_dict(value))
        if isinstance(self.use_cuda_graph, list):  # JSON has no tuples
            self.use_cuda_graph = tuple(self.use_cuda_graph)
        if self.use_default_compile_configs is not None:
            warn_once("use_default_compile_configs is an old name; set default_compile_level (0 to 3) instead")
            self.default_compile_level = 3 if self.use_default_compile_configs else 0
        if self.block_size is not None:
            warn_once("block_size is an old name; set page_size instead")
            self.page_size = self.block_size
        if self.max_cached_graphs is not None:
            warn_once("max_cached_graphs has no effect any more; leave it out")
        self.validate()

    def validate(self) -> None:
        """Raise ValueError or TypeError for a setting out of range."""
        check_ranges(self, _RANGES)
        if not isinstance(self.scheduler_type, str):
            raise TypeError(f"scheduler_type must be the name of a scheduler, not {self.scheduler_type!r}")
        if self.deterministic not in (None, True, False):
            raise TypeError(f"deterministic must be True, False or None, not {self.deterministic!r}")

    @property
    def cuda_graph_booleans(self) -> tuple[bool, bool]:
        """Whether the (prefill, decode) paths use CUDA graphs; an undecided setting counts as no."""
        if isinstance(self.use_cuda_graph, tuple):
            return self.use_cuda_graph
        return bool(self.use_cuda_graph), bool(self.use_cuda_graph)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Make the settings from a dict.

        Raises:
            ValueError: `values` has a key that is no setting.
        """
        names = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - names):
            raise ValueError(f"continuous_batching_config has no setting {unknown[0]!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a dict of their own, nested ones as dicts."""
        return {
            key: value.to_dict() if isinstance(value, CompileConfig) else deepcopy(value)
            for key, value in self.__dict__.items()
        }
