"""The ground that passes stand on: replacement, values of followers, effects, sizes."""

from __future__ import annotations

import pytest
import torch
from graphs import apply, capture
from hypothesis import given
from hypothesis import strategies as st

from llm42c.passes import graph as g
from llm42c.passes import sizes

X = torch.randn(4, 6)


def _node(gm, name):
    return next(n for n in gm.graph.nodes if g.name(n) == name)


def test_a_replacement_of_another_shape_is_refused():
    gm = capture(lambda x: x.sin() + 1, X)
    apply(gm)
    sin = _node(gm, "sin")
    wrong = g.insert(sin, g.FUNCTIONS["t"], (sin.args[0],))
    with pytest.raises(g.IllegalRewriteError, match="sin"):
        g.replace(sin, wrong)


def test_followers_see_a_new_layout():
    """sin(x) replaced by something column-major: the view behind it must know."""
    gm = capture(lambda x: x.sin().transpose(0, 1).cos(), X)
    apply(gm)
    sin = _node(gm, "sin")
    turned = g.insert(sin, g.FUNCTIONS["t"], (sin.args[0],))
    copied = g.insert(sin, "contiguous", (turned,))
    back = g.insert(sin, g.FUNCTIONS["t"], (copied,))
    g.replace(sin, back)
    assert g.fake(_node(gm, "transpose")).stride() == (4, 1)
    assert g.storage_of(_node(gm, "transpose")) == g.storage_of(copied)


def test_effects_see_writes_through_views():
    def fn(x):
        a = x.sin()
        b = a.cos()
        a[0].add_(1)
        return a.exp() + b

    gm = capture(fn, X)
    apply(gm)
    effects = g.Effects(gm.graph)
    a, cos, exp = _node(gm, "sin"), _node(gm, "cos"), _node(gm, "exp")
    assert not effects.unchanged([a], cos, exp)
    assert effects.unchanged([a], a, cos)


@given(
    st.lists(st.integers(0, 2**24), min_size=2, max_size=2),
    st.lists(st.integers(0, 2**24), min_size=2, max_size=2),
)
def test_sizes_equal_at_the_prime_are_equal_everywhere(a, b):
    """Coefficients below the prime: the polynomials a0 + a1·T agree at the prime only if they are one."""
    prime = sizes.PRIMES[0]
    assert (a[0] + a[1] * prime == b[0] + b[1] * prime) == (a == b)


def test_a_size_written_into_an_argument_is_found():
    gm = capture(lambda x: x.reshape(24), X)
    apply(gm)
    node = _node(gm, "reshape")
    assert not sizes.baked(gm.graph)
    node.args = (node.args[0], (3 * sizes.PRIMES[1],))
    assert sizes.baked(gm.graph) == [node]
