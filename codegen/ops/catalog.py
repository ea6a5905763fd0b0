"""The list of all operators."""

from __future__ import annotations

from llm42c.codegen.ops import (
    activation,
    all_reduce_add_rms_norm,
    collectives,
    dense_attention,
    grouped_linear,
    grouped_outer,
    index_add,
    linear,
    norm,
    paged_attention,
    pod_attention,
    pod_dense_attention,
    pod_varlen_attention,
    reduce,
    rotary,
    running,
    sample,
    solve_triangular,
)
from llm42c.codegen.ops.registry import Operator

OPERATORS: tuple[Operator, ...] = (
    activation.OP,
    *all_reduce_add_rms_norm.OPERATORS,
    *collectives.OPERATORS,
    dense_attention.OP,
    grouped_linear.OP,
    grouped_outer.OP,
    index_add.OP,
    *linear.OPERATORS,
    *norm.OPERATORS,
    paged_attention.OP,
    pod_attention.OP,
    pod_dense_attention.OP,
    pod_varlen_attention.OP,
    *reduce.OPERATORS,
    rotary.OP,
    *running.OPERATORS,
    *sample.OPERATORS,
    solve_triangular.OP,
)
