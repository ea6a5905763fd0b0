"""The processes that run one model together, and what they tell each other besides tensors.

Every rank runs the same deterministic program on the same requests, so there is little to tell: rank 0 gives
away what cannot be the same by itself (:meth:`Ranks.share`: random seeds, files, standard input), verdicts
on what each rank can only see of its own part are joined (:meth:`Ranks.agree`), and what must be equal is
compared (:meth:`Ranks.require_same`). A rank that dies, hangs or goes its own way is named in an error on
every other.

Collectives end by the timeout of the process group. Each rank's heart beats in the group's store from a
thread of its own. When a collective fails, the first rank to notice looks whose heart has stopped, and if
none has, who has not noticed either (its program hangs); what it finds is what every rank reports.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm42c.codegen.dist.collectives import gather_into, group_of
from llm42c.errors import RankFailureError, RanksDifferError

TIMEOUT_S = 60.0  # of one collective: a step of the slowest rank, and what it may be late
START_S = 600.0  # for all ranks to have loaded and compiled
END_S = 3600.0  # for what rank 0 does alone at the end
REPORT_S = 5.0  # after a failed collective, for the others to notice
_BEAT_S = 0.5
_SILENCE_S = 3.0  # without a beat: dead or stopped
_POLL_S = 0.05


@dataclass
class Ranks:
    """This process's place among ``size`` of them; alone unless :func:`world` made it."""

    rank: int = 0
    size: int = 1
    group_name: str = ""
    report_s: float = REPORT_S
    _meetings: Any = field(default_factory=itertools.count, repr=False)

    def share(self, value: Any) -> Any:
        """Rank 0's value, on all ranks (pickled)."""
        if self.size == 1:
            return value
        box = [value if self.rank == 0 else None]
        with self.watch("a value that rank 0 shares"):
            dist.broadcast_object_list(box, group=self._group, group_src=0)
        return box[0]

    def agree(self, same: Tensor) -> Tensor:
        """same: bool, of one shape on all ranks → where it is true on all of them."""
        if self.size == 1:
            return same
        votes = same.to(torch.uint8)
        with self.watch("a joint verdict"):
            dist.all_reduce(votes, op=dist.ReduceOp.MIN, group=self._group)
        return votes.bool()

    def all_report(self, event: str) -> bool:
        """Whether all ranks report ``event``, a name used once, within ``report_s``. No collective: for
        ranks that may have left one another in the middle of one."""
        return self.size == 1 or not self._missing(event, self.report_s)

    def require_same(self, what: str, value: str) -> None:
        """Raise RanksDifferError on every rank, unless all have this ``value``; names those unlike rank 0."""
        if self.size == 1:
            return
        found: list[Any] = [None] * self.size
        with self.watch(f"the comparison of {what}"):
            dist.all_gather_object(found, value, group=self._group)
        self._compare(what, found)

    def require_same_number(self, what: str, value: int) -> None:
        """:meth:`require_same` for an int64, without pickling."""
        if self.size == 1:
            return
        found = torch.empty(self.size, dtype=torch.int64)
        with self.watch(f"the comparison of {what}"):
            gather_into(found, torch.tensor([value]), self._group)
        self._compare(what, found.tolist())

    def _compare(self, what: str, found: list[Any]) -> None:
        others = [r for r, value in enumerate(found) if value != found[0]]
        if others:
            raise RanksDifferError(
                f"{_named(others)} and rank 0 differ in {what}: {found[others[0]]} and {found[0]}"
            )

    def meet(self, what: str, timeout_s: float = START_S) -> None:
        """Wait for all ranks, longer than a collective. Raises RankFailureError naming who is missing."""
        if self.size == 1:
            return
        with self.watch(what):
            event, end = f"meet/{next(self._meetings)}", time.monotonic() + timeout_s
            before: dict[int, int] = {}
            while missing := self._missing(event, _SILENCE_S):
                beats = {r: self._beats(r) for r in missing}
                dead = [r for r, n in beats.items() if n and before.get(r) == n]
                if dead or time.monotonic() > end:
                    raise RankFailureError(f"{_named(dead or missing)} did not come to {what}")
                before = beats

    @contextlib.contextmanager
    def watch(self, what: str) -> Iterator[None]:
        """Turn a failed collective inside the block into a RankFailureError that names who failed."""
        start = time.monotonic()
        try:
            yield
        except (RanksDifferError, RankFailureError):
            raise
        except RuntimeError as error:
            if self.size == 1 or not _of_a_collective(error):
                raise
            waited = time.monotonic() - start
            raise RankFailureError(f"{self._cause()} during {what}, after {waited:.1f} s") from error

    def _cause(self) -> str:
        """Who failed: found by the first rank that noticed, read by the others."""
        try:
            self._store.set(f"noticed/{self.rank}", "1")
            if self._store.add("causes", 1) > 1:
                end = time.monotonic() + self.report_s + 2 * _SILENCE_S
                while time.monotonic() < end:
                    if self._store.check(["cause"]):
                        return str(self._store.get("cause").decode())
                    time.sleep(_POLL_S)
            cause = self._diagnose()
            self._store.set("cause", cause)
        except RuntimeError:
            return "rank 0, which holds the store of the group, failed"
        return cause

    def _diagnose(self) -> str:
        others = [r for r in range(self.size) if r != self.rank]
        dead = self._silent(others)
        if dead:
            return f"{_named(dead)} failed"
        hanging = self._missing("noticed", self.report_s)
        return f"{_named(hanging)} failed to answer" if hanging else "a connection between ranks failed"

    def _silent(self, among: list[int]) -> list[int]:
        """Those whose hearts have stopped."""
        before = {r: self._beats(r) for r in among}
        time.sleep(_SILENCE_S)
        return [r for r in among if before[r] and self._beats(r) == before[r]]

    def _beats(self, rank: int) -> int:
        """How often the heart of a rank has beaten; 0 if it has none."""
        return int(self._store.add(f"beat/{rank}", 0))

    def _missing(self, event: str, timeout_s: float) -> list[int]:
        """Report ``event``; the ranks that have not reported it within ``timeout_s``."""
        self._store.set(f"{event}/{self.rank}", "1")
        missing = [r for r in range(self.size) if r != self.rank]
        end = time.monotonic() + timeout_s
        while missing and time.monotonic() < end:
            missing = [r for r in missing if not self._store.check([f"{event}/{r}"])]
            time.sleep(_POLL_S if missing else 0)
        return missing

    @property
    def _store(self) -> Any:
        c10d: Any = dist.distributed_c10d
        return c10d.PrefixStore("llm42", c10d._get_default_store())

    @property
    def _group(self) -> dist.ProcessGroup:
        return group_of(self.group_name)


