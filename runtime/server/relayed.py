"""What a router in front of the service says and learns of a stream, beside its bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from llm42c.runtime.server.flights import Flight
from llm42c.runtime.server.jobs import Job

RELAYED = "llm42.relayed"  # where it stands in an ASGI scope
Tokens = tuple[tuple[int, ...], ...]  # of each choice


class Relayed:
    """`drafts`: what another engine has committed of each choice; none for a request that begins."""

    def __init__(self, drafts: Tokens = ()) -> None:
        self._drafts = drafts
        self._flights: list[Flight] = []
        self._told: list[int] = []

    def drafted(self, jobs: Sequence[Job]) -> list[Job]:
        """The jobs with what is known of their outputs, which changes no bit."""
        if len(self._drafts) != len(jobs):
            return list(jobs)
        pairs = zip(jobs, self._drafts, strict=True)
        return [dataclasses.replace(job, draft=list(tokens)) if tokens else job for job, tokens in pairs]

    def follow(self, flights: Sequence[Flight]) -> None:
        self._flights, self._told = list(flights), [0] * len(flights)

    def news(self) -> Tokens:
        """Tokens committed since the last call."""
        new = [tuple(f.tokens[told:]) for f, told in zip(self._flights, self._told, strict=True)]
        self._told = [told + len(tokens) for told, tokens in zip(self._told, new, strict=True)]
        return tuple(new)
