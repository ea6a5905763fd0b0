"""What a Hugging Face model calls while it is captured: our attention, mask and experts functions.

They are installed for the duration of a capture only. The functions call ``llm42`` operators; causality
and windows live in the attention operator, so the mask function builds no mask. It returns an empty tensor
whose last size says which window the model asked for, and the attention function compares that with the
window that the model gives to the attention itself: a pattern that the operator does not know (chunks,
prefixes, blocks) is found here instead of being computed as something else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ATTENTION_NAME = "llm42_paged"
WRITTEN_OUT = "eager"
UNKNOWN_WINDOW = -1
"""The ``window`` argument of an attention call whose mask is not a causal or sliding one."""

_CONFIG_FIELDS = {
    "_attn_implementation": "_attn_implementation_internal",
    "_experts_implementation": "_experts_implementation_internal",
}
_MULTIPLE = 8  # head sizes that the operator takes


def attention_function(batch: Mapping[str, Any]) -> Callable[..., tuple[Tensor, None]]:
    """Hugging Face's attention interface on a packed batch, whose tensors it holds: models differ in
    whether they hand unknown keyword arguments down to it.

    Each call has keys and values of its own, also where a layer attends twice or is run again: the n-th call
    uses the n-th cache. (With fewer caches than calls they are shared: the graph shows how many it needs.)
    """

    def attention_forward(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """query: [1, Hq, T, D]; key: [1, Hkv, T, D]; value: [1, Hkv, T, E], positions already applied.

        Returns [1, T, Hq, E]. Sizes that the operator does not take are filled up with zeros, which change
        no score and no value.
        """
        place = len(batch["calls"]) % len(batch["k_cache"])
        batch["calls"].append(place)
        head_dim = widened_head_dim(query, value)
        out = torch.ops.llm42.paged_attention(
            _widened(query[0].transpose(0, 1), head_dim),  # [T, Hq, D]
            _widened(key[0].transpose(0, 1), head_dim),
            _widened(value[0].transpose(0, 1), head_dim),
            batch["k_cache"][place],
            batch["v_cache"][place],
            batch["slot_mapping"],
            batch["cu_seqlens_q"],
            batch["kv_lens"],
            batch["block_table"],
            query.shape[-1] ** -0.5 if scaling is None else scaling,
            _window(module, attention_mask, sliding_window or 0),
            softcap or 0.0,
            s_aux,
        )
        if value.shape[-1] != head_dim:
            out = out[..., : value.shape[-1]]
        return out.unsqueeze(0), None

    return attention_forward


def widened_head_dim(query: Tensor, value: Tensor) -> int:
    """The size of heads in the cache: one that the operator takes, for keys and values alike."""
    widest = max(query.shape[-1], value.shape[-1])
    return -(-widest // _MULTIPLE) * _MULTIPLE


def _widened(x: Tensor, head_dim: int) -> Tensor:
    """x [T, H, D] with zeros behind. (``F.pad`` would guard on the number of tokens.)"""
    missing = head_dim - x.shape[-1]
    return torch.cat([x, torch.zeros_like(x[..., :1]).expand(-1, -1, missing)], -1) if missing else x


def _window(module: nn.Module, mask: Tensor | None, window: int) -> int:
    """The window of the attention operator, or UNKNOWN_WINDOW where the mask says something else."""
    causal = getattr(module, "is_causal", True)
    if not causal or mask is None or mask.dim() != 4 or mask.shape[2] != 0:
        return UNKNOWN_WINDOW
    return window if mask.shape[3] == window else UNKNOWN_WINDOW


def mask_marker(
    *args: Any, local_size: int | None = None, use_vmap: bool = False, **kwargs: Any
) -> Tensor | None:
    """Instead of a mask: an empty tensor whose last size is the window; None for custom mask functions."""
    return None if use_vmap else torch.empty(1, 1, 0, local_size or 0)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Hugging Face's experts interface. hidden_states: [T, H]; index, weights: [T, K] → [T, H].

    Each chosen expert's output is one row's own computation; the K of a token are weighted and added in
    fp32 in the order in which the router gives them.
    """
    tokens, chosen = top_k_index.shape
    hidden = hidden_states.shape[-1]
    rows = hidden_states.unsqueeze(1).expand(tokens, chosen, hidden).reshape(tokens * chosen, hidden)
    group = top_k_index.reshape(-1)
    gated = getattr(module, "has_gate", True)
    first = "gate_up_proj" if gated else "up_proj"
    up = _grouped(module, rows, first, group)  # [T·K, 2I] or [T·K, I]
    act = module._apply_gate(up) if gated else module.act_fn(up)
    down = _grouped(module, act, "down_proj", group)
    if getattr(module, "has_post_expert_norm", False):
        down = module.post_expert_norm(down)
    weighted = down.float().view(tokens, chosen, hidden) * top_k_weights.float().unsqueeze(-1)
    total = weighted[:, 0]
    for i in range(1, chosen):
        total = total + weighted[:, i]
    return total.to(hidden_states.dtype)


def _grouped(module: Any, rows: Tensor, name: str, group: Tensor) -> Tensor:
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    return torch.ops.llm42.grouped_linear(rows, getattr(module, name), bias, group, module.is_transposed)


@contextlib.contextmanager
def installed(
    model: nn.Module,
    batch: Mapping[str, Any],
    attention: str = ATTENTION_NAME,
    function: Callable[..., Any] | None = None,
) -> Iterator[None]:
    """The model calls our functions, without dropout, inside this block; its own settings return after it.

    With ``attention=WRITTEN_OUT`` it computes scores and masks itself. ``function`` stands in for
    :func:`attention_function`.
    """
    from transformers import AttentionInterface
    from transformers.integrations.moe import ExpertsInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION_NAME, function or attention_function(batch))
    AttentionMaskInterface.register(ATTENTION_NAME, mask_marker)
    ExpertsInterface.register(ATTENTION_NAME, experts_forward)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    training = [m for m in model.modules() if m.training]
    before = [
        (config, stored, getattr(config, name))
        for config in configs.values()
        for name, stored in _CONFIG_FIELDS.items()
        if hasattr(config, name)
    ]
    for config, stored, _ in before:
        ours = attention if stored == _CONFIG_FIELDS["_attn_implementation"] else ATTENTION_NAME
        setattr(config, stored, ours)
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for config, stored, value in before:
            setattr(config, stored, value)
        for module in training:
            module.training = True
