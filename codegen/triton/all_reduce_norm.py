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

from llm42c.codegen.triton.fold import fold
from llm42c.codegen.triton.source import module
from llm42c.codegen.triton.spec import DTYPES, SpecError, power_of_two

Form = Literal["one", "two", "shard", "sum"]
FORMS: tuple[Form, ...] = ("one", "two", "shard", "sum")

_FILE = "all_reduce_norm"
_DOCS = {
    "one": "RMSNorm of residual + the sum over the ranks, in one shot.",
    "two": "RMSNorm of residual + the sum over the ranks, in two shots.",
    "shard": "RMSNorm of residual + the sum over the ranks; residual and total: own rows, from 0.",
    "sum": "The sum over the ranks, in two shots; nothing but y is written.",
}


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
    element = {"ELEMENT": f"tl.{spec.dtype}"}
    weight = {"HAS_WEIGHT": spec.weight, "CAST_FIRST": spec.cast_first}
    branches = {
        "FORM": spec.form,
        "MEETS": spec.meetings,
        "FIRST_PART": 1 in spec.parts,
        "SECOND_PART": spec.form == "one" or 2 in spec.parts,
    }
    texts = [fold(_FILE, "meet")] if spec.meetings else []
    texts += [fold(_FILE, name, spelled=element) for name in ("row_of", "add_ranks")]
    texts += [fold(_FILE, "norm", weight)] if spec.form != "sum" else []
    texts += [fold(_FILE, _FILE, branches, doc=f"{_DOCS[spec.form]} y: [R, H].")]
    constants = {"SIZE": spec.size, "WIDTH": power_of_two(spec.size), "WORLD": spec.world}
    subject = f"rows of {spec.size} in {DTYPES[spec.dtype]} over {spec.world} ranks"
    title = _DOCS[spec.form].rstrip(".")
    return module(title, subject, constants, *texts)


@functools.cache
def emit_multimem(size: int, world: int) -> str:
    """The file of ``multimem_sum`` for bf16 rows; not deterministic. Raises SpecError for odd sizes."""
    if size % 8:
        raise SpecError(f"rows of {size} are no multiple of the 8 elements that the switch adds at once")
    constants = {"SIZE": size, "WORDS": power_of_two(size // 8), "WORLD": world}
    title = "Sum over the ranks in the order of the switch: not deterministic"
    return module(
        title,
        f"rows of {size} in bf16 over {world} ranks",
        constants,
        fold(_FILE, "meet"),
        fold(_FILE, "multimem_sum"),
    )


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
