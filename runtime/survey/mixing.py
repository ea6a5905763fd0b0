"""How a decoder mixes tokens, found by what its outputs depend on, not by its name.

1. A softmax over as many keys as there are tokens, or a call of `scaled_dot_product_attention`, is softmax
   attention.
2. With each of these replaced by "every token sees itself alone", a last token that still depends on those
   before it is mixed by something else: a recurrence, linear attention, a convolution.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Mixing = Literal["softmax", "hybrid", "recurrent or linear"]
_TOKENS = 11  # no size of the tiny models
_ROUNDING = 1e-4  # of the logits' deviation: less is no dependence
_SOFTMAX = (torch.softmax, torch.special.softmax, functional.softmax, Tensor.softmax)


class _Alone(TorchFunctionMode):
    """Counts softmaxes over the tokens; with `knocked_out`, each token sees itself only."""

    def __init__(self, knocked_out: bool) -> None:
        super().__init__()
        self.knocked_out = knocked_out
        self.found = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is functional.scaled_dot_product_attention:
            self.found += 1
            if self.knocked_out:
                return _values_alone(result, args[2] if len(args) > 2 else kwargs["value"])
        elif func in _SOFTMAX and _over_tokens(result, args, kwargs):
            self.found += 1
            if self.knocked_out:
                return torch.eye(result.shape[-2], result.shape[-1], dtype=result.dtype).expand_as(result)
        return result


def _over_tokens(p: Tensor, args: Any, kwargs: Any) -> bool:
    """p is [..., tokens, tokens], possibly with a sink at its end, and sums to one over the last."""
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    keys = (_TOKENS, _TOKENS + 1)
    return p.dim() >= 3 and p.shape[-2] == _TOKENS and p.shape[-1] in keys and dim in (-1, p.dim() - 1)


def _values_alone(out: Tensor, value: Tensor) -> Tensor:
    repeats = out.shape[1] // value.shape[1] if out.dim() == 4 else 1
    return value.repeat_interleave(repeats, 1) if repeats > 1 else value


@torch.no_grad()
def mixing(model: Any) -> Mixing:
    """The kind of a model that runs on `input_ids`."""
    vocab = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(10, min(vocab, 190), (1, _TOKENS), generator=generator)
    other = ids.clone()
    other[0, :-1] -= 1
    with _Alone(knocked_out=True) as mode:
        a, b = (model(input_ids=x, use_cache=False).logits[0, -1] for x in (ids, other))
    # Not by bits: those of a row alone may depend on the rows that share its experts.
    elsewhere = not torch.allclose(a, b, rtol=0.0, atol=_ROUNDING * a.std().item())
    if mode.found:
        return "hybrid" if elsewhere else "softmax"
    return "recurrent or linear"
