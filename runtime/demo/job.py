"""The main job: the same requests alone, together, and under pressure, compared bit for bit.

`run_demo` decodes every prompt three times through engines that share one compiled model and nothing else:

    alone       one request at a time: what the others are compared with
    together    all at once
    pressure    shuffled arrivals among ordinary requests, with too few KV pages for all of them

and, as a control, once more through plain PyTorch, alone and in batches, where bits do differ.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm42c.runtime.demo.control import Control
from llm42c.runtime.engine import Engine
from llm42c.runtime.loader import BuiltEngine
from llm42c.runtime.probe import LEAST_PAGES
from llm42c.runtime.sampling import SamplingParams

# (what is being done, done so far, of how many)
Progress = Callable[[str, int, int], None]

PAGES_SHORT = 5  # `pressure` gets a fifth of the pages that all its requests want at once
ORDINARY_EVERY = 2  # one ordinary request for so many deterministic ones


@dataclass(frozen=True)
class Job:
    """One request of the demo."""

    name: str
    prompt: list[int]
    params: SamplingParams


@dataclass(frozen=True)
class Answer:
    """Committed tokens of one job and their log-probs, exact float32 values."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def logprob_bits(self) -> bytes:
        return struct.pack(f"<{len(self.logprobs)}f", *self.logprobs)


@dataclass
class Run:
    """One pass over all jobs. Answers are in the order of the jobs, whatever the order of arrival."""

    name: str
    answers: list[Answer]
    seconds: float
    stats: dict[str, Any]
    differ: list[str] = field(default_factory=list)  # names of jobs that differ from the first run

    @property
    def tokens_digest(self) -> str:
        return _digest(b"".join(struct.pack(f"<{len(a.tokens)}q", *a.tokens) for a in self.answers))

    @property
    def logprobs_digest(self) -> str:
        return _digest(b"".join(a.logprob_bits for a in self.answers))

    @property
    def rate(self) -> float:
        """Tokens per second; probing batch shapes, which happens once a contract, is not counted."""
        return self.num_tokens / (self.seconds - float(self.stats["seconds_probe"]))

    @property
    def num_tokens(self) -> int:
        """Tokens that came out, ordinary requests' included."""
        return sum(len(a.tokens) for a in self.answers) + int(self.stats["ordinary_tokens"])

    def as_dict(self) -> dict[str, Any]:
        """The row of the table as data, with the engine's counters."""
        return {
            "run": self.name,
            "requests": len(self.answers),
            "tokens_digest": self.tokens_digest,
            "logprobs_digest": self.logprobs_digest,
            "differ": self.differ,
            "tokens": self.num_tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.rate, 2),
            "stats": self.stats,
        }


@dataclass
class DemoResult:
    """Everything that the table shows. `agree` is what the exit status says."""

    runs: list[Run]
    contract: str
    shapes: dict[str, int]  # how many of the fast graph's shapes are certified, speculative, revoked
    control: Control | None = None

    @property
    def agree(self) -> bool:
        """Every deterministic request has the same tokens and log-prob bits in all runs."""
        return len(self.runs) > 1 and not any(run.differ for run in self.runs)

    def as_dict(self) -> dict[str, Any]:
        return {
            "agree": self.agree,
            "contract": self.contract,
            "shapes": self.shapes,
            "runs": [run.as_dict() for run in self.runs],
            "control": dataclasses.asdict(self.control) if self.control else None,
        }


def make_jobs(prompts: Sequence[tuple[str, list[int]]], max_tokens: int) -> list[Job]:
    """Half of the jobs greedy, half sampled, each sampled one in its own way; end-of-sequence is ignored."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0.8, "top_p": 0.95},
        {"temperature": 1.0, "top_k": 40},
        {"temperature": 0.7, "min_p": 0.05, "repetition_penalty": 1.1},
        {"temperature": 1.2, "top_k": 100, "top_p": 0.9, "presence_penalty": 0.5},
    ]
    jobs = []
    for i, (name, ids) in enumerate(prompts):
        sampling = {**ways[i // 2 % len(ways)], "seed": 1000 + i} if i % 2 else {}
        params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, detokenize=False, **sampling)
        jobs.append(Job(name, ids, params))
    return jobs


def run_demo(built: BuiltEngine, jobs: Sequence[Job], progress: Progress, *, seed: int = 0) -> DemoResult:
    """The three runs on `built`'s compiled model, each on an engine and a KV cache of its own."""
    engines = [built.variant(), built.variant(), built.variant(num_pages=scarce_pages(built, jobs))]
    runs = [
        run_alone(engines[0], jobs, progress),
        run_together(engines[1], jobs, progress),
        run_pressure(engines[2], jobs, progress, seed=seed),
    ]
    for run in runs[1:]:
        run.differ = differing(jobs, runs[0].answers, run.answers)
    status: dict[Any, str] = {}
    for engine in engines:
        status |= engine.certificates.states()
    shapes = {state: list(status.values()).count(state) for state in sorted(set(status.values()))}
    return DemoResult(runs, engines[0].contract.hash, shapes)


