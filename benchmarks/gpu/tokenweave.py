"""Token weaving and the fused all-reduce + residual + RMSNorm on several GPUs.

    torchrun --nproc-per-node 8 benchmarks/gpu/tokenweave.py [--layers 4] [--out FILE]
    python benchmarks/gpu/tokenweave.py [--ranks 8]
    python benchmarks/gpu/tokenweave.py --dry-run

Every rank holds one rank's share of a random Llama in bf16 with the shapes of Llama-3.3-70B but fewer layers,
its all-reduces where tensor parallelism has them. For each number of tokens: the step without communication,
with it, and woven, beside what the cost model predicted and decided; then the operator fused, in each form
that the machine has, against all-reduce followed by residual addition and norm, with its bits compared.

One GPU has no link: there the share is that of one of ``--ranks``, what is measured is what dividing the
tokens costs when there is nothing to hide, and the plan is that of the assumed link in the rows. What needs
several GPUs is printed as not run. Times are medians of 20 after 3; of several ranks, rank 0's. ``--dry-run``
runs the same code on the CPU with Gloo, a tiny model and no Inductor, alone or under ``torchrun``.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from common import Results, gpu_or_dry, machine, options_of
from torch import Tensor

from llm42c.codegen.device import Device, Value
from llm42c.passes.weave.text import describe_plan
from llm42c.weave.captured import When, WovenProgram, measured, weaving_backend

EPS = 1e-5
ASSUMED = {"link_latency": (1.5e-5, "s"), "link_bandwidth": (450e9, "B/s")}  # of one GPU's imagined link


@dataclass(frozen=True)
class Sizes:
    """The model, and what is measured with it."""

    hidden: int = 8192
    heads: int = 64
    kv_heads: int = 8
    intermediate: int = 28672
    vocab: int = 1024
    tokens: tuple[int, ...] = (256, 1024, 2048, 4096, 8192, 16384)
    rows: tuple[int, ...] = (1, 16, 128, 1024, 8192)

    @classmethod
    def tiny(cls) -> Sizes:
        return cls(64, 8, 8, 128, 64, tokens=(16, 48), rows=(1, 5))


class Ranks:
    """The process group: that of ``torchrun``, or this process alone."""

    def __init__(self, results: Results, imagined: int) -> None:
        timeout = timedelta(seconds=120)
        name = "gloo" if results.dry else "nccl"
        if "RANK" in os.environ:
            if not results.dry:
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
                results.device = torch.device("cuda", torch.cuda.current_device())
            dist.init_process_group(name, timeout=timeout)
        else:
            store = f"file://{tempfile.mkdtemp()}/store"
            dist.init_process_group(name, init_method=store, rank=0, world_size=1, timeout=timeout)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.alone = self.size == 1
        self.share = imagined if self.alone else self.size  # the model is divided by this
        self.group: Any = dist.group.WORLD
        self.name: str = self.group.group_name
        self._device = results.device

    def all_agree(self, here: bool) -> bool:
        """Whether it is so on every rank: a rank that stopped alone would leave the others waiting."""
        flag = torch.tensor(int(here), device=self._device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)


def share_of_llama(sizes: Sizes, layers: int, share: int, results: Results) -> Any:
    """What one of ``share`` ranks holds; its partial sums are not yet added."""
    config = transformers.LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate // share,
        num_hidden_layers=layers,
        num_attention_heads=sizes.heads // share,
        num_key_value_heads=max(sizes.kv_heads // share, 1),
        head_dim=sizes.hidden // sizes.heads,
        vocab_size=sizes.vocab,
        max_position_embeddings=65536,
    )
    torch.manual_seed(0)
    with results.device:
        model = transformers.LlamaForCausalLM(config).eval()
    return model if results.dry else model.bfloat16()


def with_collectives(model: Any, group_name: str) -> None:
    """All-reduces behind every output projection."""

    def hook(_: Any, __: Any, output: Tensor) -> Tensor:
        started = torch.ops._c10d_functional.all_reduce(output, "sum", group_name)
        return torch.ops._c10d_functional.wait_tensor(started)

    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(hook)
        layer.mlp.down_proj.register_forward_hook(hook)


def target_of(results: Results, ranks: Ranks) -> Device:
    """Measured rates; the link's are assumed where there is none."""
    target = measured(ranks.group, results.device)
    if not ranks.alone:
        return target
    for name, (value, unit) in ASSUMED.items():
        results.add("assumed", name, value, unit, "one GPU has no link")
    return target.measured({name: Value(value, "assumed") for name, (value, _) in ASSUMED.items()})


