"""Worker processes with a time limit a cell: a hang or a crash is a cell, not the end of the survey."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm42c.runtime.survey.cells import Cell
from llm42c.runtime.survey.classes import Decoder

Wanted = tuple[str, str]  # (dtype, path)
_COMMAND = [sys.executable, "-m", "llm42c.runtime.survey.worker"]


@dataclass
class Surveyed:
    """What came of one class: how it mixes tokens and its cells, or why there is no tiny model of it."""

    name: str
    mixing: str = ""
    unbuilt: str = ""
    cells: list[Cell] = field(default_factory=list)


class _Worker:
    """One process; a thread reads its lines, so that waiting can end."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def send(self, job: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()

    def receive(self, limit: float) -> dict[str, Any] | None:
        """The next answer; None if the process has ended. Raises queue.Empty past the limit."""
        line = self._lines.get(timeout=limit)
        answer: dict[str, Any] | None = None if line is None else json.loads(line)
        return answer

    def end(self) -> str:
        """Stop the process; how it ended."""
        try:
            code = self.process.wait(0.5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "stopped"
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


class _Lane:
    """One worker after another, for the classes that a thread takes from the common list."""

    def __init__(self, limit: float, job: dict[str, Any]) -> None:
        self._limit, self._job = limit, job
        self._worker: _Worker | None = None

    def survey(self, decoder: Decoder, wanted: list[Wanted], known: Surveyed | None = None) -> Surveyed:
        """The cells that are wanted, in this order; those that are known are not run."""
        before = {(c.dtype, c.path): c for c in known.cells} if known is not None else {}
        left = [w for w in wanted if w not in before]
        done = known if known is not None and (known.unbuilt or not left) else None
        found = done or self._survey(decoder, left)
        cells = before | {(c.dtype, c.path): c for c in found.cells}
        found.cells = [cells[w] for w in wanted if w in cells]
        return found

    def _survey(self, decoder: Decoder, left: list[Wanted]) -> Surveyed:
        found = Surveyed(decoder.name)
        while True:
            start = time.perf_counter()
            state, told = self._run(decoder, found, left)
            if state is None or (found.mixing and not left):
                return found
            if not found.mixing:
                found.unbuilt = f"building it {told}"
                return found
            dtype, path = left.pop(0)
            found.cells.append(Cell(decoder.name, dtype, path, state, told, time.perf_counter() - start))
            if not left:
                return found

    def _run(self, decoder: Decoder, found: Surveyed, left: list[Wanted]) -> tuple[Any, str]:
        """Do the cells that are left; (state, what happened) where the worker was lost at the first."""
        self._worker = self._worker or _Worker()
        worker = self._worker
        try:
            job = {"name": decoder.name, "model_type": decoder.model_type, "cells": left}
            worker.send(job | self._job)
            while (answer := worker.receive(self._limit)) is not None:
                if answer.get("done"):
                    if answer["full"]:
                        self.close()
                    return None, ""
                if "built" in answer:
                    found.mixing, found.unbuilt = answer.get("mixing", ""), answer.get("told", "")
                else:
                    found.cells.append(Cell(decoder.name, *left.pop(0), **answer))
        except queue.Empty:
            self.close()
            return "slow", f"takes more than {self._limit:.0f} s"
        except BrokenPipeError:
            pass
        how = worker.end()
        self._worker = None
        return "crash", f"ended the process ({how})"

    def close(self) -> None:
        if self._worker is not None:
            self._worker.process.kill()
            self._worker.process.wait()
            self._worker = None


def survey(
    decoders: Iterable[Decoder],
    wanted: list[Wanted],
    *,
    workers: int = 2,
    limit: float = 300.0,
    options: dict[str, Any] | None = None,
    inductor: bool = True,
    tell: Callable[[Surveyed], None] = lambda found: None,
    known: Mapping[str, Surveyed] | None = None,
) -> list[Surveyed]:
    """Survey the classes, `limit` seconds a cell; `tell` is called as each is finished, in any order.

    Cells that are `known`, by class, are taken as they are.

    `options` are given to ``torch.compile`` on the path ``compile``; without `inductor`, the graphs after the
    passes are run call by call.
    """
    todo: queue.Queue[Decoder] = queue.Queue()
    for decoder in decoders:
        todo.put(decoder)
    results: list[Surveyed] = []
    lock = threading.Lock()

    def work() -> None:
        lane = _Lane(limit, {"options": options, "inductor": inductor})
        try:
            while True:
                decoder = todo.get_nowait()
                found = lane.survey(decoder, wanted, (known or {}).get(decoder.name))
                with lock:
                    results.append(found)
                    tell(found)
        except queue.Empty:
            return
        finally:
            lane.close()

    threads = [threading.Thread(target=work, daemon=True) for _ in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(results, key=lambda found: found.name)
