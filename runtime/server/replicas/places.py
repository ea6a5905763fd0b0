"""Which replicas are there, and who takes the next request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm42c.errors import ConfigError
from llm42c.runtime.contract import Contract
from llm42c.runtime.server.replicas.call import LostError, Replica, State

SILENT_S = 20.0  # a replica that says nothing for so long is as good as gone
_AGAIN_S = 0.2  # between looking for one that is lost

_log = logging.getLogger(__name__)


def agree(names: Sequence[str], states: Sequence[State]) -> Contract:
    """The contract of all. Raises ConfigError where one cannot serve, or has another contract."""
    for name, state in zip(names, states, strict=True):
        if state.refused is not None:
            raise ConfigError(state.refused)
        first, other = Contract.from_json(states[0].contract), Contract.from_json(state.contract)
        if fields := first.diff(other):
            raise ConfigError(f"{name} has another contract than {names[0]}: {'; '.join(fields)}")
    return Contract.from_json(states[0].contract)


@dataclass(eq=False)
class Place:
    """A replica as the router sees it."""

    replica: Replica
    state: State | None = None  # None: it is not there
    attempts: dict[Any, Callable[[LostError], None]] = field(
        default_factory=dict
    )  # what to tell when it goes
    losses: int = 0
    unfit: State | None = None  # of one that is there and cannot be used

    @property
    def name(self) -> str:
        return self.replica.name


class Places:
    """Watches every replica, in the event loop that uses them. All have `contract`, or are not used."""

    def __init__(self, replicas: Sequence[Replica], contract: Contract) -> None:
        self.contract = contract
        self.all = [Place(replica) for replica in replicas]
        self._changed = asyncio.Event()
        self._turn = 0
        self._watchers: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._watchers = [asyncio.ensure_future(self._watch(place)) for place in self.all]

    async def close(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)

    @property
    def up(self) -> list[Place]:
        return [place for place in self.all if place.state is not None]

    def best(self, besides: Collection[Place] = ()) -> Place | None:
        """The one with the fewest requests; they take turns where that is the same."""
        self._turn += 1
        turned = [self.all[(self._turn + i) % len(self.all)] for i in range(len(self.all))]
        free = [place for place in turned if place.state is not None and place not in besides]
        return min(free, key=lambda place: len(place.attempts), default=None)

    async def wait(self, besides: Collection[Place] = ()) -> Place:
        """The best, once there is one."""
        while (place := self.best(besides)) is None:
            self._changed.clear()
            await self._changed.wait()
        return place

    def lost(self, place: Place, why: str) -> None:
        """It is not asked any more until it says again that it is there; who works there is told."""
        if place.state is None:
            return
        _log.warning("%s is gone: %s", place.name, " ".join(why.split())[:200])
        place.state = None
        place.losses += 1
        for tell in list(place.attempts.values()):
            tell(LostError(f"{place.name} is gone"))

    async def _watch(self, place: Place) -> None:
        while True:
            try:
                async with contextlib.aclosing(place.replica.watch()) as states:
                    self._here(place, await anext(states))
                    while True:
                        async with asyncio.timeout(SILENT_S):
                            self._here(place, await anext(states))
            except Exception as error:  # whatever carries the states may raise: it is asked again
                self.lost(place, f"{type(error).__name__}: {error}")
                await asyncio.sleep(_AGAIN_S)

    def _here(self, place: Place, state: State) -> None:
        if place.state == state or place.unfit == state:
            return
        try:
            agree(["the router", place.name], [State(0, self.contract.to_json()), state])
        except ConfigError as error:
            _log.error("%s is not used: %s", place.name, error)
            place.unfit = state
            return
        _log.info("%s is there, process %d", place.name, state.pid)
        place.state = state
        self._changed.set()
