"""Run a divided graph: its segments in a given order, its collectives beside them.

A program is straight-line Python, one line a segment, a start or a wait. Collectives that torch runs
asynchronously (``_c10d_functional``) are started and waited for as they stand: NCCL on its own stream, Gloo
in its own threads, each with its own event. Where some communicate inside an operator, all go through a
*lane*: a stream of its own with an event for each call, or on a CPU one thread, so that all ranks communicate
in one order.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import operator
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv

from llm42c.codegen import targets
from llm42c.compile import inductor
from llm42c.compile.clusters import Cluster, callee_of, outline
from llm42c.compile.piecewise import compile_cluster, compile_piecewise
from llm42c.compile.straightline import Step, emit
from llm42c.device import CPU
from llm42c.passes import graph as g
from llm42c.passes.sizes import SYMBOLS
from llm42c.passes.weave import communication as comm
from llm42c.passes.weave.program import SEGMENT, START, turns
from llm42c.passes.weave.schedule import Pieces
from llm42c.passes.weave.split import ALL_TOKENS, HALF_SIZES

Style = Literal["eager", "free", "fixed", "plain"]
_SMALLEST = 2  # Inductor takes a symbolic size to be at least this


class Lane(Protocol):
    """Where operators that communicate run."""

    def start(self, operator: Callable[..., Any], *args: Any) -> Any: ...
    def wait(self, begun: Any) -> Any: ...


class SameThread:
    """No lane: a collective is done when it has been started."""

    def start(self, operator: Callable[..., Any], *args: Any) -> Any:
        return operator(*args)

    def wait(self, begun: Any) -> Any:
        return begun


class ThreadLane:
    """One thread, first in, first out, so that every rank's collectives have one order."""

    def __init__(self) -> None:
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="llm42-collectives")

    def start(self, operator: Callable[..., Any], *args: Any) -> Any:
        return self._pool.submit(_without_grad, operator, *args)

    def wait(self, begun: Any) -> Any:
        return begun.result()


def _without_grad(operator: Callable[..., Any], *args: Any) -> Any:
    with torch.no_grad(), targets.of(CPU).step():
        return operator(*args)


