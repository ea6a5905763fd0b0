"""An order: what fixes the bits of an operator on a target, as a value with a name and a version.

Two versions of one name may differ in some bit; one version never does, on whatever machine of the target.
So whoever changes a bit of a kernel raises the version: ``tests/codegen/test_orders.py`` holds the digests
that each version gives. A contract lists the orders of the operators that its graph calls.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Order:
    """``text`` says in words what a simulator of the order does step by step."""

    name: str
    version: int
    text: str

    def __str__(self) -> str:
        return f"{self.name}/{self.version}"


COPY = Order("copy", 1, "Elements are copied.")
POINTWISE = Order("pointwise", 1, "One element at a time, each step rounded as the operator says.")
GPU_POINTWISE = Order(
    "pointwise-device", 1, "As pointwise, with the exponential function of the device's compiler."
)
ASCENDING = Order(
    "ascending", 1, "What was there first, then the rows of one place in ascending order, each sum rounded."
)
RUNNING = Order("running", 1, "One fp32 chain along the dimension, ascending; each value is rounded once.")
SUBSTITUTION = Order(
    "substitution",
    1,
    "From the right-hand side one rounded product after the other is taken away, in the order in which the "
    "unknowns become known.",
)
RANKS = Order("ranks-ascending", 1, "Over the ranks, ascending, in fp32, rounded once.")

CHAIN = Order(
    "fma-chain",
    2,
    "One fp32 chain of fused multiply-adds for each output element, from zero, k ascending. Of bf16 "
    "numbers, every step takes zero for denormals and gives zero for what rounds to less than the least "
    "normal number, the sign kept, and an odd k is padded with zeros.",
)
TWO_CHAINS = Order(
    "two-chains32",
    1,
    "Blocks of 32 values of k, ascending. In a block, one fp32 chain of fused multiply-adds over the even "
    "places and one over the odd places, both from zero; their sum is added to the sum of the blocks "
    "before it, which begins as zero. Of bf16 numbers only, with zero for denormals and an odd k padded as "
    "in fma-chain.",
)
GROUPS = Order(
    "int8-groups",
    1,
    "32 values of k of a row of x become integers of eight bits, to nearest, ties to even, times their "
    "largest magnitude / 127 in fp32; all are zero where that magnitude is below 2^-119. One fp32 chain for "
    "each output element, from zero, groups that share a scale of the weight ascending, at most 32 values at "
    "once: acc = fma(scale_w * scale_x, the exact sum of products of integers, acc); then, in a format with "
    "minima, acc = fma(minimum, scale_x * the sum of x's integers, acc).",
)
LANES = Order(
    "lanes16",
    1,
    "Sixteen fp32 partial sums: element i goes to lane i % 16, i ascending; then the tree: lane i + lane "
    "i + 8, then + 4, + 2, + 1.",
)
SPLITS = Order(
    "splits256",
    2,
    "Splits of 256 absolute positions, folded from the left. In a split, scores are chains as fma-chain over "
    "the head's dimension, exponentials of key j are summed in lane j % 16 and then in the tree of lanes16, "
    "and outputs are chains of fused multiply-adds over the visible keys, ascending, with the exponentials "
    "in fp32.",
)
DRAW = Order(
    "gumbel-lanes16",
    1,
    "Gumbel-max with the noise of Philox4x32-10; exponentials are summed as lanes16; top-p adds "
    "probabilities in fp64 by descending buckets of the scaled logit.",
)
RANKS_LANES = Order(
    "ranks-ascending-lanes16", 1, "The sum over the ranks as ranks-ascending, then the row as lanes16."
)

TILES = Order(
    "mma-chain",
    1,
    "One fp32 chain of a tile's matrix instructions for each output element, k ascending; inside an "
    "instruction as the device's generation adds.",
)
GPU_GROUPS = Order(
    "int8-groups-device", 1, "As int8-groups; SiLU with the exponential function of the device's compiler."
)
TREE = Order("row-tree", 1, "A row is one program; its sum is the tree of the program's reduction.")
GPU_SPLITS = Order(
    "splits512-mma",
    1,
    "Splits of 512 absolute positions, folded from the left; in a split, tiles of keys ascending, each by "
    "matrix instructions and the program's tree.",
)
GPU_DRAW = Order("gumbel-row-tree", 1, "Gumbel-max with the noise of Philox4x32-10; sums as row-tree.")
RANKS_TREE = Order(
    "ranks-ascending-row-tree", 1, "The sum over the ranks as ranks-ascending, then the row as row-tree."
)
