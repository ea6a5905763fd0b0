"""Which shapes of the fast graph give the verifier's bits, and how that is known.

A shape is certified by `Probe` (see probe.py), which compares it with the verifier graph bit for bit; a
certificate may be revoked by an audit at any time. States are kept on disk under the contract's hash, so that
a restart need not probe again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from llm42c.errors import IntegrityError
from llm42c.ranks import ALONE, Ranks
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.contract import Contract
from llm42c.runtime.probe import Probe
from llm42c.runtime.stats import Stats

_log = logging.getLogger(__name__)

Shape = tuple[int, int]  # (tokens, logits rows) of a fast step
Status = Literal["certified", "speculative", "revoked"]


class Certificates:
    """States of shapes; unknown ones count as speculative and wait in a queue to be probed.

    `probe` makes a `Probe` when one is needed. Files that cannot be read are ignored: probing is always
    possible. Of several ranks the first reads and writes them.
    """

    def __init__(
        self,
        config: EngineConfig,
        contract: Contract,
        probe: Probe,
        stats: Stats,
        ranks: Ranks = ALONE,
    ) -> None:
        self.enabled = config.verify == "auto"
        self.verifier_checked = False
        self.status: dict[Shape, Status] = {}
        self._config = config
        self._ranks = ranks
        self._contract = contract
        self._probe = probe
        self._stats = stats
        self._queue: OrderedDict[Shape | None, None] = OrderedDict()  # None: the verifier's own check
        self._current: Iterator[bool | None] | None = None
        self._ids: dict[Shape, int] = {}  # small numbers for `BlockPool.origin`; 0 is the verifier
        self._path = self._file()
        self._load()

    def commits(self, shape: Shape) -> bool:
        """Whether results of this shape are final for deterministic requests."""
        return self.enabled and self.status.get(shape) == "certified"

    def want(self, shape: Shape) -> bool:
        """Ask for a probe of `shape`; False if its state is known already."""
        if shape in self.status:
            return False
        self._queue[shape] = None
        return True

    # -- probing ---------------------------------------------------------------------------------------------

    def may_run(self, deterministic: bool) -> bool:
        """Whether such a request may start; if the verifier graph is unchecked, its check begins instead."""
        if deterministic and not self.verifier_checked:
            self._queue[None] = None
            return False
        return True

    def advance(self) -> bool:
        """Run one forward of probing, if any is wanted; returns whether there was something to do.

        Raises IntegrityError if the verifier graph's rows turn out to depend on their surroundings.
        """
        if self._current is None:
            if not self._queue:
                return False
            target = next(iter(self._queue))
            self._current = self._probe.check_verifier() if target is None else self._probe.compare(target)
        try:
            verdict = next(self._current)
        except BaseException:
            self._current = None  # a generator that was broken off never goes on: the probe begins again
            raise
        if verdict is not None:
            target, _ = self._queue.popitem(last=False)
            self._current = None
            self._settle(target, verdict)
        return True

    def _settle(self, target: Shape | None, verdict: bool) -> None:
        if target is not None:
            self.status[target] = "certified" if verdict else "speculative"
            self._stats.probes += 1
            _log.info("%d tokens x %d rows: %s", *target, self.status[target])
        elif verdict:
            self.verifier_checked = True
            _log.info("the verifier graph is row independent")
        else:
            raise IntegrityError(
                "the verifier graph is not row independent: the bits of a row change with its place in the "
                "batch, its neighbours or its pages, so no request could be deterministic"
            )
        self._save()

    def settle_all(self) -> None:
        """Check the verifier graph, and probe every shape that the scheduler can ever run."""
        self.may_run(deterministic=True)
        if self.enabled:
            for shape in self._config.shapes():
                self.want(shape)
        while self.advance():
            pass

    # -- audits ----------------------------------------------------------------------------------------------

    def origin_id(self, shape: Shape) -> int:
        return self._ids.setdefault(shape, len(self._ids) + 1)

    def shape_of(self, origin: int) -> Shape | None:
        return next((s for s, i in self._ids.items() if i == origin), None)

    def revoke(self, shapes: set[Shape]) -> None:
        """Withdraw the certificates of `shapes` for good, and all others until they are probed again.

        The probe that one of them passed was too weak, or the machine has changed since.
        """
        self.status = {s: v for s, v in self.status.items() if v != "certified"}
        self.status |= dict.fromkeys(shapes, "revoked")
        self._stats.revocations += len(shapes)
        self._save()

    # -- on disk ---------------------------------------------------------------------------------------------

    def _file(self) -> Path | None:
        if self._config.certificates_path is None:
            return None
        identity = "\n".join(
            [
                *(self._contract.hash, self._probe.fast.digest),
                *map(
                    str, (self._config.max_num_seqs, self._probe.max_pages, self._config.probe_compositions)
                ),
            ]
        )
        return (
            Path(self._config.certificates_path)
            / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        )

    def _load(self) -> None:
        if self._path is None:
            return
        try:
            data = json.loads(self._ranks.share(_text(self._path)))
            status = {_parse(k): v for k, v in data["shapes"].items()}
            checked = bool(data["verifier_checked"])
        except (ValueError, KeyError, TypeError, AttributeError):
            return
        if all(v in ("certified", "speculative", "revoked") for v in status.values()):
            self.status, self.verifier_checked = status, checked

    def _save(self) -> None:
        if self._path is None or self._ranks.rank:
            return
        shapes = {f"{t}x{r}": s for (t, r), s in sorted(self.status.items())}
        data = {
            "contract": self._contract.hash,
            "fast": self._probe.fast.digest,
            "verifier_checked": self.verifier_checked,
            "shapes": shapes,
        }
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._path.parent, suffix=".tmp", delete=False) as file:
            json.dump(data, file, indent=1)
        os.replace(file.name, self._path)


def _text(path: Path) -> str:
    """The file's text, "" where there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _parse(key: str) -> Shape:
    tokens, rows = key.split("x")
    return int(tokens), int(rows)
