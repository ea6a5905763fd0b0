"""The entry point: ``torch.compile(model, backend="llm42", options={...})``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from llm42c import versions
from llm42c.codegen import targets
from llm42c.codegen.ops.registry import operators
from llm42c.compile import inductor
from llm42c.compile.dump import Dump
from llm42c.compile.recompiles import require_room
from llm42c.device import device_of_inputs, in_steps, load_operators
from llm42c.errors import DeviceError, UnsupportedModelError
from llm42c.options import Options
from llm42c.passes import graph as g
from llm42c.passes import pipeline
from llm42c.passes.base import PLAIN, Context, Report

if TYPE_CHECKING:
    from llm42c.weave.runner import Style

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
    On a GPU the operators are Triton kernels. Raises OptionsError for bad options, DeviceError where nothing
    computes them (another device, or no Triton), UnsupportedModelError with ``strict=True`` when a part of
    the model has no known order of reduction, and where an option asks for what this graph cannot have;
    RecompileLimitError before Dynamo would begin to run the function eagerly.
    """
    versions.notice()
    opts = Options.parse(options, mode)
    free = opts.reductions == "free"
    dump = Dump.for_options(opts, "free" if free else PLAIN)
    with dump.generated_code():
        if free:
            dump.graph("00_input", gm.graph)
        else:
            require_room()
            rewrite_plain(gm, example_inputs, opts, dump)
        plain = inductor.compile_free if free else inductor.compile_fixed
        device = device_of_inputs(example_inputs)
        if opts.token_weave == "off":
            return in_steps(plain(gm, example_inputs), device)
        from llm42c.weave.option import weave_or_leave  # sympy and networkx, for those who ask

        style: Style = "free" if free else "plain"
        grad = needs_grad(example_inputs)
        woven = weave_or_leave(gm, example_inputs, opts, style, plain, grad=grad, tell=dump.weaving)
        return in_steps(woven, device)


def rewrite_plain(gm: fx.GraphModule, example_inputs: list[Any], options: Options, dump: Dump) -> Report:
    """The part of :func:`llm42` before Inductor: rewrite ``gm`` in place and check the result."""
    device = device_of_inputs(example_inputs)
    load_operators(device)
    context = Context(PLAIN, needs_grad(example_inputs), residual_shards=options.residual_shards)
    report = pipeline.run(gm, context, dump.graph, options.passes)
    report.notes += inductor.notes()
    dump.report(report)
    if options.residual_shards:
        require_shards(report)
    require_placed(report, strict=options.strict)
    require_implemented(gm.graph, device)
    return report


def require_implemented(graph: fx.Graph, device: torch.device) -> None:
    """Raises DeviceError naming the operators of ``graph`` that nothing computes on ``device``."""
    names = {op.name for n in graph.nodes if (op := g.ours(n))}
    target = targets.of(device)
    if missing := sorted(name for name in names if target.where(operators()[name]) is None):
        raise DeviceError(
            f"on {device} nothing computes llm42::{', llm42::'.join(missing)}; "
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
        raise UnsupportedModelError(f"{message}; docs/compile.md says what has one")
    _log.warning("%s; rows that pass through these calls may depend on their batch", message)


def require_shards(report: Report) -> None:
    """Raises UnsupportedModelError where ``residual_shards`` was asked for and nothing was divided."""
    found = report["residual_shards"]
    if found.matches:
        return
    why = next(iter(found.reasons()), "the graph has no fused all-reduce, residual addition and RMSNorm")
    raise UnsupportedModelError(f"residual_shards=True, but {why}")


def needs_grad(example_inputs: list[Any]) -> bool:
    """The compiled graph may be differentiated."""
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in example_inputs)
