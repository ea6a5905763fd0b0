from __future__ import annotations

import numpy as np
import torch
from toy import ToyModel

from llm42c.runtime.packing import Packer, Span, slots_of
from llm42c.runtime.probe import Piece
from llm42c.runtime.request import Lease

PAGE = 4


def piece(tokens: list[int], pages: list[int]) -> Piece:
    return Piece(tokens, 0, Lease.of(8, pages))


def test_arrays_of_a_mixed_batch() -> None:
    decode = piece([1, 2, 3, 9, 8], [5, 1])
    prompt = piece(list(range(20, 27)), [2, 0])
    packer = Packer(12, 3, 6, 8, PAGE)
    inputs = packer.pack([Span(decode, 4, 5, 4), Span(prompt, 2, 7, 5)], 8, 4)
    assert inputs.input_ids.tolist() == [8, 22, 23, 24, 25, 26, 0, 0]
    assert inputs.positions.tolist() == [4, 2, 3, 4, 5, 6, 0, 0]
    assert inputs.slot_mapping.tolist() == [4, 10, 11, 0, 1, 2, -1, -1]
    assert inputs.cu_seqlens_q.tolist() == [0, 1, 6, 6]
    assert inputs.kv_lens.tolist() == [5, 7, 0]
    assert inputs.block_table[1, :2].tolist() == [2, 0]
    assert inputs.logits_indices.tolist() == [0, 4, 5, 0]
    for name in ("input_ids", "positions", "slot_mapping", "logits_indices"):
        assert getattr(inputs, name).dtype == torch.int64
    for name in ("cu_seqlens_q", "kv_lens", "block_table"):
        assert getattr(inputs, name).dtype == torch.int32


def test_a_smaller_batch_after_a_larger_one_leaves_nothing_behind() -> None:
    packer = Packer(8, 3, 4, 8, PAGE)
    packer.pack([Span(piece(list(range(7)), [3, 4]), 0, 7, 3)], 8, 4)
    inputs = packer.pack([Span(piece([1, 2], [6]), 1, 2, 1)], 4, 2)
    assert inputs.input_ids.tolist() == [2, 0, 0, 0]
    assert inputs.slot_mapping.tolist() == [25, -1, -1, -1]
    assert inputs.cu_seqlens_q.tolist() == [0, 1, 1, 1]
    assert inputs.kv_lens.tolist() == [2, 0, 0]
    assert inputs.logits_indices.tolist() == [0, 0]


def test_one_token_chunks_take_the_same_path_as_long_ones() -> None:
    tokens = list(range(1, 12))
    whole, single = Packer(16, 4, 16, 8, PAGE), Packer(16, 4, 16, 8, PAGE)
    sequence = piece(tokens, [3, 1, 6])
    inputs = whole.pack([Span(sequence, 0, 11, 0)], 11, 11)
    for p in range(11):
        one = single.pack([Span(sequence, p, p + 1, p)], 1, 1)
        assert one.input_ids[0] == inputs.input_ids[p]
        assert one.slot_mapping[0] == inputs.slot_mapping[p]
        assert one.positions[0] == inputs.positions[p]


def test_slots_follow_the_pages() -> None:
    sequence = piece(list(range(9)), [7, 2, 5])
    assert slots_of(sequence, np.array([0, 3, 4, 8]), PAGE).tolist() == [28, 31, 8, 20]


def test_the_toy_accepts_what_the_packer_makes() -> None:
    toy = ToyModel()
    cache = toy.new_kv_cache(8, PAGE)
    sequence = piece(list(range(1, 10)), [3, 1, 6])
    packer = Packer(16, 4, 16, 8, PAGE)
    whole = toy.forward(packer.pack([Span(sequence, 0, 9, 0)], 12, 9), cache)
    pieces = [
        toy.forward(packer.pack([Span(sequence, a, b, a)], 16, b - a), cache).clone()
        for a, b in ((0, 2), (2, 7), (7, 8), (8, 9))
    ]
    assert torch.equal(whole, torch.cat(pieces))
