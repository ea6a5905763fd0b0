"""A tiny model whose processes are killed: `kill_nursery.py MODEL FOLDER KILLS SEED`.

Loads MODEL once and forks a child for every run: it generates with a journal, or finishes one, and is ended
by SIGKILL after a random time or at a random length of the journal, some times in a row; then one is left
alone. Prints what was seen.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from llm42c.runtime.journal import Journal
from llm42c.runtime.loader import BuiltEngine, build_engine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.sampling import SamplingParams

PROMPTS = [[1, *((7 * i + j) % 90 + 5 for j in range(3 + 4 * i))] for i in range(4)]
PARAMS = [
    SamplingParams(max_tokens=60, ignore_eos=True),
    SamplingParams(max_tokens=48, ignore_eos=True, temperature=0.9, seed=3, logprobs=2),
    SamplingParams(max_tokens=48, ignore_eos=True, repetition_penalty=1.3, frequency_penalty=0.2),
    SamplingParams(max_tokens=48, temperature=1.2, stop=("w9",), min_tokens=30),
]
MOST_IN_A_ROW = 6


def said(output: RequestOutput) -> list[Any]:
    logprobs = [p.hex() for p in output.logprobs]
    return [output.token_ids, logprobs, output.top_logprobs, output.text, str(output.stop_reason)]


def work(built: BuiltEngine, journal: Path) -> list[Any]:
    """Begin a journal or finish it; what each request says in the end."""
    engine = built.variant()
    states, end = Journal.read(journal) if journal.exists() else ([], 0)
    assert len(states) in (0, len(PROMPTS))
    record = Journal(journal, end)
    if states:
        names = [engine.resume(state) for state in states]
        for name, state in zip(names, states, strict=True):
            record.go_on(name, state)
    else:
        names = [engine.submit(p, q) for p, q in zip(PROMPTS, PARAMS, strict=True)]
        record.begin(names, list(map(engine.export, names)))
    done = {}
    while engine.has_unfinished():
        outputs = engine.step()
        record.take(outputs)
        done |= {o.request_id: o for o in outputs if o.finished}
    return [said(done[name]) for name in names]


def fork(built: BuiltEngine, journal: Path, answer: Path) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            answer.write_text(json.dumps(work(built, journal)))
            os._exit(0)
        finally:
            os._exit(1)  # whatever was raised
    return pid


def size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def wait(rng: random.Random, pid: int, journal: Path, usual: float, full: int) -> None:
    """Until the moment of a kill."""
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0, usual))
        return
    enough = rng.uniform(size(journal), full)
    while size(journal) < enough and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(0.0002)


def main() -> None:
    model, folder, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)  # a thread pool does not outlive a fork
    built = build_engine(model, num_pages=64)
    first = work(built, folder / "undisturbed")
    start = time.perf_counter()
    wanted = json.loads(json.dumps(work(built, folder / "again")))
    usual = time.perf_counter() - start
    assert json.loads(json.dumps(first)) == wanted
    full = size(folder / "again")
    total = sum(len(said[0]) for said in wanted)
    rng, seen = random.Random(seed), Counter[str]()
    journal, answer, in_a_row = folder / "journal", folder / "answer", 0
    while seen["kills"] < kills:
        spare = in_a_row == MOST_IN_A_ROW
        pid = fork(built, journal, answer)
        if not spare:
            wait(rng, pid, journal, usual, full)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status):
            seen["kills"] += 1
            in_a_row += 1
            states = Journal.read(journal)[0] if journal.exists() else []
            have = sum(len(s.tokens) for s in states)
            seen["in the middle"] += 0 < have < total
            seen["before the first token"] += have == 0
            continue
        seen["failed"] += os.WEXITSTATUS(status) != 0
        seen["finished"] += 1
        seen["finished after a kill"] += in_a_row > 0
        seen["wrong"] += json.loads(answer.read_text()) != wanted
        answer.unlink()
        journal.unlink()
        in_a_row = 0
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
