"""What a format costs in accuracy: perplexity of a text of the project's own.

``python benchmarks/perplexity.py`` quantises SmolLM2 to every format that ``llm42 quantize`` makes and takes
the packaged file as it is. Beside each stands the perplexity of the same weights dequantised to fp32 with x
as it is: what lies between them is the price of x in eight bits.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm42c.codegen import quant
from llm42c.codegen.ops import registry
from llm42c.hub import models
from llm42c.hub.quantise import FORMATS, quantise
from llm42c.quantised import QuantisedEmbedding, QuantisedLinear, formats
from llm42c.runtime.bench.machine import describe

ROOT = Path(__file__).parents[1]
TEXT = [ROOT / "docs" / name for name in ("determinism.md", "token_weaving.md", "tensor_parallel.md")]
WINDOW = 512


def perplexity(model: Any, ids: torch.Tensor) -> float:
    """ids: [windows, WINDOW]."""
    total, count = 0.0, 0
    for window in ids:
        with torch.no_grad():
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
        total += nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count)


def dequantised(model: Any) -> Any:
    """The same weights in fp32, in place."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, (QuantisedLinear, QuantisedEmbedding)):
            continue
        weight = quant.dequantise(quant.unpack(module.weight.data, module.format, module.n), module.format)
        new = nn.Embedding(module.n, module.k, _weight=weight)
        if isinstance(module, QuantisedLinear):
            new = nn.Linear(module.k, module.n, bias=module.bias is not None)
            new.weight, new.bias = nn.Parameter(weight), module.bias
        model.set_submodule(name, new)
    return nn.Module.float(model)  # transformers refuses it for what was quantised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "perplexity.csv")
    args = parser.parse_args()
    registry.load()
    base, tokenizer = models.load_model("smollm2")
    text = "\n".join(path.read_text() for path in TEXT)
    ids = torch.tensor(tokenizer(text)["input_ids"][: args.windows * WINDOW]).view(-1, WINDOW)
    rows = [{"model": "smollm2", "weights": "bf16", "perplexity": perplexity(base, ids)}]
    for format in ("smollm2-q4", *args.formats.split(",")):
        if format in FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                made, _ = quantise(base, tokenizer, format)
                models.write(Path(folder) / "model", made)
                model = models.load_model(Path(folder) / "model")[0]
        else:
            model = models.load_model(format)[0]
        row = {"model": "smollm2" if format in FORMATS else format, "perplexity": perplexity(model, ids)}
        row["weights"] = "+".join(formats(model))
        rows.append(row | {"exact_x": perplexity(dequantised(model), ids)})
        print(rows[-1], flush=True)
    about = describe() | {
        "tokens": ids.numel(),
        "text": hashlib.sha256(text.encode()).hexdigest()[:12],
        "command": f"python benchmarks/perplexity.py --windows {args.windows} --formats {args.formats}",
    }
    with args.out.open("w", newline="") as file:
        fields = ["model", "weights", "perplexity", "exact_x", *about]
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            numbers = {k: f"{v:.4f}" for k, v in row.items() if isinstance(v, float)}
            writer.writerow(row | numbers | about)


if __name__ == "__main__":
    main()
