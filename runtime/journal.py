"""A journal: committed tokens of requests, appended to a file as they commit, so that a killed process loses
nothing.

Each line is whole or it is the last one. The first says how many requests the file is of: a kill can fall
between the pages of one write, and a file in which some of them are missing has not begun. The state that
each request began with follows, a line each; the others are lists: which request of the file, token, bits of
its log-prob, and the link of the request's chain (as in its receipt), so that a line that was edited or lost
shows in the next one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llm42c.errors import ConfigError, Llm42Error, StateError
from llm42c.runtime import sealed
from llm42c.runtime.asked import Chain
from llm42c.runtime.resumption import RequestState, bits, from_bits

if TYPE_CHECKING:
    from llm42c.runtime.outputs import RequestOutput

KIND, VERSION = "llm42_journal", 1
HEAD = f'{{"{KIND}":'.encode()


class Journal:
    """Appends to `path`, whose first `end` bytes stay. Each write is one call of the system."""

    def __init__(self, path: Path, end: int = 0) -> None:
        """Raises ConfigError where the file cannot be written, or already holds what should stay."""
        self._path = path
        self._chains: list[Chain] = []
        self._index: dict[str, int] = {}  # request id → which request of the file
        try:
            if end == 0 and path.exists() and not _has_not_begun(path):
                raise ConfigError(f"{path} is there already: finish it with llm42 resume, or remove it")
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.ftruncate(self._file, end)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None

    @staticmethod
    def read(path: Path) -> tuple[list[RequestState], int]:
        """The states of a journal's requests, and where its last whole line ends.

        A journal that a kill cut off before all of its requests were written holds none, and ends at 0.
        Raises StateError for a journal that was edited, and ConfigError for a file that cannot be read.
        """
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error.strerror}") from None
        end = data.rfind(b"\n") + 1  # what is behind it was torn by the end of the process
        reader = _Reader()
        for number, line in enumerate(data[:end].split(b"\n")[:-1], start=1):
            try:
                reader.take(line.decode())
            except (Llm42Error, ValueError, TypeError, IndexError, struct.error) as error:
                why = str(error) if "has version" in str(error) else "damaged: it is not as it was written"
                raise StateError(f"{path}, line {number}: {why}") from None
        states = reader.states()
        return states, end if states else 0

    def begin(self, request_ids: Sequence[str], states: Sequence[RequestState]) -> None:
        """A new file is of these requests."""
        for request_id, state in zip(request_ids, states, strict=True):
            self.go_on(request_id, state)
        head = sealed.seal(KIND, VERSION, {"requests": len(states)})
        self._write("".join(f"{line}\n" for line in (head, *(state.to_json() for state in states))))

    def go_on(self, request_id: str, state: RequestState) -> None:
        """The file's next request continues under this id; what `state` holds is in the file."""
        chain = Chain(state.contract, state.prompt, state.params)
        chain.links(state.tokens, state.logprobs)
        self._index[request_id] = len(self._chains)
        self._chains.append(chain)

    def take(self, outputs: Iterable[RequestOutput]) -> None:
        """Write what is new. Raises ConfigError where that fails; then a line may be torn."""
        lines = []
        for output in outputs:
            index = self._index[output.request_id]
            for token, logprob in zip(output.new_token_ids, output.new_logprobs, strict=True):
                link = self._chains[index].add(token, logprob)
                lines.append(_line(index, token, logprob, link))
        self._write("".join(lines))

    def close(self) -> None:
        os.close(self._file)

    def _write(self, text: str) -> None:
        data = memoryview(text.encode())
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            raise ConfigError(f"cannot write {self._path}: {error.strerror}") from None


class _Reader:
    def __init__(self) -> None:
        self._requests: int | None = None  # as the first line says
        self._begun: list[RequestState] = []
        self._chains: list[Chain] = []
        self._found: list[tuple[list[int], list[float]]] = []

    def take(self, line: str) -> None:
        if self._requests is None:
            self._requests = sealed.unseal(line, KIND, VERSION, "journal", StateError)["requests"]
            return
        if len(self._begun) < self._requests:
            state = RequestState.from_json(line)
            chain = Chain(state.contract, state.prompt, state.params)
            chain.links(state.tokens, state.logprobs)
            self._begun.append(state)
            self._chains.append(chain)
            self._found.append((list(state.tokens), list(state.logprobs)))
            return
        index, token, digits, _ = json.loads(line)
        logprob = from_bits(digits)
        if index < 0 or f"{line}\n" != _line(index, token, logprob, self._chains[index].add(token, logprob)):
            raise ValueError
        self._found[index][0].append(token)
        self._found[index][1].append(logprob)

    def states(self) -> list[RequestState]:
        if len(self._begun) != self._requests:
            return []
        return [
            dataclasses.replace(state, tokens=tokens, logprobs=logprobs)
            for state, (tokens, logprobs) in zip(self._begun, self._found, strict=True)
        ]


def _has_not_begun(path: Path) -> bool:
    """Whether nothing is lost with the file: it is empty, or only the beginning of a journal's beginning."""
    data = path.read_bytes()
    return not data or (data.startswith(HEAD) and not Journal.read(path)[0])


def _line(index: int, token: int, logprob: float, link: str) -> str:
    return json.dumps([index, token, bits(logprob), link], separators=(",", ":")) + "\n"
