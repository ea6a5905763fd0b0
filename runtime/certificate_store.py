"""States of shapes on disk, shared by every process with the same contract and graph.

One JSON file, replaced as a whole under a lock. Saving merges: a revocation that either side knows stays, and
withdraws the certificates of the side that did not know it, because a probe that let one bad shape pass may
have let others pass. A store that cannot be used costs probes, never a request.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import filelock

_log = logging.getLogger(__name__)

Shape = tuple[int, int]  # (tokens, logits rows) of a fast step
Status = Literal["certified", "speculative", "revoked"]

_UNREADABLE = "certificates in %s are unreadable and are made anew: %s"
LOCK_S = 5.0  # for another process to finish writing


@dataclass(frozen=True)
class Stored:
    """What a process knows of its shapes."""

    shapes: Mapping[Shape, Status] = field(default_factory=dict)
    verifier_checked: bool = False

    @property
    def revoked(self) -> set[Shape]:
        return {s for s, v in self.shapes.items() if v == "revoked"}

    def without_certificates(self) -> Stored:
        kept = {s: v for s, v in self.shapes.items() if v != "certified"}
        return Stored(kept, self.verifier_checked)


def merge(mine: Stored, found: Stored) -> Stored:
    """What both together know. Of two states of a shape the more doubtful one counts."""
    if found.revoked - mine.revoked:
        mine = mine.without_certificates()
    if mine.revoked - found.revoked:
        found = found.without_certificates()
    shapes = dict(found.shapes)
    for shape, status in mine.shapes.items():
        shapes[shape] = max(status, shapes.get(shape, status), key=_doubt)
    return Stored(shapes, mine.verifier_checked or found.verifier_checked)


class CertificateStore:
    """The file `path`, whose folder is made when needed. `labels` say whose states they are.

    No method raises; the first failure is a warning record, and from then on only revocations are written.
    """

    def __init__(self, path: Path, labels: dict[str, str]) -> None:
        self._path = path
        self._labels = labels
        self._lock = filelock.FileLock(path.parent / ".lock", timeout=LOCK_S)
        self._seen = False  # the file was there; if it is gone, so may be a revocation
        self._failed = False

    def load(self) -> Stored:
        """What is on disk; nothing where there is no file, or none that can be read."""
        try:
            return self._read() or Stored()
        except OSError as error:
            self._complain("read", error)
        except ValueError as error:
            _log.warning(_UNREADABLE, self._path, error)
        return Stored()

    def save(self, mine: Stored, revoking: bool = False) -> Stored:
        """Write what `mine` and the file know together; returns it, or `mine` where that cannot be done."""
        if self._failed and not revoking:
            return mine
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                together = merge(*self._on_disk(mine))
                self._replace(together)
            return together
        except (OSError, NotImplementedError) as error:  # the latter: a file system without locks
            self._complain("write", error)
            if revoking:
                self._remove()
            return mine

    def _on_disk(self, mine: Stored) -> tuple[Stored, Stored]:
        """`mine` and the file's states. A file that has gone or turned to garbage may have held a revocation,
        so certificates do not outlive it."""
        try:
            found = self._read()
        except ValueError as error:
            _log.warning(_UNREADABLE, self._path, error)
            return mine.without_certificates(), Stored()
        if found is None:
            return (mine.without_certificates() if self._seen else mine), Stored()
        return mine, found

    def _read(self) -> Stored | None:
        """None where there is no file. Raises ValueError for one that nobody here wrote."""
        try:
            text = self._path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        self._seen = True
        try:
            data = json.loads(text)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
        try:
            shapes = {_parse(key): value for key, value in data["shapes"].items()}
            checked = data["verifier_checked"]
            known = all(data[name] == label for name, label in self._labels.items())
            states = set(shapes.values())
        except (KeyError, TypeError, AttributeError):
            raise ValueError("fields are missing") from None
        if not known or not isinstance(checked, bool) or not states <= set(get_args(Status)):
            raise ValueError("fields hold something else")
        return Stored(shapes, checked)

    def _replace(self, states: Stored) -> None:
        data = {
            **self._labels,
            "verifier_checked": states.verifier_checked,
            "shapes": {f"{t}x{r}": s for (t, r), s in sorted(states.shapes.items())},
        }
        new = self._path.with_suffix(".tmp")  # one writer at a time, so one name: a killed one leaves one
        with new.open("w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._path)
        self._seen = True

    def _remove(self) -> None:
        """What cannot be marked as revoked must not be found as certified."""
        try:
            self._path.unlink(missing_ok=True)
        except OSError as error:
            _log.error("a revocation cannot be stored: delete %s by hand (%s)", self._path, error)

    def _complain(self, what: str, error: Exception) -> None:
        if not self._failed:
            _log.warning(
                "cannot %s certificates in %s, shapes are probed again at the next start: %s",
                *(what, self._path, error),
            )
        self._failed = True


def _doubt(status: Status) -> int:
    return get_args(Status).index(status)


def _parse(key: str) -> Shape:
    tokens, rows = key.split("x")
    return int(tokens), int(rows)
