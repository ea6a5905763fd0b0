"""All-reduce, residual addition and RMSNorm in one kernel over symmetric memory: emitters.

Every rank's partial sums lie in a buffer that all ranks of the node can read; a table holds the buffers'
addresses. A row is added over the ranks in ascending order in fp32 and rounded once, added to the residual
and normed as ``codegen/triton/norm.py`` does: one program a row, with a layout that follows from the row's
length alone. So a row's bits do not depend on the other rows, on the grid, or on which form computes it:

``one``     each rank reads all rows of all ranks: one meeting before, one after; for small messages
``two``     each rank adds its own rows in place, the ranks meet, then each reads the sums and norms all rows
``shard``   as ``two``, but the residual is divided: each rank adds and norms its own rows only
``sum``     the all-reduce alone, as ``two``

Meetings. Programs of one number on all ranks wait for each other through flags in the ranks' signal pads,
one flag for each (program, sender): a sender turns the receiver's flag from 0 to 1 with release semantics,
the receiver turns it back with acquire semantics, both at system scope. Flags are 0 after every meeting, so
pads are never reset. All ranks must launch the same number of programs, which is why :func:`programs` is a
function of shapes alone; a program reads after a meeting only what programs of its own number wrote before.

``multimem`` lets the switch add (NVLink SHARP): its order is not specified, so it is for those who ask for
it by name and give up the promise.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import DTYPES, SpecError, power_of_two

Form = Literal["one", "two", "shard", "sum"]
FORMS: tuple[Form, ...] = ("one", "two", "shard", "sum")

_MEET = '''
@triton.jit
def meet(signals, rank):
    """Programs of this number on all ranks wait for each other; what they wrote before is seen after."""
    tl.debug_barrier()
    slot = tl.program_id(0) * WORLD
    pads = signals.to(tl.pointer_type(tl.int64))
    for peer in tl.static_range(WORLD):
        flag = tl.load(pads + peer).to(tl.pointer_type(tl.int32)) + slot + rank
        old = tl.atomic_cas(flag, 0, 1, sem="release", scope="sys")
        while old != 0:
            old = tl.atomic_cas(flag, 0, 1, sem="release", scope="sys")
    for peer in tl.static_range(WORLD):
        flag = tl.load(pads + rank).to(tl.pointer_type(tl.int32)) + slot + peer
        old = tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys")
        while old != 1:
            old = tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys")
    tl.debug_barrier()
'''
_ROW_OF = '''
@triton.jit
def row_of(buffers, peer, row):
    """Address of a row [H] in the buffer of a rank."""
    table = buffers.to(tl.pointer_type(tl.int64))
    return tl.load(table + peer).to(tl.pointer_type(tl.@ELEMENT@)) + tl.cast(row, tl.int64) * SIZE
'''
_ADD_RANKS = '''
@triton.jit
def add_ranks(buffers, row):
    """The sum of a row over the ranks, ascending, in fp32, rounded once. → [WIDTH]"""
    i = tl.arange(0, WIDTH)
    total = tl.load(row_of(buffers, 0, row) + i, mask=i < SIZE, other=0.0).to(tl.float32)
    for peer in tl.static_range(1, WORLD):
        total += tl.load(row_of(buffers, peer, row) + i, mask=i < SIZE, other=0.0).to(tl.float32)
    return total.to(tl.@ELEMENT@)
'''
_NORM = '''
@triton.jit
def norm(x, residual_row, total_row, weight_ptr, eps, offset):
    """RMSNorm of residual + x; the sum goes to total_row. x: [WIDTH] → [WIDTH]"""
    i = tl.arange(0, WIDTH)
    held = i < SIZE
    residual = tl.load(residual_row + i, mask=held, other=0.0)
    x = (residual.to(tl.float32) + x.to(tl.float32)).to(x.dtype)
    tl.store(total_row + i, x, mask=held)
    wide = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt_rn(tl.sum(wide * wide, 0) / SIZE + eps)
    normed = wide * rstd
@WEIGHT@
    return y.to(x.dtype)
'''
_PLAIN = """
    y = normed
