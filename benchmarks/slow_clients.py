"""Clients that read slowly, vanish, or never finish asking: what they cost the others, and memory.

    python benchmarks/slow_clients.py --clients 500 --csv benchmarks/results/slow_clients.csv

A fifth of each: who reads nothing of a stream, who reads a byte a second, who leaves in the middle, who
sends half a head, and who sends half a body. Who is cut off, or has left, comes back after ten seconds. They
are a process of their own on the same cores, with the lowest priority. Those that ask well ask for one and
the same stream, which somebody reads in every round, so that what they cost is connections and not tokens.
Meanwhile witnesses ask for short streams, each one at a time. Rounds with and without the clients take turns;
quantiles are of all rounds of a kind.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm42c.runtime.bench.harness import write_csv
from llm42c.runtime.bench.machine import describe

NAME = "smollm2"
WAYS = ("reads nothing", "reads slowly", "vanishes", "half a head", "half a body")
OPTIONS = ["--port", "0", "--max-num-seqs", "32"]
WITNESSES, TOKENS = 4, 16
ARRIVAL_S, AWAY_S = 0.01, 10.0


def request(body: dict[str, Any]) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
    return f"{head}Content-Type: application/json\r\n\r\n".encode() + data


LONG = request(
    {"model": NAME, "prompt": "Tales", "max_tokens": 1000, "stream": True, "logprobs": 20, "ignore_eos": True}
)


async def misbehave(port: int, way: str, number: int) -> None:
    await asyncio.sleep(number * ARRIVAL_S)
    while True:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.setblocking(False)
        with contextlib.suppress(OSError, TimeoutError), raw:
            await asyncio.get_running_loop().sock_connect(raw, ("127.0.0.1", port))
            reader, writer = await asyncio.open_connection(sock=raw, limit=256)
            writer.write({"half a head": LONG[:40], "half a body": LONG[:-20]}.get(way, LONG))
            try:
                async with asyncio.timeout(60):
                    await _read(reader, way)
            finally:
                writer.close()
        await asyncio.sleep(AWAY_S)


async def _read(reader: asyncio.StreamReader, way: str) -> None:
    """Until the server has had enough, or the client."""
    if way == "vanishes":
        await reader.read(100)
        await asyncio.sleep(1)
    elif way == "reads slowly":
        while await reader.read(1):
            await asyncio.sleep(1)
    elif way == "reads nothing":
        await asyncio.sleep(60)
    else:
        await reader.read()


async def crowd(port: int, clients: int) -> None:
    await asyncio.gather(*(misbehave(port, WAYS[i % len(WAYS)], i) for i in range(clients)))


async def read_along(port: int, over: asyncio.Event) -> None:
    """Reads the long stream as it comes, so that the engine has the same to do in every round."""
    while not over.is_set():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(LONG)
        while not over.is_set() and await reader.read(2**16):
            pass
        writer.close()


async def witness(port: int, number: int, seconds: float) -> tuple[list[float], list[float], set[str]]:
    """TTFTs, times between tokens, and answers of one that asks again and again."""
    body = {"model": NAME, "prompt": f"Rivers {number}", "max_tokens": TOKENS, "stream": True}
    asked = request(body | {"fresh": True, "ignore_eos": True, "return_token_ids": True, "seed": number})
    first, between, answers = [], [], set()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(asked)
        last, tokens = time.perf_counter(), []
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                ids = json.loads(line[6:])["choices"][0]["token_ids"]
                if ids and len(tokens) < TOKENS:
                    (between if tokens else first).append(now - last)
                    last = now
                    tokens += ids
        writer.close()
        answers.add(f"{number}: {tokens}")
    return first, between, answers


@contextlib.contextmanager
def crowded(port: int, clients: int) -> Iterator[None]:
    """With so many clients that have all arrived."""
    command = ["nice", "-n", "19", sys.executable, __file__, "--crowd", str(port), "--clients", str(clients)]
    if not clients:
        yield
        return
    process = subprocess.Popen(command)
    try:
        time.sleep(10 + clients * ARRIVAL_S)  # what nobody reads has filled its buffers by then
        yield
    finally:
        process.kill()
        process.wait()


async def round_of(port: int, seconds: float) -> dict[str, Any]:
    over = asyncio.Event()
    reading = asyncio.create_task(read_along(port, over))
    found = await asyncio.gather(*(witness(port, i, seconds) for i in range(WITNESSES)))
    over.set()
    await reading
    first = [s for one in found for s in one[0]]
    between = [s for one in found for s in one[1]]
    return {"ttft": first, "tbt": between, "answers": set().union(*(one[2] for one in found))}


def memory_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024, 1)


def open_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def quantile(seconds: list[float], share: float) -> float:
    return round(1000 * sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))], 2)


def measure(clients: int, rounds: int, seconds: float) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "llm42c", "serve", "smollm2", "--name", NAME, *OPTIONS]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    kept: dict[int, dict[str, Any]] = {
        n: {"ttft": [], "tbt": [], "answers": set(), "memory": [], "files": []} for n in (0, clients)
    }
    try:
        assert server.stderr is not None
        port = int(server.stderr.readline().split("/v1")[0].rpartition(":")[2])
        asyncio.run(round_of(port, 3.0))  # to warm up
        for i in range(rounds):
            for n in (0, clients) if i % 2 else (clients, 0):
                with crowded(port, n):
                    kept[n]["files"].append(open_files(server.pid))
                    found = asyncio.run(round_of(port, seconds))
                    kept[n]["memory"].append(memory_mb(server.pid))
                for name in ("ttft", "tbt"):
                    kept[n][name] += found[name]
                kept[n]["answers"] |= found["answers"]
                time.sleep(4)  # the others' connections end
        time.sleep(6)
        left = open_files(server.pid)
    finally:
        server.terminate()
        server.wait(60)
    rows = []
    for n, found in kept.items():
        row: dict[str, Any] = {"clients": n, "rounds": rounds, "files_open": max(found["files"])}
        row["requests"] = len(found["ttft"])
        for name in ("ttft", "tbt"):
            row |= {f"{name}_p{round(100 * q)}_ms": quantile(found[name], q) for q in (0.5, 0.99)}
        row["differing_answers"] = len(found["answers"]) - WITNESSES
        row |= {"memory_first_mb": found["memory"][0], "memory_last_mb": found["memory"][-1]}
        rows.append(row | {"files_open_after": left})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--crowd", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.crowd is not None:
        asyncio.run(crowd(arguments.crowd, arguments.clients))
        return
    rows = measure(arguments.clients, arguments.rounds, arguments.seconds)
    machine = {"command": shlex.join(["python", *sys.argv]), **describe()}
    if arguments.csv is not None:
        write_csv(arguments.csv, rows, **machine)


if __name__ == "__main__":
    main()
