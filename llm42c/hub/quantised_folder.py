"""Folders of models with quantised weights, as :mod:`llm42c.quantised` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llm42c import quantised
from llm42c.codegen import quant
from llm42c.device import dtype_of_model


@dataclass(frozen=True)
class QuantisedFolder:
    """What the folder will hold."""

    config: Any
    generation_config: Any
    tokenizer: Any
    state: dict[str, Tensor]

    def save_pretrained(self, folder: Path) -> None:
        """Write the files into ``folder``, which exists. Raises OSError or SafetensorError."""
        import safetensors.torch

        for part in (self.config, self.generation_config, self.tokenizer):
            if part is not None:
                part.save_pretrained(folder)
        safetensors.torch.save_file(self.state, folder / "model.safetensors", metadata={"format": "pt"})


def assembled(
    model: Any, tokenizer: Any, state: dict[str, Tensor], formats: dict[str, str]
) -> QuantisedFolder:
    """Of a model on the meta device, whose linears and embeddings named in ``formats`` become quantised.

    ``state``: blocks of these by their weights' names, and every other parameter. Raises WeightsError or
    FormatError where they do not fit the model.
    """
    config, dtype = model.config, dtype_of_model(model)
    formats = dict(formats)
    if config.tie_word_embeddings:
        _tie(model, formats)
    for name, format in formats.items():
        quantised.replace(model, name, format, dtype)
    _require_whole(model, state)
    config.quantization_config = {"quant_method": quantised.METHOD, "formats": formats}
    config.architectures, config.dtype = [type(model).__name__], dtype
    return QuantisedFolder(config, model.generation_config, tokenizer, state)


def _tie(model: Any, formats: dict[str, str]) -> None:
    """The output layer has the embedding's format, since it is its weight."""
    modules: dict[int, str] = {id(module): name for name, module in model.named_modules()}
    inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(outputs, nn.Linear) and (format := formats.get(modules[id(inputs)])):
        formats[modules[id(outputs)]] = format


def _require_whole(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Every parameter is there, in its shape. Raises FormatError."""
    given = set(state)
    for name, parameter in model.named_parameters():
        if name in state and state[name].shape != parameter.shape:
            shapes = f"{tuple(state[name].shape)} in the file, {tuple(parameter.shape)} in the model"
            raise quant.FormatError(f"the shape of {name} does not fit: {shapes}")
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    missing = sorted({name for name, _ in model.named_parameters(remove_duplicate=False)} - given - tied)
    if missing:
        raise quant.FormatError(f"the file lacks {missing[0]} ({len(missing)} of the model's weights)")