"""
_CAST_FIRST = """
    weight = tl.load(weight_ptr + i, mask=held, other=0.0).to(tl.float32)
    weight = (weight + offset).to(x.dtype).to(tl.float32)
    y = normed.to(x.dtype).to(tl.float32) * weight
"""
_IN_FP32 = """
    weight = tl.load(weight_ptr + i, mask=held, other=0.0).to(tl.float32)
    y = normed * (weight + offset)
"""
_HEAD = '''
@triton.jit
def all_reduce_norm(
    buffers, signals, residual_ptr, weight_ptr, y_ptr, total_ptr, rows, residual_stride, eps, offset, rank
):
    """@DOC@ y: [R, H]."""
    i = tl.arange(0, WIDTH)
    held = i < SIZE
    number = tl.program_id(0)
    programs = tl.num_programs(0)
'''
_FIRST = """
    meet(signals, rank)
"""
_ONE = """
    for row in range(number, rows, programs):
        at = tl.cast(row, tl.int64)
        x = add_ranks(buffers, row)
        y = norm(x, residual_ptr + at * residual_stride, total_ptr + at * SIZE, weight_ptr, eps, offset)
        tl.store(y_ptr + at * SIZE + i, y, mask=held)
"""
_OWN = """
    chunk = tl.cdiv(rows, WORLD)
    for k in range(number, tl.minimum(chunk, rows - rank * chunk), programs):
        row = rank * chunk + k
        tl.store(row_of(buffers, rank, row) + i, add_ranks(buffers, row), mask=held)
"""
_OWN_NORMED = """
    chunk = tl.cdiv(rows, WORLD)
    for k in range(number, tl.minimum(chunk, rows - rank * chunk), programs):
        row = rank * chunk + k
        at = tl.cast(k, tl.int64)
        x = add_ranks(buffers, row)
        y = norm(x, residual_ptr + at * residual_stride, total_ptr + at * SIZE, weight_ptr, eps, offset)
        tl.store(row_of(buffers, rank, row) + i, y, mask=held)
"""
_ALL = """
    for peer in tl.static_range(WORLD):
        for k in range(number, tl.minimum(chunk, rows - peer * chunk), programs):
            row = peer * chunk + k
            at = tl.cast(row, tl.int64)
            x = tl.load(row_of(buffers, peer, row) + i, mask=held, other=0.0)
@LAST@
            tl.store(y_ptr + at * SIZE + i, x, mask=held)
"""
_NORM_ALL = """
            x = norm(x, residual_ptr + at * residual_stride, total_ptr + at * SIZE, weight_ptr, eps, offset)
"""
_DOCS = {
    "one": "RMSNorm of residual + the sum over the ranks, in one shot.",
    "two": "RMSNorm of residual + the sum over the ranks, in two shots.",
    "shard": "RMSNorm of residual + the sum over the ranks; residual and total: own rows, from 0.",
    "sum": "The sum over the ranks, in two shots; nothing but y is written.",
}
_MULTIMEM = '''
@triton.jit
def multimem_sum(multicast, signals, rows, rank):
    """The sum over the ranks in the order of the switch, in place in every rank's buffer. Own rows."""
    word = tl.arange(0, WORDS)
    held = (word < SIZE // 8).to(tl.int32)
    chunk = tl.cdiv(rows, WORLD)
    meet(signals, rank)
    for k in range(tl.program_id(0), tl.minimum(chunk, rows - rank * chunk), tl.num_programs(0)):
        at = multicast + (tl.cast(rank * chunk + k, tl.int64) * SIZE + word * 8) * 2
        a, b, c, d = tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $5, 0;"
            " @p multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {$0, $1, $2, $3}, [$4]; }",
            "=r,=r,=r,=r,l,r", [at, held], dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False, pack=1,
        )  # fmt: skip
        tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $6, 0;"
            " @p multimem.st.relaxed.sys.global.v4.bf16x2 [$1], {$2, $3, $4, $5}; mov.u32 $0, 0; }",
            "=r,l,r,r,r,r,r", [at, a, b, c, d, held], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    meet(signals, rank)
