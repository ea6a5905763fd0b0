"""What the bits of a compiled graph depend on, apart from weights and shapes."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from llm42c.codegen import targets
from llm42c.codegen.cpu import build
from llm42c.codegen.implementation import implementation_of
from llm42c.codegen.ops.registry import orders_of
from llm42c.compile import inductor
from llm42c.digest import graph_digest
from llm42c.passes import graph as g
from llm42c.passes.kinds import FOREIGN, Kind, kind


@dataclass(frozen=True)
class Computation:
    """A graph as it runs, and who computes it.

    ``graph``: digest after all passes. ``orders``: the order of every operator that it calls.
    ``implementation``: digests of the operators' sources. ``machine``: empty on a CPU if every call is an
    operator or exact; otherwise what the other calls (``foreign``, by name) hang on.
    """

    graph: str
    target: str = "cpu"
    orders: dict[str, str] = field(default_factory=dict)
    implementation: dict[str, str] = field(default_factory=dict)
    machine: dict[str, str] = field(default_factory=dict)
    foreign: dict[str, int] = field(default_factory=dict)


def computation_of(
    gm: fx.GraphModule, weights: Collection[str], compiled: bool, device: torch.device
) -> Computation:
    """``gm`` after the passes, its constants materialised.

    ``weights`` as for :func:`~llm42c.digest.graph_digest`; ``compiled`` says that Inductor compiled a part.
    """
    target = targets.of(device)
    calls = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method")]
    names = {op.name for n in calls if (op := g.ours(n))}
    foreign = {n: kind(n) for n in calls if kind(n) in FOREIGN}
    sums = any(k is not Kind.TRANSCENDENTAL for k in foreign.values())
    machine = target.identity(device, foreign=bool(foreign), threads=sums)
    if compiled:
        machine |= {
            "torch": torch.__version__,
            "inductor": "none" if inductor.without_compiler(device) else _digest(inductor.fixed_config()),
        }
    return Computation(
        graph=graph_digest(gm, weights),
        target=target.name,
        orders=orders_of(names, target.name),
        implementation=implementation_of(names, target.name),
        machine=machine,
        foreign=dict(Counter(map(g.called, foreign))),
    )


def _digest(settings: dict[str, Any]) -> str:
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def machine_state() -> str:
    """Everything that may change the bits of some graph on this machine, ours or not: a key for its cache."""
    library = build.loaded_library()
    parts = (
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        build.cpu_features(),
        str(torch.get_num_threads()),
        "" if library is None else library.name,
        # All that are asked for: torch's version decides which of them count. Inductor is not imported.
        _digest(inductor.asked_config()) if inductor.has_compiler() else "none",
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
