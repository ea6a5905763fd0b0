"""Capture a Hugging Face decoder as one Dynamo graph over a packed ragged batch.

The model runs on ``input_ids [1, T]`` without a cache of its own; its attention calls go to
``llm42::paged_attention``, which writes and reads the paged KV cache. Nothing is executed: the capture
stops when Dynamo hands over the graph. Only T (tokens) and R (rows whose logits are wanted) are
symbolic; the number of sequences and of pages is seen by the attention operator alone.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm42c.capture import hf_interface, written
from llm42c.capture.packed import KVCache, PackedInputs
from llm42c.capture.support import layer_config, require_supported, unsupported
from llm42c.codegen.ops import registry
from llm42c.device import CPU, device_of_model, dtype_of_model
from llm42c.digest import graph_digest
from llm42c.errors import ConfigError, UnsupportedModelError
from llm42c.memory import populate, zeros
from llm42c.passes.graph import where

_CONSTANT = "constant_"  # begins the names of tensors that are neither parameters nor buffers
_BATCH_FIELDS = ("slot_mapping", "cu_seqlens_q", "kv_lens", "block_table")


@dataclass(frozen=True)
class KVSpec:
    """Shape of one layer's keys and values."""

    num_kv_heads: int
    head_dim: int


@dataclass
class CapturedGraph:
    """The canonical graph of a model.

    ``gm`` has one placeholder per entry of ``inputs``; parameters and buffers are ``get_attr`` nodes
    named after the model's own (``parameter_names`` maps the attribute to the qualified name).
    """

    gm: torch.fx.GraphModule
    inputs: list[str]  # what each placeholder is: "input_ids", "k_cache.3", "sym:T", …
    example_inputs: list[Any]
    parameter_names: dict[str, str]
    kv_spec: list[KVSpec]
    digest: str

    @property
    def weights(self) -> frozenset[str]:
        """Attributes of ``gm`` that are parameters and buffers of the model: its weights' digest has them."""
        return model_attributes(self.parameter_names)


def model_attributes(parameter_names: dict[str, str]) -> frozenset[str]:
    """The attributes of a captured graph that are parameters and buffers of the model."""
    return frozenset(a for a, name in parameter_names.items() if not name.startswith(_CONSTANT))


class _GraphCapturedError(Exception):
    """Raised by the capturing backend instead of running the graph."""


def kv_spec(model: nn.Module) -> list[KVSpec]:
    """Layer by layer, KV heads and head size, as far as the model's configuration says them."""
    config = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    layers: int = config.num_hidden_layers
    each = [layer_config(config, layer) for layer in range(layers)]
    return [_kv_spec(layer) for layer in each]


def _kv_spec(config: Any) -> KVSpec:
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return KVSpec(getattr(config, "num_key_value_heads", None) or heads, head_dim)


def new_kv_cache(
    spec: list[KVSpec], num_pages: int, page_size: int, dtype: torch.dtype, device: torch.device = CPU
) -> KVCache:
    """Zeroed pages for every layer; separate storages, so that no cache is ever copied as a view.

    Raises ConfigError for a page size that the operators do not take.
    """
    if page_size % 16:
        raise ConfigError(f"page_size must be a multiple of 16, not {page_size}")
    cache = KVCache(
        k=[zeros((num_pages, s.num_kv_heads, s.head_dim, page_size), dtype, device) for s in spec],
        v=[zeros((num_pages, s.num_kv_heads, page_size, s.head_dim), dtype, device) for s in spec],
    )
    populate([*cache.k, *cache.v])
    return cache


