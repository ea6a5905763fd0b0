"""Malformed requests to a server: the answers must be 200 or 4xx, and nobody else may notice.

    pip install schemathesis atheris
    python benchmarks/malformed.py --count 10000 --csv benchmarks/results/malformed.csv

Three kinds, a third of each: what schemathesis makes of the server's own OpenAPI document, of its kind and
against it, half of it with the right model's name; valid bodies with some bytes changed; and bodies that
atheris finds by coverage of the server's code (without sockets; left out where atheris is missing).
Meanwhile a witness asks the same deterministic question again and again: its answers must be equal.
`witness` is its latency, before (`quiet`) and meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import http.client
import importlib.util
import json
import random
import shlex
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llm42c.runtime.bench.harness import write_csv
from llm42c.runtime.bench.machine import describe

NAME = "smollm2"
WITNESS = {"model": NAME, "prompt": "Rivers", "max_tokens": 12, "seed": 5, "temperature": 1.0, "logprobs": 1}
VALID: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": NAME, "prompt": "ABC", "max_tokens": 3, "stop": ["x", "y"], "n": 2},
    "/v1/chat/completions": {"model": NAME, "messages": [{"role": "user", "content": "A"}], "max_tokens": 3},
    "/v1/score": {"model": NAME, "prompt": "ABC", "completion": "DE"},
    "/tokenize": {"prompt": "ABC"},
}
CLIENTS = 8
OPTIONS = ["--max-model-len", "64", "--kv-mb", "16", "--timeout", "20", "--port", "0"]

Case = tuple[str, str, dict[str, str], bytes]  # method, path, headers, body


class Client:
    """One connection that is opened again when the server closes it."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask(self, method: str, path: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:
        for last in (False, True):
            try:
                self._connection.request(method, path, body, headers)
                answer = self._connection.getresponse()
                return answer.status, answer.read()
            except (http.client.RemoteDisconnected, ConnectionError):
                self._connection.close()
                if last:
                    raise
        raise AssertionError


class Witness(threading.Thread):
    """Asks the same again and again until `stop`."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._client, self._over = Client(port), threading.Event()
        self.answers: set[str] = set()
        self.seconds: list[float] = []

    def run(self) -> None:
        while not self._over.is_set():
            start = time.perf_counter()
            body = json.dumps(WITNESS | {"fresh": True}).encode()
            status, data = self._client.ask(
                "POST", "/v1/completions", {"Content-Type": "application/json"}, body
            )
            self.seconds.append(time.perf_counter() - start)
            answer = json.loads(data)
            self.answers.add(json.dumps(answer["choices"]) if status == 200 else data.decode())
            time.sleep(0.02)

    def stop(self) -> None:
        self._over.set()
        self.join()


def of_the_document(document: dict[str, Any], count: int) -> list[Case]:
    """Requests that schemathesis makes, equally many for each operation that takes something."""
    import hypothesis
    import requests
    import schemathesis

    made: list[Case] = []
    operations = [result.ok() for result in schemathesis.openapi.from_dict(document).get_all_operations()]
    operations = [operation for operation in operations if operation.method == "post"]
    rng = random.Random(0)
    for mode in (schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE):
        for operation in operations:

            @hypothesis.settings(
                max_examples=-(-count // (2 * len(operations))),
                database=None,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(hypothesis.HealthCheck),
            )
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def each(case: Any) -> None:
                if isinstance(case.body, dict) and "model" in case.body and rng.random() < 0.5:
                    case.body["model"] = NAME
                sent = requests.Request(**case.as_transport_kwargs(base_url="http://x")).prepare()
                body = sent.body.encode() if isinstance(sent.body, str) else sent.body or b""
                kind = sent.headers.get("Content-Type", "application/json")
                made.append((str(sent.method), str(sent.path_url), {"Content-Type": kind}, body))

            each()
    rng.shuffle(made)
    return made[:count]


def mutated(count: int) -> list[Case]:
    """Valid bodies in which bytes were changed, put in, left out, or doubled."""
    rng, made = random.Random(1), []
    for _ in range(count):
        path = rng.choice(sorted(VALID))
        body = bytearray(json.dumps(VALID[path]).encode())
        for _ in range(rng.randrange(1, 5)):
            at, length = rng.randrange(len(body) + 1), rng.randrange(12)
            body[at : at + length] = rng.choice(
                [
                    rng.randbytes(rng.randrange(7)),
                    bytes(body[:length]),
                    b"",
                    b'"',
                    b"null",
                    b"1e999",
                    b"-1",
                    b"{",
                ]
            )
        made.append(("POST", path, {"Content-Type": "application/json"}, bytes(body)))
    return made


def tally(port: int, cases: list[Case]) -> collections.Counter[str]:
    """Statuses, and `wrong` for what is neither 200 nor 4xx with an error object."""
    clients, found = threading.local(), collections.Counter[str]()

    def send(case: Case) -> str:
        if not hasattr(clients, "own"):
            clients.own = Client(port)
        status, data = clients.own.ask(*case)
        own_deadline = status == 504 and b'"timeout"' in case[3]
        if status != 200 and not own_deadline:
            assert json.loads(data)["error"]["message"], (case, data)
        right = status == 200 or 400 <= status < 500 or own_deadline
        if not right:
            print(case, status, data[:500], file=sys.stderr)
        return str(status) if right else f"wrong {status}"

    with ThreadPoolExecutor(CLIENTS) as pool:
        found.update(pool.map(send, cases))
    return found


def fuzz(count: int) -> None:
    """Bodies for the application itself, in this process, led by coverage of the server's code."""
    import atheris

    with atheris.instrument_imports(include=["llm42c.runtime.server"]):
        from llm42c.runtime.server.app import make_app
        from llm42c.runtime.server.service import Service
        from llm42c.runtime.server.settings import Settings
    from llm42c.runtime.loader import build_engine

    built = build_engine("smollm2", max_model_len=64, kv_cache_bytes=2**24)
    service = Service(built.engine, built.tokenizer, Settings(model=NAME, timeout_s=20.0))
    app, loop = make_app(service), asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    loop.run_until_complete(_started(service))
    found, paths = collections.Counter[str](), sorted(VALID)

    def one(data: bytes) -> None:
        path = paths[data[0] % len(paths)] if data else paths[0]
        status = loop.run_until_complete(_called(app, path, data[1:]))
        found[str(status) if status == 200 or 400 <= status < 500 else f"wrong {status}"] += 1
        if sum(found.values()) == count:
            print(f"tally {json.dumps(found)}", flush=True)

    seeds = Path("/tmp") / f"llm42-malformed-{count}"
    seeds.mkdir(exist_ok=True)
    for i, path in enumerate(paths):
        (seeds / str(i)).write_bytes(bytes([i]) + json.dumps(VALID[path]).encode())
    atheris.Setup([sys.argv[0], f"-runs={count}", "-max_len=600", "-verbosity=0", str(seeds)], one)
    atheris.Fuzz()


