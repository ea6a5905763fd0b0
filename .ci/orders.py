"""Write docs/orders.md from the orders that operators declare.

python .ci/orders.py            write the page
python .ci/orders.py --check    exit 1 if it is not the one that would be written
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from pathlib import Path

from llm42c import codegen
from llm42c.codegen import targets
from llm42c.codegen.operator import Operator
from llm42c.codegen.ops.registry import operators
from llm42c.codegen.order import COPY, Order

PAGE = Path(__file__).resolve().parents[1] / "docs" / "orders.md"
HEAD = (
    "# Orders\n\n"
    "Written by `.ci/orders.py` from the code: edit `codegen/order.py` and the files of the operators "
    "instead.\n\n"
    "An order fixes the bits of an operator on a target. It is a value with a name and a version, and "
    "the [contract](determinism.md) lists those of the operators that a graph calls. One version never "
    "changes a bit; two targets that differ in a bit have two orders.\n\n"
    "A simulator is the order as a program: plain torch, fp32 step by step, made of the functions of "
    "`codegen/simulate.py`, none of which calls a library's sum, product, exponential or square root in "
    "fp32. Kernels are compared with it bit for bit, in fp32, bf16 and fp16, on the examples that the "
    "operator declares (`tests/codegen/test_every_operator.py`), and the kernels of every instruction "
    "set with the digests that the simulators give (`tests/codegen/test_orders.py`). Sums over ranks "
    "take the tensors of all ranks.\n\n"
    "Copies need no simulator. The orders of GPUs whose matrix instructions, reduction trees or "
    "exponentials are the device's have none: what adds inside of them is not ours to specify. There "
    "the tests compare schedules with each other.\n"
)


def used_by(every: Mapping[str, Operator]) -> dict[Order, dict[str, list[str]]]:
    """Order → target → the operators with that order there, by name."""
    found: dict[Order, dict[str, list[str]]] = {}
    for target in targets.targets():
        for name, op in sorted(every.items()):
            if target.name not in op.orders:
                continue
            found.setdefault(target.order(op), {}).setdefault(target.name, []).append(name)
    return dict(sorted(found.items(), key=lambda item: str(item[0])))


def where(op: Operator, order: Order) -> str:
    """The file of its simulator; a dash if it has none."""
    if order not in op.simulators:
        return "–"
    path = Path(inspect.getfile(inspect.unwrap(op.simulators[order]))).resolve()
    root = Path(codegen.__file__).resolve().parents[1]
    return f"`{path.relative_to(root).as_posix()}`"


def section(order: Order, users: Mapping[str, list[str]], every: Mapping[str, Operator]) -> str:
    lines = [f"## `{order}`", "", order.text, "", "| operator | on | simulator |", "|---|---|---|"]
    for name in sorted({name for names in users.values() for name in names}):
        on = ", ".join(target for target, names in users.items() if name in names)
        lines.append(f"| `{name}` | {on} | {'' if order == COPY else where(every[name], order)} |")
    return "\n".join(lines) + "\n"


def page(every: Mapping[str, Operator]) -> str:
    """The whole page."""
    return "\n".join([HEAD, *(section(order, users, every) for order, users in used_by(every).items())])


def main(options: list[str], path: Path = PAGE) -> int:
    text = page(operators())
    if "--check" not in options:
        path.write_text(text, encoding="utf-8")
        return 0
    current = path.exists() and path.read_text(encoding="utf-8") == text
    print("docs/orders.md is current" if current else "docs/orders.md is not: run python .ci/orders.py")
    return 0 if current else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