def _example_batch(tokens: int = 48, rows: int = 24) -> PackedInputs:
    """A batch whose sizes occur nowhere else in a model, so that symbols are not mistaken for constants."""
    return PackedInputs(
        input_ids=torch.zeros(tokens, dtype=torch.int64),
        positions=torch.arange(tokens),
        slot_mapping=torch.full((tokens,), -1, dtype=torch.int64),
        cu_seqlens_q=torch.tensor([0, tokens], dtype=torch.int32),
        kv_lens=torch.tensor([tokens], dtype=torch.int32),
        block_table=torch.zeros(1, tokens, dtype=torch.int32),
        logits_indices=torch.arange(rows),
    )


def _paged(batch: PackedInputs, cache: KVCache) -> dict[str, Any]:
    paged = {name: getattr(batch, name) for name in _BATCH_FIELDS}
    return paged | {"k_cache": cache.k, "v_cache": cache.v, "calls": []}


def _decoder(model: nn.Module, paged: dict[str, Any]) -> Callable[..., Any]:
    """What is captured: logits [1, R, V] and, where the graph must know the whole batch, its tensors.

    The model itself where it takes positions and says for which rows it wants logits. Others get what their
    forward has parameters for; their positions are found in the graph.
    """
    parameters = inspect.signature(model.forward).parameters
    takes = {name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD}

    def run(input_ids: Tensor, position_ids: Tensor, logits_to_keep: Tensor) -> Any:
        arguments: dict[str, Any] = {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        arguments = {name: value for name, value in arguments.items() if name in takes}
        logits = model(input_ids=input_ids, use_cache=False, return_dict=True, **arguments).logits
        if "logits_to_keep" not in takes:
            logits = logits[:, logits_to_keep]
        kept = [t.view_as(t) for name in _BATCH_FIELDS for t in (paged[name],)]
        kept += [t.view_as(t) for t in (*paged["k_cache"], *paged["v_cache"])]
        return logits, position_ids.view_as(position_ids), kept

    return run


def _run_dynamo(
    model: nn.Module, batch: PackedInputs, cache: KVCache, whole: bool
) -> tuple[torch.fx.GraphModule, list[Any]]:
    captured: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def grab(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        captured.append((gm, example_inputs))
        raise _GraphCapturedError

    input_ids, positions = batch.input_ids.unsqueeze(0), batch.positions.unsqueeze(0)
    for tensor, dim in ((input_ids, 1), (positions, 1), (batch.slot_mapping, 0), (batch.logits_indices, 0)):
        torch._dynamo.mark_dynamic(tensor, dim)
    before = set(model.__dict__)
    arguments: dict[str, Any] = {"position_ids": positions, "logits_to_keep": batch.logits_indices}
    target: Any = _decoder(model, _paged(batch, cache)) if whole else model
    if not whole:
        arguments["use_cache"] = False
    compiled: Any = torch.compile(target, backend=grab, fullgraph=True)
    for mark in set(model.__dict__) - before:  # that torch.compile leaves on the model
        del model.__dict__[mark]
    # A number that differs from a model captured before (a scale, an epsilon) must stay a constant: Dynamo
    # would otherwise make it an input, because the same code has been seen with another value.
    constants = torch._dynamo.config.patch(automatic_dynamic_shapes=False, specialize_float=True)
    stopped = contextlib.suppress(_GraphCapturedError, torch._dynamo.exc.BackendCompilerFailed)
    with torch.no_grad(), constants, stopped:
        compiled(input_ids=input_ids, **arguments)
    if not captured:
        raise unsupported(model, "Dynamo captured no graph of it")
    return captured[0]


def _describe_inputs(batch: PackedInputs, cache: KVCache) -> dict[int, str]:
    known = {id(getattr(batch, name)): name for name in (*_BATCH_FIELDS, "logits_indices")}
    known |= {id(t): f"k_cache.{i}" for i, t in enumerate(cache.k)}
    known |= {id(t): f"v_cache.{i}" for i, t in enumerate(cache.v)}
    return known


def _input_name(example: Any, batch: PackedInputs, known: dict[int, str]) -> str | None:
    """What a placeholder stands for, or None for a parameter, buffer or constant."""
    if isinstance(example, (int, torch.SymInt)):
        sizes = {batch.input_ids.shape[0]: "sym:T", batch.logits_indices.shape[0]: "sym:R"}
        # Not int(example): that would guard on the size, and so make the symbol a constant everywhere.
        size = example.node.hint if isinstance(example, torch.SymInt) else example
        return sizes.get(size, f"const:{size}")
    if id(example) in known:
        return known[id(example)]
    if example.shape == (1, batch.input_ids.shape[0]) and example.dtype == torch.int64:
        return "input_ids" if example._base is batch.input_ids else "positions"
    return None


def _lift_parameters(
    gm: torch.fx.GraphModule, examples: list[Any], model: nn.Module, names: list[str | None]
) -> dict[str, str]:
    """Turn placeholders of parameters, buffers and constants into get_attr nodes, in place."""
    qualified = {id(t): n for n, t in (*model.named_buffers(), *model.named_parameters())}
    parameter_names: dict[str, str] = {}
    symbols: dict[str, torch.fx.Node] = {}
    examples_of: dict[str, Any] = {}
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    for i, (node, example, name) in enumerate(zip(placeholders, examples, names, strict=True)):
        if name is not None and name.startswith("sym:"):
            examples_of.setdefault(name, example)
        if name is not None and name.startswith("sym:") and symbols.setdefault(name, node) is not node:
            # Several inputs have T rows; Dynamo gave each its own symbol for the one number. The
            # comparison makes them one symbol in the shapes of all values too.
            if not bool(example == examples_of[name]):
                raise UnsupportedModelError(f"the graph needs {name} to be two different numbers")
            node.replace_all_uses_with(symbols[name])
            gm.graph.erase_node(node)
            continue
        if name is not None and not name.startswith("const:"):
            continue
        if name is not None:
            node.replace_all_uses_with(int(example))
            gm.graph.erase_node(node)
            continue
        label = qualified.get(id(example), f"{_CONSTANT}{i}")
        attr = label.replace(".", "_")
        if isinstance(example, nn.Parameter):
            gm.register_parameter(attr, example)
        else:
            gm.register_buffer(attr, example)
        parameter_names[attr] = label
        with gm.graph.inserting_before(node):
            get = gm.graph.get_attr(attr)
        get.meta.update(node.meta)
        node.replace_all_uses_with(get)
        gm.graph.erase_node(node)
    gm.graph.lint()
    gm.recompile()
    return parameter_names


def capture_packed(model: nn.Module) -> CapturedGraph:
    """The canonical packed graph of ``model``; the model is left as it was.

    Raises UnsupportedModelError when the model cannot be captured as one graph, or when a layer's attention
    neither goes through Hugging Face's attention interface nor is written out as one that is provably causal.
    """
    registry.define()
    require_supported(model)
    if getattr(model, "_supports_attention_backend", False):
        return _captured(model, hf_interface.ATTENTION_NAME)
    try:
        return _captured(model, hf_interface.ATTENTION_NAME)
    except UnsupportedModelError:
        torch._dynamo.reset()
    return _captured(model, hf_interface.WRITTEN_OUT)


def _captured(model: nn.Module, attention: str) -> CapturedGraph:
    dtype, device = dtype_of_model(model), device_of_model(model)
    batch, spec = _example_batch().to(device), kv_spec(model)
    cache = new_kv_cache(spec, 1, 16, dtype, device)
    found = _capture(model, batch, cache, attention)
    if found.kv_spec != spec:  # a configuration need not say how its model shares KV heads: the graph does
        spec = found.kv_spec
        found = _capture(model, batch, new_kv_cache(spec, 1, 16, dtype, device), attention)
    return found


def _capture(model: nn.Module, batch: PackedInputs, cache: KVCache, attention: str) -> CapturedGraph:
    takes = inspect.signature(model.forward).parameters
    whole = attention == hf_interface.WRITTEN_OUT or not {"position_ids", "logits_to_keep"} <= set(takes)
    known = _describe_inputs(batch, cache)
    gm, examples = _traced(model, batch, cache, attention, whole)
    names = [_input_name(example, batch, known) for example in examples]
    if "positions" not in names:  # it takes them and counts for itself
        whole = True
        gm, examples = _traced(model, batch, cache, attention, whole)
        names = [_input_name(example, batch, known) for example in examples]
    _require_only_logits(model, gm, 2 + len(_BATCH_FIELDS) + 2 * len(cache.k) if whole else 1)
    parameter_names = _lift_parameters(gm, examples, model, names)
    kept: dict[str, Any] = {}
    for name, example in zip(names, examples, strict=True):
        if name is not None and not name.startswith("const:"):
            kept.setdefault(name, example)
    if whole:
        written.rewrite(gm, list(kept), len(cache.k), model, attention == hf_interface.WRITTEN_OUT)
    return CapturedGraph(
        gm=gm,
        inputs=list(kept),
        example_inputs=list(kept.values()),
        parameter_names=parameter_names,
        kv_spec=_check_attention(model, gm, len(cache.k)),
        digest=graph_digest(gm, model_attributes(parameter_names)),
    )


def _require_only_logits(model: nn.Module, gm: torch.fx.GraphModule, outputs: int) -> None:
    """The graph returns what was asked of it: more is what the model would remember from call to call."""
    found = torch.utils._pytree.tree_leaves(next(n for n in gm.graph.nodes if n.op == "output").args)
    if len(found) != outputs:
        parts = ", ".join(sorted({where(n) or n.name for n in found[:-outputs]}))
        raise unsupported(model, f"its forward keeps tensors on the model besides its logits ({parts})")


def _traced(
    model: nn.Module, batch: PackedInputs, cache: KVCache, attention: str, whole: bool
) -> tuple[torch.fx.GraphModule, list[Any]]:
    try:
        with hf_interface.installed(model, _paged(batch, cache), attention):
            return _run_dynamo(model, batch, cache, whole)
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise unsupported(model, f"{_culprit(error)} cannot be part of one graph: {reason}") from error


def _culprit(error: Exception) -> str:
    """The line of the model at which Dynamo gave up."""
    torch_itself = os.path.dirname(torch.__file__)
    frames = [f for f in getattr(error, "real_stack", None) or () if not f.filename.startswith(torch_itself)]
    if not frames:
        return "its forward"
    last = frames[-1]
    return f"`{last.line}` ({os.path.basename(last.filename)}, line {last.lineno}, in {last.name})"


def _check_attention(model: nn.Module, gm: torch.fx.GraphModule, layers: int) -> list[KVSpec]:
    """The KV shapes that the graph's attention calls use, call by call; a layer has one call or more.

    Raises UnsupportedModelError when a layer has another attention, or one that the operator cannot do.
    """
    schema = torch.ops.llm42.paged_attention.default._schema
    place = {argument.name: i for i, argument in enumerate(schema.arguments)}
    operator = torch.ops.llm42.paged_attention
    calls = [n for n in gm.graph.nodes if n.target in (operator, operator.default)]
    if len(calls) < layers:
        raise unsupported(
            model,
            f"{len(calls)} of {layers} layers use an attention that llm42 can replace; "
            "layers that keep other sequence state are not served",
        )
    if any(n.args[place["window"]] == hf_interface.UNKNOWN_WINDOW for n in calls):
        encoder = getattr(model.config, "is_decoder", None) is False
        why = " (its configuration says is_decoder=False)" if encoder else ""
        raise unsupported(model, f"its attention mask is neither causal nor a sliding window{why}")
    spec = []
    for call in calls:
        k = call.args[place["k"]].meta["example_value"].shape
        spec.append(KVSpec(int(k[1]), int(k[2])))
    return spec
