"""Puts the Triton implementations behind the operators. Triton is imported by the first call on a GPU."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

# Operator → the file and function that launch its kernel.
IMPLEMENTATIONS: dict[str, tuple[str, str]] = {
    "add_rms_norm": ("norm", "add_rms_norm"),
    "dense_attention": ("dense_attention", "dense_attention"),
    "grouped_linear": ("grouped_linear", "grouped_linear"),
    "layer_norm": ("norm", "layer_norm"),
    "linear": ("linear", "linear"),
    "linear_add": ("linear", "linear_add"),
    "linear_dense": ("linear", "linear_dense"),
    "linear_pack": ("linear", "linear_pack"),
    "linear_silu_mul": ("linear", "linear_silu_mul"),
    "linear_unpack": ("linear", "linear_unpack"),
    "paged_attention": ("attention", "paged_attention"),
    "pod_attention": ("attention", "pod_attention"),
    "pod_dense_attention": ("pod_dense_attention", "pod_dense_attention"),
    "pod_varlen_attention": ("attention", "varlen_attention"),
    "rms_norm": ("norm", "rms_norm"),
    "rotary": ("rotary", "rotary"),
    "row_log_softmax": ("reduce", "row_log_softmax"),
    "row_softmax": ("reduce", "row_softmax"),
    "row_sum": ("reduce", "row_sum"),
    "running_product": ("running", "running_product"),
    "running_sum": ("running", "running_sum"),
    "sample": ("sample", "sample"),
    "silu_mul": ("silu_mul", "silu_mul"),
    "token_logprobs": ("sample", "token_logprobs"),
    "top_logprobs": ("sample", "top_logprobs"),
}


def _lazy(module: str, function: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        launch = getattr(importlib.import_module(f"llm42c.codegen.triton.{module}"), function)
        return launch(*args, **kwargs)

    return call


def register(library: torch.library.Library) -> None:
    """Register all of them for CUDA (and ROCm) tensors. Imports neither Triton nor an emitter."""
    for operator, (module, function) in IMPLEMENTATIONS.items():
        library.impl(operator, _lazy(module, function), "CUDA")