def weaving(results: Results, ranks: Ranks, sizes: Sizes, layers: int) -> None:
    """The step without communication, whole and woven at every number of tokens."""
    model = share_of_llama(sizes, layers, ranks.share, results)
    bare = dict(_without(results, ranks, model, sizes))
    with_collectives(model, ranks.name)
    target = target_of(results, ranks)
    made: list[WovenProgram] = []
    torch._dynamo.reset()
    backend = weaving_backend(target, style="eager" if results.dry else "free", group=ranks.group, made=made)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for tokens in sizes.tokens:
        if not ranks.all_agree(not results.spent):
            results.not_run(f"{tokens} tokens", "whole and woven", "ms", "the budget was spent")
            continue
        step = _step(compiled, tokens, results)
        step()
        _compare(results, ranks, made[0], step, tokens, bare.get(tokens))
    print(describe_plan(made[0].planner, sizes.tokens), flush=True)


def _without(results: Results, ranks: Ranks, model: Any, sizes: Sizes) -> Iterator[tuple[int, float | None]]:
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager" if results.dry else "inductor", fullgraph=True)
    for tokens in sizes.tokens:
        if ranks.all_agree(not results.spent):
            step = _step(compiled, tokens, results)
            case = f"{tokens} tokens"
            yield (
                tokens,
                results.attempt(case, "without communication", "ms", lambda s=step: results.median_ms(s)),
            )


def _step(compiled: Any, tokens: int, results: Results) -> Callable[[], None]:
    ids = torch.zeros(1, tokens, dtype=torch.long, device=results.device)
    torch._dynamo.mark_dynamic(ids, 1)

    def once() -> None:
        with torch.no_grad():
            compiled(input_ids=ids, use_cache=False, logits_to_keep=1)

    return once


def _compare(
    results: Results,
    ranks: Ranks,
    program: WovenProgram,
    step: Callable[[], None],
    tokens: int,
    bare: float | None,
) -> None:
    case = f"{tokens} tokens"
    decision = program.planner.decide(tokens)
    cut = decision.tokens_0 if decision.weaves else "not woven"
    results.add(case, "decision", cut, "", "the first half's tokens")
    found: dict[str, float] = {}
    choices: tuple[When, ...] = ("off", "always")
    for when in choices:
        program.when = when
        what = {"off": "whole", "always": "woven"}[when]
        found[what] = results.median_ms(step)  # an error here is every rank's, and ends the script
        results.add(case, what, found[what], "ms")
    program.when = "auto"
    results.add(case, "woven", found["woven"] / found["whole"], "x whole")
    if decision.woven is not None:
        results.add(case, "woven, predicted", decision.woven_seconds / decision.plain_seconds, "x whole")
    if ranks.alone:
        results.not_run(case, "communication hidden", "share", "needs two or more GPUs")
    elif bare is not None and found["whole"] > bare:
        hidden = (found["whole"] - found["woven"]) / (found["whole"] - bare)
        results.add(case, "communication", 1 - bare / found["whole"], "share")
        results.add(case, "communication hidden", hidden, "share")


