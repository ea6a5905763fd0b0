"""What more than one attention kernel holds: states of a softmax, and counters for drawing work items."""

from __future__ import annotations

from llm42c.codegen.triton.fold import fold


def states(sinks: bool) -> tuple[str, str]:
    """``fold`` and ``finish`` of ``kernels/attention_parts.py``, with or without sinks."""
    finish = fold("attention_parts", "finish", {"HAS_SINKS": sinks})
    return fold("attention_parts", "fold"), finish


COUNTERS = 2048  # next prefill item, next decode item, finished programs, then a ticket counter an SM
FIRST_TICKET = 8
COUNTER_CONSTANTS = {"COUNTERS": COUNTERS, "TICKETS": FIRST_TICKET, "MAX_SMS": COUNTERS - FIRST_TICKET}
IMPORT_SMID = "from triton.language.extra.cuda import smid\n"
