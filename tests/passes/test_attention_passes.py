"""SDPA calls and attention written out become the operator, on unrepeated keys and values."""

from __future__ import annotations

import pytest
import torch
from graphs import apply, calls, capture, run, same_bits
from transformers.integrations.sdpa_attention import repeat_kv

from llm42c.passes.attention_eager import attention_eager
from llm42c.passes.attention_sdpa import attention_sdpa
from llm42c.passes.check import unplaced

F = torch.nn.functional
OP = torch.ops.llm42.dense_attention
G = torch.Generator().manual_seed(6)
Q = torch.randn(2, 4, 7, 8, generator=G)
K, V = torch.randn(2, 2, 9, 8, generator=G), torch.randn(2, 2, 9, 8, generator=G)
K4, V4 = repeat_kv(K, 2), repeat_kv(V, 2)
SEEN = torch.rand(2, 1, 7, 9, generator=G) > 0.3
ADDED = torch.where(SEEN, 0.0, torch.finfo(torch.float32).min)
SCALE = 8**-0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("fn", "mask", "scale", "causal"),
    [
        (lambda q, k, v, m: F.scaled_dot_product_attention(q, repeat_kv(k, 2), repeat_kv(v, 2)), 0, SCALE, 0),
        (
            lambda q, k, v, m: F.scaled_dot_product_attention(
                q, k.repeat_interleave(2, dim=1), v.repeat_interleave(2, 1), m
            ),
            1,
            SCALE,
            0,
        ),
        (
            lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m, scale=0.3, enable_gqa=True),
            1,
            0.3,
            0,
        ),
        (
            lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, None, 0.0, True, enable_gqa=True),
            0,
            SCALE,
            1,
        ),
    ],
)
def test_sdpa(fn, mask, scale, causal, dynamic, dtype):
    q, k, v = Q.to(dtype), K.to(dtype), V.to(dtype)
    gm = capture(fn, q, k, v, SEEN, dynamic=dynamic)
    report = apply(gm, attention_sdpa)
    assert len(report.matches) == 1
    assert set(calls(gm)) <= {"llm42::dense_attention", "item"}
    assert same_bits(run(gm), OP(q, k, v, SEEN if mask else None, scale, bool(causal), 0, 0.0))


def test_a_mask_of_fewer_dimensions():
    gm = capture(lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m), Q, K4, V4, SEEN[0, 0])
    assert len(apply(gm, attention_sdpa).matches) == 1
    assert same_bits(run(gm), OP(Q, K4, V4, SEEN[:1, :1], SCALE, False, 0, 0.0))


def test_keys_that_change_after_they_were_repeated():
    """The repeated copy has the old values: the operator must read the copy."""

    def fn(q, k, v):
        k, v = k.sin(), v.sin()
        k4 = repeat_kv(k, 2)
        k.add_(1)
        return F.scaled_dot_product_attention(q, k4, repeat_kv(v, 2)), k

    gm = capture(fn, Q, K, V)
    assert len(apply(gm, attention_sdpa).matches) == 1
    want = OP(Q, repeat_kv(K.sin(), 2), repeat_kv(V.sin(), 2), None, SCALE, False, 0, 0.0)
    assert same_bits(run(gm)[0], want)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1), "dropout"),
        (lambda q, k, v: F.scaled_dot_product_attention(q.double(), k.double(), v.double()), "float64"),
        (lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0]), "B, H, S, D"),
    ],
)
def test_calls_that_are_left_alone(fn, reason):
    gm = capture(fn, Q, K4, V4)
    report = apply(gm, attention_sdpa)
    assert not report.matches
    assert reason in " ".join(report.reasons())


def _eager(q, k, v, m, cap=None, cast=True):
    """As Hugging Face writes it (Gemma 2)."""
    scores = torch.matmul(q, repeat_kv(k, 2).transpose(2, 3)) * 0.25
    if cap is not None:
        scores = torch.tanh(scores / cap) * cap
    if m is not None:
        scores = scores + m
    p = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) if cast else scores.softmax(-1)
    p = F.dropout(p, p=0.1, training=False)
    return torch.matmul(p, repeat_kv(v, 2)).transpose(1, 2).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("fn", "mask", "cap"),
    [
        (lambda q, k, v, m: _eager(q, k, v, None), 0, 0.0),
        (lambda q, k, v, m: _eager(q, k, v, m, cast=False), 1, 0.0),
        (lambda q, k, v, m: _eager(q, k, v, m, cap=5.0), 1, 5.0),
    ],
)
def test_written_out(fn, mask, cap, dtype):
    q, k, v, m = (t.to(dtype) for t in (Q, K, V, ADDED))
    gm = capture(fn, q, k, v, m)
    report = apply(gm, attention_eager)
    assert len(report.matches) == 1
    assert not {"softmax", "matmul", "tanh"} & set(calls(gm))
    want = OP(q, k, v, m if mask else None, 0.25, False, 0, cap)
    assert same_bits(run(gm), want.transpose(1, 2).contiguous())


def test_probabilities_that_are_returned_stay():
    def fn(q, k, v):
        p = F.softmax(q @ k.transpose(2, 3), -1)
        return p @ v, p

    gm = capture(fn, Q, K4, V4)
    report = apply(gm, attention_eager)
    assert not report.matches
    assert calls(gm)["matmul"] == 2


@pytest.mark.parametrize(("keys", "values"), [(6, 6), (8, 5), (20, 24), (24, 16)])
@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_any_size(keys, values, eager, dtype):
    """Zeros behind the last element: the bits are those of the operator on padded heads."""
    g = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(2, 4, n, d, generator=g).to(dtype) for n, d in ((7, keys), (9, keys), (9, values)))

    def fn(q, k, v):
        if eager:
            p = F.softmax(q @ k.transpose(2, 3) * 0.25, -1, dtype=torch.float32).to(q.dtype)
            y = p @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, scale=0.25)
        return y.transpose(1, 2).contiguous().view(2, 7, -1)

    gm = capture(fn, q, k, v)
    report = apply(gm, attention_eager if eager else attention_sdpa)
    assert len(report.matches) == 1
    assert not unplaced(gm.graph)
    wide = -(-max(keys, values) // 8) * 8
    padded = [F.pad(t, (0, wide - t.shape[-1])) for t in (q, k, v)]
    want = OP(*padded, None, 0.25, False, 0, 0.0)[..., :values]
    assert same_bits(run(gm), want.transpose(1, 2).reshape(2, 7, -1))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=0.25)
    eps = torch.finfo(dtype).eps
    # Scores of `keys` terms, a softmax and a weighted mean of 9 values, one rounding to dtype.
    bound = (keys + 16) * 2.0**-23 * v.abs().max() * (1 + q.abs().max() * k.abs().max()) + eps * exact.abs()
    assert (
        (run(gm) - exact.transpose(1, 2).reshape(2, 7, -1)).abs() <= bound.transpose(1, 2).reshape(2, 7, -1)
    ).all()


def test_gradients_pass_through_padded_heads():
    g = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(1, 2, 5, d, generator=g) for d in (12, 12, 8))

    def fn(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    gm = capture(fn, q, k, v)
    apply(gm, attention_sdpa)
    ours, exact = (
        [t.to(dtype, copy=True).requires_grad_() for t in (q, k, v)]
        for dtype in (torch.float32, torch.float64)
    )
    gm(*ours)[0].square().sum().backward()
    fn(*exact).square().sum().backward()
    for got, true in zip(ours, exact, strict=True):
        assert (got.grad - true.grad).abs().max() <= 200 * 2.0**-24 * (1 + true.grad.abs().max())
