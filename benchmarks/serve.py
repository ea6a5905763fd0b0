"""The server against its own engine: the same requests over HTTP and without, in turns; tokens a second.

python benchmarks/serve.py --csv benchmarks/results/serve.csv

The client is a process of its own on the same cores, and its work counts in the rates. The engine alone
makes no text. `cpu` is CPU time of the server's process over that of the engine alone, which other work on
the machine touches less than the rates.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from llm42c.prompts import load_prompts
from llm42c.runtime.bench.client import send_all
from llm42c.runtime.bench.contenders import Llm42
from llm42c.runtime.bench.harness import write_csv
from llm42c.runtime.bench.machine import describe


def serve(model: str, requests: list[int], tokens: int, rounds: int) -> list[dict[str, Any]]:
    from llm42c.runtime.loader import build_engine
    from llm42c.runtime.server.app import make_app
    from llm42c.runtime.server.listen import Server, bind, configured
    from llm42c.runtime.server.service import Service
    from llm42c.runtime.server.settings import Settings

    built = build_engine(model, prefix_cache=False)
    service = Service(built.engine, built.tokenizer, Settings(model=model))
    listener, up = bind("127.0.0.1", 0), threading.Event()
    server = Server(configured(make_app(service), service), service, up.set)
    thread = threading.Thread(target=lambda: asyncio.run(server._serve([listener])))
    thread.start()
    up.wait()
    prompts = [p.token_ids(built.tokenizer)[:64] for p in load_prompts()]
    prompts = [ids[i:] for i in range(2) for ids in prompts]  # more than there are, and none twice
    rows = []
    for count in requests:
        bodies = [
            {"model": model, "prompt": ids, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
            for ids in prompts[:count]
        ]
        rates: dict[str, list[float]] = {"engine": [], "stream": [], "whole": []}
        spent: dict[str, list[float]] = {way: [] for way in rates}
        for i in range(rounds + 1):
            for way in list(rates)[:: -1 if i % 2 else 1]:
                before = time.process_time()
                rate = (
                    _alone(service, prompts[:count], tokens)
                    if way == "engine"
                    else _over_http(listener.getsockname()[1], bodies, way, tokens)
                )
                if i:
                    rates[way].append(rate)
                    spent[way].append(time.process_time() - before)
        row: dict[str, Any] = {"requests": count, "new_tokens": tokens, "rounds": rounds}
        for way, found in rates.items():
            row[f"{way}_tok_s"] = round(statistics.median(found), 1)
        for way in ("stream", "whole"):
            pairs = zip(rates[way], rates["engine"], strict=True)
            row[f"{way}_over_engine"] = round(statistics.median(a / b for a, b in pairs), 3)
            pairs = zip(spent[way], spent["engine"], strict=True)
            row[f"{way}_cpu_over_engine"] = round(statistics.median(a / b for a, b in pairs), 3)
        print(row, flush=True)
        rows.append(row)
    server.should_exit = True
    thread.join()
    return rows


def _alone(service: Any, prompts: list[list[int]], tokens: int) -> float:
    run = service.flights.thread.call(lambda engine: Llm42("engine", engine, 100).run(prompts, tokens))
    return float(run.result().rate)


def _over_http(port: int, bodies: list[dict[str, Any]], way: str, tokens: int) -> float:
    asked = [body | {"stream": way == "stream"} for body in bodies]
    command = [sys.executable, __file__, "--client", str(port)]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=True)
    return len(bodies) * tokens / float(done.stdout)


def client(port: int, bodies: list[dict[str, Any]]) -> float:
    """Seconds for all, sent at once."""
    start = time.perf_counter()
    replies = asyncio.run(send_all(f"http://127.0.0.1:{port}", bodies, [0.0] * len(bodies)))
    seconds = time.perf_counter() - start
    assert all(reply.whole for reply in replies), [reply.error for reply in replies]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", default="1,8,32")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client is not None:
        print(client(arguments.client, json.load(sys.stdin)))
        return
    requests = list(map(int, arguments.requests.split(",")))
    rows = serve(arguments.model, requests, arguments.tokens, arguments.rounds)
    machine = {"command": shlex.join(["python", *sys.argv]), **describe()}
    if arguments.csv is not None:
        write_csv(arguments.csv, rows, **machine)


if __name__ == "__main__":
    main()
