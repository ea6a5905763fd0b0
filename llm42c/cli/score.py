"""`llm42 score`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from llm42c.cli.common import (
    DeviceOption,
    DtypeOption,
    FastOption,
    KvOption,
    ModelArgument,
    PassOption,
    VerifyOption,
    open_engine,
    print_json,
    progress_bars,
    read_lines,
)
from llm42c.errors import RequestError


def score(
    model: ModelArgument,
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE.jsonl", help="Lines of {prompt, completion}: texts, or token ids; '-' is stdin."
        ),
    ],
    dtype: DtypeOption = None,
    device: DeviceOption = "cpu",
    fast: FastOption = "pinned",
    verify: VerifyOption = "auto",
    kv_mb: KvOption = 256,
    passes: PassOption = None,
) -> None:
    """Log-probs of given completions, with the bits that generating them would have given."""
    pairs = [_pair(f"{file}:{n}", text) for n, text in read_lines(file)]
    if not pairs:
        raise RequestError(f"{file} holds nothing to score")
    with progress_bars() as report:
        built = open_engine(
            *(model, report), dtype=dtype, device=device, fast=fast, verify=verify, kv_mb=kv_mb, passes=passes
        )
        ids = [
            (_ids(built.tokenizer, prompt, True), _ids(built.tokenizer, completion, False))
            for prompt, completion in pairs
        ]
        report("scoring", 0, 0)
        results = built.engine.score_batch(ids)
    for i, ((_, tokens), result) in enumerate(zip(ids, results, strict=True)):
        print_json(
            {
                "index": i,
                "token_ids": list(tokens),
                "logprobs": result.logprobs,
                "total": result.total,
                "greedy": all(result.greedy),
                "contract": built.engine.contract.hash,
            }
        )


def _pair(place: str, line: str) -> tuple[Any, Any]:
    try:
        values = json.loads(line)
        prompt, completion = values["prompt"], values["completion"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise RequestError(f'{place} is no JSON object with "prompt" and "completion"') from None
    for name, value in (("prompt", prompt), ("completion", completion)):
        if not isinstance(value, (str, list)) or not value:
            raise RequestError(f"{place}: {name} must be a text or a list of token ids, and not empty")
    return prompt, completion


def _ids(tokenizer: Any, value: Any, special: bool) -> Any:
    if isinstance(value, list):
        return value
    if tokenizer is None:
        raise RequestError("the model has no tokenizer: give token ids")
    return tokenizer(value, add_special_tokens=special)["input_ids"]
