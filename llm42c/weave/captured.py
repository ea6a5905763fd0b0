"""Token weaving of a captured graph: divide, plan, compile, and choose by the number of tokens at each call.

The cost model's rates are measured on rank 0 and sent to the others, and every rank compares the hash of
its plan with theirs before anything runs, so that ranks can never take different decisions.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import math
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import fx

from llm42c.codegen import targets
from llm42c.codegen.device import MEASURED, Device, Value, measure
from llm42c.compile import inductor
from llm42c.errors import RanksDifferError
from llm42c.passes import graph as g
from llm42c.passes.sizes import SYMBOLS
from llm42c.passes.weave import communication as comm
from llm42c.passes.weave.cost import Rates
from llm42c.passes.weave.rules import UnsplittableError
from llm42c.passes.weave.schedule import Decision, Planner
from llm42c.passes.weave.split import Split, split_tokens
from llm42c.weave.runner import Lane, SegmentCompiler, Style, build_program, lane_for

When = Literal["auto", "always", "off"]
_log = logging.getLogger(__name__)


class WovenProgram:
    """A compiled graph that is woven where the plan says so. Call it with the graph's inputs.

    ``when``: ``"auto"`` weaves where the plan predicts a gain, ``"always"`` wherever there are two
    tokens, ``"off"`` never; it may be changed between calls, on all ranks alike. ``whole`` is what runs
    calls that are not woven, by default the unchanged graph compiled in the same style. ``sources`` are the
    programs made so far, by what was decided; ``calls`` counts woven and other calls.
    """

    def __init__(
        self, planner: Planner, style: Style, lane: Lane, whole: Callable[..., tuple[Any, ...]] | None = None
    ) -> None:
        self.planner = planner
        self.when: When = "always" if planner.always else "auto"
        split = planner.split
        self._lane = lane
        self.compiler = SegmentCompiler(style, [split.prime, *split.original.meta[SYMBOLS]])
        inputs = [n for n in split.original.graph.nodes if n.op == "placeholder"]
        values = [g.value(n) for n in inputs]
        self._tokens_at = next(i for i, v in enumerate(values) if isinstance(v, int) and v == split.prime)
        self.sources: dict[str, str] = {}
        self.calls = {"woven": 0, "whole": 0}
        self._woven = functools.cache(self._build_woven)
        self._whole = functools.cache(self._build_whole if whole is None else lambda _: whole)

    @property
    def split(self) -> Split:
        return self.planner.split

    def _build_woven(self, order: tuple[str, ...]) -> Callable[..., tuple[Any, ...]]:
        run, source = build_program(self.split.gm, self.planner.woven, order, self.compiler, self._lane)
        self.sources[f"woven_{len(self.sources)}"] = source
        return run

    def _build_whole(self, order: tuple[str, ...]) -> Callable[..., tuple[Any, ...]]:
        run, source = build_program(self.split.original, self.planner.plain, order, self.compiler, self._lane)
        self.sources["whole"] = source
        return run

    def decide(self, *inputs: Any) -> Decision:
        """What will be done with these inputs; only the number of tokens counts."""
        decision = self.planner.decide(int(inputs[self._tokens_at]), self.when == "always")
        return dataclasses.replace(decision, tokens_0=0) if self.when == "off" else decision

    def run(self, decision: Decision, *inputs: Any) -> tuple[Any, ...]:
        """Run as ``decision`` says."""
        if decision.weaves:
            self.calls["woven"] += 1
            return self._woven(decision.order)(*inputs, decision.tokens_0)
        self.calls["whole"] += 1
        return self._whole(decision.plain.order)(*inputs)

    def prepare(self, tokens: int) -> None:
        """Compile now what a call with so many tokens will need, if it will be woven."""
        decision = self.planner.decide(tokens, self.when == "always")
        if decision.weaves and self.when != "off":
            self._woven(decision.order)

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        return self.run(self.decide(*inputs), *inputs)


def compile_woven(
    gm: fx.GraphModule,
    target: Device | None = None,
    *,
    when: When = "auto",
    style: Style = "free",
    group: dist.ProcessGroup | None = None,
    whole: Callable[..., tuple[Any, ...]] | None = None,
    fixed: Mapping[str, int] | None = None,
) -> WovenProgram:
    """:func:`plan` for ``gm``, compiled lazily; ``whole``: see :class:`WovenProgram`."""
    planner = plan(gm, target, when=when, group=group, fixed=fixed)
    return WovenProgram(planner, style, lane_for(_device(gm)), whole)


def plan(
    gm: fx.GraphModule,
    target: Device | None = None,
    *,
    when: When = "auto",
    group: dist.ProcessGroup | None = None,
    fixed: Mapping[str, int] | None = None,
) -> Planner:
    """Divide ``gm`` and agree with the other ranks of ``group`` on when to weave it.

    ``fixed``: see :func:`~llm42c.passes.weave.split.split_tokens`. ``target`` must have the rates that
    :func:`measured` gives; without one they are measured here. All ranks
    of ``group`` must call this together. Raises UnsplittableError, on every rank, where the graph cannot be
    divided, UnknownDeviceError where a rate is missing, RanksDifferError where graphs or plans differ.
    """
    try:
        split, refusal = split_tokens(gm, fixed), ""
    except UnsplittableError as reason:
        split, refusal = None, str(reason)

    def agree() -> Planner:
        where = "measured rates" if target is None else f"rates {_digest(target)}"
        require_equal(refusal or where, group, "the division of tokens")
        if split is None:
            raise UnsplittableError(refusal)
        rates = Rates.of(measured(group, _device(gm)) if target is None else target)
        planner = Planner(split, rates, always=when == "always")
        if group is not None and group.size() > 1:
            costs = [planner.costs]
            dist.broadcast_object_list(costs, group_src=0, group=group)
            planner.adopt(costs[0])
        require_equal(planner.hash, group)
        return planner

    return _apart(agree)


def _apart(run: Callable[[], Planner]) -> Planner:
    """``run()`` in a thread of its own.

    A compiler at work around us has set fake tensors and its Python dispatcher for its thread. Collectives
    sent through that dispatcher hold the interpreter's lock while they wait for a lock of the process group,
    whose own thread may wait for the interpreter.
    """
    gpu = torch.cuda.current_device() if torch.cuda.is_initialized() else None  # of this thread

    def there() -> Planner:
        if gpu is not None:
            torch.cuda.set_device(gpu)
        return run()

    with ThreadPoolExecutor(1, thread_name_prefix="llm42-plan") as pool:
        return pool.submit(there).result()


def _digest(target: Device) -> str:
    return hashlib.sha256(target.to_json().encode()).hexdigest()[:12]


def _device(gm: fx.GraphModule) -> torch.device:
    sent = next(n for n in gm.graph.nodes if comm.is_collective(n)).args[0]
    return g.fake(sent).device


def require_equal(found_here: str, group: dist.ProcessGroup | None, what: str = "the weaving plan") -> None:
    """Raises RanksDifferError, naming the ranks, unless all ranks of ``group`` have found the same."""
    if group is None or group.size() == 1:
        return
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, found_here, group=group)
    differing = [rank for rank, other in enumerate(found) if other != found[0]]
    if differing:
        raise RanksDifferError(
            f"{what} of rank {', '.join(map(str, differing))} is not that of rank 0: "
            f"{found[differing[0]]} and {found[0]}; ranks must hold the same model and the same versions"
        )


def measured(group: dist.ProcessGroup | None, device: torch.device) -> Device:
    """The device with its rates and those of the group's link, as rank 0 sees them, the same on every rank.

    Every rank of ``group`` must call this at the same time.
    """
    target = targets.of(device)
    mine = measure(target.detect(device.index or 0), target.rates)
    if group is not None and group.size() > 1:
        dist.barrier(group)  # so that ranks of one machine see what it has for each of them
    mine = mine.measured(target.rates_now())
    if group is not None and group.size() > 1:
        mine = mine.measured(link_rates(group, device))
        text = [mine.to_json()]
        dist.broadcast_object_list(text, group_src=0, group=group)
        mine = Device.from_json(text[0])
    return mine


def link_rates(group: dist.ProcessGroup, device: torch.device) -> dict[str, Value]:
    """Latency and bandwidth of an all-reduce, from a small and a large message, and how much of the large
    one's time products that run beside it lose."""
    small, large = torch.zeros(64, device=device), torch.zeros(1 << 20, device=device)
    x, w = torch.ones(256, 1024, device=device), torch.ones(1024, 1024, device=device)

    def seconds(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(7):
            dist.barrier(group)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

    def compute(count: int) -> None:
        for _ in range(count):
            torch.nn.functional.linear(x, w)

    def both(count: int) -> None:
        work = dist.all_reduce(large, group=group, async_op=True)
        compute(count)
        work.wait()

    latency = seconds(lambda: dist.all_reduce(small, group=group))
    whole = seconds(lambda: dist.all_reduce(large, group=group))
    count = math.ceil(1.5 * whole / seconds(lambda: compute(1)))  # products outlast the message
    lost = seconds(lambda: both(count)) - seconds(lambda: compute(count))
    bandwidth = (large.nbytes - small.nbytes) / max(whole - latency, 1e-9)
    source = f"{MEASURED}: all_reduce of 256 B and 4 MiB over {group.size()} ranks"
    return {
        "link_latency": Value(latency, source),
        "link_bandwidth": Value(bandwidth, source),
        "link_processor_share": Value(
            min(max(lost / whole, 1e-3), 1.0), f"{MEASURED}: {count} products beside an all_reduce of 4 MiB"
        ),
    }


def weaving_backend(
    target: Device | None = None,
    *,
    when: When = "auto",
    style: Style = "free",
    group: dist.ProcessGroup | None = None,
    made: list[WovenProgram] | None = None,
) -> Callable[..., Any]:
    """A ``torch.compile`` backend for inference that weaves what it can.

    A graph that cannot be divided goes to Inductor as it is, with the reason in the log; so ranks must
    compile the same model. Programs are appended to ``made``. The token dimension must be dynamic.
    """
    from torch._dynamo.backends.common import aot_autograd

    def compile_graph(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        try:
            program = compile_woven(gm, target, when=when, style=style, group=group)
        except UnsplittableError as reason:
            _log.info("not woven: %s", reason)
            plain = inductor.compile_free(gm, inputs)
            return lambda *args: plain(*args)  # which AOTAutograd must not take for a function of one list
        if made is not None:
            made.append(program)

        def run(*args: Any) -> tuple[Any, ...]:
            return program(*args)

        return run

    backend: Callable[..., Any] = aot_autograd(fw_compiler=compile_graph)
    return backend
