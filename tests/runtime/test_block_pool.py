from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm42c.capture.packed import KVCache
from llm42c.runtime.block_pool import BlockPool, as_bits, kv_digest, kv_rows_equal, read_kv


def test_pages_come_and_go() -> None:
    pool = BlockPool(3, 4, b"")
    pages = [pool.allocate() for _ in range(3)]
    assert sorted(p for p in pages if p is not None) == [0, 1, 2]
    assert pool.allocate() is None
    pool.release([0])
    assert pool.num_free == 1
    assert pool.allocate() == 0


def _cached(pool: BlockPool, tokens: list[list[int]], proved: bool = True) -> list[int]:
    pages, key = [], None
    for chunk in tokens:
        page = pool.allocate()
        assert page is not None
        key = pool.key(key, chunk)
        pool.register(page, key, proved)
        pages.append(page)
    return pages


def test_keys_chain_over_tokens_and_contract() -> None:
    pool, other = BlockPool(1, 2, b"contract"), BlockPool(1, 2, b"other contract")
    first = pool.key(None, [1, 2])
    assert first == pool.key(None, [1, 2])
    keys = {first, pool.key(None, [2, 1]), pool.key(first, [1, 2]), other.key(None, [1, 2])}
    assert len(keys) == 4


def test_released_pages_stay_cached_until_evicted_in_lru_order_ends_first() -> None:
    pool = BlockPool(4, 2, b"")
    a = _cached(pool, [[1, 2], [3, 4]])
    b = _cached(pool, [[5, 6]])
    pool.release(a)
    pool.release(b)
    assert pool.num_free == 4
    key = pool.key(None, [1, 2])
    assert pool.lookup(key) == a[0]
    taken = [pool.allocate() for _ in range(2)]
    assert taken == [3, a[1]], "the free page first, then the end of the oldest sequence"
    assert pool.lookup(pool.key(key, [3, 4])) is None
    assert pool.lookup(key) == a[0]


def test_a_shared_page_lives_as_long_as_anyone_holds_it() -> None:
    pool = BlockPool(2, 2, b"")
    (page,) = _cached(pool, [[1, 2]])
    pool.retain(page)
    pool.release([page])
    other = pool.allocate()
    assert other != page
    assert pool.allocate() is None
    pool.release([page])
    assert pool.is_idle(page)
    pool.retain(page)
    assert not pool.is_idle(page)
    assert pool.allocate() is None


def test_the_first_page_of_a_key_stays_the_shared_one() -> None:
    pool = BlockPool(2, 2, b"")
    (first,) = _cached(pool, [[1, 2]])
    (second,) = _cached(pool, [[1, 2]])
    assert pool.lookup(pool.key(None, [1, 2])) == first
    pool.release([second])
    assert pool.allocate() == second, "a page that is not shared is free at once"


def test_drop_unproved_keeps_proved_pages() -> None:
    pool = BlockPool(3, 2, b"")
    (proved,) = _cached(pool, [[1, 2]], proved=True)
    idle, held = _cached(pool, [[3, 4], [5, 6]], proved=False)
    pool.release([idle])
    pool.drop_unproved()
    assert pool.lookup(pool.key(None, [1, 2])) == proved
    assert pool.lookup(pool.key(None, [3, 4])) is None
    assert pool.allocate() == idle
    pool.release([held])
    assert pool.allocate() == held


@given(st.lists(st.tuples(st.sampled_from("arcs"), st.integers(0, 7)), max_size=60))
def test_counts_stay_consistent(actions: list[tuple[str, int]]) -> None:
    pool = BlockPool(5, 2, b"")
    held: list[int] = []
    for action, number in actions:
        if action == "a":
            page = pool.allocate()
            assert (page is None) == (pool.num_pages == len(set(held)))
            if page is not None:
                assert page not in held
                held.append(page)
        elif action == "r" and held:
            pool.release([held.pop(number % len(held))])
        elif action == "c" and held:
            pool.register(held[number % len(held)], pool.key(None, [number, number]), True)
        elif action == "s":
            page = pool.lookup(pool.key(None, [number, number]))
            if page is not None:
                pool.retain(page)
                held.append(page)
        assert pool.num_free == pool.num_pages - len(set(held))
        assert all(pool.refs[p] == held.count(p) for p in range(pool.num_pages))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_kv_is_read_and_compared_bit_by_bit(dtype: torch.dtype) -> None:
    # [num_pages, H, D, page] and [num_pages, H, page, D]
    k = torch.arange(3 * 2 * 5 * 4).reshape(3, 2, 5, 4).to(dtype)
    v = torch.arange(3 * 2 * 4 * 5).reshape(3, 2, 4, 5).to(dtype)
    cache = KVCache([k], [v])
    slots = torch.tensor([6, 1, 11])
    got_k, got_v = read_kv(cache, slots, 4)
    for i, slot in enumerate(slots.tolist()):
        assert torch.equal(got_k[i], k[slot // 4, :, :, slot % 4])
        assert torch.equal(got_v[i], v[slot // 4, :, slot % 4])
    digest = kv_digest(cache, slots, 4)
    before = read_kv(cache, slots, 4)
    k[1, 1, 3, 2] += 2
    assert kv_rows_equal(before, read_kv(cache, slots, 4)).tolist() == [False, True, True]
    assert kv_digest(cache, slots, 4) != digest
    k[1, 1, 3, 2] -= 2
    k[0, 0, 0, 0] += 2  # slot 0 is not among them
    assert kv_digest(cache, slots, 4) == digest


def test_bits_of_zeros_and_nans() -> None:
    x = torch.tensor([0.0, -0.0, torch.nan])
    assert not torch.equal(as_bits(x[:1]), as_bits(x[1:2]))
    assert torch.equal(as_bits(x[2:]), as_bits(x[2:].clone()))
