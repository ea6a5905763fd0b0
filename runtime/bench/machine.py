"""What a measurement depends on besides the code."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

import torch

from llm42c.codegen.cpu import build


def describe() -> dict[str, str]:
    """CPU, cores this process may use, instruction set and versions, as columns of a result."""
    return {
        "cpu": _cpu_model(),
        "cores": str(len(os.sched_getaffinity(0))),
        "threads": str(torch.get_num_threads()),
        "isa": build.widest_isa(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "llm42": importlib.metadata.version("llm42c"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown"
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown"
    )
