"""What attention kernels share: states of a softmax over a range of keys, and drawing of work items."""

import triton
import triton.language as tl

HAS_SINKS = tl.constexpr(False)  # one more score a head, which has no value


@triton.jit
def fold(left_max, left_sum, left, right_max, right_sum, right):
    """The state over two ranges of keys. max, sum: [M]; left, right: [M, D]."""
    top = tl.maximum(left_max, right_max)
    base = tl.where(top == float("-inf"), 0.0, top)
    a = tl.exp2(left_max - base)
    b = tl.exp2(right_max - base)
    total = tl.fma(right, tl.broadcast_to(b[:, None], right.shape), left * a[:, None])
    return top, tl.fma(right_sum, b, left_sum * a), total


@triton.jit
def finish(row_max, row_sum, acc, sinks_ptr, head):
    """Normalise. Adding 0 turns -0 into +0, whose sign depends on how many empty blocks were folded in."""
    if HAS_SINKS:
        sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
        row_max, row_sum, acc = fold(
            row_max, row_sum, acc, sink, tl.full(row_sum.shape, 1.0, tl.float32), tl.zeros(acc.shape, tl.float32)
        )  # fmt: skip
    return acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None] + 0.0


@triton.jit
def draw(counters_ptr, decode_first, prefills, decodes):
    """(role, index) of the next item: role 0 is prefill, 1 decode, 2 means that nothing is left.

    Whose role has run dry takes over the other's.
    """
    role = decode_first.to(tl.int32)
    index = tl.atomic_add(counters_ptr + role, 1, sem="relaxed")
    if index >= tl.where(role == 1, decodes, prefills):
        role = 1 - role
        index = tl.atomic_add(counters_ptr + role, 1, sem="relaxed")
        if index >= tl.where(role == 1, decodes, prefills):
            role = role * 0 + 2
    return role, index
