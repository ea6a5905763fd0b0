"""How much communication does token weaving hide, and does it ever cost anything?

    python benchmarks/weave.py overlap [--csv benchmarks/results/weave_overlap.csv]
    python benchmarks/weave.py sweep   [--csv benchmarks/results/weave_sweep.csv]
    torchrun --nproc-per-node 2 benchmarks/weave.py gloo [--link NAME] [--csv …/weave_gloo.csv]

A random Llama, fp32, one thread a process. ``overlap`` and ``sweep`` run the share of one rank against a
simulated link (one transfer at a time, latency + bytes / bandwidth; waiting sleeps). ``overlap`` sets the
bandwidth so that communication is a given share of a layer, and compares the woven model with the unwoven
one and with the same model on a link that takes no time. ``sweep`` lets the cost model decide over numbers
of tokens and links, and says how its choice compares with not weaving (the very same function, where it
declines) and with weaving all the same. ``gloo`` divides a model among real processes, and says how much of
an all-reduce is the processor's own work; ``--link`` is what the rows call the network. A slower one than
this machine's loopback, for two processes:

    unshare -n sh -c 'ip link set lo up mtu 9000 &&
        tc qdisc add dev lo root tbf rate 1gbit burst 128kb latency 1s &&
        GLOO_SOCKET_IFNAME=lo torchrun --nproc-per-node 2 --master-addr 127.0.0.1 benchmarks/weave.py gloo'

Variants take turns, every other turn backwards; times are medians, ratios medians of those within a turn.
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

from llm42c.codegen.cpu import device as devices
from llm42c.codegen.device import Device, Value
from llm42c.passes.weave.cost import Rates
from llm42c.passes.weave.schedule import Decision, Planner
from llm42c.weave.captured import When, WovenProgram, measured, weaving_backend
from llm42c.weave.simulated_link import Link, WallClock, simulated

GROUP = "weave-benchmark"
SHARES = (0.2, 0.3, 0.4)
TOKENS = (1, 2, 3, 7, 16, 33, 64, 128, 255, 256, 512, 1000, 2048, 4096)
LINKS = {  # seconds, bytes a second
    "20 µs, 100 GB/s": (2e-5, 1e11),
    "50 µs, 1 GB/s": (5e-5, 1e9),
    "100 µs, 200 MB/s": (1e-4, 2e8),
    "500 µs, 40 MB/s": (5e-4, 4e7),
    "2 ms, latency only": (2e-3, 1e15),
}
LATENCY = 5e-5
DECLINED = "not woven"


@dataclass(frozen=True)
class Row:
    case: str
    tokens: int
    comm_share: float | str  # of the unwoven step
    decision: str
    whole_ms: float
    chosen_ms: float  # what the benchmark is about: woven, or what the cost model chose
    no_comm_ms: float | str
    ratio: float  # chosen over whole
    hidden: float | str  # share of the communication that the chosen step is shorter by
    woven_ms: float | str  # woven whatever the cost model says
    woven_ratio: float | str
    runs: int
    cpu: str
    threads: int
    torch: str
    all_reduce_ms: float | str = ""  # of all the step's, one after another, with nothing beside them
    processor_share: float | str = ""  # of that time, what products beside an all-reduce lose, as measured
    predicted_ratio: float | str = ""


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

    def __init__(self, model: Any, target: Device, group: Any = None) -> None:
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


Times = dict[str, list[float]]


def times(variants: dict[str, Callable[[], None]], runs: int) -> Times:
    """Seconds; variants take turns after one warm-up of each."""
    for run in variants.values():
        run()
    found: Times = {name: [] for name in variants}
    for i in range(runs):
        for name, run in list(variants.items())[:: -1 if i % 2 else 1]:
            start = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - start)
    return found


def ratio(t: Times, name: str, over: str) -> float:
    """Median of the ratios within a turn."""
    return statistics.median(a / b for a, b in zip(t[name], t[over], strict=True))


def row(case: str, tokens: int, decision: str, t: Times, runs: int, **more: Any) -> Row:
    """``t``: whole, chosen (what the ratio is of), woven, and none (without communication) where measured."""
    median = {name: statistics.median(x) for name, x in t.items()}
    whole, chosen, none = median["whole"], median["chosen"], median.get("none")
    comm = more.pop("comm", None if none is None else whole - none)
    hidden = round((whole - chosen) / comm, 3) if comm and decision != DECLINED else ""
    woven = median.get("woven")
    return Row(
        case=case,
        tokens=tokens,
        comm_share="" if comm is None else round(comm / whole, 3),
        decision=decision,
        whole_ms=round(1e3 * whole, 3),
        chosen_ms=round(1e3 * chosen, 3),
        no_comm_ms="" if none is None else round(1e3 * none, 3),
        ratio=round(ratio(t, "chosen", "whole"), 3),
        hidden=hidden,
        woven_ms="" if woven is None else round(1e3 * woven, 3),
        woven_ratio="" if woven is None else round(ratio(t, "woven", "whole"), 3),
        runs=runs,
        cpu=devices.detect().name,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        **more,
    )


def with_link(target: Device, latency: float, bandwidth: float) -> Device:
    source = "measured: the simulated link"
    return target.measured(
        {"link_latency": Value(latency, source), "link_bandwidth": Value(bandwidth, source)}
    )


def overlap(tokens: int = 384, layers: int = 6, hidden: int = 512, runs: int = 11) -> Iterator[Row]:
    base = measured(None, torch.device("cpu"))
    link = Link(0.0, 1e15, WallClock())
    model = with_collectives(llama(hidden, layers))
    with simulated(GROUP, link):
        case = Case(model, with_link(base, LATENCY, 1e8))
        variants = case.variants(tokens)
        alone = statistics.median(times({"none": variants["whole"]}, 15)["none"])
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
                "chosen": on(variants["woven"], LATENCY, bandwidth),
            }
            t = times(turns, runs)
            alone = statistics.median(t["none"])
            yield row(f"simulated link, {share:.0%} of a layer", tokens, "woven", t, runs)


def sweep(layers: int = 2, hidden: int = 512) -> Iterator[Row]:
    base = measured(None, torch.device("cpu"))
    link = Link(0.0, 1e15, WallClock())
    with simulated(GROUP, link):
        case = Case(with_collectives(llama(hidden, layers)), with_link(base, LATENCY, 1e15))
        split = case.program.split
        for tokens in TOKENS:
            for name, (latency, bandwidth) in LINKS.items():
                link.latency, link.bandwidth = latency, bandwidth
                case.program.planner = Planner(split, Rates.of(with_link(base, latency, bandwidth)))
                decision = case.program.planner.decide(tokens)
                variants = case.variants(tokens)
                turns = {"whole": variants["whole"], "chosen": case.run(tokens)}
                if tokens > 1:
                    turns["woven"] = variants["woven"]
                runs = 41 if tokens <= 64 else 21 if tokens <= 512 else 5
                t = times({name: _cleared(link, run) for name, run in turns.items()}, runs)
                predicted = round(decision.woven_seconds / decision.plain_seconds, 3)
                yield row(name, tokens, _cut(decision), t, runs, predicted_ratio=predicted)


def _cleared(link: Link, run: Callable[[], None]) -> Callable[[], None]:
    def once() -> None:
        link.clear()
        run()

    return once


def _cut(decision: Decision) -> str:
    return f"cut at {decision.tokens_0}" if decision.weaves else DECLINED


def gloo(network: str, hidden: int = 1536, layers: int = 4, runs: int = 7) -> Iterator[Row]:
    """Rows on rank 0; every rank must run this."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    size = dist.get_world_size()
    model = llama(hidden, layers)
    parameters = sum(p.numel() for p in model.parameters())
    plan = model._resolve_parallel_plans(DistributedConfig(tp_size=size))[0]
    plan = {name: style for name, style in plan.items() if ".layers." in name}
    model = apply_tensor_parallelism(model, init_device_mesh("cpu", (size,)), plan)
    group = dist.group.WORLD
    target = measured(group, torch.device("cpu"))
    case = Case(model, target, group)
    name = f"{network}, {size} ranks, {parameters / 1e6:.0f}M parameters"
    for tokens in (2, 16, 64, 128, 256, 512):
        decision = case.program.planner.decide(tokens)
        variants = case.variants(tokens)
        turns = {"whole": variants["whole"], "chosen": case.run(tokens), "woven": variants["woven"]}
        t = times({n: _together(run) for n, run in turns.items()}, runs)
        comm = communication(tokens, hidden, 2 * layers)
        yield row(
            name,
            tokens,
            _cut(decision),
            t,
            runs,
            comm=comm,
            all_reduce_ms=round(1e3 * comm, 3),
            processor_share=round(target.get("link_processor_share"), 3),
            predicted_ratio=round(decision.woven_seconds / decision.plain_seconds, 3),
        )