async def _started(service: Any) -> None:
    service.start()


async def _called(app: Any, path: str, body: bytes) -> int:
    """The status of a POST without a socket."""
    sent: list[dict[str, Any]] = []
    incoming = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if incoming:
            return incoming.pop()
        await asyncio.sleep(3600)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http"}
    await app(scope | {"server": ("x", 80), "client": ("x", 1), "root_path": ""}, receive, send)
    return int(sent[0]["status"])


def fuzzed(count: int) -> collections.Counter[str]:
    done = subprocess.run(
        [sys.executable, __file__, "--fuzz", str(count)], capture_output=True, text=True, check=False
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith("tally ")), None)
    if line is None:
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-4000:])
    return collections.Counter(json.loads(line.removeprefix("tally ")))


def quantile(seconds: list[float], share: float) -> float:
    return round(1000 * sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))], 1)


def measure(count: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "llm42c", "serve", "smollm2", "--name", NAME, *OPTIONS]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    rows = []
    try:
        assert server.stderr is not None
        port = int(server.stderr.readline().split("/v1")[0].rpartition(":")[2])
        document = json.loads(Client(port).ask("GET", "/openapi.json", {}, b"")[1])
        third = count // 3 if importlib.util.find_spec("atheris") else count // 2
        kinds = {"schemathesis": of_the_document(document, third), "bytes": mutated(third)}
        quiet = Witness(port)
        quiet.start()
        time.sleep(10)
        quiet.stop()
        answers = set(quiet.answers)
        for kind, cases in kinds.items():
            witness = Witness(port)
            witness.start()
            start = time.perf_counter()
            found = tally(port, cases)
            seconds = time.perf_counter() - start
            witness.stop()
            answers |= witness.answers
            rows.append(_row(kind, found, seconds, witness.seconds, quiet.seconds, len(answers)))
        status, _ = Client(port).ask("GET", "/health", {}, b"")
        assert status == 200
    finally:
        server.terminate()
        server.wait(60)
    assert server.returncode == 0
    if importlib.util.find_spec("atheris"):
        start = time.perf_counter()
        found = fuzzed(count - 2 * third)
        rows.append(_row("atheris", found, time.perf_counter() - start, [], [], 1))
    return rows


def _row(
    kind: str,
    found: collections.Counter[str],
    seconds: float,
    meanwhile: list[float],
    quiet: list[float],
    answers: int,
) -> dict[str, Any]:
    wrong = sum(count for status, count in found.items() if status.startswith("wrong"))
    statuses = " ".join(f"{status}:{count}" for status, count in sorted(found.items()))
    row: dict[str, Any] = {"kind": kind, "requests": found.total(), "wrong": wrong, "statuses": statuses}
    row |= {"seconds": round(seconds, 1), "witness_answers": answers, "witness_asked": len(meanwhile)}
    for name, times in (("quiet", quiet), ("meanwhile", meanwhile)):
        for share in (0.5, 0.99):
            row[f"witness_p{round(100 * share)}_ms_{name}"] = quantile(times, share) if times else ""
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--fuzz", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.fuzz is not None:
        fuzz(arguments.fuzz)
        return
    rows = measure(arguments.count)
    machine = {"command": shlex.join(["python", *sys.argv]), **describe()}
    if arguments.csv is not None:
        write_csv(arguments.csv, rows, **machine)
    if any(row["wrong"] or row["witness_answers"] != 1 for row in rows):
        sys.exit("somebody was hurt")


if __name__ == "__main__":
    main()
