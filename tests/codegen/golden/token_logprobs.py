"""Log-probabilities of tokens.

Emitted by llm42 for any row.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(1024)
COLUMNS = tl.constexpr(32)


@triton.jit(do_not_specialize=["columns"])
def token_logprobs(x_ptr, token_ptr, y_ptr, size, columns):
    """Log-softmax of x: [R, V] at token: [R, K] → y: [R, K]. Program: row.

    NaN in rows that ``sample`` refuses, and for tokens that are not in the vocabulary.
    """
    row = tl.program_id(0).to(tl.int64)
    values = x_ptr + row * size
    lane = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    unordered = tl.zeros([BLOCK], tl.int32)
    for start in tl.range(0, size, BLOCK):
        x = tl.load(values + start + lane, mask=start + lane < size, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
        unordered = unordered | (x != x).to(tl.int32)
    top = tl.max(largest, 0)
    bad = (tl.max(unordered, 0) > 0) | (tl.abs(top) == float("inf"))
    total = 0.0
    for start in tl.range(0, size, BLOCK):
        x = tl.load(values + start + lane, mask=start + lane < size, other=float("-inf")).to(tl.float32)
        total += tl.sum(tl.exp(x - top), 0)
    for start in tl.range(0, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        there = column < columns
        token = tl.load(token_ptr + row * columns + column, mask=there, other=-1)
        known = (token >= 0) & (token < size)
        x = tl.load(values + token, mask=known, other=0.0).to(tl.float32)
        y = tl.where(known & (not bad), x - top - tl.log(total), float("nan"))
        tl.store(y_ptr + row * columns + column, y, mask=there)
