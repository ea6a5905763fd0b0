"""Experts and log-probabilities under Triton's interpreter; prints one JSON object."""

from __future__ import annotations

import json
from typing import Any

import torch
from interpreted import digest  # also makes the interpreter's products independent of a row's place
from torch import Tensor

from llm42c.codegen.ops import registry
from llm42c.codegen.ops import sample as operators
from llm42c.codegen.triton import grouped_linear, linear, sample

EPS = torch.finfo(torch.float32).eps


def experts() -> dict[str, Any]:
    """Errors over their bounds; bits against ``linear_dense`` and under other companions."""
    g = torch.Generator().manual_seed(0)
    rows, count, n, k = 41, 5, 70, 50
    x, bias = torch.randn(rows, k, generator=g), torch.randn(count, n, generator=g)
    weight = torch.randn(count, n, k, generator=g)
    group = torch.randint(0, count - 1, (rows,), generator=g)  # nobody asks the last expert
    group[:20] = 1
    got = grouped_linear.grouped_linear(x, weight, bias, group, False)
    want = registry.operators()["grouped_linear"].reference(x, weight, bias, group, False)
    size = torch.einsum("rk,rnk->rn", x.abs().double(), weight[group].abs().double()) + bias[group].abs()
    turned = grouped_linear.grouped_linear(x, weight.transpose(1, 2).contiguous(), bias, group, True)
    order = torch.randperm(rows, generator=g)
    permuted = grouped_linear.grouped_linear(x[order], weight, bias, group[order], False)
    one_by_one = torch.cat(
        [linear.linear_dense(x[i : i + 1], weight[e], bias[e]) for i, e in enumerate(group)]
    )
    some = torch.arange(0, rows, 3)
    fewer = grouped_linear.grouped_linear(x[some], weight, bias, group[some], False)
    lost = group.clone()
    lost[3], lost[30] = -1, count
    partly = grouped_linear.grouped_linear(x, weight, bias, lost, False)
    found = torch.tensor([i not in (3, 30) for i in range(rows)])
    swapped = grouped_linear.grouped_linear(x, weight, bias, group.flip(0), False)
    return {
        "error": float(((got.double() - want).abs() / ((k + 2) * EPS * size)).max()),
        "same": {
            "transposed": digest(turned) == digest(got),
            "permuted": digest(permuted) == digest(got[order]),
            "linear_dense": digest(one_by_one) == digest(got),
            "fewer rows": digest(fewer) == digest(got[some]),
            "unknown experts": digest(partly[found]) == digest(got[found])
            and bool(partly[~found].isnan().all()),
            "no bias": digest(grouped_linear.grouped_linear(x, weight, None, group, False)) != digest(got),
        },
        "control": digest(swapped) != digest(got),
    }


def work_lists() -> bool:
    """Every row is in exactly one tile, with rows of its own expert; tiles that are not there say so."""
    g = torch.Generator().manual_seed(1)
    for rows, count, size in ((1, 1, 16), (100, 3, 16), (7, 64, 16), (257, 4, 64), (33, 2, 16)):
        group = torch.randint(-1, count + 1, (rows,), generator=g)
        order, expert, first, ends = grouped_linear.work_list(group, count, size)
        seen: list[int] = []
        for e, f in zip(expert.tolist(), first.tolist(), strict=True):
            if e > count:
                continue
            places = range(f, min(f + size, int(ends[e])))
            assert len(places) > 0
            taken = [int(order[p]) for p in places]
            assert all(int(group[i]) == e if e < count else int(group[i]) in (-1, count) for i in taken)
            seen += taken
        assert sorted(seen) == list(range(rows)), (rows, count, size)
    return True


def logits(g: torch.Generator) -> Tensor:
    x = torch.randn(5, 1500, generator=g) * 4
    x[0, 7] = x[0, 900] = x[0].max() + 1  # two that are equal
    x[2, 3], x[3, 5] = torch.nan, torch.inf
    x[4, 100:] = -torch.inf
    return x


def logprobs() -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    x = logits(g)
    values, indices = sample.top_logprobs(x, 9)
    want_values, want_indices = operators.top_logprobs.reference(x, 9)
    tokens = torch.randint(0, 100, (5, 3), generator=g)
    got = sample.token_logprobs(x, tokens)
    want = operators.token_logprobs.reference(x, tokens)
    good = torch.tensor([0, 1, 4])
    limit = (1500 + 2 * 40 + 8) * EPS + 4 * EPS * want[good].abs()
    columns = (torch.tensor([0.0] * 5), torch.zeros(5).int(), torch.ones(5), torch.zeros(5))
    token, logprob = sample.sample(x, *columns, torch.arange(5), torch.arange(5))
    half = sample.top_logprobs(x.half(), 9)[1]
    outside = sample.token_logprobs(x, torch.full((5,), 1500))
    return {
        "error": float(((got[good].double() - want[good]).abs() / limit).max()),
        "top_error": float(((values[good].double() - want_values[good]).abs() / (1600 * EPS)).max()),
        "checks": {
            "indices": torch.equal(indices, want_indices),
            "refused": bool(values[2:4].isnan().all() and got[2:4].isnan().all()),
            "ties": indices[0, :2].tolist() == [7, 900],
            "half": torch.equal(half, operators.top_logprobs.reference(x.half(), 9)[1]),
            "outside": bool(outside.isnan().all()),
            "sampled": digest(logprob[good]) == digest(sample.token_logprobs(x, token.clamp(min=0))[good]),
            "greedy": token.tolist() == [7, int(x[1].argmax()), -1, -1, int(x[4].argmax())],
            "alone": digest(sample.token_logprobs(x[1:2], tokens[1:2])) == digest(got[1:2]),
            "double": torch.equal(sample.top_logprobs(x.double(), 3)[1][good], indices[good, :3]),
        },
        "control": another_order(g),
    }


def another_order(g: torch.Generator) -> bool:
    """Control: in some rows the bits tell that a sum went the other way round."""
    x, first = torch.randn(64, 1500, generator=g), torch.zeros(64, dtype=torch.int64)
    there, back = sample.token_logprobs(x, first), sample.token_logprobs(x.flip(1), 1499 - first)
    return digest(there) != digest(back)


if __name__ == "__main__":
    registry.define()
    print(json.dumps({"experts": experts(), "work_lists": work_lists(), "logprobs": logprobs()}))