def _together(run: Callable[[], None]) -> Callable[[], None]:
    """Ranks begin together, and the time is that until both have done."""

    def once() -> None:
        dist.barrier()
        run()
        dist.barrier()

    return once


def communication(tokens: int, hidden: int, count: int) -> float:
    """Seconds of a step's all-reduces one after another, with nothing beside them."""
    message = torch.zeros(1, tokens, hidden)

    def once() -> None:
        for _ in range(count):
            dist.all_reduce(message)

    return statistics.median(times({"comm": _together(once)}, 5)["comm"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["overlap", "sweep", "gloo"])
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--link", default="Gloo over loopback", help="what the rows of gloo call the network")
    parser.add_argument("--append", action="store_true", help="add to the CSV")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    quiet = int(os.environ.get("RANK", "0")) > 0
    command = f"benchmarks/weave.py {args.what}"
    measure = {"overlap": overlap, "sweep": sweep, "gloo": lambda: gloo(args.link)}[args.what]
    for found in measure():
        rows.append({**asdict(found), "command": command})
        if not quiet:
            print(
                f"{found.case:<34}{found.tokens:>6} {found.decision:<14}communication {found.comm_share}  "
                f"{found.whole_ms:>9.2f} → {found.chosen_ms:>9.2f} ms  ×{found.ratio:.3f}  "
                f"hidden {found.hidden}  woven anyway ×{found.woven_ratio} "
                f"(predicted ×{found.predicted_ratio})",
                flush=True,
            )
    if args.csv and not quiet:
        new = not (args.append and args.csv.exists())
        with args.csv.open("w" if new else "a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
