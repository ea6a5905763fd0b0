"""Which shapes of the fast graph give the verifier's bits, and how that is known.

A shape is certified by construction where every call of the graph has a fixed order and gives each row from
that row alone (`PackedModel.dependence`): then each shape, and the verifier graph's own independence of rows,
is spot-checked along the way. Elsewhere it is certified by `Probe` (see probe.py) first, which compares it
with the verifier graph bit for bit. A certificate may be revoked by an audit, or a spot check, at any time;
from then on nothing is certified by construction. What probes found is kept on disk by contract and machine,
so that a restart need not probe again.
"""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch

from llm42c.compile.computation import machine_state
from llm42c.errors import IntegrityError, RankFailureError, RanksDifferError
from llm42c.parallel.ranks import ALONE, Ranks
from llm42c.runtime.certificate_store import CertificateStore, Shape, Status, Stored, Verifier
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.contract import Contract
from llm42c.runtime.probe import Probe
from llm42c.runtime.stats import Stats

_log = logging.getLogger(__name__)

SPECULATIVE: Status = "speculative"
CERTIFIED: Status = "certified"
CONSTRUCTED = "certified by construction"
NOTICE_STEPS = 8  # between looks at what other processes revoked
_DEPENDENT = (
    "the verifier graph is not row independent: the bits of a row change with its place in the batch, its "
    "neighbours or its pages, so no request could be deterministic"
)


