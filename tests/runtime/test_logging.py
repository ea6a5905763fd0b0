"""Records of the runtime: silent unless the application listens, and one for each thing worth knowing."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
from toy import VOCAB, NoisyModel, make_engine, small_config

from llm42c.runtime.sampling import SamplingParams

QUIET = """
import logging, sys
before = logging.root.handlers[:], logging.root.level
import llm42c.runtime.audit, llm42c.runtime.engine
package = logging.getLogger("llm42c.runtime")
assert (logging.root.handlers, logging.root.level) == before
assert package.level == logging.NOTSET and package.propagate
assert [type(h) for h in package.handlers] == [logging.NullHandler]
logging.getLogger("llm42c.runtime.audit").error("nobody listens")
"""


def test_importing_installs_nothing_and_nothing_is_said_unasked() -> None:
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_an_engine_tells_what_it_does(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "llm42c.runtime"):
        engine = make_engine(NoisyModel(noisy=lambda tokens, call: tokens == 6), small_config(num_pages=14))
        engine.certify()
        for i in range(4):
            engine.submit([(7 * i + j) % VOCAB for j in range(8)], SamplingParams(max_tokens=20))
        engine.abort(engine.submit([1], SamplingParams(max_tokens=4)))
        while engine.has_unfinished():
            engine.step()
    said = {(r.name.removeprefix("llm42c.runtime."), r.levelname, r.getMessage()) for r in caplog.records}
    messages = {message for _, _, message in said}
    assert any(n == "engine" and m.startswith("engine built: contract ") for n, _, m in said)
    assert "8 tokens x 8 rows: certified" in messages
    assert "6 tokens x 6 rows: speculative" in messages
    assert any(n == "scheduler" and "preempted for" in m for n, _, m in said)
    assert any(level == "DEBUG" and "aborted after 0 tokens" in m for _, level, m in said)
    assert engine.stats().preemptions == sum("preempted for" in r.getMessage() for r in caplog.records)
