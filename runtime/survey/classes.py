"""Which classes are surveyed: all that transformers maps to a causal language model, and its exports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Decoder:
    """A model class and the configuration class that goes with it, by name."""

    name: str
    model_type: str

    def load(self) -> tuple[Any, Any]:
        """(model class, configuration class)."""
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        model_class = getattr(transformers, self.name)
        config_class = getattr(model_class, "config_class", None)
        return model_class, config_class or CONFIG_MAPPING[self.model_type]


def decoders() -> list[Decoder]:
    """Every class of transformers' mapping for causal language models, each once, by name.

    Besides those, every exported class whose name ends in ``ForCausalLM``.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    found: dict[str, Decoder] = {}
    for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        for name in (names,) if isinstance(names, str) else names:
            found.setdefault(name, Decoder(name, model_type))
    for name in dir(transformers):
        if name.endswith("ForCausalLM") and not name.startswith(("Auto", "TF", "Flax")):
            found.setdefault(name, Decoder(name, ""))
    return sorted(found.values(), key=lambda d: d.name)
