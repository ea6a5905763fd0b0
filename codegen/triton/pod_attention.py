"""The hybrid attention kernel: prefill tiles and decode splits drawn from one work list by one launch.

The idea of mixing both on every SM is POD-Attention's (Kamath et al., ASPLOS 2025). Here a work item is
one KV head of either a tile of a sequence's tokens over all of its keys, or a few tokens over one split of
the keys. Who runs an item is up to the scheduler; what an item computes is not:

- keys in blocks of ``keys`` from absolute position 0, an online softmax (Milakov and Gimelshein, arXiv
  1805.02867) inside a split of ``split`` positions, splits folded from the left in index order;
- a split or a block in which a row sees nothing leaves the row's state as it is, bit for bit, so
  neighbours in a tile do not matter;
- the fold is written with explicit fused multiply-adds and compiled without contraction, so folding in
  registers (prefill) and in the combining kernel (decode) give the same bits.
"""

from __future__ import annotations

import functools

from llm42c.codegen.triton import fragments
from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import AttentionSpec

_DOCS = {
    "tickets": "One item a program: an SM's programs take roles in turn by the tickets of their SM.",
    "persistent": "Resident programs draw items until none is left, in roles by the tickets of their SM.",
    "partition": "Some SMs begin with prefill, the others with decode; who runs dry takes over.",
}


@functools.cache
def emit(spec: AttentionSpec) -> str:
    """The file of one specialisation; its kernel is ``pod_attention``."""
    constants = {
        **spec.constants(),
        **spec.stride_constants(),
        "PREFILL_ROWS": spec.rows,
        "SPLIT_ROWS": spec.decode_rows,
        "KEYS": spec.keys,
        "STAGES": spec.stages,
        "NO_HOISTING": not spec.hoist,
        **fragments.COUNTER_CONSTANTS,
        "LOG2E": 1.4426950408889634,
    }
    if spec.sm == "program":
        constants["SMS"] = spec.sms
    return module(
        "Prefill and decode attention over paged keys and values in one launch",
        spec.subject(),
        constants,
        *fragments.states(spec.sinks),
        fold("pod_attention", "attend", spec.decided("LAYOUT", "ONE_PAGE", "CAPPED")),
        fold("attention_parts", "draw"),
        fold("pod_attention", "take", spec.decided("SCHEDULER")),
        fold("pod_attention", "run", spec.decided("UNIFORM")),
        fold("pod_attention", "pod_attention", spec.decided("SCHEDULER", "SM"), doc=_DOCS[spec.scheduler]),
        imports=fragments.IMPORT_SMID if spec.sm == "register" else "",
    )
