from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from toy import ToyModel, make_engine, small_config

from llm42c.compile.computation import Computation
from llm42c.errors import ConfigError, ContractError, ContractMismatchError
from llm42c.runtime.config import EngineConfig
from llm42c.runtime.contract import RULES, Contract, engine_contract
from llm42c.runtime.sampling import SamplingParams


def contract() -> Contract:
    return engine_contract(
        ToyModel(), small_config(), weights="w0", computation=Computation("g0", implementation={"cpu": "k0"})
    )


def test_round_trip() -> None:
    mine = contract()
    again = Contract.from_json(mine.to_json())
    assert again == mine
    assert again.hash == mine.hash
    assert json.loads(mine.to_json())["weights"] == "w0"


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Contract)])
def test_every_field_changes_the_hash_and_shows_in_the_diff(field: str) -> None:
    mine = contract()
    value = getattr(mine, field)
    changed: object = (
        {"cpu": "k1"} if isinstance(value, dict) else value + (1 if isinstance(value, int) else "x")
    )
    theirs = dataclasses.replace(mine, **{field: changed})
    assert theirs.hash != mine.hash
    lines = mine.diff(theirs)
    assert lines
    assert all(line.startswith(field) and "->" in line for line in lines)
    with pytest.raises(ContractMismatchError, match=field):
        mine.require(theirs)
    with pytest.raises(ContractMismatchError):
        mine.require(theirs.hash)
    mine.require(mine)
    mine.require(mine.hash)


def test_scheduling_is_not_part_of_the_contract() -> None:
    config = small_config()
    for change in (
        {"max_num_seqs": 3},
        {"num_pages": 30},
        {"fast_buckets": (4,)},
        {"verify": "always"},
        {"verify_window": 2},
        {"prefix_cache": False},
        {"audit_fraction": 0.0},
        {"certify": "startup"},
    ):
        assert engine_contract(ToyModel(), dataclasses.replace(config, **change)) == engine_contract(
            ToyModel(), config
        )


def test_the_verifier_shape_is() -> None:
    config = small_config()
    for change in ({"verify_tokens": 16}, {"verify_seqs": 2}, {"verify_rows": 6}, {"page_size": 8}):
        assert engine_contract(ToyModel(), dataclasses.replace(config, **change)) != engine_contract(
            ToyModel(), config
        )


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(Computation) if f.name != "foreign"])
def test_what_computes_is(field: str) -> None:
    mine = Computation("g0", orders={"linear": "fma-chain/1"}, machine={"torch": "2.13"})
    value = getattr(mine, field)
    changed = dataclasses.replace(
        mine, **{field: "cuda" if field == "target" else value | {"linear": "x"} if value != "g0" else "g1"}
    )

    def on(computation: Computation) -> Contract:
        return engine_contract(ToyModel(), small_config(), weights="w0", computation=computation)

    assert on(changed).hash != on(mine).hash
    assert any(line.startswith(field) for line in on(mine).diff(on(changed)))


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contract()
    monkeypatch.setitem(RULES, rule, RULES[rule].replace("/1", "/2"))
    assert before.diff(contract()) == [f"rules.{rule}: {before.rules[rule]} -> {RULES[rule]}"]


def test_threads_are_not() -> None:
    before = contract()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert contract() == before
    finally:
        torch.set_num_threads(threads)


def test_a_pin_may_be_the_contract_as_text() -> None:
    mine = contract()
    mine.require(mine.to_json())
    mine.require(json.dumps({"hash": mine.hash, **dataclasses.asdict(mine)}))
    theirs = dataclasses.replace(mine, page_size=mine.page_size + 1)
    with pytest.raises(ContractMismatchError, match=f"page_size: {theirs.page_size} -> {mine.page_size}"):
        mine.require(theirs.to_json())
    for text in ("{", '{"weights": "w"}', '{"isa": "avx2"}', "[]", '"text"'):
        with pytest.raises(ContractError, match="this is no contract"):
            Contract.from_json(text)


# -- configuration -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bad",
    [
        {"max_num_seqs": 0},
        {"page_size": -1},
        {"num_pages": 0},
        {"verify": "sometimes"},
        {"certify": "never"},
        {"audit_fraction": 1.5},
        {"verify_rows": 65},
        {"max_pending": 3},
        {"fast_buckets": ()},
        {"fast_buckets": (4, 2)},
        {"row_buckets": (0, 2)},
        {"max_num_seqs": 600},
        {"verify_tokens": True},
    ],
)
def test_bad_configurations(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**bad)  # type: ignore[arg-type]
    assert any(name in str(caught.value) for name in bad)


@pytest.mark.parametrize("top", [1, 5, 32, 100, 512, 4096])
def test_buckets_and_shapes(top: int) -> None:
    config = EngineConfig(max_num_batched_tokens=top, max_num_seqs=min(32, top))
    assert config.token_buckets[-1] == top
    assert list(config.token_buckets) == sorted(set(config.token_buckets))
    shapes = config.shapes()
    for tokens in config.token_buckets:
        for rows in range(1, min(tokens, config.max_num_seqs) + 1):
            bucket = config.row_bucket(tokens, rows)
            assert rows <= bucket <= tokens
            assert (tokens, bucket) in shapes


def test_the_kv_budget_in_bytes() -> None:
    toy = ToyModel()
    per_page = toy.kv_bytes_per_page(4)
    engine = make_engine(config=small_config(num_pages=None, kv_cache_bytes=7 * per_page + 5))
    assert engine.limits.num_pages == 7


def test_different_configurations_under_one_contract_give_the_same_bits() -> None:
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=3)
    prompts = [[(3 * i + 5 * j) % 48 for j in range(4 + 5 * i)] for i in range(5)]
    seen = set()
    for change in ({}, {"max_num_seqs": 2}, {"num_pages": 14}, {"verify": "always", "verify_window": 1}):
        engine = make_engine(config=small_config(**change))
        outputs = engine.generate(prompts, params)
        seen.add((engine.contract.hash, *((tuple(o.token_ids), tuple(o.logprobs)) for o in outputs)))
    assert len(seen) == 1
