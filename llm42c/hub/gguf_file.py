"""A GGUF file becomes a folder that :mod:`llm42c.quantised` reads, with every weight's blocks as they are.

Names, configuration and tokenizer are transformers' own reading of the file. What belongs to a linear or an
embedding keeps its blocks; where transformers orders rows differently (rotary pairs), whole rows move. The
rest, norms and biases, is small and becomes bf16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm42c.codegen import quant
from llm42c.hub.quantised_folder import QuantisedFolder, assembled

_PLAIN = frozenset({"F32", "F16", "BF16"})


def unpack(gguf: Path, dtype: torch.dtype = torch.bfloat16) -> QuantisedFolder:
    """The model in a GGUF file; ``dtype`` is that of the rest.

    Raises ValueError (FormatError among them) or OSError for a file that cannot be read, WeightsError for
    quantised weights of a part that can have none.
    """
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    config = AutoConfig.from_pretrained(**where)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    state, formats = _read(GGUFReader(gguf), model, dtype)
    return assembled(model, AutoTokenizer.from_pretrained(**where), state, formats)


def _read(reader: Any, model: Any, dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, formats by module)."""
    from gguf import dequantize
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        read_field,
    )

    architecture = read_field(reader, "general.architecture")[0]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    state: dict[str, Tensor] = {}
    formats: dict[str, str] = {}
    for tensor in reader.tensors:
        if tensor.name not in names:
            continue  # frequencies of rotary embeddings, which the configuration has
        name, kind = names[tensor.name], tensor.tensor_type.name
        if kind in _PLAIN:
            values = dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1].tolist())
            values = processor.process(weights=values, name=tensor.name).weights
            state[name] = torch.from_numpy(np.array(values)).to(dtype)
            continue
        try:
            format = quant.format_of(kind.lower()).name
            blocks = torch.from_numpy(np.array(tensor.data))
            quant.split(blocks, format)
        except quant.FormatError as error:
            raise quant.FormatError(f"{tensor.name}: {error}") from None
        state[name] = blocks[_rows(processor, tensor.name, len(blocks))]
        formats[name.removesuffix(".weight")] = format
    return state, formats


def _rows(processor: Any, name: str, count: int) -> Tensor:
    """Which row of the file is row i of the model's weight: what the processor does with numbered rows."""
    numbers = np.arange(count, dtype=np.int64)[:, None]
    moved = np.asarray(processor.process(weights=numbers, name=name).weights)
    if moved.shape != numbers.shape or not np.array_equal(np.sort(moved, 0), numbers):
        raise quant.FormatError(f"{name}: transformers changes the values of this weight, not only its rows")
    return torch.from_numpy(moved[:, 0].copy())