class StreamLane:
    """A stream of its own; each call waits for what was there when it was started, and no more."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def start(self, operator: Callable[..., Any], *args: Any) -> Any:
        ready = torch.cuda.current_stream().record_event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            result = operator(*args)
            done = self._stream.record_event()
        for t in torch.utils._pytree.tree_leaves(args):
            if isinstance(t, Tensor):
                t.record_stream(self._stream)
        return result, done

    def wait(self, begun: Any) -> Any:
        result, done = begun
        current = torch.cuda.current_stream()
        current.wait_event(done)
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                t.record_stream(current)
        return result


def lane_for(device: torch.device) -> Lane:
    return StreamLane(device) if device.type == "cuda" else ThreadLane()


class Symbols:
    """Symbolic sizes in one environment for the primes of a divided graph."""

    def __init__(self, primes: list[int]) -> None:
        self._env = ShapeEnv()
        self.mode = FakeTensorMode(shape_env=self._env, allow_non_fake_inputs=True)
        self._made: dict[str, Any] = {}
        self._others = primes

    def _symbol(self, name: str) -> Any:
        if name not in self._made:
            from torch._dynamo.source import ConstantSource

            hint, source = 64 + 8 * len(self._made), ConstantSource(name)
            symbol = self._env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC)
            self._made[name] = self._env.create_symintnode(symbol, hint=hint, source=source)
        return self._made[name]

    def of(self, values: list[Any]) -> dict[int, torch.SymInt]:
        """prime → symbol for a segment with these inputs; one that sees one size only gets the first."""
        numbers = [v for v in values if isinstance(v, int)]
        numbers += [n for v in values if isinstance(v, Tensor) for n in (*v.shape, *v.stride())]

        def seen(prime: int) -> bool:
            return any(n >= prime and n % prime < (1 << 20) for n in numbers)

        tokens = [p for p in (*HALF_SIZES, ALL_TOKENS, *self._others) if seen(p)]
        first = self._symbol("n0")
        found = {tokens[0]: first} if tokens else {}
        if HALF_SIZES[0] in tokens and HALF_SIZES[1] in tokens:
            second = self._symbol("n1")
            found = {HALF_SIZES[0]: first, HALF_SIZES[1]: second, ALL_TOKENS: first + second}
        for p in tokens:
            if p not in found:
                found[p] = self._symbol(f"m{len(found)}")
        return found


class SegmentCompiler:
    """Compiles segments, each structure once.

    ``"free"`` gives a segment to Inductor; ``"plain"`` does so under the settings for fixed reductions;
    ``"fixed"`` calls llm42 operators directly and gives what lies between them to Inductor under those
    settings; ``"eager"`` calls everything as it stands.
    """

    def __init__(self, style: Style, primes: list[int]) -> None:
        self.style, self._symbols = style, Symbols(primes)
        self.compiled: dict[str, Callable[..., Any]] = {}
        self.calls: dict[str, int] = {}

    def __call__(self, module: fx.GraphModule) -> Callable[..., Any]:
        values = [g.value(n) for n in module.graph.nodes if n.op == "placeholder"]
        symbols = self._symbols.of(values)
        key = _signature(module, symbols)
        if key not in self.compiled:
            # In a thread of its own: the first call may come from inside AOTAutograd's wrapper, whose
            # dispatch state is no state to trace in.
            with concurrent.futures.ThreadPoolExecutor(1) as pool:
                self.compiled[key] = pool.submit(self._compile, module, symbols).result()
        self.calls[key] = self.calls.get(key, 0) + 1
        return self.compiled[key]

    def _compile(self, module: fx.GraphModule, symbols: dict[int, torch.SymInt]) -> Callable[..., Any]:
        if self.style == "eager":
            forward: Callable[..., Any] = module.forward
            return forward
        if self.style == "fixed":
            module.meta[SYMBOLS] = symbols
            return compile_piecewise(module)
        with_inductor = inductor.compile_fixed if self.style == "plain" else inductor.compile_free
        compiled = compile_cluster(module, symbols or None, with_inductor)
        return _from_two_rows(module, compiled, symbols)


def _from_two_rows(
    module: fx.GraphModule, compiled: Callable[..., Any], symbols: dict[int, torch.SymInt]
) -> Callable[..., Any]:
    """``compiled``, but the calls as they stand where a size is below what Inductor assumes."""
    where = None
    for i, node in enumerate(n for n in module.graph.nodes if n.op == "placeholder"):
        t = g.tensor(node)
        for d, size in enumerate(t.shape if t is not None else ()):
            if size in symbols:
                where = where or (i, d)
    if where is None:
        return compiled
    index, dim = where

    def run(*args: Any) -> Any:
        return (compiled if args[index].shape[dim] >= _SMALLEST else module.forward)(*args)

    return run


def _signature(module: fx.GraphModule, symbols: dict[int, torch.SymInt]) -> str:
    """Equal for segments that one compiled function can run."""
    names = {prime: str(symbol) for prime, symbol in symbols.items()}

    def size(n: int) -> str:
        for prime, name in names.items():
            whole, rest = divmod(n, prime)
            if whole and rest < (1 << 20):
                return f"({size(whole)}*{name}+{rest})"
        return str(n)

    def layout(v: Any) -> str:
        if isinstance(v, Tensor):
            shape, stride = ",".join(map(size, v.shape)), ",".join(map(size, v.stride()))
            return f"{v.dtype}[{shape}][{stride}]{v.device}"
        return size(v) if isinstance(v, int) and not isinstance(v, bool) else str(v)

    number = {node: i for i, node in enumerate(module.graph.nodes)}
    lines = []
    for node in module.graph.nodes:
        args = fx.node.map_arg((node.args, dict(node.kwargs)), lambda n: f"%{number[n]}")
        if node.op == "placeholder":
            lines.append(layout(g.value(node)))
        else:
            lines.append(f"{node.op} {callee_of(node)} {args}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def build_program(
    gm: fx.GraphModule,
    p: Pieces,
    order: tuple[str, ...],
    compile_segment: Callable[[fx.GraphModule], Callable[..., Any]],
    lane: Lane,
) -> tuple[Callable[..., tuple[Any, ...]], str]:
    """The program that runs ``order``, and its source. Its inputs are ``gm``'s placeholders."""
    inputs = [n for n in gm.graph.nodes if n.op == "placeholder"]
    constants = {n: getattr(gm, str(n.target)) for n in gm.graph.nodes if n.op == "get_attr"}
    outputs = next(n for n in gm.graph.nodes if n.op == "output").args[0]
    steps: list[Step] = []
    labels: dict[int, str] = {}
    in_lane = any(transfer.start.target is comm.start for transfer in p.transfers.values())
    for turn in turns(p, order):
        if turn.what != SEGMENT:
            steps.append(_transfer(p, turn.key, turn.what == START, lane if in_lane else None))
            continue
        nodes = p.segments[turn.key].nodes
        accesses = [n for n in nodes if _is_access(n)]
        steps += [Step((n,), operator.getitem, n.args, {}) for n in accesses]
        if len(accesses) < len(nodes):
            step = _segment([n for n in nodes if n not in accesses], compile_segment)
            labels.setdefault(id(step.function), f"segment_{turn.key.replace('.', '_')}")
            steps.append(step)
    return emit(inputs, constants, steps, outputs, labels)


def _is_access(node: fx.Node) -> bool:
    """One of several results of a collective: a tuple as input would hide sizes from Inductor."""
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and comm.is_wait(source)


def _segment(nodes: list[fx.Node], compile_segment: Callable[[fx.GraphModule], Callable[..., Any]]) -> Step:
    inside = set(nodes)
    inputs = list(dict.fromkeys(s for n in nodes for s in n.all_input_nodes if s not in inside))
    outputs = [n for n in nodes if any(u not in inside for u in n.users)]
    function = compile_segment(outline(Cluster(nodes, inputs, outputs)))
    return Step(tuple(outputs), function, tuple(inputs), {}, sequence=bool(outputs))


def _transfer(p: Pieces, key: str, starts: bool, lane: Lane | None) -> Step:
    """In a program that has a lane, everything communicates there: ranks must do so in one order."""
    node = p.transfers[key].start if starts else p.transfers[key].wait
    if lane is None:
        return Step((node,), node.target, node.args, node.kwargs)
    if not starts:
        return Step((node,), lane.wait, node.args, {})
    if node.target is comm.start:
        return Step((node,), lane.start, node.args, {})
    return Step((node,), functools.partial(lane.start, _to_its_end), (node.target, *node.args), {})


def _to_its_end(functional: Callable[..., Tensor], *args: Any) -> Tensor:
    """A collective that torch would run asynchronously."""
    done: Tensor = torch.ops._c10d_functional.wait_tensor(functional(*args))
    return done
