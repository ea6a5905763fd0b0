"""How llm42 calls Inductor: with settings that keep every row's arithmetic the same in every batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

# The reductions that llm42 does not replace must not be split by shape, and nothing may be chosen by
# a benchmark. `cpp.simdlen=1`: the vectorised body of a loop and its scalar tail round exp, tanh, ...
# differently, so an element's bits would depend on where in the batch it stands; scalar code compiled
# without fast-math does not (the compiler still vectorises what is exact).
_FIXED: dict[str, Any] = {
    "deterministic": True,
    "batch_invariant": True,
    "split_reductions": False,
    "max_autotune": False,
    "max_autotune_gemm": False,
    "max_autotune_pointwise": False,
    "coordinate_descent_tuning": False,
    "dynamic_scale_rblock": False,
    "emulate_precision_casts": True,
    "freezing": False,
    "epilogue_fusion": True,
    "cpp.simdlen": 1,
    "cpp.enable_unsafe_math_opt_flag": False,
    "cpp.enable_floating_point_contract_flag": "off",
    "cpp.gemm_max_k_slices": 1,
    "cpp.dynamic_threads": False,
    "triton.cooperative_reductions": False,
    "triton.mix_order_reduction": False,
    "triton.multi_kernel": 0,
}


def fixed_config() -> dict[str, Any]:
    """The settings for fixed reductions, restricted to those that this version of torch has."""
    from torch._inductor import config

    known = config.get_config_copy()
    return {key: value for key, value in _FIXED.items() if key in known}


def compile_fixed(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compile a rewritten graph with Inductor under :func:`fixed_config`."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, example_inputs, config_patches=fixed_config())
    return compiled


def compile_free(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compile a graph with Inductor as it is."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, example_inputs)
    return compiled
