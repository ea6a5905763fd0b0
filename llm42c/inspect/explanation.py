"""What the compiler does with a model, and why not more.

``llm42c.explain(model, inputs)`` is about ``torch.compile(model, backend="llm42")``, :func:`explain_engine`
about the packed graph that an engine (``generate``) runs.
"""

from __future__ import annotations

import types
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed

from llm42c import backend
from llm42c.codegen.device import Device
from llm42c.codegen.operator import Cost
from llm42c.codegen.ops.registry import operators
from llm42c.codegen.order import Order
from llm42c.compile.clusters import find_clusters, outline, structural_hash
from llm42c.compile.dump import Dump
from llm42c.errors import Llm42Error, OptionsError
from llm42c.options import Options
from llm42c.passes import graph as g
from llm42c.passes.base import Report
from llm42c.passes.kinds import FOREIGN, Kind, kind
from llm42c.passes.sizes import PRIMES

if TYPE_CHECKING:
    from llm42c.compile.compiler import ModelCompiler
    from llm42c.weave.option import PackedWeaving, Weaving

_FOREIGN = "of these neither ours nor exact: "


@dataclass
class GraphExplanation:
    """One graph of the model (there are several when Dynamo breaks it).

    ``operators`` counts the llm42 operators of the final graph, ``inductor`` the calls that Inductor
    compiles, by name; views and sizes are in neither. ``foreign`` are those of them that are not exact: their
    bits hang on who computes them. ``weaving`` is what ``token_weave`` makes of it, None
    where the option is off.
    """

    report: Report
    operators: dict[str, int]
    inductor: dict[str, int]
    foreign: dict[str, int] = field(default_factory=dict)
    weaving: Weaving | None = None


@dataclass
class Explanation:
    """The result of :func:`explain`; ``str()`` gives a readable page."""

    graphs: list[GraphExplanation] = field(default_factory=list)

    @property
    def unplaced(self) -> list[str]:
        """Calls without a known order of reduction, with their modules."""
        events = [e for graph in self.graphs for e in graph.report.unplaced]
        return [f"{e.module or '(top)'}: {e.reason}" for e in events]

    def draw(self, path: str | Path) -> None:
        """Write the woven graph's segments and collectives to ``*.dot`` (Graphviz) or ``*.mmd`` (Mermaid).

        Raises OptionsError for another ending, and where no graph is woven.
        """
        path, plans = Path(path), [graph.weaving for graph in self.graphs if graph.weaving is not None]
        if path.suffix not in (".dot", ".mmd"):
            raise OptionsError(f"{path.name}: drawings are written as .dot or .mmd")
        for plan in plans:
            if (drawing := plan.drawing("dot" if path.suffix == ".dot" else "mermaid")) is not None:
                try:
                    path.write_text(drawing)
                except OSError as error:
                    raise OptionsError(f"cannot write {path}: {error.strerror}") from error
                return
        reason = plans[0].reason if plans else "token_weave is off"
        raise OptionsError(f"there is no plan to draw: {reason}")

    def __str__(self) -> str:
        if not self.graphs:
            return "Dynamo captured no graph.\n"
        return "\n".join(_page(i, graph, len(self.graphs)) for i, graph in enumerate(self.graphs))


@dataclass
class Piece:
    """A part of an engine's graph that Inductor compiles: its calls by name, where, and how often it runs."""

    calls: dict[str, int]
    module: str
    times: int


@dataclass
class EngineExplanation:
    """The result of :func:`explain_engine`; ``str()`` gives a readable page.

    ``operators`` counts the llm42 operators that are called. ``orders`` has the order of each, which the
    contract lists by name and version. ``costs`` has what the products of one token with weights move and
    compute, all calls of an operator together. ``foreign`` counts the calls that are neither operators nor
    exact: their bits hang on the machine. ``dependence`` is why batch shapes are not certified by
    construction, None if they are.
    """

    report: Report
    operators: dict[str, int]
    orders: dict[str, Order]
    costs: dict[str, Cost]
    pieces: list[Piece]
    foreign: dict[str, int]
    digest: str
    weaving: PackedWeaving | None = None
    dependence: str | None = None

    def __str__(self) -> str:
        lines = ["the engine's graph", "", self.report.table().rstrip(), "", *_where(self.report)]
        lines.append("operators: " + (_counts(self.operators) or "none"))
        for name, order in self.orders.items():
            cost = f"; a token: {self.costs[name]}" if name in self.costs else ""
            lines.append(f"    {name}: {order} ({order.text}){cost}")
        lines.append("compiled by Inductor, with its reductions fixed: " + ("" if self.pieces else "nothing"))
        lines += [f"    {p.times:>4} × {p.module or '(top)'}: {_counts(p.calls)}" for p in self.pieces]
        lines.append(_FOREIGN + (_counts(self.foreign) or "nothing"))
        shapes = f"by comparing bits: {self.dependence}" if self.dependence else "by construction"
        lines += [_verdict(self.report), f"batch shapes are certified {shapes}", f"graph {self.digest}"]
        if self.weaving is not None:
            lines += ["", "token weaving:", self.weaving.summary()]
        return "\n".join(line.rstrip() for line in lines) + "\n"


