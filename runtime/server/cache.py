"""Exact answers of earlier requests, in a file of SQLite. What is found is what would be computed.

A key holds the contract, the prompt and the resolved parameters (`jobs.py`), so an entry never goes stale: a
server of another contract finds none. Entries are sealed, and a damaged one counts as absent. A revoked
certificate empties it.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llm42c.errors import ConfigError, Llm42Error, StateError
from llm42c.runtime import sealed
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.receipt import Receipt
from llm42c.runtime.resumption import bits, from_bits
from llm42c.runtime.server.jobs import Job

_log = logging.getLogger(__name__)

KIND, VERSION = "llm42_answer", 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, value TEXT NOT NULL, used INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS by_use ON answers (used);
CREATE TABLE IF NOT EXISTS total (bytes INTEGER NOT NULL);
INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT * FROM total);
"""


class AnswerCache:
    """At most `max_bytes` of answers; those that were used longest ago go first. Has a thread of its own."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        """Raises ConfigError for a file that is no such cache, or cannot be written."""
        self._max_bytes, self._failed = max_bytes, False
        try:
            self._db = sqlite3.connect(path, timeout=5.0, isolation_level=None, check_same_thread=False)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            raise ConfigError(f"cannot use the cache {path}: {error}") from None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="llm42-cache")

    async def get(self, job: Job) -> RequestOutput | None:
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._get, job)

    def put(self, job: Job, output: RequestOutput) -> None:
        """Keep a finished output, sometime soon."""
        self._worker.submit(self._put, job, output)

    def clear(self) -> None:
        """Forget every answer: a certificate was revoked."""
        self._worker.submit(self._clear)

    def close(self) -> None:
        self._worker.shutdown()
        self._db.close()

    def _get(self, job: Job) -> RequestOutput | None:
        try:
            row = self._db.execute("SELECT value FROM answers WHERE key = ?", (job.key,)).fetchone()
            if row is None:
                return None
            output = from_text(row[0])
            self._db.execute(f"UPDATE answers SET used = {_NEXT} WHERE key = ?", (job.key,))
        except sqlite3.Error as error:
            self._give_up(error)
            return None
        return output

    def _put(self, job: Job, output: RequestOutput) -> None:
        value = to_text(output)
        if len(value) > self._max_bytes:
            return
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._drop("key = ?", job.key)
            self._db.execute(f"INSERT INTO answers VALUES (?, ?, {_NEXT})", (job.key, value))
            self._db.execute("UPDATE total SET bytes = bytes + ?", (len(value),))
            while self._db.execute("SELECT bytes FROM total").fetchone()[0] > self._max_bytes:
                self._drop("used = (SELECT min(used) FROM answers)")
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._give_up(error)

    def _clear(self) -> None:
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._drop("true")
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            self._give_up(error)

    def _drop(self, which: str, *values: Any) -> None:
        size = f"SELECT coalesce(sum(length(value)), 0) FROM answers WHERE {which}"
        self._db.execute(f"UPDATE total SET bytes = bytes - ({size})", values)
        self._db.execute(f"DELETE FROM answers WHERE {which}", values)

    def _give_up(self, error: sqlite3.Error) -> None:
        """Serving goes on; one line says so."""
        if not self._failed:
            _log.warning("the cache of answers fails, requests are computed instead: %s", error)
        self._failed = True


_NEXT = "(SELECT coalesce(max(used), 0) + 1 FROM answers)"


def to_text(output: RequestOutput) -> str:
    """One line; log-probs keep their bits."""
    tops = output.top_logprobs
    body = {
        "tokens": output.token_ids,
        "logprobs": list(map(bits, output.logprobs)),
        "tops": None if tops is None else [[(token, bits(p)) for token, p in top] for top in tops],
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
        "receipt": None if output.receipt is None else output.receipt.to_json(),
    }
    return sealed.seal(KIND, VERSION, body)


def from_text(text: str) -> RequestOutput | None:
    """The inverse, as an output that brings everything at once; None for what was damaged."""
    try:
        values = sealed.unseal(text, KIND, VERSION, "answer", StateError)
        tops = values["tops"]
        if tops is not None:
            tops = [[(token, from_bits(digits)) for token, digits in top] for top in tops]
        logprobs = list(map(from_bits, values["logprobs"]))
        return RequestOutput(
            "",
            values["tokens"],
            logprobs,
            tops,
            finished=True,
            finish_reason=values["finish_reason"],
            stop_reason=values["stop_reason"],
            token_ids=values["tokens"],
            logprobs=logprobs,
            top_logprobs=tops,
            receipt=None if values["receipt"] is None else Receipt.from_json(values["receipt"]),
        )
    except (Llm42Error, ValueError, TypeError, KeyError):
        return None
