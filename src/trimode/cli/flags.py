"""Puts a command's flags in the place of the library's parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from trimode.errors import TrimodeError

_ALIKE = (
    "alpha",
    "batch_size",
    "block_length",
    "block_size",
    "d_model",
    "device",
    "dtype",
    "feed_forward",
    "from_scratch",
    "learning_rate",
    "max_drop",
    "max_new_tokens",
    "minutes",
    "modes",
    "precision",
    "rank",
    "ranking_samples",
    "resume",
    "seed",
    "steps",
    "target",
)
FLAGS = {
    **{name: f"--{name.replace('_', '-')}" for name in _ALIKE},
    "block_lengths": "--block-length",
    "calibrations": "--calibration",
    "is_per_channel": "--per-channel",
    "memory_gib": "--memory",
    "num_heads": "--heads",
    "num_held_out": "--held-out",
    "num_layers": "--layers",
    "num_samples": "--samples",
}
"""Flags of ``trimode calibrate`` and ``trimode report``, by parameter of the library."""


_OF_BUILD = (
    "block_lengths",
    "calibration",
    "capacities",
    "drafter",
    "exact",
    "force",
    "max_batch",
    "max_length",
    "precision",
    "quadratic",
    "quantize_head",
    "sampler",
    "weights",
)
BUILD_FLAGS = {
    **{name: f"--{name.replace('_', '-')}" for name in _OF_BUILD},
    "gpu_memory_gb": "--gpu-memory",
    "num_jobs": "--jobs",
    "targets": "--target",
    "workspace_mib": "--workspace",
}
"""Flags of ``trimode build``."""
_OF_VERIFY = ("calibration", "long", "max_new_tokens", "sampler", "seed", "target")
VERIFY_FLAGS = {name: f"--{name.replace('_', '-')}" for name in _OF_VERIFY}
"""Flags of ``trimode verify``."""
_OF_BENCH = ("batch", "max_batch", "past", "repeats", "rows")
BENCH_FLAGS = {name: f"--{name.replace('_', '-')}" for name in _OF_BENCH}
"""Flags of ``trimode bench``, and of the build that it may ask for."""
_OF_LOAD = (
    "burstiness",
    "check",
    "concurrency",
    "data",
    "duration",
    "goodput",
    "model",
    "modes",
    "num_prompts",
    "random_input_len",
    "random_output_len",
    "random_range_ratio",
    "rate",
    "shared_prefix",
    "temperature",
    "timeout",
    "warmup",
)
LOAD_FLAGS = {
    **{name: f"--{name.replace('_', '-')}" for name in _OF_LOAD},
    "api_key": "--api-key-file",
    "max_tokens": "--max-new-tokens",
}
"""Flags of ``trimode bench serve``."""
_OF_SERVE = (
    "drain_timeout",
    "host",
    "log_format",
    "max_queue",
    "max_rows",
    "mode",
    "otlp_traces_endpoint",
    "port",
    "precision",
    "target",
)
SERVE_FLAGS = {name: f"--{name.replace('_', '-')}" for name in _OF_SERVE}
"""Flags of ``trimode serve``."""
COMMON_FLAGS = {
    "block_lengths": "--block-lengths",
    "enable_thinking": "--enable-thinking",
    "is_raw": "--raw",
    "max_batch": "--max-batch",
    "max_length": "--max-length",
    "num_threads": "--threads",
    "system": "--system",
}
"""Flags that mean the same in every command that has them."""


def with_flags(text: str, flags: Mapping[str, str] = FLAGS) -> str:
    """Name flags in a text that names `parameters`."""
    return re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), text)


@contextmanager
def flags_in_errors(flags: Mapping[str, str] = FLAGS) -> Iterator[None]:
    """Name ``flags`` in the errors of the block."""
    try:
        yield
    except TrimodeError as error:
        error.rename(flags)
        raise
