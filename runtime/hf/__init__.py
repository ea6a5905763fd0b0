"""Hugging Face models made deterministic."""

from llm42c.runtime.hf.deterministic import Deterministic, deterministic
from llm42c.runtime.hf.output import DeterministicOutput
from llm42c.runtime.hf.streaming import StreamedToken

__all__ = ["Deterministic", "DeterministicOutput", "StreamedToken", "deterministic"]
