"""The sum, softmax and log-softmax of a row, in BLOCK lanes."""

import triton
import triton.language as tl

BLOCK = tl.constexpr(4096)
LOG = tl.constexpr(False)


@triton.jit
def row_sum(x_ptr, y_ptr, size):
    """x: [R, N] → y: [R]. Program: row."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        lanes += tl.load(x_ptr + row * size + i, mask=i < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + row, tl.sum(lanes, 0).to(y_ptr.dtype.element_ty))


@triton.jit
def row_softmax(x_ptr, y_ptr, size):
    """x: [R, N] → y: [R, N]. Program: row. A row with NaN is NaN."""
    row = tl.program_id(0).to(tl.int64)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    for begin in range(0, size, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row * size + i, mask=i < size, other=float("-inf")).to(tl.float32)
        largest = tl.maximum(largest, x)
    top = tl.max(largest, 0)
    lanes = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, size, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        held = i < size
        x = tl.load(x_ptr + row * size + i, mask=held, other=0.0).to(tl.float32)
        lanes += tl.where(held, tl.exp(x - top), 0.0)
    total = tl.sum(lanes, 0)
    for begin in range(0, size, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        held = i < size
        x = tl.load(x_ptr + row * size + i, mask=held, other=0.0).to(tl.float32)
        if LOG:
            tl.store(y_ptr + row * size + i, (x - top - tl.log(total)).to(y_ptr.dtype.element_ty), mask=held)
        else:
            tl.store(y_ptr + row * size + i, (tl.exp(x - top) / total).to(y_ptr.dtype.element_ty), mask=held)
