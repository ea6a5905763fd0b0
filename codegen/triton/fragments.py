"""Functions that more than one attention kernel holds: the fold of two partial softmaxes, and its end."""

from __future__ import annotations

FOLD = '''
@triton.jit
def fold(left_max, left_sum, left, right_max, right_sum, right):
    """The state over two ranges of keys. max, sum: [M]; left, right: [M, D]."""
    top = tl.maximum(left_max, right_max)
    base = tl.where(top == float("-inf"), 0.0, top)
    a = tl.exp2(left_max - base)
    b = tl.exp2(right_max - base)
    total = tl.fma(right, tl.broadcast_to(b[:, None], right.shape), left * a[:, None])
    return top, tl.fma(right_sum, b, left_sum * a), total
'''

_FINISH = '''
@triton.jit
def finish(row_max, row_sum, acc, sinks_ptr, head):
    """Normalise. Adding 0 turns -0 into +0, whose sign depends on how many empty blocks were folded in."""
@SINK@
    return acc / tl.where(row_sum > 0.0, row_sum, 1.0)[:, None] + 0.0
'''
_SINK = """
    sink = tl.load(sinks_ptr + head).to(tl.float32) * 1.4426950408889634
    row_max, row_sum, acc = fold(
        row_max, row_sum, acc, sink, tl.full(row_sum.shape, 1.0, tl.float32), tl.zeros(acc.shape, tl.float32)
    )
"""


def finish(sinks: bool) -> str:
    """With or without one more score per head that has no value."""
    return _FINISH.replace("@SINK@\n", _SINK.lstrip("\n") if sinks else "")
