"""Functions that more than one attention kernel holds: folding partial softmaxes, and drawing work items."""

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


COUNTERS = 2048  # next prefill item, next decode item, finished programs, then a ticket counter an SM
FIRST_TICKET = 8

DRAW = '''
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
'''
TICKET = """
ticket = tl.atomic_add(counters_ptr + TICKETS + sm, 1, sem="relaxed")
role, index = draw(
    counters_ptr, ticket % (prefill_share + decode_share) >= prefill_share, prefills, decodes
)
"""
# Releases every program's draws to the one that zeroes the counters, and acquires them there.
RESET = """
# The last program to finish leaves the counters as it found them: zero.
finished = tl.atomic_add(counters_ptr + 2, 1, sem="acq_rel")
if finished == tl.num_programs(0) - 1:
    tl.store(counters_ptr + tl.arange(0, COUNTERS), tl.zeros([COUNTERS], tl.int32))
"""
COUNTER_CONSTANTS = {"COUNTERS": COUNTERS, "TICKETS": FIRST_TICKET, "MAX_SMS": COUNTERS - FIRST_TICKET}
# Where a program learns on which SM it runs, by ``AttentionSpec.sm``.
SM = {
    "register": "smid() % MAX_SMS",
    "program": "program % SMS",
    "table": "tl.load(sm_order_ptr + program) % MAX_SMS",
}
IMPORT_SMID = "from triton.language.extra.cuda import smid\n"


def indent(text: str, by: int) -> str:
    """The lines of ``text``, without blank ones around, ``by`` columns to the right."""
    pad = " " * by
    return "\n".join(pad + line if line else line for line in text.strip("\n").split("\n"))
