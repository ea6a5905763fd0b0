"""What a model's keys and values take, without its weights: one forward on the meta device, computing
nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llm42c.capture import hf_interface
from llm42c.capture.dynamo import KVSpec
from llm42c.codegen.ops import registry

_TOKENS = 48


def kv_spec_of_meta(model: nn.Module) -> list[KVSpec] | None:
    """Keys and values of each attention call of ``model``, whose parameters lie on the meta device.

    They are those of the captured graph. None where attention does not go through Hugging Face's interface:
    only a capture tells what it takes.
    """
    registry.define()
    found: list[KVSpec] = []

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Any:
        found.append(KVSpec(int(key.shape[1]), hf_interface.widened_head_dim(query, value)))
        rows = value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[-1])
        return rows, None

    ids = torch.zeros(1, _TOKENS, dtype=torch.int64, device="meta")
    # With a mask nobody looks whether positions begin anew, which would need their values.
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        with torch.no_grad(), hf_interface.installed(model, {}, hf_interface.ATTENTION_NAME, attention):
            model(**arguments)
    except Exception:  # an attention that is written out needs a mask, others look at their values
        return None
    return found or None
