"""How much communication does token weaving hide, and does it ever cost anything?

    python benchmarks/weave.py overlap [--csv benchmarks/results/weave_overlap.csv]
    python benchmarks/weave.py sweep   [--csv benchmarks/results/weave_sweep.csv]
    torchrun --nproc-per-node 2 benchmarks/weave.py gloo [--csv benchmarks/results/weave_gloo.csv]

A random Llama, fp32, one thread a process. ``overlap`` and ``sweep`` run the share of one rank against a
simulated link (one transfer at a time, latency + bytes / bandwidth; waiting sleeps). ``overlap`` sets the
bandwidth so that communication is a given share of a layer, and compares the woven model with the unwoven one
and with the same model on a link that takes no time. ``sweep`` lets the cost model decide over numbers of
tokens and links, and says how its choice compares with not weaving. ``gloo`` divides a model among real
processes. Variants take turns; times are medians.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor

from llm42c.codegen import target as targets
from llm42c.codegen.target import Target, Value
from llm42c.simulated_link import Link, WallClock, simulated
from llm42c.weave import When, WovenProgram, compute_rates, measured, weaving_backend

GROUP = "weave-benchmark"
SHARES = (0.2, 0.3, 0.4)
TOKENS = (1, 2, 4, 16, 64, 128, 256, 512, 1024, 4096)
LINKS = {"fast": (2e-5, 1e11), "slow": (1e-4, 2e8), "latency": (2e-3, 1e12)}
LATENCY = 5e-5


@dataclass(frozen=True)
class Row:
    case: str
    tokens: int
    comm_share: float  # of the unwoven step
    decision: str
    whole_ms: float
    woven_ms: float
    no_comm_ms: float
    ratio: float  # woven (or what was chosen) over whole
    hidden: float | str  # of the communication, against the model without any
    runs: int
    cpu: str
    threads: int
    torch: str


def llama(hidden: int, layers: int, vocab: int = 512) -> Any:
    heads = hidden // 64
    config = transformers.LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=vocab,
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def with_collectives(model: Any) -> Any:
    """All-reduces of GROUP behind every output projection, where tensor parallelism has them."""

    def hook(_: Any, __: Any, output: Tensor) -> Tensor:
        started = torch.ops._c10d_functional.all_reduce(output, "sum", GROUP)
        return torch.ops._c10d_functional.wait_tensor(started)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(hook)
        layer.mlp.down_proj.register_forward_hook(hook)
    return model


class Case:
    """A compiled model, run woven or whole on the inputs of its graph."""

    def __init__(self, model: Any, target: Target, group: Any = None) -> None:
        made: list[WovenProgram] = []
        self._inputs: list[Any] = []
        backend = weaving_backend(target, style="free", group=group, made=made)
        self._ids = torch.zeros(1, 48, dtype=torch.long)
        torch._dynamo.reset()
        torch._dynamo.mark_dynamic(self._ids, 1)
        self._compiled = torch.compile(model, backend=backend, fullgraph=True)
        with torch.no_grad():
            self._compiled(input_ids=self._ids, use_cache=False, logits_to_keep=1)
        self.program = made[0]

    def run(self, tokens: int) -> Callable[[], None]:
        ids = torch.arange(tokens)[None] % 500

        def once() -> None:
            with torch.no_grad():
                self._compiled(input_ids=ids, use_cache=False, logits_to_keep=1)

        return once

    def variants(self, tokens: int) -> dict[str, Callable[[], None]]:
        """The step woven whatever it costs, and not woven."""
        return {"woven": self._when("always", tokens), "whole": self._when("off", tokens)}

    def _when(self, when: When, tokens: int) -> Callable[[], None]:
        run = self.run(tokens)

        def once() -> None:
            self.program.when = when
            run()
            self.program.when = "auto"

        return once


def times(variants: dict[str, Callable[[], None]], runs: int) -> dict[str, float]:
    """Medians in seconds; variants take turns after one warm-up of each."""
    for run in variants.values():
        run()
    found: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(runs):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in found.items()}


def row(case: str, tokens: int, decision: str, t: dict[str, float], runs: int) -> Row:
    comm = t["whole"] - t["none"] if "none" in t else 0.0
    hidden: float | str = round(1 - (t["woven"] - t["none"]) / comm, 3) if comm > 0 else ""
    return Row(
        case,
        tokens,
        round(comm / t["whole"], 3),
        decision,
        round(1e3 * t["whole"], 2),
        round(1e3 * t["woven"], 2),
        round(1e3 * t.get("none", 0.0), 2),
        round(t["woven"] / t["whole"], 3),
        hidden,
        runs,
        targets.detect("cpu").name,
        torch.get_num_threads(),
        torch.__version__,
    )


def with_link(target: Target, latency: float, bandwidth: float) -> Target:
    source = "measured: the simulated link"
    return target.measured(
        {"link_latency": Value(latency, source), "link_bandwidth": Value(bandwidth, source)}
    )


def overlap(tokens: int = 384, layers: int = 6, hidden: int = 512, runs: int = 7) -> Iterator[Row]:
    base = targets.measure(targets.detect("cpu"), "cpu").measured(compute_rates(torch.device("cpu")))
    link = Link(0.0, 1e15, WallClock())
    model = with_collectives(llama(hidden, layers))
    with simulated(GROUP, link):
        case = Case(model, with_link(base, LATENCY, 1e8))
        variants = case.variants(tokens)
        alone = times({"none": variants["whole"]}, 5)["none"]
        nbytes = 2 * layers * tokens * hidden * 4
        for share in SHARES:
            seconds = alone * share / (1 - share)
            bandwidth = nbytes / (seconds - 2 * layers * LATENCY)

            def on(run: Callable[[], None], latency: float, rate: float) -> Callable[[], None]:
                def timed() -> None:
                    link.latency, link.bandwidth = latency, rate
                    link.clear()
                    run()

                return timed

            turns = {
                "none": on(variants["whole"], 0.0, 1e15),
                "whole": on(variants["whole"], LATENCY, bandwidth),
                "woven": on(variants["woven"], LATENCY, bandwidth),
            }
            yield row(f"simulated link, {share:.0%} of a layer", tokens, "woven", times(turns, runs), runs)


def sweep(layers: int = 2, hidden: int = 256) -> Iterator[Row]:
    base = targets.measure(targets.detect("cpu"), "cpu").measured(compute_rates(torch.device("cpu")))
    for name, (latency, bandwidth) in LINKS.items():
        link = Link(latency, bandwidth, WallClock())
        with simulated(GROUP, link):
            case = Case(with_collectives(llama(hidden, layers)), with_link(base, latency, bandwidth))
            for tokens in TOKENS:
                decision = case.program.planner.decide(tokens)
                cut = f"cut at {decision.tokens_0}" if decision.weaves else "not woven"
                runs = 15 if tokens <= 512 else 5
                variants = {"whole": case.variants(tokens)["whole"], "woven": case.run(tokens)}
                yield row(f"{name} link", tokens, cut, times(variants, runs), runs)


def gloo(hidden: int = 768, layers: int = 12, runs: int = 5) -> Iterator[Row]:
    """Rows on rank 0; every rank must run this."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    size = dist.get_world_size()
    model = llama(hidden, layers, vocab=49152)
    parameters = sum(p.numel() for p in model.parameters())
    plan = model._resolve_parallel_plans(DistributedConfig(tp_size=size))[0]
    plan = {name: style for name, style in plan.items() if ".layers." in name}
    model = apply_tensor_parallelism(model, init_device_mesh("cpu", (size,)), plan)
    group = dist.group.WORLD
    case = Case(model, measured(group, torch.device("cpu")), group)
    for tokens in (2, 16, 64, 128, 256):
        decision = case.program.planner.decide(tokens)
        cut = f"cut at {decision.tokens_0}" if decision.weaves else "not woven"
        t = times(case.variants(tokens), runs)
        comm = communication(tokens, hidden, 2 * layers)
        t["none"] = t["whole"] - comm
        yield row(f"Gloo, {size} ranks, {parameters / 1e6:.0f}M", tokens, cut, t, runs)


def communication(tokens: int, hidden: int, count: int) -> float:
    """Seconds of a step's all-reduces one after another, with nothing beside them."""
    message = torch.zeros(1, tokens, hidden)

    def once() -> None:
        for _ in range(count):
            dist.all_reduce(message)

    return times({"comm": once}, 5)["comm"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["overlap", "sweep", "gloo"])
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    quiet = int(os.environ.get("RANK", "0")) > 0
    for found in {"overlap": overlap, "sweep": sweep, "gloo": gloo}[args.what]():
        rows.append(found)
        if not quiet:
            print(
                f"{found.case:<34}{found.tokens:>6} {found.decision:<14}{found.whole_ms:>9.2f} → "
                f"{found.woven_ms:>9.2f} ms (without communication {found.no_comm_ms:.2f})  "
                f"×{found.ratio:.3f}  hidden {found.hidden}",
                flush=True,
            )
    if args.csv and not quiet:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(asdict(rows[0])))
            writer.writeheader()
            writer.writerows(asdict(r) for r in rows)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
