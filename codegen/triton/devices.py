"""The device that a tensor lies on."""

from __future__ import annotations

import functools

import torch

from llm42c.codegen.device import Device, UnknownDeviceError, detect


@functools.cache
def _device(index: int) -> Device:
    try:
        return detect("cuda", index)
    except UnknownDeviceError:
        return Device("cuda", "interpreter", "sm_80")


def device_of(device: torch.device) -> Device:
    """What is known of the GPU that a tensor lies on; a generic one when kernels are interpreted."""
    return _device(device.index or 0)
