"""CONTRIBUTING's recipe for an operator, followed from outside: three files in a folder, and nothing else.

The kernel for CPUs is Python there, or C++.

They are written to a temporary folder and given to ``registry.add`` in processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FILES = {
    "toy_operator.py": '''
        import torch
        from torch import Tensor

        from llm42c.codegen import simulate
        from llm42c.codegen.examples import ROWS, WIDTH, Numbers
        from llm42c.codegen.operator import Tokens, operator
        from llm42c.codegen.order import LANES, TREE


        def examples(r: Numbers):
            yield (r(ROWS, WIDTH),)
            yield (r(3, ROWS, WIDTH).transpose(0, 1),)


        @operator(orders={"cpu": LANES, "cuda": TREE}, tokens=Tokens.ROWS, examples=examples)
        def toy_mean_abs(x: Tensor) -> Tensor:
            """x: [..., N] → [..., 1], the mean of |x| over the last dimension."""
            return x.double().abs().mean(-1, keepdim=True)


        @toy_mean_abs.fake
        def _(x):
            return x.new_empty(*x.shape[:-1], 1)


        @toy_mean_abs.simulator(LANES)
        def _(x):
            return simulate.div(simulate.lane_sum(x.float().abs()), x.shape[-1]).to(x.dtype)
    ''',
    "toy_on_cpu.py": """
        import torch

        from llm42c.codegen.operator import implements


        @implements("toy_mean_abs", "cpu")
        def mean_abs(x):
            size = x.shape[-1]
            lanes = torch.zeros(*x.shape[:-1], LANES)
            for begin in range(0, size, LANES):
                part = x[..., begin : begin + LANES].float().abs()
                lanes[..., : part.shape[-1]] += part
            while lanes.shape[-1] > 1:
                half = lanes.shape[-1] // 2
                lanes = lanes[..., :half] + lanes[..., half:]
            return (lanes / size).to(x.dtype)


        LANES = 16
    """,
    "toy_on_gpu.py": '''
        import torch

        from llm42c.codegen.operator import implements
        from llm42c.codegen.triton import kernel
        from llm42c.codegen.triton.devices import device_of
        from llm42c.codegen.triton.source import module

        TEXT = """
        @triton.jit
        def toy_mean_abs(x_ptr, y_ptr, size):
            row = tl.program_id(0).to(tl.int64)
            lanes = tl.zeros([BLOCK], tl.float32)
            for begin in range(0, size, BLOCK):
                i = begin + tl.arange(0, BLOCK)
                x = tl.load(x_ptr + row * size + i, mask=i < size, other=0.0).to(tl.float32)
                lanes += tl.abs(x)
            tl.store(y_ptr + row, (tl.sum(lanes, 0) / size).to(y_ptr.dtype.element_ty))
        """
        SOURCE = module("toy_mean_abs", "rows in 256 lanes", {"BLOCK": 256}, TEXT)


        def kernels(device):
            from llm42c.codegen.triton.catalog import Kernel

            yield Kernel("toy_mean_abs", "toy_mean_abs", SOURCE, "bfloat16")


        @implements("toy_mean_abs", "cuda", kernels=kernels)
        def mean_abs(x):
            rows = kernel.aligned(x.reshape(-1, x.shape[-1]).contiguous())
            y = x.new_empty(*x.shape[:-1], 1)
            fn = kernel.load("toy_mean_abs", SOURCE, device_of(x.device))
            fn[(len(rows),)](rows, y, rows.shape[1], num_warps=4, **kernel.OPTIONS)
            return y
    ''',
}
# The same with a kernel in C++, which the declaration names.
IN_CPP = {
    "toy_operator.py": FILES["toy_operator.py"]
    + """
        from pathlib import Path

        toy_mean_abs.compiled("cpu", Path(__file__).with_name("toy_on_cpu.cpp"))
    """,
    "toy_on_cpu.cpp": """
        #include "bind_linear.h"
        #include "kernels/element.h"
        #include "kernels/parallel.h"

        namespace {

        using namespace llm42;
        constexpr int LANES = 16;

        bind::Tensor mean_abs(const bind::Tensor& x) {
          const bind::MatrixView view = bind::as_rows(x, "toy_mean_abs");
          bind::Dims sizes = bind::dims_of(x.sizes());
          sizes.back() = 1;
          const bind::Tensor out = bind::empty(sizes, x.scalar_type());
          with_element(bind::dtype_of(x, "toy_mean_abs"), [&]<class T>(T) {
            const T* from = static_cast<const T*>(view.keep.const_data_ptr());
            T* to = static_cast<T*>(out.mutable_data_ptr());
            parallel_rows(view.rows, view.rows * view.cols, 1 << 14, bind::num_threads(), [&](int64_t row) {
              float lanes[16] = {};  // LANES of them
              for (int64_t i = 0; i < view.cols; i++)
                lanes[i % LANES] += std::fabs(to_float(from[row * view.stride + i]));
              to[row] = from_float<T>(hsum(V16::load(lanes)) / float(view.cols));
            });
          });
          return out;
        }

        }  // namespace

        STABLE_TORCH_LIBRARY_IMPL(llm42, CPU, m) { m.impl("toy_mean_abs", TORCH_BOX(&mean_abs)); }
    """,
    "toy_on_gpu.py": FILES["toy_on_gpu.py"],
}
ADD = """
    import json, sys
    sys.path[:0] = [{folder!r}, {here!r}]
    import torch
    from llm42c.codegen.ops import registry
    import importlib, pathlib
    import toy_operator
    modules = [importlib.import_module(file.stem) for file in pathlib.Path(sys.path[0]).glob("*.py")]
