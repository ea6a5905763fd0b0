"""A process group whose link is simulated: one transfer at a time, latency + bytes / bandwidth each.

There is one process. The other ranks of the group are imagined to contribute zeros to sums and copies of this
rank's tensor to gathers, so results do not depend on the link. A transfer takes its turn when the one before
it has left the link; nothing computes meanwhile on behalf of it, so compute and communication overlap exactly
as far as a program lets them. Against a :class:`WallClock` waiting sleeps; against a :class:`VirtualClock`
nothing does, and the log is the same in every run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import Work


class Clock(Protocol):
    def now(self) -> float: ...
    def sleep_until(self, moment: float) -> None: ...


class WallClock:
    """Real time, in seconds."""

    def now(self) -> float:
        return time.perf_counter()

    def sleep_until(self, moment: float) -> None:
        while (left := moment - time.perf_counter()) > 0:
            time.sleep(left)


@dataclass
class VirtualClock:
    """Time that passes only where somebody says so."""

    time: float = 0.0

    def now(self) -> float:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += seconds

    def sleep_until(self, moment: float) -> None:
        self.time = max(self.time, moment)


@dataclass(frozen=True)
class Transfer:
    """One collective on the link: its bytes, and when it left and arrived."""

    number: int
    nbytes: int
    begin: float
    end: float


@dataclass
class Link:
    """State of the link. ``log``: ("start" | "wait", number of the transfer) in program order."""

    latency: float
    bandwidth: float
    clock: Clock
    free_at: float = 0.0
    transfers: list[Transfer] = field(default_factory=list)
    log: list[tuple[str, Any]] = field(default_factory=list)

    def send(self, nbytes: int) -> Transfer:
        """Queue a transfer behind those under way."""
        begin = max(self.clock.now(), self.free_at)
        self.free_at = begin + self.latency + nbytes / self.bandwidth
        sent = Transfer(len(self.transfers), nbytes, begin, self.free_at)
        self.transfers.append(sent)
        self.log.append(("start", sent.number))
        return sent

    def receive(self, sent: Transfer) -> None:
        """Wait until a transfer has arrived."""
        self.clock.sleep_until(sent.end)
        self.log.append(("wait", sent.number))

    def clear(self) -> None:
        self.transfers.clear()
        self.log.clear()
        self.free_at = 0.0

    @property
    def seconds(self) -> float:
        """Time that all transfers took on the link."""
        return sum(t.end - t.begin for t in self.transfers)


class _Work(Work):
    def __init__(self, link: Link, sent: Transfer) -> None:
        super().__init__()
        self._link, self._sent = link, sent

    def wait(self, timeout: Any = None) -> bool:
        self._link.receive(self._sent)
        return True


class SimulatedGroup(dist.ProcessGroup):
    """The process group; ``_c10d_functional`` operators find it by the name given to :func:`simulated`."""

    def __init__(self, size: int, link: Link) -> None:
        super().__init__(0, size)  # type: ignore[call-arg]
        self._link = link
        self._works: list[_Work] = []  # kept while C++ holds them

    def _send(self, nbytes: int) -> _Work:
        if len(self._works) > 1024:
            del self._works[:512]
        self._works.append(_Work(self._link, self._link.send(nbytes)))
        return self._works[-1]

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> _Work:  # type: ignore[override]
        return self._send(sum(t.nbytes for t in tensors))

    def _allgather_base(self, output: Tensor, tensor: Tensor, opts: Any = None) -> _Work:
        output.view(self.size(), *tensor.shape).copy_(tensor.expand(self.size(), *tensor.shape))
        return self._send(tensor.nbytes * (self.size() - 1))

    def alltoall_base(
        self,
        output: Tensor,
        tensor: Tensor,
        output_splits: list[int],
        input_splits: list[int],
        opts: Any = None,
    ) -> _Work:
        own = tensor.split(input_splits)[0] if input_splits else tensor.chunk(self.size())[0]
        output.view(self.size(), -1).copy_(own.reshape(1, -1).expand(self.size(), -1))
        return self._send(tensor.nbytes - own.nbytes)

    # The names of torch 2.13
    all_gather_single = _allgather_base  # type: ignore[assignment]
    all_to_all_single = alltoall_base  # type: ignore[assignment]

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None
    ) -> _Work:
        for output, tensor in zip(outputs, tensors, strict=True):
            output.view(self.size(), *tensor.shape).copy_(tensor.expand(self.size(), *tensor.shape))
        return self._send(sum(t.nbytes for t in tensors) * (self.size() - 1))

    all_gather_single_coalesced = allgather_into_tensor_coalesced  # type: ignore[assignment]

    def getBackendName(self) -> str:  # noqa: N802
        return "simulated"


@contextmanager
def simulated(name: str, link: Link, size: int = 2) -> Iterator[SimulatedGroup]:
    """A group called ``name`` for the time of the block; one of that name outside of it returns after it."""
    groups: Any = torch._C._distributed_c10d
    outer = None
    with suppress(RuntimeError, ValueError):
        outer = groups._resolve_process_group(name)
        groups._unregister_process_group(name)
    group = SimulatedGroup(size, link)
    groups._register_process_group(name, group)
    try:
        yield group
    finally:
        groups._unregister_process_group(name)
        if outer is not None:
            groups._register_process_group(name, outer)
