"""States of shapes on disk, shared by every process with the same contract and graph.

One JSON file, replaced as a whole under a lock. Saving merges: a revocation that either side knows stays, and
withdraws the certificates of the side that did not know it, because a probe that let one bad shape pass may
have let others pass. Engines whose probes differ only in the pages at their disposal share the file. A store
that cannot be used costs probes, never a request.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import filelock

_log = logging.getLogger(__name__)

Shape = tuple[int, int]  # (tokens, logits rows) of a fast step
Status = Literal["certified", "speculative", "revoked"]
Verifier = Literal["unchecked", "independent", "dependent"]  # of the rows of the verifier graph, on what else

_UNREADABLE = "certificates in %s are unreadable and are made anew: %s"
LOCK_S = 5.0  # for another process to finish writing


@dataclass(frozen=True)
class Stored:
    """What a process knows of its shapes and of its verifier graph.

    `pages` is how many the probe of a certified shape could use (None: the check of the verifier graph). More
    pages make a stronger probe, so what one of them found equal is equal for a process with fewer. A
    difference counts whoever found it.
    """

    shapes: Mapping[Shape, Status] = field(default_factory=dict)
    verifier: Verifier = "unchecked"
    pages: Mapping[Shape | None, int] = field(default_factory=dict)

    @property
    def revoked(self) -> set[Shape]:
        return {s for s, v in self.shapes.items() if v == "revoked"}

    def without_certificates(self) -> Stored:
        kept = {s: v for s, v in self.shapes.items() if v != "certified"}
        return Stored(kept, self.verifier, self.pages)

    def vouched_with(self, key: Shape | None) -> int:
        """Pages of the probe that found `key` equal; -1 if none did."""
        vouched = self.verifier == "independent" if key is None else self.shapes.get(key) == "certified"
        return self.pages.get(key, 0) if vouched else -1

    def proved_with(self, pages: int) -> Stored:
        """Without what weaker probes than those with `pages` let pass."""
        weak = {key for key in (None, *self.shapes) if 0 <= self.vouched_with(key) < pages}
        kept = {s: v for s, v in self.shapes.items() if s not in weak}
        return Stored(kept, "unchecked" if None in weak else self.verifier, self.pages)


def merge(mine: Stored, found: Stored) -> Stored:
    """What both together know. Of two states the more doubtful one counts, of two probes the stronger."""
    if found.revoked - mine.revoked:
        mine = mine.without_certificates()
    if mine.revoked - found.revoked:
        found = found.without_certificates()
    shapes = dict(found.shapes)
    for shape, status in mine.shapes.items():
        shapes[shape] = max(status, shapes.get(shape, status), key=get_args(Status).index)
    verifier = max(mine.verifier, found.verifier, key=get_args(Verifier).index)
    together = Stored(shapes, verifier)
    pages = {
        key: max(side.vouched_with(key) for side in (mine, found))
        for key in (None, *shapes)
        if together.vouched_with(key) >= 0
    }
    return Stored(shapes, verifier, pages)


class CertificateStore:
    """The file `path`, whose folder is made when needed. `labels` say whose states they are.

    No method raises; the first failure is a warning record, and from then on only revocations are written.
    """

    def __init__(self, path: Path, labels: dict[str, str]) -> None:
        self.path = path
        self._labels = labels
        self._lock = filelock.FileLock(path.parent / ".lock", timeout=LOCK_S)
        self._seen = False  # the file was there; if it is gone, so may be a revocation
        self._stamp: tuple[int, ...] | None = None  # of the file as it was last read or written
        self._failed = False

    def load(self) -> Stored:
        """What is on disk; nothing where there is no file, or none that can be read."""
        try:
            return self._read() or Stored()
        except OSError as error:
            self._complain("read", error)
        except ValueError as error:
            _log.warning(_UNREADABLE, self.path, error)
        return Stored()

    def save(self, mine: Stored, revoking: bool = False) -> Stored:
        """Write what `mine` and the file know together; returns it, or `mine` where that cannot be done."""
        if self._failed and not revoking:
            return mine
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                together = merge(*self._on_disk(mine))
                self._replace(together)
            return together
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            self._complain("write", error)
            if revoking:
                self._remove()
            return mine

    def news(self, mine: Stored) -> Stored | None:
        """What `mine` and the file know together, if the file is another one than before. Writes nothing."""
        try:
            if self._stamp_of_file() == self._stamp:
                return None
            return merge(*self._on_disk(mine))
        except OSError as error:
            self._complain("read", error)
            return None

    def _stamp_of_file(self) -> tuple[int, ...] | None:
        """What changes whenever the file is replaced; None where there is none."""
        try:
            found = self.path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return found.st_ino, found.st_mtime_ns, found.st_size

    def _on_disk(self, mine: Stored) -> tuple[Stored, Stored]:
        """`mine` and the file's states. A file that has gone or turned to garbage may have held a revocation,
        so certificates do not outlive it."""
        try:
            found = self._read()
        except ValueError as error:
            _log.warning(_UNREADABLE, self.path, error)
            return mine.without_certificates(), Stored()
        if found is None:
            return (mine.without_certificates() if self._seen else mine), Stored()
        return mine, found

    def _read(self) -> Stored | None:
        """None where there is no file. Raises ValueError for one that nobody here wrote."""
        self._stamp = self._stamp_of_file()  # first: a file that is replaced meanwhile is read again
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        self._seen = True
        try:
            data = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        try:
            if not all(data[name] == label for name, label in self._labels.items()):
                raise ValueError("they are of something else")
            return _parsed(data)
        except (KeyError, TypeError, AttributeError):
            raise ValueError("fields are missing") from None

    def _replace(self, states: Stored) -> None:
        data = {
            **self._labels,
            "verifier": states.verifier,
            "shapes": {_named(shape): s for shape, s in sorted(states.shapes.items())},
            "pages": {_named(key): n for key, n in states.pages.items()},
        }
        new = self.path.with_suffix(".tmp")  # one writer at a time, so one name: a killed one leaves one
        with new.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self.path)
        self._seen = True
        self._stamp = self._stamp_of_file()

    def _remove(self) -> None:
        """What cannot be marked as revoked must not be found as certified."""
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            _log.error("a revocation cannot be stored: delete %s by hand (%s)", self.path, error)

    def _complain(self, what: str, error: Exception) -> None:
        if not self._failed:
            _log.warning(
                "cannot %s certificates in %s, shapes are probed again at the next start: %s",
                *(what, self.path, error),
            )
        self._failed = True


def _parsed(data: Mapping[str, Any]) -> Stored:
    """Raises ValueError, KeyError, TypeError or AttributeError for what `_replace` never wrote."""
    shapes = {_parse(key): value for key, value in data["shapes"].items()}
    pages = {None if key == "verifier" else _parse(key): n for key, n in data["pages"].items()}
    known = set(shapes.values()) <= set(get_args(Status)) and data["verifier"] in get_args(Verifier)
    if not known or not all(isinstance(n, int) for n in pages.values()):
        raise ValueError("fields hold something else")
    stored = Stored(shapes, data["verifier"], pages)
    if any(key not in pages for key in (None, *shapes) if stored.vouched_with(key) >= 0):
        raise ValueError("fields are missing")
    return stored


def _parse(key: str) -> Shape:
    tokens, rows = key.split("x")
    return int(tokens), int(rows)


def _named(key: Shape | None) -> str:
    return "verifier" if key is None else f"{key[0]}x{key[1]}"
