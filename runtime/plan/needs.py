"""What a model takes, to the byte and without its weights: from its configuration, on the meta device."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm42c.codegen import cache
from llm42c.errors import ModelNotFoundError

if TYPE_CHECKING:
    from torch import nn

_FOLDER, _LAYOUT = "plans", "2"


@dataclass(frozen=True)
class Needs:
    """Bytes of one model in one dtype. ``weights``: of its parameters, each once, as they lie in memory;
    ``read``: of those that a decoding step reads (a table of embeddings that is no output layer is not).

    ``sparse``: experts, of which a token reads some; what it reads then follows the batch.
    """

    model: str
    family: str
    dtype: str
    parameters: int
    weights: int
    read: int
    products: int  # parameters of the matrices that every token goes through
    kv_per_token: int
    kv_exact: bool  # seen in a forward; else as the configuration says
    layers: int
    vocab: int
    hidden: int
    context: int
    formats: dict[str, int]
    sparse: bool


def needs(name: str, dtype: str | None = None) -> Needs:
    """Of MODEL as the command line takes it, in ``dtype`` or the checkpoint's own.

    The answer is kept in the cache folder under a digest of the configuration. Raises ModelNotFoundError, or
    UnsupportedModelError for a model that is not served.
    """
    from llm42c.hub import models

    source = models.folder_of(name) or models.resolve(name)
    kept = _kept(source, name, dtype)
    if kept is not None and (content := _read(kept)) is not None:
        return dataclasses.replace(content, model=name)
    found = of_model(_on_meta(name, source, dtype), name)
    if kept is not None:
        cache.write(kept, json.dumps(dataclasses.asdict(found)))
    return found


def of_model(model: nn.Module, name: str = "") -> Needs:
    """Of a model on any device, whose parameters are not read. Raises UnsupportedModelError."""
    from llm42c import quantised
    from llm42c.capture.dynamo import kv_spec
    from llm42c.capture.sizes import kv_spec_of_meta
    from llm42c.capture.support import context_limit
    from llm42c.device import dtype_of_model

    parameters = {id(p): p for p in model.parameters()}
    sizes = {key: _nbytes(model, p) for key, p in parameters.items()}
    dtype = dtype_of_model(model)
    config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator,union-attr]
    embeddings, outputs = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    table = getattr(embeddings, "weight", None)
    tied = table is not None and table is getattr(outputs, "weight", None)
    unread = 0 if table is None or tied else sizes[id(table)]
    seen = kv_spec_of_meta(model)
    spec = seen or kv_spec(model)
    return Needs(
        model=name or type(model).__name__,
        family=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        parameters=sum(_elements(model, p) for p in parameters.values()),
        weights=sum(sizes.values()),
        read=sum(sizes.values()) - unread,
        products=sum(
            _elements(model, p) for p in parameters.values() if p.dim() >= 2 and (tied or p is not table)
        ),
        kv_per_token=sum(2 * s.num_kv_heads * s.head_dim for s in spec) * dtype.itemsize,
        kv_exact=seen is not None,
        layers=len(spec),
        vocab=config.vocab_size,
        hidden=config.hidden_size,
        context=context_limit(model),
        formats=quantised.formats(model),
        sparse=any(p.dim() == 3 for p in parameters.values()),
    )


def _quantised_of(model: nn.Module, parameter: Any) -> Any:
    from llm42c import quantised

    return next(
        (m for m in model.modules() if isinstance(m, quantised.Quantised) and m.weight is parameter), None
    )


def _nbytes(model: nn.Module, parameter: Any) -> int:
    """As it lies in memory: quantised weights in panels (``codegen/quant.py``)."""
    from llm42c.codegen import quant

    module = None if parameter.is_floating_point() else _quantised_of(model, parameter)
    if module is None or parameter.dim() != 2:
        return int(parameter.nbytes)
    form = quant.format_of(module.format)
    return int(-(-module.n // quant.COLUMNS) * (module.k // form.block) * form.panel_bytes)


def _elements(model: nn.Module, parameter: Any) -> int:
    module = None if parameter.is_floating_point() else _quantised_of(model, parameter)
    return int(parameter.numel()) if module is None else int(module.n * module.k)


def _on_meta(name: str, source: str | Path, dtype: str | None) -> nn.Module:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from llm42c import quantised

    try:
        config = AutoConfig.from_pretrained(source)
        wanted = getattr(torch, dtype) if dtype else (getattr(config, "dtype", None) or torch.float32)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelNotFoundError(f"cannot read the configuration of {name!r}: {reason}") from error
    for part, form in _formats(config, source).items():
        quantised.replace(model, part, form, wanted)
    if config.tie_word_embeddings:
        model.tie_weights()
    return model.eval()


def _formats(config: Any, source: str | Path) -> dict[str, str]:
    """Formats of the modules whose weights stay quantised."""
    from llm42c import quantised
    from llm42c.hub import four_bits

    stated = getattr(config, "quantization_config", None)
    stated = stated if isinstance(stated, dict) or stated is None else stated.to_dict()
    if not stated:
        return {}
    if stated.get("quant_method") == quantised.METHOD:
        return dict(stated["formats"])
    if four_bits.method_of(config) is None:
        return {}
    return _four_bits(stated, Path(source))


def _four_bits(stated: dict[str, Any], folder: Path) -> dict[str, str]:
    """Of a checkpoint of another library: the modules whose weights its files hold packed."""
    import safetensors

    group = stated.get("group_size") or _group_of_compressed(stated)
    names: list[str] = []
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as opened:
            names += opened.keys()
    suffixes = (".qweight", ".weight_packed")
    return {n.removesuffix(s): f"i4_{group}" for n in names for s in suffixes if n.endswith(s)}


def _group_of_compressed(stated: dict[str, Any]) -> int | None:
    groups = stated.get("config_groups") or {}
    return next((g["weights"].get("group_size") for g in groups.values() if g.get("weights")), None)


def _kept(source: str | Path, name: str, dtype: str | None) -> Path | None:
    """Where the answer is kept: by the configuration, the versions that read it, and llm42's own sources."""
    import importlib.metadata

    folder = Path(source)
    config = folder / "config.json"
    if not config.is_file() or cache.place(_FOLDER) is None:
        return None
    versions = [importlib.metadata.version(p) for p in ("torch", "transformers")]
    own = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    files = sorted((f.name, f.stat().st_size) for f in folder.glob("*.safetensors"))
    key = json.dumps([_LAYOUT, own, config.read_text(), files, versions, dtype])
    return cache.folder() / _FOLDER / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _read(path: Path) -> Needs | None:
    try:
        return Needs(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
