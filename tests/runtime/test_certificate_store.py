"""Certificates on disk: a revocation wins whatever else happens to the file, and no failure reaches a
request."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from toy import VOCAB, NoisyModel, ToyModel, ToySampler, make_engine, reference, small_config

from llm42c.errors import IntegrityError
from llm42c.runtime import certificate_store, certificates
from llm42c.runtime.certificate_store import CertificateStore, Status, Stored, merge
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.engine import Engine
from llm42c.runtime.sampling import SamplingParams

LABELS = {"contract": "c", "fast": "f"}
PROMPTS = [[(11 * i + 5 * j) % VOCAB for j in range(5 + 3 * i)] for i in range(6)]
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)
RIGHT = [reference(p, 20, frozenset()) for p in PROMPTS]


def _stored(**shapes: Status) -> Stored:
    """`s6="revoked"` is shape (6, 6)."""
    states = {(int(k[1:]), int(k[1:])): v for k, v in shapes.items()}
    equal = {s: 40 for s, v in states.items() if v == "certified"}
    return Stored(states, "independent", {None: 40, **equal})


def _in_child(work: Callable[[], None]) -> None:
    """Run `work` in a process of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


# -- merging -------------------------------------------------------------------------------------------------


def test_states_of_both_sides_are_kept() -> None:
    together = merge(
        _stored(s1="certified", s2="speculative"), Stored({(3, 3): "certified"}, pages={(3, 3): 40})
    )
    assert together == _stored(s1="certified", s2="speculative", s3="certified")


def test_the_more_doubtful_state_counts() -> None:
    for a, b in itertools.product(("certified", "speculative"), repeat=2):
        expected = "certified" if a == b == "certified" else "speculative"
        assert merge(_stored(s1=a), _stored(s1=b)).shapes == {(1, 1): expected}


def test_a_revocation_withdraws_the_certificates_of_the_side_that_did_not_know_it() -> None:
    old, new = _stored(s1="certified", s2="certified"), _stored(s2="revoked", s3="certified")
    for together in (merge(old, new), merge(new, old)):
        assert together.shapes == {(2, 2): "revoked", (3, 3): "certified"}
    both = _stored(s2="revoked", s1="certified")
    assert merge(both, new).shapes == {(1, 1): "certified", (2, 2): "revoked", (3, 3): "certified"}


# -- processes -----------------------------------------------------------------------------------------------

WORKER = """
import random, sys
from pathlib import Path
from llm42c.runtime import certificate_store as cs
folder, seed, overwrite = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "overwrite"
if overwrite:
    cs.merge = lambda mine, found: mine
rng = random.Random(seed)
store = cs.CertificateStore(folder / "s.json", {"contract": "c", "fast": "f"})
mine = cs.Stored({}, "independent") if overwrite else store.load()
print("ready", flush=True)
for i in range(4000):
    if rng.random() < 0.1:
        shape = seed, i + 1
        states = {**mine.without_certificates().shapes, shape: "revoked"}
        mine = store.save(cs.Stored(states, "independent"), True)
        with open(folder / f"{seed}.told", "a") as file:
            file.write(f"{shape[0]}x{shape[1]}\\n")
    else:
        mine = store.save(cs.Stored({**mine.shapes, (1 + rng.randrange(50), 1): "certified"}, "independent"))
"""


def _told(folder: Path) -> set[str]:
    return {line for path in folder.glob("*.told") for line in path.read_text().splitlines()}


def _race(folder: Path, how: str) -> tuple[set[str], dict[str, str]]:
    """Two processes at a time write one file, and are killed at any point. Acknowledged revocations, and
    what the file holds."""
    rng = random.Random(0)
    for seed in (1000, 1002, 1004):
        pair = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(folder), str(seed + i), how], stdout=subprocess.PIPE
            )
            for i in range(2)
        ]
        for process in pair:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        wanted, deadline = len(_told(folder)) + 10, time.monotonic() + 60
        while len(_told(folder)) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        for process in pair:
            time.sleep(0.1 * rng.random())
            if (folder / "s.json").exists():
                json.loads((folder / "s.json").read_text())
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()
    return _told(folder), json.loads((folder / "s.json").read_text())["shapes"]


def test_no_revocation_is_lost_between_processes_that_are_killed(tmp_path: Path) -> None:
    told, shapes = _race(tmp_path, "merge")
    assert len(told) > 20
    assert all(shapes.get(shape) == "revoked" for shape in told)
    assert len(list(tmp_path.glob("*.tmp"))) <= 1, "killed writers leave one file behind, not one each"


def test_negative_control_overwriting_loses_revocations(tmp_path: Path) -> None:
    told, shapes = _race(tmp_path, "overwrite")
    assert any(shapes.get(shape) != "revoked" for shape in told)


