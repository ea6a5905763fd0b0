"""Look at a model as one rank of several would see it, in one process: for explanations and plans."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from llm42c.codegen.device import Device, Value
from llm42c.parallel.ranks import Ranks
from llm42c.parallel.tensor_parallel import Division, divide
from llm42c.weave.captured import measured
from llm42c.weave.simulated_link import Link, VirtualClock, simulated

_GROUP = "imagined ranks"


@contextlib.contextmanager
def imagined_ranks(model: nn.Module, size: int) -> Iterator[Division]:
    """``model``, for good, as the first of ``size`` ranks has it; its collectives work inside the block.

    They compute nothing of use: the other ranks are imagined to hold the same. Raises UnsupportedModelError
    for a model that cannot be divided.
    """
    with simulated(_GROUP, Link(0.0, float("inf"), VirtualClock()), size):
        yield divide(model, Ranks(0, size, _GROUP))


def with_link(gigabytes_s: float, microseconds: float) -> Device:
    """This machine as measured, with a link as given: bytes / bandwidth + latency for each collective."""
    given = {
        "link_bandwidth": Value(gigabytes_s * 1e9, "given"),
        "link_latency": Value(microseconds * 1e-6, "given"),
    }
    return measured(None, torch.device("cpu")).measured(given)
