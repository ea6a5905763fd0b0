"""The target that a tensor lies on."""

from __future__ import annotations

import functools

import torch

from llm42c.codegen.target import Target, TargetError, detect


@functools.cache
def _target(index: int) -> Target:
    try:
        return detect("cuda", index)
    except TargetError:
        return Target("cuda", "interpreter", "sm_80")


def target_of(device: torch.device) -> Target:
    """What is known of the GPU that a tensor lies on; a generic one when kernels are interpreted."""
    return _target(device.index or 0)