def fused(results: Results, ranks: Ranks, sizes: Sizes) -> None:
    """All-reduce, addition and norm as three calls, as one operator, and as one kernel."""
    from llm42c.codegen.ops import registry

    registry.load() if results.dry else registry.define()
    forms = {"three calls": _three_calls, "one operator": _one_operator}
    dtype = torch.float32 if results.dry else torch.bfloat16
    for rows in sizes.rows:
        case = f"{rows} x {sizes.hidden}"
        if not ranks.all_agree(not results.spent):
            results.not_run(case, "fused norm", "ms", "the budget was spent")
            continue
        torch.manual_seed(ranks.rank)  # partial sums differ; what follows them is every rank's
        x = torch.randn(rows, sizes.hidden, device=results.device, dtype=dtype)
        torch.manual_seed(1)
        residual, weight = torch.randn_like(x), torch.randn_like(x[0])
        outputs = {}
        for what, form in forms.items():
            call = _bound(form, x, residual, weight, ranks.name)
            outputs[what] = call()
            results.add(case, what, results.median_ms(call), "ms")
        if ranks.size > 2:
            results.add(case, "rows that differ", "", "rows", "the library's order of summation is its own")
        else:
            pair = (outputs["three calls"] != outputs["one operator"]).any(1)
            results.add(case, "rows that differ", int(pair.sum()), "rows")
    _one_kernel(results, ranks, sizes)


def _bound(form: Callable[..., Tensor], *args: Any) -> Callable[[], Tensor]:
    return lambda: form(*args)


def _three_calls(x: Tensor, residual: Tensor, weight: Tensor, group_name: str) -> Tensor:
    started = torch.ops._c10d_functional.all_reduce(x, "sum", group_name)
    total = torch.ops._c10d_functional.wait_tensor(started)
    normed: Tensor = torch.ops.llm42.add_rms_norm(total, residual, weight, EPS, 0.0, True)[0]
    return normed


def _one_operator(x: Tensor, residual: Tensor, weight: Tensor, group_name: str) -> Tensor:
    ops: Any = torch.ops.llm42
    normed: Tensor = ops.all_reduce_add_rms_norm(x, residual, weight, EPS, 0.0, True, group_name)[0]
    return normed


def _one_kernel(results: Results, ranks: Ranks, sizes: Sizes) -> None:
    """The operator over symmetric memory, against itself over process-group calls."""
    if ranks.alone or results.dry:
        reason = "a dry run has no GPU" if results.dry else "needs two or more GPUs"
        for rows in sizes.rows:
            results.not_run(f"{rows} x {sizes.hidden}", "one kernel", "ms", reason)
        return
    from llm42c.codegen.triton import symmetric

    inputs = {}
    for rows in sizes.rows:
        torch.manual_seed(ranks.rank)
        x = torch.randn(rows, sizes.hidden, device=results.device, dtype=torch.bfloat16)
        torch.manual_seed(1)
        arguments = (x, torch.randn_like(x), torch.randn_like(x[0]), ranks.name)
        inputs[rows] = (arguments, _one_operator(*arguments))
    symmetric.enable(ranks.name, max(sizes.rows) * sizes.hidden * 2, results.device)
    for rows, (arguments, want) in inputs.items():
        case = f"{rows} x {sizes.hidden}"
        call = _bound(_one_operator, *arguments)
        differ = (call().view(torch.int16) != want.view(torch.int16)).any(1).sum()
        results.add(case, "one kernel: rows that differ", int(differ), "rows")
        results.add(case, "one kernel", results.median_ms(call), "ms")


def main() -> int:
    default = Path(__file__).with_name("tokenweave.csv")
    parser = options_of(__doc__, default)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--ranks", type=int, default=8, help="of which one GPU holds a share")
    options = parser.parse_args()
    if not gpu_or_dry(options, default):
        return 1
    results = Results(options.budget, options.dry_run)
    ranks = Ranks(results, options.ranks)
    sizes = Sizes.tiny() if options.dry_run else Sizes()
    layers = 2 if options.dry_run else options.layers
    status = 0
    silence = contextlib.redirect_stdout(io.StringIO()) if ranks.rank else contextlib.nullcontext()
    with silence:
        machine(results)
        results.add("machine", "ranks", ranks.size, "")
        try:
            weaving(results, ranks, sizes, layers)
            fused(results, ranks, sizes)
        except Exception as error:
            results.not_run("all that follows", "stopped", "", error)
            status = 1
        if not ranks.rank:
            results.write(options.out)
    sys.stdout.flush()
    if status or not options.dry_run:
        os._exit(status)  # other ranks may wait in a collective that this one will not join
    dist.destroy_process_group()
    return status


if __name__ == "__main__":
    sys.exit(main())
