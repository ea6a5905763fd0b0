"""Rewritten graphs between processes: in the user's cache folder, under what they are a function of.

An entry is the key, the digest of the graph and its text, sealed by a checksum. One that is damaged, of
another key, or whose text no longer gives the graph of that digest counts as absent: the model is captured.
The folder keeps the ``KEPT`` entries that were used last.
"""

from __future__ import annotations

import hashlib
import logging

from torch import nn

from llm42c.codegen import cache
from llm42c.compile.identity import Identity, UnknownIdentityError, identify
from llm42c.compile.standin import StandIn
from llm42c.compile.stored import FAULTS, Rewritten, UnstorableError, decode, encode
from llm42c.digest import graph_digest

FOLDER = "programs"
KEPT = 256  # a tenth of a megabyte each
_log = logging.getLogger(__name__)


class Programs:
    """The stored graphs of ``model`` as it is now, for who compiles it with ``options`` (plain values)."""

    def __init__(self, model: nn.Module, *options: object) -> None:
        self._model = model
        self.obstacle: str | None = None  # why nothing is stored
        self.identity: Identity | None = None
        try:
            if isinstance(model, StandIn):
                self.identity = Identity(model.identity, ())
            else:
                self.identity = identify(model, *options)
        except UnknownIdentityError as error:
            self.obstacle = str(error)

    def load(self, kind: str) -> Rewritten | None:
        """The graph of that kind, on the model's parameters; None if there is none that can be trusted."""
        if self.obstacle is not None:
            return None
        path = cache.folder() / FOLDER / f"{self._key(kind)}.json"
        content = cache.sealed(path)
        if content is None:
            return None
        try:
            key, digest, text = content.decode().split("\n", 2)
            if key == self._key(kind):
                cache.used(path)
                return self._decoded(text, digest)
        except (*FAULTS, UnstorableError) as error:
            _log.info("%s is of no use: %s: %s", path, type(error).__name__, error)
        return None

    def keep(self, kind: str, rewritten: Rewritten) -> Rewritten:
        """Store a graph; returns it as every later process will load it, so that all run the same."""
        if self.obstacle is not None:
            return rewritten
        try:
            text, digest = encode(rewritten), _digest(rewritten)
            again = self._decoded(text, digest)
        except (*FAULTS, UnstorableError) as error:
            self.obstacle = str(error)
            return rewritten
        path = cache.folder() / FOLDER / f"{self._key(kind)}.json"
        cache.write(path, "\n".join((self._key(kind), digest, text)), seal=True)
        cache.keep_newest(FOLDER, path.suffix, KEPT)
        return again

    @property
    def _digest(self) -> str:
        return "" if self.identity is None else self.identity.digest

    def _key(self, kind: str) -> str:
        return hashlib.sha256(f"{self._digest}\0{kind}".encode()).hexdigest()

    def _decoded(self, text: str, digest: str) -> Rewritten:
        found = decode(text, self._model)
        if _digest(found) != digest:
            raise UnstorableError("its text is of another graph")
        return found


def _digest(rewritten: Rewritten) -> str:
    return graph_digest(rewritten.gm, rewritten.weights)
