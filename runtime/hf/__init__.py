"""Hugging Face models made deterministic."""

from llm42c.runtime.hf.deterministic import Deterministic, deterministic
from llm42c.runtime.hf.generate import StreamedToken
from llm42c.runtime.hf.output import DeterministicOutput

__all__ = ["Deterministic", "DeterministicOutput", "StreamedToken", "deterministic"]
