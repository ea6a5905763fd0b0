"""What more than one attention kernel holds: states of a softmax, and the drawing of work items."""

from __future__ import annotations

from llm42c.codegen.triton.fold import fold


def states(sinks: bool) -> tuple[str, str]:
    """``fold`` and ``finish`` of ``kernels/attention_parts.py``, with or without sinks."""
    finish = fold("attention_parts", "finish", {"HAS_SINKS": sinks})
    return fold("attention_parts", "fold"), finish


COUNTERS = 2048  # next prefill item, next decode item, finished programs, then a ticket counter an SM
FIRST_TICKET = 8

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
