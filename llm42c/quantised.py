"""Modules whose weight stays quantised, and what puts them into a Hugging Face model.

A folder whose ``config.json`` says ``quantization_config: {"quant_method": "llm42", "formats": {…}}`` holds,
for every module that ``formats`` names, the blocks of its weight as bytes, as GGUF defines them. After
:func:`register`, ``from_pretrained`` reads such a folder. Once loaded, a weight is packed as its target reads
it (``codegen/packing.py``): the packed form is the only one in memory, and what an eager call,
``torch.compile`` and the engine compute with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from llm42c.codegen import quant, targets
from llm42c.codegen.ops import registry
from llm42c.errors import WeightsError

METHOD = "llm42"


class Quantised(nn.Module):
    """``weight``: blocks [n, bytes of a row] until :meth:`pack`, then panels."""

    weight: nn.Parameter

    def __init__(self, n: int, k: int, format: str) -> None:
        super().__init__()
        self.n, self.k, self.format = n, k, format
        blocks = torch.empty(n, quant.row_bytes(format, k), dtype=torch.uint8)
        self.weight = nn.Parameter(blocks, requires_grad=False)

    def pack(self) -> None:
        """Panels instead of blocks; modules that share the weight share its panels. Raises FormatError."""
        if self.weight.dim() == 2:
            values = quant.split(self.weight.data, self.format)
            self.weight.data = targets.of(self.weight.device).packing.quantised(values, self.format)

    def extra_repr(self) -> str:
        return f"{self.n}, {self.k}, format={self.format}"


class QuantisedLinear(Quantised):
    """``nn.Linear`` of a quantised weight [n, k]; the bias is an ordinary one."""

    def __init__(self, n: int, k: int, format: str, bias: nn.Parameter | None) -> None:
        super().__init__(n, k, format)
        self.in_features, self.out_features = k, n
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., k] → [..., n]."""
        y: Tensor = torch.ops.llm42.linear_q.default(
            x, [self.weight], self.format, [self.n], self.bias, None, False
        )
        return y


class QuantisedEmbedding(Quantised):
    """``nn.Embedding`` of a quantised weight [n, k], times ``scale`` rounded to ``dtype``."""

    def __init__(self, n: int, k: int, format: str, dtype: torch.dtype, scale: float | None) -> None:
        super().__init__(n, k, format)
        self.num_embeddings, self.embedding_dim = n, k
        self.dtype, self.scale = dtype, scale

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> QuantisedEmbedding:
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # .to(dtype) changes what rows become
        super()._apply(fn, recurse)
        return self

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: [...] → [..., k]."""
        rows: Tensor = torch.ops.llm42.embedding_q.default(
            input_ids, self.weight, self.format, self.n, self.k, self.dtype
        )
        return rows if self.scale is None else rows * torch.tensor(self.scale, dtype=self.dtype).item()


def formats(model: nn.Module) -> dict[str, int]:
    """How many weights of each format the model holds; empty if none is quantised. Shared ones count once."""
    found = {id(m.weight): m.format for m in model.modules() if isinstance(m, Quantised)}
    return dict(sorted(Counter(found.values()).items()))


def replace(model: nn.Module, name: str, format: str, dtype: torch.dtype) -> None:
    """A quantised module of that name in place of a linear or an embedding, on the same device.

    Raises WeightsError for any other module, and FormatError for rows that no blocks of ``format`` hold.
    """
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise WeightsError(f"quantised weights of {name!r}, which the model does not have") from None
    kind = type(module).__name__
    new: Quantised | None = None
    weight = getattr(module, "weight", None)
    with torch.device(weight.device if isinstance(weight, Tensor) else "cpu"):
        if type(module) is nn.Linear:
            new = QuantisedLinear(module.out_features, module.in_features, format, module.bias)
        elif isinstance(module, nn.Embedding):
            scale = getattr(module, "scalar_embed_scale", None)
            if type(module) is nn.Embedding or scale is not None:
                new = QuantisedEmbedding(module.num_embeddings, module.embedding_dim, format, dtype, scale)
    if new is None:
        raise WeightsError(f"{name!r} is a {kind}: only linears and embeddings can have quantised weights")
    model.set_submodule(name, new)


def register() -> None:
    """Let transformers read the folders that this module describes. Idempotent."""
    from transformers.quantizers import auto

    if METHOD in auto.AUTO_QUANTIZER_MAPPING:
        return
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Llm42Config(QuantizationConfigMixin):
        def __init__(self, formats: dict[str, str], **_: Any) -> None:
            self.quant_method: Any = METHOD
            self.formats = formats

    class Llm42Quantizer(HfQuantizer):
        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            for name, format in dict(self.quantization_config)["formats"].items():
                replace(model, name, format, model.dtype)

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
            registry.define()
            for module in model.modules():
                if isinstance(module, Quantised):
                    module.pack()
            return model

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return False

    auto.register_quantization_config(METHOD)(Llm42Config)
    auto.register_quantizer(METHOD)(Llm42Quantizer)
