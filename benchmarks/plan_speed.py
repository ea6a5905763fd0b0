"""The coefficients of `runtime/plan/calibration.py` for H100 and B200, and their errors for models unseen.

    pip install --no-deps leadgreen-mcp
    python benchmarks/plan_speed.py

Fits the sum of constant, bytes and operations to the dense bf16 configurations of the ML.ENERGY Leaderboard
3.0 that the package leadgreen-mcp carries; then leaves each model out, and prints the error of its median
latency between tokens, the share of its measurements inside the interval of the others, and what was drawn of
the TDP.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llm42c.runtime.plan.calibration import Observation, fit

# Parameters, and bytes a token of keys and values in bf16, from the models' configurations.
MODELS = {
    "llama-3-1-8b-instruct": (8.03e9, 131072),
    "llama-3-1-70b-instruct": (70.55e9, 327680),
    "llama-3-3-70b-instruct": (70.55e9, 327680),
    "llama-3-1-405b-instruct": (405.8e9, 516096),
    "qwen-3-8b": (8.19e9, 147456),
    "qwen-3-14b": (14.77e9, 163840),
    "qwen-3-32b": (32.76e9, 262144),
    "gemma-3-12b": (11.77e9, 393216),
    "gemma-3-27b": (27.0e9, 507904),
}
DEVICES = {"H100": (3.35e12, 989.4e12, 700.0), "B200": (8e12, 2250e12, 1000.0)}  # bandwidth, bf16, TDP
PROMPT = 250  # tokens of an average prompt of that workload
QUANTILES = (0.05, 0.95)


@dataclass(frozen=True)
class Row:
    model: str
    gpu: str
    step: Observation
    power: float  # of the TDP


def rows(data: Path) -> list[Row]:
    """Every dense bf16 configuration."""
    found = []
    for model, (parameters, kv) in MODELS.items():
        for c in json.loads((data / f"{model}.json").read_text())["configurations"]:
            if c["precision"] != "BF16":
                continue
            count, batch = c["num_gpus"], c["avg_running_batch"]
            context = PROMPT + c["avg_output_tokens"] / 2
            nbytes = (2 * parameters + batch * context * kv) / count
            step = Observation(nbytes, 2 * parameters * batch / count, c["median_itl_ms"] / 1e3)
            tdp = DEVICES[c["gpu"]][2]
            found.append(Row(model, c["gpu"], step, c["gpu_power_watts_total"] / count / tdp))
    return found


def predicted(step: Observation, x: tuple[float, float, float], gpu: str) -> float:
    bandwidth, rate, _ = DEVICES[gpu]
    return x[0] + x[1] * step.nbytes / bandwidth + x[2] * step.operations / rate


def ratios(mine: list[Row], x: tuple[float, float, float], gpu: str) -> list[float]:
    """Measured over predicted."""
    return [r.step.seconds / predicted(r.step, x, gpu) for r in mine]


def report(gpu: str, every: list[Row]) -> None:
    bandwidth, rate, _ = DEVICES[gpu]
    errors, inside = [], []
    models = sorted({r.model for r in every})
    held: dict[str, list[float]] = {}
    for model in models:
        x = fit([r.step for r in every if r.model != model], bandwidth, rate)
        held[model] = ratios([r for r in every if r.model == model], x, gpu)
        errors += [abs(1 / ratio - 1) for ratio in held[model]]
    for model in models:
        others = [ratio for other in models if other != model for ratio in held[other]]
        low, high = np.quantile(others, QUANTILES)
        inside += [low <= ratio <= high for ratio in held[model]]
    everything = [ratio for its in held.values() for ratio in its]
    low, high = np.quantile(everything, QUANTILES)
    constant, memory, compute = fit([r.step for r in every], bandwidth, rate)
    power = np.quantile([r.power for r in every], (0, 0.5, 1))
    print(f"{gpu}: {len(every)} configurations of {len(models)} models")
    print(f"  constant {constant:.4g} s, memory_share {memory:.4f}, compute_share {compute:.4f}")
    print(f"  low {low:.3f}, high {high:.3f}; power {', '.join(f'{p:.2f}' for p in power)} of the TDP")
    print(
        f"  a model left out: median error {np.median(errors):.1%}, 80th percentile "
        f"{np.quantile(errors, 0.8):.1%}"
    )
    print(f"  inside the interval of the other models: {np.mean(inside):.0%}")


def main() -> int:
    spec = importlib.util.find_spec("leadgreen_mcp")
    if spec is None or spec.origin is None:
        print("pip install --no-deps leadgreen-mcp", file=sys.stderr)
        return 2
    found = rows(Path(spec.origin).parent / "data" / "models")
    for gpu in DEVICES:
        report(gpu, [r for r in found if r.gpu == gpu])
    return 0


if __name__ == "__main__":
    sys.exit(main())
