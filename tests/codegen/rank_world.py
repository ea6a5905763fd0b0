"""Processes that form a Gloo group on this machine, for tests of collectives."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# Ranks are forks of one process that has imported these and done nothing else; each import costs seconds.
_IMPORTED_ONCE = [
    "torch.distributed",
    "torch._dynamo",
    "llm42c.compile.compiler",
    "transformers.models.llama",
]


def run(size: int, fn: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """``fn(rank, *args)`` in ``size`` processes of one default group; what each returned, in rank order.

    ``fn`` is a function of a module. Raises RuntimeError when a process fails or does not end in time.
    """
    with tempfile.TemporaryDirectory() as folder:
        codes = start(size, Path(folder), fn, *args, timeout=timeout)
        if any(codes):
            raise RuntimeError(f"exit codes of the ranks: {codes}")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(size)]


def start(
    size: int,
    folder: Path,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 120.0,
    collective_s: float = 60.0,
    wait_for: Sequence[int] | None = None,
) -> list[int | None]:
    """As :func:`run`, results left as ``{rank}.pt``; returns exit codes (None: had to be killed).

    Only the ranks in ``wait_for`` are waited for, if given.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    processes = [
        context.Process(target=_main, args=(r, size, folder, collective_s, fn, args)) for r in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    try:
        for process in [processes[r] for r in (range(size) if wait_for is None else wait_for)]:
            process.join(max(0.0, end - time.monotonic()))
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()


def _main(
    rank: int, size: int, folder: Path, collective_s: float, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=collective_s),
    )
    torch.save(fn(rank, *args), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
