"""The rewritten graphs of one model: as an earlier process has stored them, else captured and rewritten."""

from __future__ import annotations

import functools
import os

from torch import fx, nn

from llm42c.backend import require_shards
from llm42c.capture.dynamo import CapturedGraph, KVSpec, capture_packed
from llm42c.capture.support import context_limit, unsupported
from llm42c.codegen.ops import registry
from llm42c.compile import inductor
from llm42c.compile.dump import Dump
from llm42c.compile.identity import Identity, digest_of_values
from llm42c.compile.programs import Programs
from llm42c.compile.standin import StaleError, StandIn
from llm42c.compile.stored import Rewritten
from llm42c.passes import pipeline
from llm42c.passes.base import PACKED, Context, Pass, PositionInput, Report


class Rewriter:
    """Captures ``model`` once, when the first graph is wanted that is not stored.

    Stored are the graphs of a model that one process has whole (``stored``), except while graphs are dumped:
    what is to be looked at is made. ``strict`` refuses graphs with a call of no known order.
    """

    def __init__(
        self, model: nn.Module, passes: tuple[Pass, ...], *, strict: bool, residual_shards: bool, stored: bool
    ) -> None:
        registry.define()
        self._model, self._passes, self._strict = model, passes, strict
        self._residual_shards = residual_shards
        self._programs: Programs | None = None
        if stored and not residual_shards and not os.environ.get("LLM42_DUMP"):
            self._programs = Programs(model, strict)
        self._ready: dict[str, Rewritten] = {}  # loaded, by what is asked for, and not given away yet
        if (first := self._load(PACKED)) is not None:
            self._ready[self._kind(PACKED)] = first
        # A model that cannot be captured is refused at once.
        self.kv_spec: list[KVSpec] = (first or self.captured).kv_spec

    @property
    def identity(self) -> Identity | None:
        """What stored graphs are kept under; None where nothing is stored."""
        return None if self._programs is None else self._programs.identity

    @functools.cached_property
    def captured(self) -> CapturedGraph:
        """The graph before the passes; the model's parameters must be its own.

        Raises StaleError for a stand-in, which has no code.
        """
        if isinstance(self._model, StandIn):
            raise StaleError("no graph of it is stored")
        return capture_packed(self._model)

    def rewritten(self, target: str, dump: Dump) -> Rewritten:
        """A graph of that kind, for its caller to materialise. Raises UnsupportedModelError, OptionsError."""
        if (known := self._load(target)) is not None:
            known.report.notes.append("the graph was captured and rewritten by an earlier process")
            return known
        found = self.rewrite(target, self._residual_shards and target == PACKED, dump)
        found.report.notes += inductor.notes() if target == PACKED else []
        dump.report(found.report)
        if self._residual_shards and target == PACKED:
            require_shards(found.report)
        self._require_placed(found.report)
        if self._programs is not None:
            found = self._programs.keep(self._kind(target), found)
            if self._programs.obstacle is not None:
                found.report.notes.append(f"captured at every start: {self._programs.obstacle}")
        return found

    def rewrite(self, target: str, residual_shards: bool, dump: Dump | None = None) -> Rewritten:
        captured, gm = self.captured, _copy(self.captured.gm)
        inputs = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
        context = Context(
            target=target,
            positions=PositionInput(inputs[captured.inputs.index("positions")], context_limit(self._model)),
            residual_shards=residual_shards,
        )
        report = pipeline.run(gm, context, None if dump is None else dump.graph, self._passes)
        return Rewritten(gm, captured.inputs, captured.parameter_names, captured.kv_spec, report)

    def _load(self, target: str) -> Rewritten | None:
        if self._programs is None:
            return None
        kind = self._kind(target)
        return self._ready.pop(kind, None) or self._programs.load(kind)

    def _kind(self, target: str) -> str:
        return digest_of_values(target, pipeline.passes_for(target, self._passes))

    def _require_placed(self, report: Report) -> None:
        if self._strict and report.unplaced:
            events = "; ".join(f"{e.node} ({e.module}): {e.reason}" for e in report.unplaced[:3])
            reason = f"no fixed order of reduction is known for {events}"
            raise unsupported(self._model, reason, "docs/compile.md")


def _copy(gm: fx.GraphModule) -> fx.GraphModule:
    """The same graph on the same tensors; passes may rewrite one without touching the other."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)