def test_a_lock_that_another_process_holds_is_waited_for_only_so_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(certificate_store, "LOCK_S", 0.2)
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            f"import filelock; lock = filelock.FileLock({str(tmp_path / '.lock')!r}); lock.acquire()\n"
            "print(1, flush=True); input()",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    store = CertificateStore(tmp_path / "s.json", LABELS)
    start = time.monotonic()
    assert store.save(_stored(s1="certified")) == _stored(s1="certified")
    assert time.monotonic() - start < 10
    assert "cannot write certificates" in caplog.text
    holder.communicate(b"\n")


# -- files that cannot be read or written --------------------------------------------------------------------

_WHOLE = '{"contract": "c", "fast": "f", "verifier": "unchecked", "pages": {}, "shapes": {%s}}'
GARBAGE = [
    *("", "{", "[]", "3", "null", '{"shapes": 3}', "\0" * 100, "[" * 200_000, "9" * 5000),
    *(
        '{"contract": "c", "fast": "f", "verifier": 1',
        _WHOLE % '"1x1": []',
        _WHOLE % '"1x1": "maybe"',
    ),
    _WHOLE % '"1x1": "certified"',
    *(_WHOLE % '"1": "certified"', _WHOLE % f'"{"9" * 5000}x1": "certified"'),
]


@pytest.mark.parametrize("text", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_holds_nothing_and_certificates_do_not_outlive_it(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s.json"
    store = CertificateStore(path, LABELS)
    store.save(_stored(s1="certified"))
    path.write_text(text)
    assert CertificateStore(path, LABELS).load() == Stored()
    assert caplog.text.count("unreadable") == 1
    saved = store.save(_stored(s1="certified", s2="speculative", s3="revoked"))
    assert saved.shapes == {(2, 2): "speculative", (3, 3): "revoked"}
    assert CertificateStore(path, LABELS).load() == saved


def test_bytes_that_are_no_text_are_garbage(tmp_path: Path) -> None:
    (tmp_path / "s.json").write_bytes(b"\xff\xfe" * 50)
    assert CertificateStore(tmp_path / "s.json", LABELS).load() == Stored()


def test_a_file_system_without_locks_is_gone_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CertificateStore(tmp_path / "s.json", LABELS)
    monkeypatch.setattr(store._lock, "_acquire", lambda: (_ for _ in ()).throw(NotImplementedError("flock")))
    assert store.save(_stored(s1="certified")) == _stored(s1="certified")
    assert _one_line(caplog), caplog.text


@pytest.mark.parametrize("field", ["contract", "fast"])
def test_states_of_something_else_are_not_taken(field: str, tmp_path: Path) -> None:
    CertificateStore(tmp_path / "s.json", LABELS | {field: "other"}).save(_stored(s1="certified"))
    assert CertificateStore(tmp_path / "s.json", LABELS).load() == Stored()


def _one_line(caplog: pytest.LogCaptureFixture) -> bool:
    return [r.levelno for r in caplog.records] == [logging.WARNING] and len(caplog.text.splitlines()) == 1


def test_a_full_disk_costs_the_file_not_the_revocation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "s.json"
    CertificateStore(path, LABELS).save(_stored(s1="certified", s2="certified"))

    def work() -> None:
        store = CertificateStore(path, LABELS)
        before = path.read_text()
        resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))  # bytes; what is beyond is refused
        mine = _stored(s1="certified", s2="certified", s3="certified")
        assert store.save(mine) == mine
        assert path.read_text() == before, "a write that fails leaves the old file"
        assert _one_line(caplog), caplog.text
        store.save(_stored(s2="revoked"), revoking=True)

    _in_child(work)
    assert CertificateStore(path, LABELS).load() == Stored(), "a revoked shape is found as certified"


