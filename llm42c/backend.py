"""The entry point: ``torch.compile(model, backend="llm42", options={...})``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from llm42c import inductor
from llm42c.codegen.ops import registry
from llm42c.codegen.target import local_decode_workers
from llm42c.dump import Dump
from llm42c.errors import UnsupportedModelError
from llm42c.options import Options
from llm42c.passes import pipeline
from llm42c.passes.base import PLAIN, Context, Report
from llm42c.recompiles import require_room

_log = logging.getLogger(__name__)


def llm42(
    gm: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph so that each row's bits do not depend on its batch.

    The graph is rewritten before Inductor and its caches see it, so that their keys cover the rewrite.
    Raises OptionsError for bad options, UnsupportedModelError for another device than the CPU, and with
    ``strict=True`` when a part of the model has no known order of reduction; RecompileLimitError before
    Dynamo would begin to run the function eagerly.
    """
    opts = Options.parse(options, mode)
    dump = Dump.for_options(opts, PLAIN if opts.reductions == "fixed" else "free")
    with dump.generated_code():
        if opts.reductions == "free":
            dump.graph("00_input", gm.graph)
            return inductor.compile_free(gm, example_inputs)
        require_room()
        rewrite_plain(gm, example_inputs, opts, dump)
        return inductor.compile_fixed(gm, example_inputs)


def rewrite_plain(gm: fx.GraphModule, example_inputs: list[Any], options: Options, dump: Dump) -> Report:
    """The part of :func:`llm42` before Inductor: rewrite ``gm`` in place and check the result."""
    _require_cpu(example_inputs)
    registry.load()
    context = Context(target=PLAIN, grad=needs_grad(example_inputs), decode_workers=local_decode_workers())
    report = pipeline.run(gm, context, dump.graph)
    dump.report(report)
    require_placed(report, strict=options.strict)
    return report


def _require_cpu(example_inputs: list[Any]) -> None:
    for device in {x.device for x in example_inputs if isinstance(x, Tensor)}:
        if device.type != "cpu":
            raise UnsupportedModelError(
                f"reductions='fixed' has operators for the CPU only, and an input is on {device}; "
                "reductions='free' leaves the model to Inductor"
            )


def require_placed(report: Report, *, strict: bool) -> None:
    """Name the calls without a known order of reduction: as an error if ``strict``, else as a warning."""
    if not report.unplaced:
        return
    shown = [f"{e.reason} ({e.module or 'top level'})" for e in report.unplaced[:5]]
    more = f" and {len(report.unplaced) - 5} more" if len(report.unplaced) > 5 else ""
    message = f"no known order of reduction: {'; '.join(shown)}{more}"
    if strict:
        raise UnsupportedModelError(message)
    _log.warning("%s; rows that pass through these calls may depend on their batch", message)


def needs_grad(example_inputs: list[Any]) -> bool:
    """The compiled graph may be differentiated."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