'''


@dataclass(frozen=True)
class FusedSpec:
    """One kernel: rows of ``size`` in ``dtype`` over ``world`` ranks.

    ``meetings`` and ``parts`` are for running the ranks one after the other: without meetings, the parts of
    a kernel before (1) and after (2) its inner meeting are launched rank by rank.
    """

    size: int
    dtype: str
    world: int
    form: Form = "one"
    weight: bool = True
    cast_first: bool = True
    meetings: bool = True
    parts: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise SpecError(f"dtype must be one of {', '.join(DTYPES)}, not {self.dtype}")
        if self.form not in FORMS:
            raise SpecError(f"form must be one of {', '.join(FORMS)}, not {self.form!r}")
        if self.world < 1 or self.size < 1:
            raise SpecError(f"{self.world} ranks and rows of {self.size} are no group and no rows")

    @property
    def warps(self) -> int:
        """As many as the norm alone takes: its sum then has the same shape."""
        return min(16, max(1, power_of_two(self.size) // 512))


@functools.cache
def emit(spec: FusedSpec) -> str:
    """The file of one specialisation; its kernel is ``all_reduce_norm``."""
    meeting = _FIRST if spec.meetings else ""
    last = _NORM_ALL if spec.form == "two" else ""
    everyone = _ALL.replace("@LAST@\n", last.lstrip("\n"))
    own = _OWN_NORMED if spec.form == "shard" else _OWN
    if spec.form == "one":
        steps = [meeting, _ONE, meeting]
    else:
        # The second part alone needs the chunk too.
        chunk = "    chunk = tl.cdiv(rows, WORLD)\n" if 1 not in spec.parts else ""
        steps = [meeting, own if 1 in spec.parts else chunk]
        steps += [meeting, everyone, meeting] if 2 in spec.parts else []
    body = "".join(step.lstrip("\n") for step in steps)
    kernel = _HEAD.replace("@DOC@", _DOCS[spec.form]).lstrip("\n") + body
    weight = _PLAIN if not spec.weight else _CAST_FIRST if spec.cast_first else _IN_FP32
    helpers = [_MEET] if spec.meetings else []
    helpers += [_ROW_OF, _ADD_RANKS]
    if spec.form != "sum":
        helpers.append(_NORM.replace("@WEIGHT@", weight.strip("\n")))
    constants = {"SIZE": spec.size, "WIDTH": power_of_two(spec.size), "WORLD": spec.world}
    subject = f"rows of {spec.size} in {DTYPES[spec.dtype]} over {spec.world} ranks"
    title = _DOCS[spec.form].rstrip(".")
    texts = [text.replace("@ELEMENT@", spec.dtype) for text in (*helpers, kernel)]
    return module(title, subject, constants, *texts)


@functools.cache
def emit_multimem(size: int, world: int) -> str:
    """The file of ``multimem_sum`` for bf16 rows; not deterministic. Raises SpecError for odd sizes."""
    if size % 8:
        raise SpecError(f"rows of {size} are no multiple of the 8 elements that the switch adds at once")
    constants = {"SIZE": size, "WORDS": power_of_two(size // 8), "WORLD": world}
    title = "Sum over the ranks in the order of the switch: not deterministic"
    return module(title, f"rows of {size} in bf16 over {world} ranks", constants, _MEET, _MULTIMEM)


def programs(form: Form, rows: int, world: int, pad_bytes: int, sms: int) -> int:
    """Programs to launch: a function of shapes alone, so equal on all ranks.

    At most one a multiprocessor, because all must run at once, and no more than the pads have flags for.
    Raises SpecError for pads that are too small for a single program.
    """
    flags = pad_bytes // (4 * world)
    if flags < 1:
        raise SpecError(f"signal pads of {pad_bytes} bytes hold no flags for {world} ranks")
    work = rows if form == "one" else -(-rows // world)
    return max(1, min(work, flags, sms))
