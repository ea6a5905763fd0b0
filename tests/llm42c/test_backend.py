"""torch.compile(model, backend="llm42"): correct, and rows that know nothing of their batch."""

from __future__ import annotations

import logging
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from llm42c.errors import OptionsError, UnsupportedModelError

LENGTH = 13
ROWS = 5


def _compiled(fn: Any, dynamic: bool | None = None, **options: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(fn, backend="llm42", dynamic=dynamic, options=options or None)


def _bits(t: Tensor) -> Tensor:
    return t.contiguous().view(torch.uint8)


def _rows_alone_and_together(fn: Any, rows: Tensor, sizes: tuple[int, ...] = (1, 2, 3, 5)) -> int:
    """How many rows change their bits with the size of the batch or their place in it."""
    whole, changed = fn(rows), 0
    generator = torch.Generator().manual_seed(0)
    for size in sizes:
        pick = torch.randperm(rows.shape[0], generator=generator)[:size]
        part = fn(rows[pick].contiguous())
        changed += sum(not torch.equal(_bits(part[i]), _bits(whole[j])) for i, j in enumerate(pick.tolist()))
    return changed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("llama", torch.float32),
        ("gpt2", torch.float32),
        ("gemma2", torch.float32),
        ("qwen3", torch.bfloat16),
    ],
)
def test_rows_of_a_model(family: str, dtype: torch.dtype) -> None:
    """All sizes in one dynamic graph and batch 1 in its own, which Dynamo always specialises."""
    built = tiny.model(family, dtype, layers=1)
    ids = tiny.ids(ROWS, LENGTH)
    with torch.no_grad():
        compiled = _compiled(built, dynamic=True, strict=True)
        logits = compiled(input_ids=ids).logits
        assert _rows_alone_and_together(lambda rows: compiled(input_ids=rows).logits, ids) == 0
        exact = tiny.model(family, dtype, layers=1).double()(input_ids=ids).logits
        eager = built(input_ids=ids).logits
    # As close to fp64 as eager code is, give or take: both round the same number of times.
    assert (logits - exact).abs().max() <= 2 * (eager - exact).abs().max() + 2.0**-23


class _Mlp(nn.Module):
    """Odd sizes: every loop over a row has a tail."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(37, 53), nn.Linear(53, 29)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x)) * torch.nn.functional.gelu(self.first(x))
        return torch.softmax(self.second(y).exp().sin(), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pointwise_tails_and_small_reductions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    compiled, x = _compiled(_Mlp().to(dtype), dynamic=True), 3 * torch.randn(61, 37).to(dtype)
    with torch.no_grad():
        assert _rows_alone_and_together(compiled, x, (1, 2, 3, 5, 7, 16, 33)) == 0


def test_free_reductions_do_depend_on_the_batch() -> None:
    """The control: without llm42's order the same rows differ on any CPU with vector units."""
    torch.manual_seed(0)
    x = 3 * torch.randn(61, 37)

    def pointwise(x: Tensor) -> Tensor:
        return torch.tanh(x) * torch.exp(x) + torch.sin(100 * x)

    mlp = _Mlp()
    with torch.no_grad():
        free = [_compiled(fn, dynamic=True, reductions="free") for fn in (mlp, pointwise)]
        sizes = (1, 2, 3, 5, 7, 16, 33)
        assert sum(_rows_alone_and_together(fn, x, sizes) for fn in free) > 0


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_stock_generate(implementation: str) -> None:
    """Hugging Face's own generate and caches around the compiled model; each row as if it were alone."""
    built = tiny.model("llama", layers=1)
    torch._dynamo.reset()
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    if implementation == "static":
        options |= {"cache_implementation": "static", "disable_compile": True}
    ids = tiny.ids(3, 7)
    eager = built.generate(ids, **options)
    built.forward = torch.compile(built.forward, backend="llm42", dynamic=True)
    runs = {n: built.generate(ids[:n], output_logits=True, **options) for n in (3, 1)}
    assert torch.equal(runs[3].sequences, eager.sequences)
    for step_all, step_one in zip(runs[3].logits, runs[1].logits, strict=True):
        assert torch.equal(_bits(step_all[0]), _bits(step_one[0]))


def test_gradients() -> None:
    """A compiled model trains: the operators carry autograd formulas."""
    ids = tiny.ids(2, LENGTH)

    def gradients(built: Any, run: Any) -> dict[str, Tensor]:
        run(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {n: p.grad.double() for n, p in built.named_parameters()}

    ours, eager = tiny.model("llama", layers=1), tiny.model("llama", layers=1)
    exact = tiny.model("llama", layers=1).double()
    got, plain, true = gradients(ours, _compiled(ours)), gradients(eager, eager), gradients(exact, exact)
    for name, gradient in true.items():
        # Eager code rounds as often as ours; its own error is the yardstick.
        error = (plain[name] - gradient).abs().max() + 2.0**-24 * gradient.abs().max()
        assert (got[name] - gradient).abs().max() <= 4 * error, name


def test_a_running_sum_is_refused_when_strict() -> None:
    def fn(x: Tensor) -> Tensor:
        return x.logcumsumexp(-1)

    with pytest.raises(Exception, match="logcumsumexp") as caught:
        _compiled(fn, strict=True)(torch.randn(3, 40))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), UnsupportedModelError)


def test_a_running_sum_is_named_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    def fn(x: Tensor) -> Tensor:
        return x.logcumsumexp(-1)

    x = torch.randn(3, 40)
    with caplog.at_level(logging.WARNING, logger="llm42c.backend"):
        out = _compiled(fn)(x)
    assert "logcumsumexp" in caplog.text
    assert (out - x.double().logcumsumexp(-1)).abs().max() <= 200 * 2.0**-24


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"options": {"reduction": "fixed"}}, "did you mean 'reductions'"),
        ({"options": {"reductions": "loose"}}, "must be one of"),
        ({"options": {"strict": "yes"}}, "must be bool"),
        ({"mode": "max-autotune"}, "has no mode"),
    ],
)
def test_bad_options(arguments: dict[str, Any], message: str) -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match=message) as caught:
        torch.compile(lambda x: x + 1, backend="llm42", **arguments)(torch.randn(3))
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), OptionsError)


_IN_A_NEW_PROCESS = """
import hashlib, sys, torch
torch.manual_seed(0)
layer = torch.nn.Linear(100, 70)
def fn(x):
    return torch.nn.functional.softmax(torch.tanh(layer(x)), dim=-1)
x = torch.randn(33, 100)
compiled = torch.compile(fn, backend="llm42", options={"reductions": sys.argv[1]})
with torch.no_grad():
    out = compiled(x)
from torch._dynamo.utils import counters
hits = counters["aot_autograd"]["autograd_cache_hit"]
print(hashlib.sha256(out.numpy().tobytes()).hexdigest(), hits, "llm42c" in sys.modules)
"""


def test_caches_tell_options_apart(tmp_path: Any) -> None:
    """Another option in between does not disturb: the second process finds its own artefact."""

    def run(option: str) -> list[str]:
        import os

        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        program = [sys.executable, "-c", textwrap.dedent(_IN_A_NEW_PROCESS), option]
        result = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()

    cold, free, warm = run("fixed"), run("free"), run("fixed")
    assert (cold[1], free[1], warm[1]) == ("0", "0", "1")
    assert cold[0] == warm[0] != free[0]
    assert cold[2] == "True"  # nothing of ours was imported: the entry point did it
