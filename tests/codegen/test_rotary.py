"""Rotary embedding: the bits of Hugging Face's eager code."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as apply_partial
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from llm42c.codegen.ops import registry, rotary

registry.load()
op = torch.ops.llm42.rotary
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(tokens: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, heads, dim, generator=g).to(dtype)
    frequencies = 10000.0 ** (-torch.arange(0, dim, 2) / dim)
    angles = torch.randint(2000, (tokens, 1), generator=g) * frequencies
    angles = torch.cat((angles, angles), -1)  # [T, D]
    return x, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "dim"), [(9, 64), (3, 128), (2, 80), (1, 2), (2, 20)])
def test_bits_of_hugging_face(heads: int, dim: int, dtype: torch.dtype) -> None:
    x, cos, sin = inputs(13, heads, dim, dtype)
    q = x.transpose(0, 1)[None]  # [B, H, S, D]
    expected, _ = apply_rotary_pos_emb(q, q, cos[None], sin[None])
    y = op(x, cos, sin)
    assert torch.equal(y, expected[0].transpose(0, 1))
    assert torch.equal(y, rotary.rotary.reference(x, cos, sin))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding_would_differ(dtype: torch.dtype) -> None:
    x, cos, sin = inputs(13, 9, 64, dtype)
    single = rotary.rotary.reference(x.float(), cos.float(), sin.float()).to(dtype)
    assert not torch.equal(op(x, cos, sin), single)


def test_partial_rotation_copies_the_rest() -> None:
    x, _, _ = inputs(5, 2, 80, torch.bfloat16)
    _, cos, sin = inputs(5, 2, 20, torch.bfloat16)
    q = x.transpose(0, 1)[None]
    expected, _ = apply_partial(q, q, cos[None], sin[None])
    y = op(x, cos, sin)
    assert torch.equal(y, expected[0].transpose(0, 1))
    assert torch.equal(y[..., 20:], x[..., 20:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_rows_and_threads_change_nothing(dtype: torch.dtype) -> None:
    x, cos, sin = inputs(70, 9, 64, dtype)
    y = op(x, cos, sin)
    qkv = torch.randn(70, 20 * 64).to(dtype)
    qkv[:, 64 : 10 * 64] = x.reshape(70, -1)
    assert torch.equal(op(qkv[:, 64 : 10 * 64].unflatten(1, (9, 64)), cos, sin), y)
    assert torch.equal(op(x.transpose(0, 1).contiguous().transpose(0, 1), cos, sin), y)
    assert torch.equal(op(x.transpose(1, 2).contiguous().transpose(1, 2), cos, sin), y)
    table = torch.cat((cos, sin), -1)
    assert torch.equal(op(x, table[:, :64], table[:, 64:]), y)
    g = torch.Generator().manual_seed(1)
    for m in range(1, 71):
        pick = torch.randint(70, (m,), generator=g)
        assert torch.equal(op(x[pick], cos[pick], sin[pick]), y[pick])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(op(x, cos, sin), y)
    finally:
        torch.set_num_threads(before)
    assert op(x[:0], cos[:0], sin[:0]).shape == (0, 9, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, c: op(x[0], c, c), r"expected x \[T, H, D\]"),
        (lambda x, c: op(x, c[:2], c[:2]), r"expected cos \[T, R\] with T = 3"),
        (lambda x, c: op(x, c[:, :5], c[:, :5]), "even R"),
        (lambda x, c: op(x, torch.cat((c, c), 1), torch.cat((c, c), 1)), "R <= 8"),
        (lambda x, c: op(x, c, c[:, :4]), "of one shape"),
        (lambda x, c: op(x, c.half(), c), "expected cos of dtype"),
        (lambda x, c: op(x, c, c.half()), "expected sin of dtype"),
        (lambda x, c: op(x.long(), c.long(), c.long()), "expected float32, bfloat16 or float16"),
    ],
)
def test_errors_say_what_was_expected(call: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.zeros(3, 2, 8), torch.zeros(3, 8))


def test_opcheck_and_gradients() -> None:
    x, cos, sin = inputs(3, 2, 8, torch.float32)
    torch.library.opcheck(op.default, (x.transpose(0, 1), cos[:2], sin[:2]))
    tensors = [t.requires_grad_() for t in (x, cos, sin)]
    torch.library.opcheck(op.default, tuple(tensors))
    torch.library.opcheck(op.default, (x, cos[:, :4], sin[:, :4]))
    up = torch.randn(3, 2, 8)
    for width in (8, 4):
        args = (x, cos[:, :width], sin[:, :width])
        ours = torch.autograd.grad(op(*args), tensors, up)
        theirs = torch.autograd.grad(rotary.rotary.reference(*args), tensors, up)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
