"""The list of all operators."""

from __future__ import annotations

from llm42c.codegen.ops import paged_attention
from llm42c.codegen.ops.registry import Operator

OPERATORS: tuple[Operator, ...] = (paged_attention.OP,)