def run_alone(engine: Engine, jobs: Sequence[Job], progress: Progress) -> Run:
    """One request at a time; the next is submitted when the last has finished."""
    return _drive("alone", engine, jobs, [[job] for job in range(len(jobs))], [], progress, wait=True)


def run_together(engine: Engine, jobs: Sequence[Job], progress: Progress) -> Run:
    """All requests submitted before the first step."""
    return _drive("together", engine, jobs, [list(range(len(jobs)))], [], progress)


def run_pressure(engine: Engine, jobs: Sequence[Job], progress: Progress, *, seed: int) -> Run:
    """Requests arrive in shuffled order, none to three before each step, mixed with ordinary ones."""
    rng = random.Random(seed)
    ordinary = [
        dataclasses.replace(
            job, params=dataclasses.replace(job.params, temperature=1.0, seed=None, top_k=0, min_p=0.0)
        )
        for job in rng.sample(list(jobs), len(jobs) // ORDINARY_EVERY)
    ]
    # Numbers from len(jobs) on stand for ordinary requests.
    order = list(range(len(jobs) + len(ordinary)))
    rng.shuffle(order)
    arrivals = []
    while order:
        count = rng.randrange(4)
        arrivals.append(order[:count])
        order = order[count:]
    return _drive("pressure", engine, jobs, arrivals, ordinary, progress)


def scarce_pages(built: BuiltEngine, jobs: Sequence[Job]) -> int:
    """KV pages for `pressure`: enough for any one request and for probes, far too few for all."""
    size = built.engine.config.page_size
    wanted = [-(-(len(job.prompt) + (job.params.max_tokens or 0)) // size) for job in jobs]
    return max(LEAST_PAGES, max(wanted), sum(wanted) // PAGES_SHORT)


def differing(jobs: Sequence[Job], expected: Sequence[Answer], got: Sequence[Answer]) -> list[str]:
    """Names of the jobs whose tokens or log-prob bits are not the same."""
    return [
        job.name
        for job, a, b in zip(jobs, expected, got, strict=True)
        if a.tokens != b.tokens or a.logprob_bits != b.logprob_bits
    ]


def _drive(
    name: str,
    engine: Engine,
    jobs: Sequence[Job],
    arrivals: Sequence[Sequence[int]],
    ordinary: Sequence[Job],
    progress: Progress,
    *,
    wait: bool = False,
) -> Run:
    """Submit `arrivals[i]` before step i (with `wait`: once everything before has finished)."""
    everything = [*jobs, *ordinary]
    total = sum(job.params.max_tokens or 0 for job in everything)
    waiting = list(reversed(arrivals))
    answers: dict[str, Answer] = {}
    done = 0
    start = time.perf_counter()
    while waiting or engine.has_unfinished():
        if waiting and not (wait and engine.has_unfinished()):
            for i in waiting.pop():
                job = everything[i]
                engine.submit(job.prompt, job.params, deterministic=i < len(jobs), request_id=str(i))
        for output in engine.step():
            done += len(output.new_token_ids)
            if output.finished:
                if output.error:
                    raise RuntimeError(f"request {everything[int(output.request_id)].name}: {output.error}")
                answers[output.request_id] = Answer(tuple(output.token_ids), tuple(output.logprobs))
        progress(name, done, total)
    seconds = time.perf_counter() - start
    return Run(name, [answers[str(i)] for i in range(len(jobs))], seconds, engine.stats().as_dict())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