class Certificates:
    """States of shapes; unknown ones count as speculative and wait in a queue to be probed.

    A probe that fails leaves its shape speculative; one that finds too few pages waits, and asks for pages to
    be left for it (`reserve`). A store that cannot be used is gone without. Of several ranks the first reads
    and writes it.

    Raises IntegrityError if the store says that the verifier graph's rows depend on their surroundings.
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
        self._short = False  # a probe has found too few pages, and some are still wanted
        self.waited = 0  # for how many steps the current probe has found too few
        self.check_error: Exception | None = None  # what the last attempt to check the verifier graph met
        self.learned: set[Shape] = set()  # revoked by another process; whoever takes back empties it
        self._unsaved: set[Shape] = set()  # their probes failed, which may pass
        self._pages: dict[Shape | None, int] = {}  # of the probes that found no difference
        self._until_notice = NOTICE_STEPS
        # What is certified by construction and by no probe yet (None: the verifier graph's rows).
        self._given: set[Shape | None] = set()
        self._unchecked: OrderedDict[Shape | None, None] = OrderedDict()  # of these, what has been used
        self.spot_checking = False  # the current probe is one that nobody waits for
        self._trusts_rows = ranks.size == 1 and probe.verifier.dependence is None
        self._trusts_shapes = probe.fast.dependence is None and probe.fast.digest == probe.verifier.digest
        self._store = self._open_store()
        self._load()
        self._give()

    def _give(self) -> None:
        """Certify by construction what no probe has settled, unless one has ever been revoked here."""
        if not self._trusts_rows or "revoked" in self.status.values():
            return
        if not self.verifier_checked:
            self.verifier_checked = True
            self._given.add(None)
            self._unchecked[None] = None
        if self._trusts_shapes and self.enabled:
            given = [shape for shape in self._config.shapes() if shape not in self.status]
            self.status |= dict.fromkeys(given, CERTIFIED)
            self._given |= set(given)

    def states(self) -> dict[Shape, str]:
        """The state of every known shape, in words."""
        return {s: CONSTRUCTED if s in self._given else v for s, v in self.status.items()}

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

    @property
    def due(self) -> bool:
        """Whether a probe is wanted that can run now."""
        return bool(self._queue) and not self.spot_checking and not self.waited

    def reserve(self, num_running: int) -> int:
        """Pages that admissions should leave free, for a probe to find while so many requests run."""
        return self._probe.pages_for(num_running) if self._short else 0

    def advance(self, spare: bool = False) -> bool:
        """Run one forward of probing, if any is wanted; returns whether there was something to do. There is
        not while requests leave too few pages. With time to `spare`, one of a spot check otherwise.

        A probe's exception is not raised but recorded: the shape stays speculative; for the verifier graph it
        is in `check_error`, and the next deterministic request tries again. Raises IntegrityError if the
        verifier graph's rows turn out to depend on their surroundings, RankFailureError if a rank failed
        alone.
        """
        self._begin(spare)
        self.spot_checking &= len(self._queue) == 1  # others wait for it now
        if self._current is None or (self.spot_checking and not spare):
            return False
        try:
            verdict = next(self._current)
        except StopIteration:  # a step was broken off with its verdict in hand: the probe begins again
            self._current = None
            self._begin(spare)
            return True
        except BaseException as error:
            self._current = None  # a generator that was broken off never goes on: the probe begins again
            self._probe.release()
            if not isinstance(error, Exception) or isinstance(error, RankFailureError | RanksDifferError):
                raise
            self._failed(error)
            self._begin()
            return True
        if self._probe.starved:
            if self.spot_checking:
                return False
            self._short = True
            self.waited += 1
            return False
        self.waited = 0
        if verdict is not None:
            self._current = None
            target, _ = self._queue.popitem(last=False)
            self._settle(target, verdict)
            self._begin()
        return True

    def _begin(self, spare: bool = False) -> None:
        """Turn to the next probe that is wanted, or else to a spot check, if none is under way."""
        if spare and not self._queue and self._unchecked:
            target, _ = self._unchecked.popitem(last=False)
            if target in self._given:
                self._queue[target] = None
                self.spot_checking = True
        if not self._queue:
            self._short, self.waited = False, 0
        elif self._current is None:
            target = next(iter(self._queue))
            self._current = self._probe.check_verifier() if target is None else self._probe.compare(target)

    def _failed(self, error: Exception) -> None:
        target, _ = self._queue.popitem(last=False)
        self._stats.probe_failures += 1
        spot_check, self.spot_checking = self.spot_checking, False
        if target is None and spot_check:
            _log.warning("a spot check failed: %s: %s", type(error).__name__, error)
            return
        self._given.discard(target)
        if target is None:
            self.check_error = error
            _log.warning("the verifier graph could not be checked: %s: %s", type(error).__name__, error)
            return
        self.status[target] = SPECULATIVE
        self._unsaved.add(target)
        _log.warning(
            "the probe of %s failed, so its tokens are verified: %s: %s",
            *(named([target]), type(error).__name__, error),
        )

    def _settle(self, target: Shape | None, verdict: bool) -> None:
        self._stats.spot_checks += self.spot_checking
        self.spot_checking = False
        if verdict:
            self._pages[target] = self._probe.pages
        if target is not None and not verdict and target in self._given:
            _log.error(
                "certificate of the fast graph at %s revoked: a spot check found other bits; unaudited "
                "results are taken back",
                named([target]),
            )
            self.revoke({target})
            self.learned.add(target)
            return
        self._given.discard(target)
        if target is not None:
            self.status[target] = "certified" if verdict else SPECULATIVE
            self._stats.probes += 1
            _log.info("%s: %s", named([target]), self.status[target])
        elif verdict:
            self.verifier_checked = True
            _log.info("the verifier graph is row independent")
        else:
            self.convict_verifier()
            raise IntegrityError(_DEPENDENT)
        self._save()

    def convict_verifier(self) -> None:
        """Remember on disk that the verifier graph's rows depend on their surroundings."""
        self.verifier_checked = self._trusts_rows = False
        if self._store is not None and self._ranks.rank == 0:
            self._store.save(Stored(verifier="dependent"), revoking=True)

    def settle(self, progress: Callable[[], None] = lambda: None) -> None:
        """Run every probe that is wanted. Raises what kept the verifier graph from being checked."""
        while self.advance():
            if self.check_error is not None:
                error, self.check_error = self.check_error, None
                raise error
            progress()

    def settle_all(self, progress: Callable[[], None] = lambda: None, full: bool = False) -> None:
        """Check the verifier graph, and probe every shape that the scheduler can ever run; as `settle`.

        With `full` also what is certified by construction.
        """
        self.may_run(deterministic=True)
        if full:
            self._queue |= dict.fromkeys(sorted(self._given, key=lambda s: s or (0, 0)))
            self._unchecked.clear()
            self.spot_checking = False
        if self.enabled:
            for shape in self._config.shapes():
                self.want(shape)
        self.settle(progress)

    # -- audits ----------------------------------------------------------------------------------------------

    def origin_id(self, shape: Shape) -> int:
        if shape in self._given and shape not in self._ids:
            self._unchecked[shape] = None
        return self._ids.setdefault(shape, len(self._ids) + 1)

    def shape_of(self, origin: int) -> Shape | None:
        return next((s for s, i in self._ids.items() if i == origin), None)

    def revoke(self, shapes: set[Shape]) -> None:
        """Withdraw the certificates of `shapes` for good, and all others until they are probed again.

        The probe that one of them passed was too weak, or the machine has changed since.
        """
        if self.spot_checking:  # what is begun says nothing of what is revoked
            self._queue.popitem(last=False)
            self._current, self.spot_checking = None, False
        if None in self._given:
            self.verifier_checked = False
        self._trusts_rows = False
        self._unchecked.clear()
        self._given.clear()
        self.status = {s: v for s, v in self.status.items() if v != "certified"}
        self.status |= dict.fromkeys(shapes, "revoked")
        self._unsaved -= shapes
        self._stats.revocations += len(shapes)
        self._save(revoking=True)

    # -- on disk ---------------------------------------------------------------------------------------------

    def _open_store(self) -> CertificateStore | None:
        if self._config.certificates_path is None:
            return None
        labels = {"contract": self._contract.hash, "fast": self._probe.fast.digest}
        labels["machine"] = machine_state()  # graphs of one contract may have other shapes certified there
        identity = "\n".join([*labels.values(), *map(str, self._probe.identity)])
        name = f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.json"
        return CertificateStore(Path(self._config.certificates_path) / name, labels)

    def _load(self) -> None:
        if self._store is not None:
            self._take(self._ranks.share(self._store.load() if self._ranks.rank == 0 else None))

    def _save(self, revoking: bool = False) -> None:
        """Merge with the file; what another process revoked is withdrawn here too."""
        if self._store is not None:
            mine = self._known()
            together = self._ranks.share(self._store.save(mine, revoking) if self._ranks.rank == 0 else None)
            self._learn(mine, together)

    def notice(self) -> None:
        """Every few steps: withdraw what another process has revoked since the file was last read. Raises
        IntegrityError if it found the verifier graph's rows to depend on their surroundings."""
        self._until_notice -= 1
        if self._store is None or self._until_notice > 0:
            return
        self._until_notice = NOTICE_STEPS
        mine = self._known()
        found = self._store.news(mine) if self._ranks.rank == 0 else None
        others = self._ranks.rank != 0
        if not self._ranks.agree(torch.tensor(others or found is None)):
            self._learn(mine, self._ranks.share(found))

    def _known(self) -> Stored:
        kept = {s: v for s, v in self.status.items() if s not in self._unsaved | self._given}
        probed = self.verifier_checked and None not in self._given
        verifier: Verifier = "independent" if probed else "unchecked"
        return Stored(kept, verifier, self._pages)

    def _learn(self, mine: Stored, together: Stored) -> None:
        elsewhere = together.revoked - mine.revoked
        if elsewhere:
            _log.error("another process revoked certificates: %s", named(elsewhere))
            self._stats.revocations += len(elsewhere)
            self.learned |= elsewhere
        self._take(together)

    def _take(self, states: Stored) -> None:
        """Go on with `states`, as far as they are proved by probes as strong as ours."""
        if states.verifier == "dependent":
            self.verifier_checked = False
            assert self._store is not None
            raise IntegrityError(f"{_DEPENDENT}; found before: delete {self._store.path} to check again")
        proved = states.proved_with(self._probe.pages)
        self._pages = dict(states.pages)
        self.status = dict.fromkeys(self._unsaved, SPECULATIVE) | dict(proved.shapes)
        self.verifier_checked = proved.verifier == "independent"
        self._given.clear()
        self._give()
        self.spot_checking &= next(iter(self._queue), ...) in self._given
        for shape in [s for s in self._queue if s in self.status and s not in self._given]:
            if shape == next(iter(self._queue)):
                self._current = None
            del self._queue[shape]


def named(shapes: Iterable[Shape]) -> str:
    """Shapes in words."""
    return ", ".join(f"{tokens} tokens x {rows} rows" for tokens, rows in sorted(shapes))
