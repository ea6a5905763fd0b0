"""Orders are complete, and one version of an order is one set of bits, on every instruction set."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from order_bits import computing, digests

from llm42c.codegen.cpu import build
from llm42c.codegen.examples import for_specification
from llm42c.codegen.operator import Operator
from llm42c.codegen.ops.registry import operators, orders_of
from llm42c.codegen.order import Order
from llm42c.codegen.targets import targets

HERE = Path(__file__).parent
GOLDEN = HERE / "golden" / "orders_cpu.json"


OF_CPUS = {"linear_blocks", "linear_silu_mul_blocks", "linear_add_blocks"}


def test_every_operator_has_an_order_on_every_target() -> None:
    for name, op in operators().items():
        wanted = {"cpu"} if name in OF_CPUS else {target.name for target in targets()}
        assert set(op.orders) == wanted, name
        assert all(o.version >= 1 and o.text for o in op.orders.values())


def test_one_name_and_version_is_one_order() -> None:
    orders = {order for op in operators().values() for order in op.orders.values()}
    assert len({str(order) for order in orders}) == len(orders)


def test_orders_are_listed_by_name_and_version() -> None:
    assert orders_of(["rotary", "linear", "linear"], "cpu") == {
        "linear": "fma-chain/2",
        "rotary": "pointwise/1",
    }
    assert orders_of(["linear"], "cuda") != orders_of(["linear"], "cpu")
    assert str(Order("x", 3, "")) == "x/3"


def test_every_order_has_golden_bits() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert {name.split()[0] for name in golden} == computing(operators()).keys()
    for name in golden:
        operator, order = name.split()
        assert order == str(operators()[operator].orders["cpu"])


def test_bits_of_a_version_never_change() -> None:
    """If this fails, a kernel gives other bits: raise the version of its order, then write the file anew with

    ``python tests/codegen/order_bits.py portable > tests/codegen/golden/orders_cpu.json``.
    """
    assert bits_on(build.widest_isa()) == json.loads(GOLDEN.read_text())


@pytest.mark.slow
def test_golden_bits_are_those_of_the_simulators() -> None:
    """So the digests above, of every instruction set, are measured against the specification."""

    def simulated(op: Operator, example: tuple[Any, ...]) -> list[torch.Tensor]:
        results = op.simulators[op.orders["cpu"]](*for_specification(example))
        return [results] if isinstance(results, torch.Tensor) else list(results)

    assert digests(simulated) == json.loads(GOLDEN.read_text())


@pytest.mark.slow
def test_bits_of_a_version_are_those_of_every_instruction_set() -> None:
    golden = json.loads(GOLDEN.read_text())
    isas = [isa for isa in build.ISAS if can_run(isa) and isa != build.widest_isa()]
    assert "portable" in isas
    for isa in isas:
        assert bits_on(isa) == golden, isa


def bits_on(isa: str) -> dict[str, str]:
    command = [sys.executable, str(HERE / "order_bits.py"), isa]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(output)
    return found


def can_run(isa: str) -> bool:
    try:
        build.require_isa(isa)
    except build.BuildError:
        return False
    return True


def test_the_page_of_orders_is_current(tmp_path: Path) -> None:
    script = HERE.parents[1] / ".ci" / "orders.py"
    spec = importlib.util.spec_from_file_location("orders_page", script)
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(writer)
    assert writer.main(["--check"]) == 0, "run python .ci/orders.py"
    copy = tmp_path / "orders.md"
    assert writer.main([], copy) == 0
    assert all(f"`{name}`" in copy.read_text() for name in operators())
    copy.write_text(copy.read_text().replace("k ascending", "k descending"))
    assert writer.main(["--check"], copy) == 1
