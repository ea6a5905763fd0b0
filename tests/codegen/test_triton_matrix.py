"""Attention kernels ahead of time, over pairs of everything that a specialisation can be."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import spills

from llm42c.codegen.triton import devices
from llm42c.codegen.triton import spec as specs
from llm42c.codegen.triton.spec import AttentionSpec, default_spec

AXES: dict[str, tuple[Any, ...]] = {
    "device": ("NVIDIA A100-SXM4-80GB", "NVIDIA H200", "NVIDIA B200", "AMD Instinct MI300X"),
    "head_dim": specs.HEAD_DIMS,
    "dtype": tuple(specs.DTYPES),
    "scheduler": specs.SCHEDULERS,
    "layout": specs.LAYOUTS,
    "page": (16, 64, 256),
    "features": ("none", "window", "softcap and sinks", "all"),
    "heads": ((32, 8), (8, 8), (16, 1)),
    "uniform": (True, False),
}
FEATURES: dict[str, dict[str, Any]] = {
    "none": {},
    "window": {"window": 1000},
    "softcap and sinks": {"softcap": True, "sinks": True},
    "all": {"window": 1000, "softcap": True, "sinks": True},
}


def pairs(case: dict[str, Any]) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def cover() -> Iterator[dict[str, Any]]:
    """Cases that hold every pair of values of two axes; greedy, best of some random candidates."""
    names = list(AXES)
    rng = random.Random(0)
    wanted = {
        tuple(sorted(((a, x), (b, y)), key=lambda item: item[0]))
        for a, b in itertools.combinations(names, 2)
        for x in AXES[a]
        for y in AXES[b]
    }
    while wanted:
        start = dict(min(wanted, key=repr))
        candidates = [{n: start.get(n, rng.choice(AXES[n])) for n in names} for _ in range(200)]
        best = max(candidates, key=lambda case: len(pairs(case) & wanted))
        wanted -= pairs(best)
        yield best


CASES = list(cover())


def spec_of(case: dict[str, Any]) -> AttentionSpec:
    heads, kv_heads = case["heads"]
    return default_spec(
        devices.from_table(case["device"]), heads=heads, kv_heads=kv_heads, head_dim=case["head_dim"],
        page=case["page"], dtype=case["dtype"], scheduler=case["scheduler"], uniform=case["uniform"],
        layout=case["layout"], **FEATURES[case["features"]],
    )  # fmt: skip


def name(case: dict[str, Any]) -> str:
    return "-".join(str(value).replace(" ", "_") for value in case.values())


def test_every_pair_is_in_some_case():
    seen = set().union(*map(pairs, CASES))
    assert len(seen) == sum(len(AXES[a]) * len(AXES[b]) for a, b in itertools.combinations(AXES, 2))
    assert len(CASES) <= 32


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=name)
def test_it_fits_and_does_not_spill(case: dict[str, Any]):
    pytest.importorskip("triton")
    from llm42c.codegen.triton.catalog import attention_kernel

    target = devices.from_table(case["device"])
    found = attention_kernel(spec_of(case)).compile(target).resources
    assert found.spills <= spills.allowed(), found
    assert found.shared <= target.get("shared_bytes"), found


@pytest.mark.parametrize("device", AXES["device"])
def test_tiles_do_not_depend_on_what_must_not_change_bits(device: str):
    """Scheduler and layout choose no tile; neither do the variants that are tried against spills."""
    target = devices.from_table(device)
    free = [AXES[n] for n in ("scheduler", "layout", "uniform")]
    for head_dim, dtype, features in itertools.product(AXES["head_dim"], AXES["dtype"], FEATURES.values()):
        made = [
            default_spec(
                target, heads=32, kv_heads=8, head_dim=head_dim, page=64, dtype=dtype, scheduler=scheduler,
                uniform=uniform, layout=layout, **features,
            )
            for scheduler, layout, uniform in itertools.product(*free)
        ]  # fmt: skip
        every = [variant for spec in made for variant in spec.variants()]
        assert len({(s.rows, s.decode_rows, s.keys, s.split, s.warps) for s in every}) == 1
        assert all(spec == spec.variants()[0] for spec in made)
