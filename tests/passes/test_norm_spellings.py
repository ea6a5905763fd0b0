"""Norms in the spellings that models use: one operator where there is one, else sums in a fixed order."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from graphs import apply, calls, capture, run, same_bits
from torch import nn

from llm42c.passes import graph as g
from llm42c.passes.check import unplaced
from llm42c.passes.layer_norm import layer_norm
from llm42c.passes.reductions import reductions
from llm42c.passes.rms_norm import rms_norm

OPS = torch.ops.llm42
H, EPS = 40, 1e-3
HALF, FULL = torch.bfloat16, torch.float32


def tensor(*shape, dtype=FULL, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


X, W, B = tensor(2, 5, H), tensor(H, seed=3), tensor(H, seed=4)


def ms(x):
    return x.pow(2).mean(-1, keepdim=True)


RMS = {
    "x / sqrt": lambda x: x / torch.sqrt(ms(x) + EPS),
    "x / sqrt of methods": lambda x: x.div(ms(x).add(EPS).sqrt()),
    "1 / sqrt": lambda x: x * (1.0 / torch.sqrt(ms(x) + EPS)),
    "reciprocal": lambda x: (ms(x) + EPS).sqrt().reciprocal() * x,
    "power of the root": lambda x: x * (ms(x) + EPS).sqrt() ** -1,
    "power": lambda x: x * (EPS + ms(x)) ** -0.5,
    "half powers": lambda x: x / (ms(x) + EPS) ** 0.5,
    "sum over a count": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / H + EPS),
    "sum over a size": lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS),
    "sum times a fraction": lambda x: x * torch.rsqrt((1 / H) * x.square().sum(-1, keepdim=True) + EPS),
    "2-norm": lambda x: x * torch.rsqrt(x.norm(dim=-1, keepdim=True) ** 2 / H + EPS),
    "vector norm": lambda x: (
        x * torch.rsqrt(torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() * (1 / H) + EPS)
    ),
    "dimension put back": lambda x: x * torch.rsqrt(x.pow(2).mean(-1).unsqueeze(-1) + EPS),
    "dimension put back late": lambda x: x * torch.rsqrt(x.pow(2).mean(-1) + EPS)[..., None],
    "axis": lambda x: x / torch.sqrt(torch.mean(torch.square(x), axis=-1, keepdim=True) + EPS),
}


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("spelling", RMS)
def test_rms_norm(spelling, dtype):
    def fn(x, w):
        return RMS[spelling](x.float()).to(x.dtype) * w

    x, w = X.to(dtype), W.to(dtype)
    gm = capture(fn, x, w)
    report = apply(gm, rms_norm)
    assert not report.misses
    assert calls(gm) == {"llm42::rms_norm": 1}
    assert same_bits(run(gm), OPS.rms_norm(x, w, EPS, 0.0, True))


def test_no_epsilon():
    gm = capture(lambda x: x * torch.rsqrt(ms(x)), X)
    apply(gm, rms_norm)
    assert same_bits(run(gm), OPS.rms_norm(X, None, 0.0, 0.0, True))


def n(x):
    return x.float() * torch.rsqrt(ms(x.float()) + EPS)


WEIGHTS = {
    "cast, then weight": (lambda x, w: n(x).to(x.dtype) * w, 0.0, True),
    "weight, then cast": (lambda x, w: (w.float() * n(x)).to(x.dtype), 0.0, False),
    "offset, then cast": (lambda x, w: (n(x) * (w.float() + 1)).to(x.dtype), 1.0, False),
    "offset first": (lambda x, w: (n(x) * (1.0 + w.float())).type_as(x), 1.0, False),
    "cast, then offset": (lambda x, w: n(x).to(x.dtype) * (0.5 + w), 0.5, True),
    "as a row": (lambda x, w: (n(x) * w.float().view(1, 1, -1)).to(x.dtype), 0.0, False),
}


@pytest.mark.parametrize("spelling", WEIGHTS)
def test_weights_in_half_precision(spelling):
    fn, offset, cast_first = WEIGHTS[spelling]
    x, w = X.to(HALF), W.to(HALF)
    gm = capture(fn, x, w)
    assert not apply(gm, rms_norm).misses
    assert calls(gm)["llm42::rms_norm"] == 1
    assert calls(gm).keys() <= {"llm42::rms_norm", "to", "view", "reshape"}
    assert same_bits(run(gm), OPS.rms_norm(x, w, EPS, offset, cast_first))


def _bound(exact, eps):
    """An RMSNorm of H elements and a weight: some H roundings in fp32 and three of ``eps``."""
    return (3.1 * eps + (H + 8) * 2.0**-24) * exact.abs() + 1e-6


@pytest.mark.parametrize("spelling", WEIGHTS)
@pytest.mark.parametrize(("x_dtype", "w_dtype"), [(HALF, FULL), (FULL, HALF), (HALF, torch.float16)])
def test_weights_of_another_dtype(spelling, x_dtype, w_dtype):
    """The result has the dtype that the model's own promotion gives it, and the model's value."""
    fn = WEIGHTS[spelling][0]
    x, w = X.to(x_dtype), W.to(w_dtype)
    gm = capture(fn, x, w)
    apply(gm, rms_norm)
    assert calls(gm)["llm42::rms_norm"] == 1
    got, eager = run(gm), fn(x, w)
    assert got.dtype == eager.dtype
    exact = n(x.double()) * (w.double() + WEIGHTS[spelling][1])
    assert ((got - exact).abs() <= _bound(exact, 2.0**-8)).all()


def test_weight_read_before_a_write_is_not_read_again():
    def fn(x, w):
        wide = w.float()
        w.mul_(2)
        return (n(x) * wide).to(x.dtype)

    x, w = X.to(HALF), W.to(HALF)
    expected = OPS.rms_norm(x, w, EPS, 0.0, False)
    gm = capture(fn, x, w.clone())
    gm.meta["inputs"] = [w.clone() if i.dim() == 1 else i for i in gm.meta["inputs"]]
    apply(gm, rms_norm)
    assert same_bits(run(gm), expected)


def test_heads_and_groups():
    """q/k norm over a head; groups of a last dimension with one weight over all of them; a gate."""

    def fn(x, w, gate):
        groups = x.view(2, 5, 4, 10)
        heads = n(groups).to(x.dtype) * w[:10]
        whole = n(groups).view(2, 5, H) * w * F.silu(gate)
        return heads, whole

    gm = capture(fn, X, W, B)
    report = apply(gm, rms_norm)
    assert len(report.matches) >= 1
    assert not report.misses
    assert not {"rsqrt", "mean", "square"} & set(calls(gm))
    heads, whole = run(gm)
    normed = OPS.rms_norm(X.view(2, 5, 4, 10), None, EPS, 0.0, True)
    assert same_bits(heads, normed * W[:10])
    assert same_bits(whole, normed.view(2, 5, H) * W * F.silu(B))


def test_what_is_not_recognised_behind_the_norm_stays_in_fp32():
    """T5 with an fp32 weight: the result is fp32, whatever x is."""
    x = X.to(HALF)
    gm = capture(lambda x, w: w * (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)), x, W)
    assert len(apply(gm, rms_norm).matches) == 1
    assert same_bits(run(gm), OPS.rms_norm(x.float(), W, EPS, 0.0, True))


def centred(x):
    return x - x.mean(-1, keepdim=True)


LAYER = {
    "mean of squares": lambda x: centred(x) * torch.rsqrt(centred(x).pow(2).mean(-1, keepdim=True) + EPS),
    "division": lambda x: centred(x) / torch.sqrt(centred(x).pow(2).mean(-1, keepdim=True) + EPS),
    "var": lambda x: centred(x) * torch.rsqrt(x.var(-1, unbiased=False, keepdim=True) + EPS),
    "var by correction": lambda x: centred(x) / (torch.var(x, -1, correction=0, keepdim=True) + EPS) ** 0.5,
    "sums": lambda x: (
        (x - x.sum(-1, keepdim=True) / H)
        / torch.sqrt((x - x.sum(-1, keepdim=True) / H).square().sum(-1, keepdim=True) / H + EPS)
    ),
    "dimensions put back": lambda x: (
        (x - x.mean(-1)[..., None]) * torch.rsqrt(x.var(-1, unbiased=False) + EPS).unsqueeze(-1)
    ),
}


def _var_mean(x):
    var, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(var + EPS)


LAYER["var_mean"] = _var_mean
AFFINE = {
    "plain": lambda y: (y, None, None),
    "weight": lambda y: (y * W, W, None),
    "bias": lambda y: (y + B, None, B),
    "both": lambda y: (B + W * y, W, B),
}


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("affine", AFFINE)
@pytest.mark.parametrize("spelling", LAYER)
def test_layer_norm_by_hand(spelling, affine, dtype):
    x = X.to(dtype)
    gm = capture(lambda x: AFFINE[affine](LAYER[spelling](x.float()))[0].to(x.dtype), x)
    report = apply(gm, layer_norm)
    assert not report.misses
    assert calls(gm) == {"llm42::layer_norm": 1}
    _, weight, bias = AFFINE[affine](x.float())
    assert same_bits(run(gm), OPS.layer_norm(x, weight, bias, EPS))


def test_layer_norm_whose_weight_rounds_on_its_own():
    """DeBERTa: the norm is cast, then multiplied and added to in half precision."""
    x, w, b = X.to(HALF), W.to(HALF), B.to(HALF)
    gm = capture(lambda x: w * LAYER["division"](x.float()).to(HALF) + b, x)
    assert len(apply(gm, layer_norm).matches) == 1
    assert same_bits(run(gm), w * OPS.layer_norm(x, None, None, EPS) + b)


@pytest.mark.parametrize(("w_dtype", "b_dtype"), [(FULL, HALF), (HALF, FULL), (HALF, HALF)])
def test_layer_norm_with_parameters_of_other_dtypes(w_dtype, b_dtype):
    w, b = W.to(w_dtype), B.to(b_dtype)
    gm = capture(lambda x: LAYER["var"](x) * w + b, X)
    assert len(apply(gm, layer_norm).matches) == 1
    assert same_bits(run(gm), OPS.layer_norm(X, w.float(), b.float(), EPS))


@pytest.mark.parametrize("x_dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("w_dtype", [FULL, HALF, None], ids=str)
@pytest.mark.parametrize("b_dtype", [FULL, HALF, None], ids=str)
def test_the_operator_takes_both_parameters_in_the_dtype_of_x_or_in_fp32(x_dtype, w_dtype, b_dtype):
    """By hand, because ``F.layer_norm`` of eager mode refuses a mixture."""
    x = X.to(x_dtype)
    w, b = (None if d is None else p.to(d) for p, d in ((W, w_dtype), (B, b_dtype)))

    def fn(x):
        n = LAYER["var"](x.float())
        n = n if w is None else n * w
        return (n if b is None else n + b).to(x_dtype)

    gm = capture(fn, x)
    assert len(apply(gm, layer_norm).matches) == 1
    taken = [g.fake(a).dtype for a in operator(gm).args[1:3] if a is not None]
    given = {d for d in (w_dtype, b_dtype) if d is not None}
    assert set(taken) <= ({x_dtype} if given == {x_dtype} else {FULL})
    wide = [None if p is None else p.float() for p in (w, b)]
    assert same_bits(run(gm), OPS.layer_norm(x, *wide, EPS))


def operator(gm):
    return next(n for n in gm.graph.nodes if n.target is OPS.layer_norm.default)


@pytest.mark.parametrize("bias", [B, None], ids=["bias", "none"])
def test_calls_with_parameters_in_fp32(bias):
    """The mixture that ``F.layer_norm`` takes."""
    x = X.to(HALF)
    gm = capture(lambda x: F.layer_norm(x, (H,), W, bias, EPS), x)
    assert len(apply(gm, layer_norm).matches) == 1
    assert same_bits(run(gm), OPS.layer_norm(x, W, bias, EPS))


@pytest.mark.parametrize("norm", [F.layer_norm, F.rms_norm])
def test_calls_over_several_dimensions(norm):
    w = tensor(5, H, seed=5)
    gm = capture(lambda x: norm(x, (5, H), w, eps=EPS), X)
    apply(gm, layer_norm, rms_norm)
    args = (None, EPS) if norm is F.layer_norm else (EPS, 0.0, False)
    op = OPS.layer_norm if norm is F.layer_norm else OPS.rms_norm
    assert same_bits(run(gm), op(X.flatten(1), w.flatten(), *args).view(2, 5, H))


def test_calls_with_a_weight_of_another_dtype():
    gm = capture(lambda x: F.rms_norm(x, (H,), W.to(HALF), EPS), X)
    apply(gm, rms_norm)
    assert same_bits(run(gm), OPS.rms_norm(X, W.to(HALF).float(), EPS, 0.0, False))


MISSES = {
    "the variance is computed in torch.bfloat16": lambda x: x * torch.rsqrt(ms(x.bfloat16()) + EPS),
    "the scale is rounded to torch.bfloat16": lambda x: x * torch.rsqrt(ms(x) + EPS).to(HALF),
    "the epsilon is added to the root": lambda x: x / (torch.sqrt(ms(x)) + EPS),
    "a least value stands for the epsilon": lambda x: x * torch.rsqrt(ms(x).clamp(min=EPS)),
    "the epsilon is no number": lambda x: x * torch.rsqrt(ms(x) + W[0].abs()),
    "not divided by their count": lambda x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + EPS),
    "the sum of squares is not divided": lambda x: (
        x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) / (H - 1) + EPS)
    ),
    "not over the last dimension": lambda x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + EPS),
    "what is scaled is not what was squared": lambda x: W * x * torch.rsqrt(ms(x) + EPS),
    "one less than the count": lambda x: centred(x) * torch.rsqrt(x.var(-1, keepdim=True) + EPS),
}


@pytest.mark.parametrize("reason", MISSES)
def test_near_misses_say_why_and_still_have_an_order(reason):
    gm = capture(MISSES[reason], X)
    report = apply(gm, layer_norm if "one less" in reason else rms_norm)
    assert not report.matches
    assert reason in " ".join(report.reasons())
    apply(gm, reductions)
    assert not unplaced(gm.graph)
    assert not {"mean", "sum", "var"} & set(calls(gm))
    eager = MISSES[reason](X)
    torch.testing.assert_close(run(gm), eager, rtol=0.02 if "bfloat16" in reason else 1e-5, atol=1e-5)


LEFT_TO_REDUCTIONS = {
    "2-norm": lambda x: x / x.norm(dim=-1, keepdim=True),
    "2-norm of all": lambda x: x / torch.norm(x),
    "1-norm": lambda x: x / torch.norm(x, p=1, dim=-1, keepdim=True),
    "largest": lambda x: x / torch.linalg.vector_norm(x, float("inf"), -1, True),
    "Frobenius": lambda x: x / torch.linalg.norm(x, dim=(1, 2), keepdim=True),
    "normalize": lambda x: F.normalize(x, dim=-1) * H**0.5,
    "normalize another dimension": lambda x: F.normalize(x, p=1.0, dim=0, eps=0.1),
    "std": lambda x: W * (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + EPS) + B,
    "std_mean": lambda x: torch.sub(x, torch.std_mean(x, -1, keepdim=True)[1]),
    "group_norm": lambda x: F.group_norm(x.view(10, H), 4, W.to(x.dtype), B.to(x.dtype), EPS),
    "group_norm with space": lambda x: F.group_norm(x.transpose(1, 2), 4, W.to(x.dtype), B.to(x.dtype), EPS),
}


@pytest.mark.parametrize("dtype", [FULL, HALF], ids=str)
@pytest.mark.parametrize("name", LEFT_TO_REDUCTIONS)
def test_other_norms_have_an_order(name, dtype):
    fn, x = LEFT_TO_REDUCTIONS[name], X.to(dtype)
    gm = capture(fn, x)
    assert apply(gm, reductions).matches
    assert not unplaced(gm.graph)
    got, eager, exact = run(gm), fn(x), fn(x.double())
    assert got.dtype == eager.dtype
    error = (exact.abs() + 2) * (2.0**-8 * 4 if dtype == HALF else 0) + (H + 8) * 8 * 2.0**-24 * (
        2 + exact.abs()
    )
    assert ((got - exact).abs() <= error).all()


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (lambda x: torch.linalg.norm(x[0], ord=2), "a matrix norm of order 2"),
        (lambda x: x.norm(p=3, dim=-1), "a norm of order 3"),
    ],
)
def test_norms_without_an_order_are_named(fn, reason):
    gm = capture(fn, X)
    report = apply(gm, reductions)
    assert reason in " ".join(report.reasons())
    assert unplaced(gm.graph)


# One class for every way in which the decoders of transformers write a norm: module, class, arguments.
CLASSES = [
    ("llama", "LlamaRMSNorm", (H,), "rms_norm"),
    ("gemma2", "Gemma2RMSNorm", (H,), "rms_norm"),
    ("gemma3n", "Gemma3nRMSNorm", (H,), "rms_norm"),
    ("gpt_oss", "GptOssRMSNorm", (H,), "rms_norm"),
    ("helium", "HeliumRMSNorm", (H,), "rms_norm"),
    ("llama4", "Llama4TextRMSNorm", (H,), "rms_norm"),
    ("llama4", "Llama4TextL2Norm", (), "rms_norm"),
    ("moshi", "MoshiRMSNorm", (H,), "rms_norm"),
    ("mt5", "MT5LayerNorm", (H,), "rms_norm"),
    ("imagegpt", "ImageGPTLayerNorm", ((H,),), "rms_norm"),
    ("cohere", "CohereLayerNorm", ((H,),), "layer_norm"),
    ("chameleon", "ChameleonLayerNorm", ((H,),), "layer_norm"),
    ("deberta", "DebertaLayerNorm", (H,), "layer_norm"),
    ("nemotron", "NemotronLayerNorm1P", (H,), "layer_norm"),
    ("olmo", "OlmoLayerNorm", (H,), "layer_norm"),
]


DTYPES = [(FULL, FULL), (HALF, HALF), (HALF, FULL), (FULL, HALF)]
# torch's own layer norm takes no parameters in half precision for an input in fp32.
CELLS = [(c, d) for c in CLASSES for d in DTYPES if c[0] != "nemotron" or d != (FULL, HALF)]


@pytest.mark.parametrize(("norm", "dtypes"), CELLS, ids=[f"{c[1]}-{x}-{w}" for c, (x, w) in CELLS])
def test_the_norms_of_transformers(norm, dtypes):
    (model, name, args, operator), (x_dtype, w_dtype) = norm, dtypes
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    layer: nn.Module = getattr(module, name)(*args).to(w_dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = X.to(x_dtype)
    gm = capture(layer, x)
    in_half = name == "ImageGPTLayerNorm" and x_dtype == HALF  # its mean is one of bf16 numbers
    report = apply(gm, layer_norm if operator == "layer_norm" else rms_norm)
    assert len(report.matches) == (0 if in_half else 1), report.reasons()
    apply(gm, reductions)
    assert not unplaced(gm.graph)
    got, eager = run(gm), layer(x)
    assert got.dtype == eager.dtype
    tolerance = 0.02 if HALF in dtypes else 1e-5
    torch.testing.assert_close(got, eager, rtol=tolerance, atol=tolerance)
