"""The captured graph of a model that was not made for a packed batch: own attention, own positions."""

from __future__ import annotations

import torch
from torch import fx, nn

from llm42c.capture.support import context_limit, unsupported
from llm42c.passes import graph as g
from llm42c.passes.attention_written import NotProvenError, PackedBatch, attention_written
from llm42c.passes.base import Context, PassReport
from llm42c.passes.cleanup import erase_dead_code
from llm42c.passes.normalize import normalize
from llm42c.passes.token_functions import TokenFunctions, left_over, recover_positions

_METADATA = ("slot_mapping", "cu_seqlens_q", "kv_lens", "block_table")


def rewrite(gm: fx.GraphModule, inputs: list[str], layers: int, model: nn.Module, attention: bool) -> None:
    """Attention (with ``attention``) and counts of tokens become those of the packed batch, in place.

    ``inputs``: what each placeholder is. Raises UnsupportedModelError for a mask that is not provably causal,
    and for anything else that depends on a token's place in the batch.
    """
    graph, report = gm.graph, PassReport("attention_written")
    nodes = [n for n in graph.nodes if n.op == "placeholder"]
    placeholder = dict(zip(inputs, nodes, strict=True))
    positions = placeholder["positions"]
    _only_logits(graph)
    normalize(graph, Context(), report)
    erase_dead_code(graph)
    values = TokenFunctions(graph, g.fake(positions).shape[-1], positions)
    if attention:
        k_cache, v_cache = ([placeholder[f"{kind}_cache.{i}"] for i in range(layers)] for kind in "kv")
        batch = PackedBatch(positions, k_cache, v_cache, tuple(placeholder[m] for m in _METADATA))
        try:
            attention_written(graph, values, batch, context_limit(model), report)
        except NotProvenError as error:
            raise unsupported(model, f"its attention {error}") from error
        erase_dead_code(graph)
    recover_positions(values)
    erase_dead_code(graph)
    fault = left_over(values)
    if fault is not None:
        raise unsupported(
            model,
            "it counts tokens from the beginning of the batch in "
            f"{g.where(fault) or 'the model'} ({fault.name})",
        )
    graph.lint()
    gm.recompile()


def _only_logits(graph: fx.Graph) -> None:
    """Drop the outputs that made Dynamo keep the batch's tensors."""
    output = next(n for n in graph.nodes if n.op == "output")
    logits = torch.utils._pytree.tree_leaves(output.args[0])[0]
    output.args = ((logits,),)