def explain_engine(compiler: ModelCompiler) -> EngineExplanation:
    """What became of the model that ``compiler`` was made for, in the form that commits tokens.

    Compiles it if that has not been done. Raises what compiling raises; with ``strict=False`` calls without
    an order are in the page instead.
    """
    compiled = compiler.compile("pinned")
    graph = compiler.graph("pinned")
    found: dict[str, Piece] = {}
    for cluster in find_clusters(graph):
        calls = Counter(g.called(n) for n in cluster.nodes if kind(n) not in (Kind.VIEW, Kind.SIZE))
        key = structural_hash(outline(cluster))
        piece = found.setdefault(key, Piece(dict(calls.most_common()), _folded(cluster.module), 0))
        piece.times += 1
    counts, *_ = _census(graph)
    computation = compiled.computation
    return EngineExplanation(
        compiled.report,
        counts,
        {name: operators()[name].orders[computation.target] for name in counts},
        _costs(graph),
        list(found.values()),
        computation.foreign,
        compiled.digest,
        compiled.weaving,
        compiled.dependence,
    )


def explain(
    model: Any,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    target: Device | None = None,
) -> Explanation:
    """Capture ``model`` on ``example_inputs`` and report what each pass did.

    ``example_inputs``: a tensor, a sequence of positional arguments or a mapping of keyword arguments.
    The rewritten graphs are executed once without Inductor. With ``token_weave`` sizes are captured as
    symbols, and ``target``, if given, is the device that the plan is for; all ranks must call this.
    Raises OptionsError for bad options, UnsupportedModelError with ``{"strict": True}`` and where an option
    asks for what a graph cannot have.
    """
    opts = Options.parse(options)
    found = Explanation()
    weaves = opts.token_weave != "off"

    def observe(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        dump = Dump.for_options(opts, "explain")
        report = backend.rewrite_plain(gm, inputs, opts, dump)
        graph = GraphExplanation(report, *_census(gm.graph))

        def tell(weaving: Weaving) -> None:
            graph.weaving = weaving
            dump.weaving(weaving)

        run = _planned(gm, inputs, opts, target, tell) if weaves else gm.forward
        found.graphs.append(graph)  # here: Dynamo may call off a graph with symbols, and begin again
        return run

    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    with torch.no_grad():
        compiled = torch.compile(_callable(model), backend=observe, dynamic=weaves or None)
        try:
            if isinstance(example_inputs, Mapping):
                compiled(**example_inputs)
            else:
                compiled(*example_inputs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, Llm42Error):
                raise error.inner_exception from None
            raise
    return found


def _planned(
    gm: fx.GraphModule,
    inputs: list[Any],
    options: Options,
    target: Device | None,
    tell: Callable[[Weaving], None],
) -> Callable[..., Any]:
    from llm42c.weave.option import weave_or_leave

    grad = backend.needs_grad(inputs)
    return weave_or_leave(gm, inputs, options, "eager", _as_it_is, grad=grad, target=target, tell=tell)


def _as_it_is(gm: fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
    forward: Callable[..., Any] = gm.forward
    return forward


def _callable(model: Any) -> Any:
    """A function of its own, so that Dynamo's cache of the model's code stays as it is."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    fresh = types.FunctionType(run.__code__.replace(), run.__globals__, "run", None, run.__closure__)
    fresh.__kwdefaults__ = run.__kwdefaults__
    return fresh


def _census(graph: fx.Graph) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    operators: Counter[str] = Counter()
    inductor: Counter[str] = Counter()
    foreign: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op in ("call_function", "call_method"):
            k = kind(node)
            if (ours := g.ours(node)) is not None:
                operators[ours.name] += 1
            elif k not in (Kind.VIEW, Kind.SIZE):
                inductor[g.called(node)] += 1
                foreign[g.called(node)] += k in FOREIGN
    return dict(operators.most_common()), dict(inductor.most_common()), dict((+foreign).most_common())


def _costs(graph: fx.Graph) -> dict[str, Cost]:
    """Of products with weights, by operator, in a step of one token. Numbers of rows stand as primes."""

    def of_one_token(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        sizes = [1 if size in PRIMES else size for size in value.shape]
        return torch.empty(sizes, dtype=value.dtype, device="meta")

    found: dict[str, Cost] = {}
    for node in graph.nodes:
        if (ours := g.ours(node)) is not None and ours.product is not None:
            call = fx.node.map_arg((node.args, node), g.value)
            args, result = torch.utils._pytree.tree_map(of_one_token, call)
            found[ours.name] = found.get(ours.name, Cost(0, 0)) + ours.cost(args, result)
    return found


def _page(number: int, graph: GraphExplanation, total: int) -> str:
    lines = [f"graph {number + 1} of {total}", "", graph.report.table().rstrip(), ""]
    lines += _where(graph.report)
    lines.append("operators: " + (_counts(graph.operators) or "none"))
    lines.append("compiled by Inductor: " + (_counts(graph.inductor) or "nothing"))
    lines.append(_FOREIGN + (_counts(graph.foreign) or "nothing"))
    lines.append(_verdict(graph.report))
    if graph.weaving is not None:
        lines += ["", "token weaving:", str(graph.weaving).rstrip()]
    return "\n".join(lines) + "\n"


def _verdict(report: Report) -> str:
    if report.unplaced:
        return f"check: {len(report.unplaced)} calls have no known order of arithmetic (listed above)"
    return "check: every call has a fixed order of arithmetic"


def _where(report: Report) -> list[str]:
    """For each pass that fired, the modules it fired in, numbered repetitions folded."""
    lines = []
    for p in report.passes:
        modules = Counter(_folded(e.module) for e in p.matches if e.module)
        if modules:
            lines.append(f"{p.name} fired in:")
            lines += [f"    {count:>4} × {module}" for module, count in modules.most_common(8)]
    return [*lines, ""] if lines else []


def _folded(module: str) -> str:
    """``model.layers.7.mlp`` as ``model.layers.*.mlp``."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} ×{count}" for name, count in counts.items())
