"""The entry point: ``torch.compile(model, backend="llm42", options={...})``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from llm42c import inductor
from llm42c.codegen.ops import registry
from llm42c.options import Options
from llm42c.passes import pipeline
from llm42c.passes.base import PLAIN, Context


def llm42(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph so that each row's bits do not depend on its batch.

    The graph is rewritten before Inductor and its caches see it, so that their keys cover the rewrite.
    Raises OptionsError for bad options, UnsupportedModelError with ``strict=True`` when a part of the
    model has no known order of reduction.
    """
    opts = Options.parse(options, mode)
    if opts.reductions == "free":
        return inductor.compile_free(gm, example_inputs)
    registry.load()
    pipeline.run(gm, Context(target=PLAIN, grad=needs_grad(example_inputs)))
    return inductor.compile_fixed(gm, example_inputs)


def needs_grad(example_inputs: list[Any]) -> bool:
    """The compiled graph may be differentiated."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