ALONE = Ranks()


def world() -> Ranks:
    """The default group of ``torch.distributed``, or a process alone where it is not initialised."""
    group = dist.group.WORLD if dist.is_available() and dist.is_initialized() else None
    return ALONE if group is None else Ranks(group.rank(), group.size(), group.group_name)


@contextlib.contextmanager
def joined(timeout_s: float = TIMEOUT_S) -> Iterator[Ranks]:
    """A member, with a beating heart, of the Gloo group that ``torchrun`` announces in the environment.

    Leaves the group at the end of the block, once all ranks are there. Raises RankFailureError.
    """
    try:
        dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))
    except (RuntimeError, ValueError) as error:
        raise RankFailureError(f"cannot join the other ranks: {error}") from error
    ranks = world()
    with heart(ranks):
        yield ranks
        ranks.meet("the end", END_S)
    dist.destroy_process_group()


@contextlib.contextmanager
def heart(ranks: Ranks) -> Iterator[None]:
    """Beats in the group's store while the block runs."""
    stop = threading.Event()

    def beat() -> None:
        store = ranks._store
        with contextlib.suppress(RuntimeError):  # the store is gone: so is the job
            while True:
                store.add(f"beat/{ranks.rank}", 1)
                if stop.wait(_BEAT_S):
                    return

    thread = threading.Thread(target=beat, name="llm42 heart", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _of_a_collective(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return True
    text = str(error).lower()
    return any(word in text for word in ("gloo", "nccl", "connection", "timed out", "timeout", "socket"))