def test_another_process_drops_its_certificates_when_the_file_has_gone(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    store = CertificateStore(path, LABELS)
    assert store.save(_stored(s1="certified")).shapes == {(1, 1): "certified"}
    path.unlink()
    assert store.save(_stored(s1="certified", s2="speculative")).shapes == {(2, 2): "speculative"}


def test_a_read_only_folder(caplog: pytest.LogCaptureFixture) -> None:
    folder = Path(tempfile.mkdtemp())
    path = folder / "s.json"
    try:
        CertificateStore(path, LABELS).save(_stored(s1="certified"))
        folder.chmod(0o555)

        def work() -> None:
            if os.geteuid() == 0:  # who may write anywhere
                os.setuid(65534)
            store = CertificateStore(path, LABELS)
            assert store.load() == _stored(s1="certified")
            for _ in range(3):
                assert store.save(_stored(s2="certified")) == _stored(s2="certified")
            assert _one_line(caplog), caplog.text
            store.save(_stored(s2="revoked"), revoking=True)
            assert "delete" in caplog.records[-1].getMessage()

        _in_child(work)
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


# -- engines -------------------------------------------------------------------------------------------------


def test_an_engine_works_on_without_a_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    engine = make_engine(config=small_config(certificates_path=str(tmp_path / "file")), check=True)
    assert [o.token_ids for o in engine.generate(PROMPTS, PARAMS)] == RIGHT
    assert engine.stats().probes > 3
    assert _one_line(caplog), caplog.text


def test_what_another_process_revoked_is_withdrawn_here_and_taken_back(tmp_path: Path) -> None:
    # Pages enough for the probe's reference to stay, so that the next probe ends while requests run.
    config = small_config(certificates_path=str(tmp_path), audit_fraction=0.0, num_pages=512)
    bad = {"now": False}
    engine = make_engine(
        NoisyModel(noisy=lambda t, call: bad["now"] and t == 6, flip=0.0), config, check=True
    )
    engine.certify()
    other = make_engine(NoisyModel(noisy=lambda t, call: False), config)
    assert other.certificates.status == engine.certificates.status
    for prompt in PROMPTS:
        engine.submit(prompt, PARAMS, stream=False)
    bad["now"] = True
    outputs = {}
    for step in itertools.count():
        if step == 8:
            other.certificates.revoke({(6, 6)})
            assert engine.stats().certified_tokens > 6, "vacuous: nothing to take back"
            engine.certificates._save()  # as after a probe, whose pages may not be free by now
        outputs |= {o.request_id: o for o in engine.step()}
        if not engine.has_unfinished():
            break
    assert engine.certificates.status[6, 6] == "revoked"
    assert engine.stats().revocations == 1
    assert engine.stats().rollbacks > 0
    solo = make_engine(config=small_config(verify="always")).generate(PROMPTS, PARAMS)
    got = [(o.token_ids, o.logprobs) for _, o in sorted(outputs.items())]
    assert got == [(o.token_ids, o.logprobs) for o in solo]


# -- probes that fail ----------------------------------------------------------------------------------------


class _Breaking(ToyModel):
    """Runs out of memory, at buckets of `tokens` or everywhere."""

    tokens: int | None = None

    def forward(self, inputs, cache):  # type: ignore[no-untyped-def]
        if self.tokens in (None, len(inputs.input_ids)):
            raise MemoryError("no memory for a probe")
        return super().forward(inputs, cache)


def test_a_probe_that_fails_leaves_requests_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = small_config(certificates_path=str(tmp_path))
    engine = make_engine(config=config)
    broken = _Breaking()
    broken.tokens = 6
    engine.certificates._probe.fast = broken
    assert [o.token_ids for o in engine.generate(PROMPTS, PARAMS)] == RIGHT
    engine.certificates.settle()
    assert engine.certificates.status[6, 6] == "speculative"
    assert "certified" in engine.certificates.status.values()
    failed = engine.stats().probe_failures
    assert failed >= 1
    assert caplog.text.count("MemoryError: no memory for a probe") == failed
    again = make_engine(config=config)
    assert (6, 6) not in again.certificates.status, "what may pass is not remembered"
    assert again.certificates.status.items() <= engine.certificates.status.items()


def test_a_check_of_the_verifier_that_fails_fails_only_who_needs_it(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(check=True)
    whole = engine.certificates._probe.verifier
    engine.certificates._probe.verifier = _Breaking()
    ordinary = engine.submit(PROMPTS[0], PARAMS, deterministic=False)
    mine = [engine.submit(p, PARAMS) for p in PROMPTS[1:3]]
    done = {}
    while engine.has_unfinished():
        done |= {o.request_id: o for o in engine.step() if o.finished}
    assert done[ordinary].token_ids == RIGHT[0]
    for request_id in mine:
        assert done[request_id].finish_reason == "error"
        assert done[request_id].error == (
            "the verifier graph could not be checked: MemoryError: no memory for a probe"
        )
    assert "could not be checked" in caplog.text
    with pytest.raises(MemoryError):
        engine.certify()
    engine.certificates._probe.verifier = whole
    engine.certificates._probe._reference = None
    assert [o.token_ids for o in engine.generate(PROMPTS, PARAMS)] == RIGHT


# -- a running engine and other processes --------------------------------------------------------------------

REVOKER = """
import json, sys
from pathlib import Path
from llm42c.runtime.certificate_store import CertificateStore, Stored
path = Path(sys.argv[1])
labels = {k: json.loads(path.read_text())[k] for k in ("contract", "fast", "machine")}
states = Stored(verifier="dependent") if sys.argv[2] == "verifier" else Stored({(6, 6): "revoked"})
CertificateStore(path, labels).save(states, revoking=True)
"""


def _in_another_process(path: Path, what: str) -> None:
    subprocess.run([sys.executable, "-c", REVOKER, str(path), what], check=True)


def test_a_revocation_by_another_process_is_noticed_while_requests_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[list[tuple[list[int], list[float]]], Engine]:
        config = small_config(
            certificates_path=str(tmp_path), audit_fraction=0.0, num_pages=512, certify="startup"
        )
        bad = {"now": False}
        engine = make_engine(NoisyModel(noisy=lambda t, call: bad["now"] and t == 6, flip=0.0), config)
        bad["now"] = True
        for prompt in PROMPTS:
            engine.submit(prompt, PARAMS, stream=False)
        outputs = {}
        for step in itertools.count():
            if step == 8:
                assert engine.stats().certified_tokens > 6, "vacuous: nothing to take back"
                assert engine.certificates.status[6, 6] == "certified"
                (path,) = tmp_path.glob("*.json")
                _in_another_process(path, "shape")
            outputs |= {o.request_id: o for o in engine.step()}
            if not engine.has_unfinished():
                return [(o.token_ids, o.logprobs) for _, o in sorted(outputs.items())], engine

    expected = [
        (o.token_ids, o.logprobs)
        for o in make_engine(config=small_config(verify="always")).generate(PROMPTS, PARAMS)
    ]
    got, engine = run()
    assert got == expected
    assert engine.certificates.status[6, 6] == "revoked"
    assert engine.stats().revocations == 1
    assert engine.stats().rollbacks > 0
    for file in tmp_path.iterdir():
        file.unlink()
    monkeypatch.setattr(certificates, "NOTICE_STEPS", 10**9)
    assert run()[0] != expected, "vacuous: what was computed by the revoked shape is right"


def test_a_file_is_looked_at_every_few_steps_and_read_when_it_is_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CertificateStore(tmp_path / "s.json", LABELS)
    assert store.news(Stored()) is None
    mine = store.save(_stored(s1="certified"))
    reads = []
    read = CertificateStore._read
    monkeypatch.setattr(CertificateStore, "_read", lambda self: reads.append(self) or read(self))
    for _ in range(3):
        assert store.news(mine) is None
    assert not reads
    CertificateStore(tmp_path / "s.json", LABELS).save(_stored(s2="revoked"), revoking=True)
    reads.clear()
    assert store.news(mine) == _stored(s2="revoked")
    assert store.news(mine) is None
    assert len(reads) == 1
    (tmp_path / "s.json").unlink()
    gone = store.news(mine)
    assert gone is not None
    assert gone.shapes == {}, "the file may have held a revocation"
    assert store.news(mine) is None


# -- a verifier graph that is not row independent ------------------------------------------------------------


def _finish(engine: Engine) -> None:
    while engine.has_unfinished():
        engine.step()


def _dependent(config: EngineConfig) -> Engine:
    class Drifting(ToyModel):
        def disturb_logits(self, batch, logits):  # type: ignore[no-untyped-def]
            return logits + np.float32(2.0**-14) * (self.calls % 2)

    shape = (config.verify_tokens, config.verify_seqs, config.rows)
    return Engine(ToyModel(), Drifting(fixed=shape), config, sampler=ToySampler())


def test_a_dependent_verifier_is_said_at_once_by_the_next_start(tmp_path: Path) -> None:
    config = small_config(certificates_path=str(tmp_path))
    engine = _dependent(config)
    engine.submit(PROMPTS[0], PARAMS)
    with pytest.raises(IntegrityError, match="not row independent"):
        _finish(engine)
    (path,) = tmp_path.glob("*.json")
    with pytest.raises(IntegrityError, match=f"not row independent.*found before: delete {path} to check"):
        _dependent(config)
    # The same whoever checked, and with how many pages.
    with pytest.raises(IntegrityError, match="found before"):
        _dependent(dataclasses.replace(config, num_pages=512))
    path.unlink()
    _dependent(config)


def test_a_dependent_verifier_that_another_process_found(tmp_path: Path) -> None:
    engine = make_engine(config=small_config(certificates_path=str(tmp_path), certify="startup"), check=True)
    mine = engine.submit(PROMPTS[0], PARAMS)
    engine.step()
    (path,) = tmp_path.glob("*.json")
    _in_another_process(path, "verifier")
    with pytest.raises(IntegrityError, match="not row independent"):
        _finish(engine)
    assert mine in engine._requests
    assert not engine.certificates.verifier_checked