"""
PICKED_UP = """
    registry.load()
    before = set(registry.operators())
    added = registry.add(*modules)

    import order_bits
    import llm42c
    from llm42c.codegen.implementation import implementation_of
    from llm42c.passes.kinds import Kind, kind

    def normed(x):
        return torch.ops.llm42.toy_mean_abs(x) * 2

    graph = torch.fx.symbolic_trace(normed).graph
    call = next(n for n in graph.nodes if "toy" in str(n.target))
    x = torch.arange(-20.0, 20.0).reshape(2, 20)
    def compute(op, example):
        return order_bits.kernel(op, example) if op.name == "toy_mean_abs" else []
    print(json.dumps({
        "new": sorted(set(registry.operators()) - before),
        "where": registry.implementations()["toy_mean_abs"],
        "orders": [registry.orders_of(["toy_mean_abs"], t)["toy_mean_abs"] for t in ("cpu", "cuda")],
        "sources": sorted(implementation_of(["toy_mean_abs"], "cpu")),
        "kind": kind(call) is Kind.OPERATOR,
        "explained": str(llm42c.explain(normed, x)),
        "compiled": torch.equal(torch.compile(normed, backend="llm42")(x), normed(x)),
        "digest": "toy_mean_abs lanes16/1" in order_bits.digests(compute),
    }))
"""
AHEAD = """
    registry.add(*modules)
    from llm42c.codegen.triton import devices
    from llm42c.codegen.triton.catalog import kernels
    h200 = devices.from_table("NVIDIA H200")
    (mine,) = [k for k in kernels(h200) if k.label.startswith("toy")]
    found = mine.compile(h200)
    print(json.dumps({"spills": found.resources.spills, "registers": found.resources.registers}))
"""
INTERPRETED = """
    registry.add(*modules)
    from llm42c.codegen.examples import Numbers
    x = Numbers(torch.float32)(7, 577)
    whole = registry.implemented("cuda")["toy_mean_abs"](x)
    alone = torch.cat([registry.implemented("cuda")["toy_mean_abs"](row[None]) for row in x])
    error = (whole.double() - toy_operator.toy_mean_abs.reference(x)).abs().max()
    print(json.dumps({"alone": torch.equal(whole, alone), "error": float(error)}))
"""
GENERIC = """
    registry.add(*modules)
    import pytest
    sys.exit(pytest.main(["-q", "-k", "toy_mean_abs", sys.path[1] + "/test_every_operator.py"]))
"""


def written(folder: Path, files: dict[str, str]) -> Path:
    assert len(files) <= 3
    for name, text in files.items():
        (folder / name).write_text(textwrap.dedent(text))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path, FILES)


@pytest.fixture(params=[FILES, IN_CPP], ids=["python", "c++"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return written(tmp_path, request.param)


def run(folder: Path, program: str, **environment: str) -> str:
    program = textwrap.dedent(ADD).format(folder=str(folder), here=str(HERE)) + textwrap.dedent(program)
    command = [sys.executable, "-c", program]
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def result(folder: Path, program: str, **environment: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(folder, program, **environment).splitlines()[-1])
    return found


def test_three_files_are_an_operator_everywhere(either: Path) -> None:
    found = result(either, PICKED_UP)
    assert found["new"] == ["toy_mean_abs"]
    (on_cpu,) = either.glob("toy_on_cpu.*")
    assert found["where"] == {"cpu": on_cpu.name.removesuffix(".py"), "cuda": "toy_on_gpu"}
    assert found["orders"] == ["lanes16/1", "row-tree/1"]
    assert "composites" in found["sources"]
    assert found["kind"]
    assert found["compiled"]
    assert found["digest"]
    assert "toy_mean_abs" in found["explained"]


def test_opcheck_fakes_and_the_order_test_find_it(either: Path) -> None:
    assert "7 passed" in run(either, GENERIC)


def test_the_order_test_refuses_another_order(either: Path) -> None:
    """An edited kernel is compiled anew."""
    (wrong,) = either.glob("toy_on_cpu.*")
    wrong.write_text(wrong.read_text().replace("LANES = 16", "LANES = 8"))
    with pytest.raises(AssertionError, match="test_kernels_are_the_simulator_bit_for_bit"):
        run(either, GENERIC)


MISSING = """
    registry.add(*modules)
    from llm42c.codegen.cpu.build import BuildError
    try:
        registry.load()
    except BuildError as error:
        print(json.dumps(str(error).splitlines()))
"""


@pytest.mark.parametrize("broken", [False, True])
def test_a_kernel_that_is_not_there_or_does_not_compile_is_an_error(tmp_path: Path, broken: bool) -> None:
    source = written(tmp_path, IN_CPP) / "toy_on_cpu.cpp"
    if broken:
        source.write_text("an error")
    else:
        source.unlink()
    lines = json.loads(run(tmp_path, MISSING).splitlines()[-1])
    assert str(source) in lines[0]
    assert broken or len(lines) == 1


def test_its_kernel_compiles_ahead_of_time(folder: Path) -> None:
    pytest.importorskip("triton")
    found = result(folder, AHEAD)
    assert found["spills"] == 0
    assert found["registers"] > 0


def test_its_kernel_runs_interpreted(folder: Path) -> None:
    pytest.importorskip("triton")
    found = result(folder, INTERPRETED, TRITON_INTERPRET="1")
    assert found["alone"]
    assert found["error"] < 577 * 2.0**-24
