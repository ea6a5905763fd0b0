"""A token of a row of logits, and log-probabilities of tokens."""

import triton
import triton.language as tl

BLOCK = tl.constexpr(1024)
COLUMNS = tl.constexpr(32)


@triton.jit
def gumbel(seed, position, index):
    """Noise of ``codegen/ops/sample.py``: Philox4x32-10 under the row's seed at the row's position."""
    block = index // 64
    word = index % 64 // 16
    lane = index % 16
    c0 = (block * 16 + lane).to(tl.uint32)
    zero = c0 * 0
    low = zero + (position & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, c0, zero, low, high)
    bits = tl.where(word == 0, r0, tl.where(word == 1, r1, tl.where(word == 2, r2, r3)))
    u = bits.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    u = tl.minimum(u, 0.99999994)
    # -log(-log(1 - u)); for small u, -log(1 - u) by its series, where 1 - u would lose u's digits.
    near = u * (1.0 + u * (0.5 + u * (0.33333334 + u * 0.25)))
    return -tl.log(tl.where(u < 0.01, near, -tl.log(1.0 - u)))


@triton.jit
def sample(
    sorted_ptr, index_ptr, token_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr, seed_ptr, position_ptr, size,
):  # fmt: skip
    """sorted, index: [R, V], descending. Program: row."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    top_p = tl.load(top_p_ptr + row)
    min_p = tl.load(min_p_ptr + row)
    seed = tl.load(seed_ptr + row)
    position = tl.load(position_ptr + row)
    values = sorted_ptr + row * size
    indices = index_ptr + row * size
    lane = tl.arange(0, BLOCK)
    top = tl.load(values).to(tl.float32)
    last = tl.load(values + size - 1).to(tl.float32)
    drawn = temperature > 0.0
    scale = tl.where(drawn, temperature, 1.0)
    limited = drawn & (top_k > 0) & (top_k < size)
    least = tl.load(values + tl.where(limited, top_k, size) - 1).to(tl.float32)  # and its equals

    kept_sum = 0.0  # of exp((x - max) / temperature) over the top k
    for start in tl.range(0, size, BLOCK):
        there = start + lane < size
        x = tl.load(values + start + lane, mask=there, other=float("-inf")).to(tl.float32)
        kept_sum += tl.sum(tl.where(x >= least, tl.exp((x - top) / scale), 0.0), 0)

    # The first entry always stays; with top-p off, all do.
    limit = tl.where(top_p >= 1.0, float("inf"), tl.maximum(top_p * kept_sum, 1e-30))
    before = 0.0
    best = float("-inf")
    token = tl.load(indices)
    for start in tl.range(0, size, BLOCK):
        at = start + lane
        there = at < size
        x = tl.load(values + at, mask=there, other=float("-inf")).to(tl.float32)
        index = tl.load(indices + at, mask=there, other=0)
        z = (x - top) / scale
        p = tl.where(there & (x >= least), tl.exp(z), 0.0)
        ahead = before + tl.cumsum(p, 0) - p
        before += tl.sum(p, 0)
        keep = there & (x >= least) & (tl.exp(z) >= min_p)
        keep = keep & (ahead < limit)
        score = tl.where(keep, z + gumbel(seed, position, index), float("-inf"))
        highest = tl.max(score, 0)
        # Equal scores go to the lowest index.
        winner = tl.min(tl.where(score == highest, index, 0x7FFFFFFF), 0)
        better = drawn & ((highest > best) | ((highest == best) & (winner < token)))
        token = tl.where(better, winner, token)
        best = tl.maximum(best, highest)

    # NaN sorts above everything; a row that holds it, or has no finite maximum, fails alone.
    bad = (top != top) | (last != last) | (tl.abs(top) == float("inf"))
    tl.store(token_ptr + row, tl.where(bad, -1, token).to(tl.int64))


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
