"""Models on a GPU, as far as a machine without one can tell: devices, operators, errors, identity."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm42c import backend, device
from llm42c.capture import dynamo
from llm42c.capture.packed import PackedInputs
from llm42c.codegen import targets
from llm42c.codegen.cpu import build
from llm42c.codegen.ops import registry
from llm42c.codegen.triton import target as gpu
from llm42c.codegen.triton.devices import from_table
from llm42c.codegen.triton.target import GpuTarget
from llm42c.compile import compiler
from llm42c.compile.compiler import ModelCompiler
from llm42c.compile.dump import Dump
from llm42c.errors import DeviceError
from llm42c.options import Options

CUDA = torch.device("cuda", 0)
PLACE = torch.device("meta")


def _batch() -> PackedInputs:
    """Two sequences and padding, on the CPU as the packer makes them."""
    return PackedInputs(
        input_ids=torch.zeros(8, dtype=torch.int64),
        positions=torch.zeros(8, dtype=torch.int64),
        slot_mapping=torch.full((8,), -1),
        cu_seqlens_q=torch.tensor([0, 5, 6], dtype=torch.int32),
        kv_lens=torch.tensor([5, 1], dtype=torch.int32),
        block_table=torch.zeros(2, 3, dtype=torch.int32),
        logits_indices=torch.tensor([4, 5, 0]),
    )


class OneDevice(TorchDispatchMode):
    """Remembers the llm42 operators that are called; every tensor that one is given must lie on ``PLACE``."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "llm42":
            places = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            assert places == {PLACE}, f"{func}: {places}"
            self.called.append(func._opname)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data stand for those of a GPU: like them, they are not the CPU's, and do not mix."""
    real = targets.of
    monkeypatch.setattr(targets, "of", lambda place: PRETENDED if place == PLACE else real(place))
    monkeypatch.setattr(dynamo, "require_supported", lambda model: None)
    monkeypatch.setattr(compiler, "checked_digest", lambda model: "w")
    monkeypatch.setattr(build, "build", lambda: pytest.fail("compiled for the CPU"))


class Pretended(GpuTarget):
    """Of the device whose tensors have no data."""

    def __init__(self) -> None:
        self.steps = 0

    def require(self, device: torch.device) -> None:
        pass

    def identity(self, device: torch.device, foreign: bool, threads: bool) -> dict[str, str]:
        return {}

    def step(self) -> AbstractContextManager[None]:
        self.steps += 1
        return super().step()


PRETENDED = Pretended()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_a_packed_model_stays_on_its_device(
    family: str, pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured, packed and called without one tensor on the CPU, and without a C++ compiler."""
    forms = ModelCompiler(tiny.model(family).to(PLACE), keep_originals=True)
    model = forms.compile("pinned")
    cache = model.new_kv_cache(4, 16)
    assert {t.device for t in (*cache.k, *cache.v)} == {PLACE}
    steps = PRETENDED.steps
    with OneDevice() as seen:
        logits = model.forward(_batch(), cache)
    assert (logits.shape, logits.device) == ((3, model.vocab_size), PLACE)
    assert seen.called.count("paged_attention") == 2
    assert PRETENDED.steps == steps + 1, "one step around all layers"
    for name in {*seen.called, "linear_pack", "linear_unpack", "sample", "token_logprobs", "top_logprobs"}:
        assert PRETENDED.where(registry.operators()[name]), name


def test_the_backend_takes_a_model_on_another_device(
    pretended: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, seen = [], OneDevice()

    def observe(gm: Any, inputs: list[Any]) -> Any:
        found.append(backend.rewrite_plain(gm, inputs, Options(strict=True), Dump(None, "test")))

        def run(*args: Any) -> Any:
            with seen:
                return gm.forward(*args)

        return run

    torch._dynamo.reset()
    built = tiny.model("llama", layers=1).to(PLACE)
    with torch.no_grad():
        ids = torch.zeros(2, 7, dtype=torch.int64, device=PLACE)
        logits = torch.compile(built, backend=observe)(input_ids=ids, use_cache=False).logits
    torch._dynamo.reset()
    assert logits.device == PLACE
    assert {"linear_dense", "rms_norm", "dense_attention"} <= set(seen.called)
    assert not found[0].unplaced


def test_a_compiled_graph_shares_work_lists_among_its_calls() -> None:
    from llm42c.codegen.triton import attention

    def shared(*args: Any) -> bool:
        return attention._current.get() is not None

    assert device.in_steps(shared, CUDA)()
    assert not device.in_steps(shared, device.CPU)(), "a CPU's step is its own"
    assert attention._current.get() is None


def test_operators_that_nothing_computes_there_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    registry.define()
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.llm42.silu_mul.default, (x,)))
    backend.require_implemented(graph, CUDA)
    monkeypatch.setattr(GpuTarget, "where", lambda self, op: None)
    with pytest.raises(DeviceError, match="nothing computes llm42::silu_mul"):
        backend.require_implemented(graph, CUDA)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there() -> None:
    with pytest.raises(DeviceError, match="device cuda was asked for, and there is no GPU"):
        device.parse_device("cuda")


def test_devices_by_name() -> None:
    assert device.parse_device("cpu") == device.CPU
    for name in ("tpu", "cuda:1", "CPU", ""):
        with pytest.raises(DeviceError, match="must be cpu or cuda"):
            device.parse_device(name)


def test_no_operators_on_other_devices() -> None:
    model, x = torch.nn.Linear(4, 4, device=PLACE), torch.empty(2, 4, device=PLACE)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"DeviceError: .*none for meta"):
        torch.compile(model, backend="llm42")(x)


def test_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    device.target_of(device.CPU)
    with pytest.raises(DeviceError, match="pip install triton"):
        device.target_of(CUDA)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\n", "570.86.15"),
        ("nothing of the kind", ""),
    ],
)
def test_version_of_the_driver(
    text: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "version").write_text(text)
    monkeypatch.delattr(torch._C, "_cuda_getDriverVersion", raising=False)
    assert gpu.driver_version(tmp_path / "version") == version
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    assert gpu.driver_version(tmp_path / "version") == (version or "CUDA 13000")
    assert gpu.driver_version(tmp_path / "absent") == "CUDA 13000"


def test_identity_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    h200, h100 = from_table("NVIDIA H200"), from_table("NVIDIA H100 PCIe")
    monkeypatch.setattr(gpu.devices, "detect", lambda index: h200)
    monkeypatch.setattr(gpu, "driver_version", lambda: "570.1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    mine = gpu.TARGET.identity(CUDA, False, False)
    assert mine["gpu"] == "NVIDIA H200 sm_90"
    assert mine["driver"] == "570.1"
    assert mine["target"] == h200.hash
    assert {"cuda", "triton", "torch"} <= mine.keys()
    monkeypatch.setattr(gpu.devices, "detect", lambda index: h100)
    assert gpu.TARGET.identity(CUDA, False, False)["target"] != mine["target"]


def test_layers_share_one_work_list_and_compute_what_the_cpu_does() -> None:
    """The whole packed model on the Triton kernels, interpreted, in a process of its own."""
    pytest.importorskip("triton")
    script = Path(__file__).with_name("interpreted_model.py")
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["layers"] == 2
    assert found["plans in a step"] == 1
    assert found["plans without a step"] == 2, "the negative control"
    assert found["plans of two steps"] == 2
    assert found["error"] < found["bound"]
    assert "paged_attention" in found["operators"]
    assert "linear_silu_mul" in found["operators"]
