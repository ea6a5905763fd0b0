"""How llm42 calls Inductor: with settings that keep every row's arithmetic the same in every batch."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from llm42c.codegen.cpu import build

_log = logging.getLogger(__name__)

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


# What keeps the bits of a pointwise call the same anywhere in a loop, and a sum whole. The other settings
# matter only to calls that ``check`` names, or repeat torch's own defaults.
REQUIRED = frozenset(
    {
        "split_reductions",
        "cpp.simdlen",
        "cpp.enable_unsafe_math_opt_flag",
        "cpp.enable_floating_point_contract_flag",
    }
)


def asked_config() -> dict[str, Any]:
    """The settings for fixed reductions, those included that this version of torch may not have."""
    return dict(_FIXED)


def fixed_config() -> dict[str, Any]:
    """The settings for fixed reductions, restricted to those that this version of torch has."""
    from torch._inductor import config

    known = config.get_config_copy()
    return {key: value for key, value in _FIXED.items() if key in known}


def unknown_settings() -> list[str]:
    """The settings for fixed reductions that this version of torch does not have."""
    known = fixed_config()
    return [key for key in _FIXED if key not in known]


def missing() -> list[str]:
    """Those of :data:`REQUIRED`."""
    return sorted(REQUIRED.intersection(unknown_settings()))


def notes() -> list[str]:
    """For reports: a sentence on each setting that this version of torch does not have."""
    return [
        f"Inductor of this torch has no setting {key}: "
        + (
            "bits of what it compiles may depend on the batch"
            if key in REQUIRED
            else "no placed call needs it"
        )
        for key in unknown_settings()
    ] + ([] if has_compiler() else [WITHOUT_COMPILER])


WITHOUT_COMPILER = (
    "there is no C++ compiler: on a CPU, what lies between the operators runs call by call, as PyTorch has it"
)


def has_compiler() -> bool:
    """Whether Inductor can compile for CPUs."""
    return build.compiler_version() != build.NO_COMPILER


def runs_as_it_stands(example_inputs: list[Any]) -> bool:
    """Whether a graph on these inputs is left to PyTorch, because Inductor could not compile it."""
    return any(without_compiler(x.device) for x in example_inputs if isinstance(x, Tensor))


def without_compiler(device: torch.device) -> bool:
    """Whether Inductor cannot compile for ``device``."""
    return device.type == "cpu" and not has_compiler()


@functools.cache
def _warn_once() -> None:
    if names := missing():
        _log.warning(
            "Inductor of this torch does not know %s; rows of what it compiles may depend on their batch",
            ", ".join(names),
        )


def compile_fixed(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compile a rewritten graph with Inductor under :func:`fixed_config`; uncompiled without a compiler."""
    if runs_as_it_stands(example_inputs):
        return gm
    from torch._inductor.compile_fx import compile_fx

    _warn_once()
    compiled: Any = compile_fx(gm, example_inputs, config_patches=fixed_config())
    return compiled


def compile_free(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
    """Compile a graph with Inductor as it is; without a compiler, as it stands."""
    if runs_as_it_stands(example_inputs):
        return gm
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, example_inputs)
    return compiled
