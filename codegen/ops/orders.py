"""The order of every operator on every target: a name and a version.

Two versions of one name may differ in some bit; one version never does, on whatever machine of the target.
So the version is raised by whoever changes a bit of a kernel: ``tests/codegen/test_orders.py`` holds the
digests that each version gives. A contract lists the orders of the operators that its graph calls.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

TARGETS = ("cpu", "cuda")


@dataclass(frozen=True)
class Order:
    """What fixes the bits of one operator on one target."""

    name: str
    version: int

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


# Exact: elements are copied, or every step is one correctly rounded operation.
COPY = Order("copy", 1)
# One step an element: rotary is two products and a sum, silu_mul has the exponential of the target.
POINTWISE = Order("pointwise", 1)
# CPU: one fp32 FMA chain over k ascending for each output element.
CHAIN = Order("fma-chain", 1)
# CPU: sixteen fp32 lane sums, element i in lane i % 16, then the tree +8, +4, +2, +1.
LANES = Order("lanes16", 1)
# CPU: splits of 256 absolute positions folded from the left; chains and lanes inside a split.
SPLITS = Order("splits256", 1)
# CPU: Gumbel-max with Philox4x32-10; log-probabilities from lane sums.
DRAW = Order("gumbel-lanes16", 1)
# Values at one index, added one after the other, ascending.
ASCENDING = Order("ascending", 1)
# One fp32 sum or product along the dimension, rounded where it is read.
RUNNING = Order("running", 1)
# One rounded product after the other is taken away, in the order in which the unknowns become known.
SUBSTITUTION = Order("substitution", 1)
# Over the ranks, ascending, in fp32, rounded once.
RANKS = Order("ranks-ascending", 1)
RANKS_LANES = Order("ranks-ascending-lanes16", 1)
# GPU: what a tile's matrix instructions, a program's tree and a split of its kernels give.
TILES = Order("mma-chain", 1)
TREE = Order("row-tree", 1)
GPU_SPLITS = Order("splits512-mma", 1)
GPU_DRAW = Order("gumbel-row-tree", 1)
RANKS_TREE = Order("ranks-ascending-row-tree", 1)


def _both(order: Order) -> dict[str, Order]:
    return dict.fromkeys(TARGETS, order)


def _each(cpu: Order, cuda: Order) -> dict[str, Order]:
    return {"cpu": cpu, "cuda": cuda}


ORDERS: dict[str, dict[str, Order]] = {
    "all_gather_last": _both(COPY),
    "all_reduce": _both(RANKS),
    "all_reduce_add_rms_norm": _each(RANKS_LANES, RANKS_TREE),
    "all_reduce_add_rms_norm_sharded": _each(RANKS_LANES, RANKS_TREE),
    "add_rms_norm": _each(LANES, TREE),
    "dense_attention": _each(SPLITS, GPU_SPLITS),
    "gather_rows": _both(COPY),
    "grouped_linear": _each(CHAIN, TILES),
    "grouped_outer": _each(CHAIN, TILES),
    "index_add": _both(ASCENDING),
    "layer_norm": _each(LANES, TREE),
    "linear": _each(CHAIN, TILES),
    "linear_add": _each(CHAIN, TILES),
    "linear_dense": _each(CHAIN, TILES),
    "linear_pack": _both(COPY),
    "linear_silu_mul": _each(CHAIN, TILES),
    "linear_unpack": _both(COPY),
    "paged_attention": _each(SPLITS, GPU_SPLITS),
    "pod_attention": _each(SPLITS, GPU_SPLITS),
    "pod_dense_attention": _each(SPLITS, GPU_SPLITS),
    "pod_varlen_attention": _each(SPLITS, GPU_SPLITS),
    "rms_norm": _each(LANES, TREE),
    "rotary": _both(POINTWISE),
    "row_log_softmax": _each(LANES, TREE),
    "row_softmax": _each(LANES, TREE),
    "row_sum": _each(LANES, TREE),
    "running_product": _both(RUNNING),
    "running_sum": _both(RUNNING),
    "sample": _each(DRAW, GPU_DRAW),
    "shard_last": _both(COPY),
    "shard_rows": _both(COPY),
    "silu_mul": _both(POINTWISE),
    "solve_triangular": _both(SUBSTITUTION),
    "token_logprobs": _each(LANES, TREE),
    "top_logprobs": _each(LANES, TREE),
}


def orders_of(operators: Iterable[str], target: str) -> dict[str, str]:
    """``name/version`` of each operator's order on ``target``, by operator."""
    return {name: str(ORDERS[name][target]) for name in sorted(set(operators))}
