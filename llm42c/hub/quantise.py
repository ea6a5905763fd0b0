"""A model's weights quantised, as a folder that :mod:`llm42c.quantised` reads."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llm42c import quantised
from llm42c.codegen import quant
from llm42c.errors import ConfigError, WeightsError
from llm42c.hub.quantised_folder import QuantisedFolder, assembled
from llm42c.quantised import formats as formats_of

FORMATS = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")


def quantise(model: Any, tokenizer: Any, format: str) -> tuple[QuantisedFolder, list[str]]:
    """The folder of ``model`` with its linears and embeddings in ``format``, and what stays as it is: names
    of weights that are neither, or whose rows no whole number of blocks holds.

    Rounding is that of the ``gguf`` package. Raises ConfigError for a format that it cannot make,
    WeightsError for a model whose weights are quantised already.
    """
    _require_quantisable(model, format)
    state, formats = _state(model, format, lambda parameter: parameter.detach())
    kept = [name for name, tensor in state.items() if tensor.dtype != torch.uint8 and tensor.dim() > 1]
    skeleton = _skeleton(model)
    skeleton.generation_config = model.generation_config
    return assembled(skeleton, tokenizer, state, formats), kept


def quantised_copy(model: Any, format: str, read: Callable[[nn.Parameter], Tensor]) -> nn.Module:
    """A model of the same class whose linears and embeddings are quantised; it shares no parameter.

    ``read`` gives a parameter's values, where the model itself may have lent them away. Raises as
    :func:`quantise`.
    """
    _require_quantisable(model, format)
    state, formats = _state(model, format, lambda parameter: read(parameter).clone())
    copied = _skeleton(model)
    made = assembled(copied, None, state, formats)
    copied.load_state_dict(made.state, strict=False, assign=True)
    copied.tie_weights()
    for name, buffer in model.named_buffers():  # some are in no state, and on the meta device hold nothing
        owner, _, last = name.rpartition(".")
        setattr(copied.get_submodule(owner), last, buffer.detach().clone())
    copied.to(next(model.parameters()).device)
    for module in copied.modules():
        if isinstance(module, quantised.Quantised):
            module.pack()
    return copied.requires_grad_(False).eval()


def _require_quantisable(model: Any, format: str) -> None:
    if format not in FORMATS:
        raise ConfigError(f"the format must be one of {', '.join(FORMATS)}, not {format!r}")
    if there := formats_of(model):
        raise WeightsError(f"the weights are quantised already ({', '.join(there)}): quantise the original")


def _skeleton(model: Any) -> Any:
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config)).to(model.dtype)


def _state(
    model: Any, format: str, read: Callable[[nn.Parameter], Tensor]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Blocks of the weights that take them, every other parameter as it is; and the formats by module."""
    state: dict[str, Tensor] = {}
    formats: dict[str, str] = {}
    block = quant.format_of(format).block
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        module = model.get_submodule(owner)
        if name == f"{owner}.weight" and _takes_blocks(module) and parameter.shape[1] % block == 0:
            state[name], formats[owner] = _blocks(read(parameter), format), format
        else:
            state[name] = read(parameter).cpu().contiguous()
    return state, formats


def _takes_blocks(module: nn.Module) -> bool:
    scaled = isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale")
    return type(module) in (nn.Linear, nn.Embedding) or scaled


def _blocks(weight: Tensor, format: str) -> Tensor:
    """[n, k] → [n, bytes of a row]."""
    import gguf

    kind = gguf.GGMLQuantizationType[format.upper()]
    return torch.from_numpy(gguf.quants.quantize(weight.detach().float().cpu().numpy(), kind))
