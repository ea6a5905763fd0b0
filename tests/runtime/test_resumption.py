"""A request that goes from engine to engine gives the bits of one that stays; so does one of a journal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from test_drafts import MODES, PARAMS, PROMPT
from toy import VOCAB, ToyModel, make_engine, small_config

from llm42c.errors import ConfigError, ContractMismatchError, RequestError, StateError
from llm42c.runtime import sealed
from llm42c.runtime.engine import Engine
from llm42c.runtime.journal import Journal
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.resumption import RequestState
from llm42c.runtime.sampling import SamplingParams

PORTABLE = [name for name in PARAMS if name != "processor"]


def finish(engine: Engine) -> list[RequestOutput]:
    outputs = []
    while engine.has_unfinished():
        outputs += engine.step()
    return outputs


def undisturbed(params: SamplingParams) -> RequestOutput:
    engine = make_engine(config=small_config(verify="always"))
    engine.submit(PROMPT, params, receipt=True, request_id="r")
    return finish(engine)[-1]


def complete(output: RequestOutput) -> RequestOutput:
    """What a whole output says, however it was delivered."""
    news = {"new_token_ids": [], "new_logprobs": [], "new_top_logprobs": None, "new_text": ""}
    return dataclasses.replace(output, **news)


def states(params: SamplingParams, mode: str = "certified") -> list[tuple[RequestState, str]]:
    """A state after every step that the request does not end in, and the text that was delivered by then."""
    fast, changes = MODES[mode]
    engine = make_engine(fast(), small_config(**changes))
    engine.submit(PROMPT, params, request_id="r")
    found, text = [(engine.export("r"), "")], ""
    while engine.has_unfinished():
        for output in engine.step():
            text += output.new_text
        if engine.has_unfinished():
            found.append((engine.export("r"), text))
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PORTABLE)
def test_another_engine_continues_to_the_same_bits(name: str, mode: str) -> None:
    whole = undisturbed(PARAMS[name])
    seen = set()
    fast, changes = MODES[mode]
    for state, delivered in states(PARAMS[name]):
        count = len(state.tokens)
        seen.add(count)
        engine = make_engine(fast(), small_config(**changes))
        engine.resume(RequestState.from_json(state.to_json()), request_id="r", receipt=True)
        outputs = finish(engine)
        assert complete(outputs[-1]) == complete(whole)
        assert [t for o in outputs for t in o.new_token_ids] == whole.token_ids[count:]
        assert [p for o in outputs for p in o.new_logprobs] == whole.logprobs[count:]
        assert delivered + "".join(o.new_text for o in outputs) == whole.text
    assert len(seen) > 4, "vacuous: hardly any state in the middle"


def test_a_state_is_small_and_goes_on_where_it_is() -> None:
    engine = make_engine()
    engine.submit(PROMPT, PARAMS["greedy"], request_id="r")
    for _ in range(6):
        engine.step()
    state = engine.export("r")
    assert 0 < len(state.tokens) < 24
    assert complete(finish(engine)[-1]) == dataclasses.replace(
        complete(undisturbed(PARAMS["greedy"])), receipt=None
    )
    # Twice in one engine, with what came before it in the prefix cache.
    for name in ("one", "two"):
        engine.resume(state, request_id=name)
    first, second = (o for o in finish(engine) if o.finished)
    assert (first.token_ids, first.logprobs) == (second.token_ids, second.logprobs)


def test_resuming_takes_few_passes() -> None:
    state = states(PARAMS["greedy"])[-1][0]
    engine = make_engine(config=small_config(verify="always"))
    engine.resume(state)
    finish(engine)
    assert engine.stats().verifier_steps <= -(-(len(PROMPT) + 24) // 12) + 2


def test_a_state_survives_preemption_and_can_be_exported_again() -> None:
    whole = undisturbed(PARAMS["sampled"])
    state = states(PARAMS["sampled"])[9][0]
    for _ in range(4):
        engine = make_engine(config=small_config(certify="startup"))
        engine.resume(state, request_id="r")
        engine.step()
        engine._scheduler.preempt(engine._requests["r"])
        before = len(state.tokens)
        while len(engine.export("r").tokens) <= before:
            engine.step()
        state = engine.export("r")
    engine = make_engine()
    engine.resume(state, request_id="r", receipt=True)
    assert complete(finish(engine)[-1]) == complete(whole)


def test_another_contract_is_refused_and_names_what_differs() -> None:
    state = states(PARAMS["greedy"])[5][0]
    engine = make_engine(config=small_config(verify_tokens=16))
    with pytest.raises(ContractMismatchError, match="verify_rows: 12 -> 16; verify_tokens: 12 -> 16"):
        engine.resume(state)
    assert not engine.has_unfinished()


@pytest.mark.parametrize("what", ["token", "log-prob"])
def test_a_state_that_is_not_what_its_contract_gives_ends_its_request_only(what: str) -> None:
    state = states(PARAMS["greedy"])[9][0]
    tokens, logprobs = list(state.tokens), list(state.logprobs)
    at = len(tokens) // 2
    if what == "token":
        tokens[at] = (tokens[at] + 1) % VOCAB
    else:
        logprobs[at] = -0.5
    engine = make_engine(config=small_config(certify="startup"))
    engine.resume(dataclasses.replace(state, tokens=tokens, logprobs=logprobs), request_id="forged")
    engine.submit(PROMPT, PARAMS["greedy"], request_id="r", receipt=True)
    done = {o.request_id: o for o in finish(engine) if o.finished}
    assert done["forged"].error == f"output {at} of the state that was resumed is not what its contract gives"
    assert complete(done["r"]) == complete(undisturbed(PARAMS["greedy"]))


def test_what_has_no_state_is_refused() -> None:
    engine = make_engine()
    ordinary = engine.submit(PROMPT, deterministic=False)
    code = engine.submit(PROMPT, PARAMS["processor"])
    for request_id, words in ((ordinary, "deterministic"), (code, "a state cannot hold"), ("no", "running")):
        with pytest.raises(RequestError, match=words):
            engine.export(request_id)


def test_one_bit_anywhere_is_damage() -> None:
    text = states(PARAMS["stops"])[3][0].to_json().encode()
    assert RequestState.from_json(text.decode()).to_json().encode() == text
    for i in range(len(text)):
        for bit in range(8):
            edited = bytes([*text[:i], text[i] ^ (1 << bit), *text[i + 1 :]])
            with pytest.raises(StateError, match="damaged"):
                RequestState.from_json(edited.decode("latin-1"))
    later = json.loads(text)
    del later["sha256"]
    with pytest.raises(StateError, match="has version 9; this release of llm42 reads 1"):
        RequestState.from_json(sealed.seal("llm42_state", 9, later))
    with pytest.raises(StateError, match="damaged"):
        RequestState.from_json(sealed.seal("llm42_state", 1, {**later, "tokens": [1]}))


# -- journals ------------------------------------------------------------------------------------------------


def journal(path: Path, steps: int = 1000) -> list[RequestOutput]:
    """Two requests, journaled for some steps."""
    engine, record = make_engine(), Journal(path)
    names = [engine.submit(PROMPT[:n], PARAMS[p]) for n, p in ((9, "greedy"), (4, "stops"))]
    record.begin(names, list(map(engine.export, names)))
    done = []
    while engine.has_unfinished() and steps:
        outputs = engine.step()
        record.take(outputs)
        done += [o for o in outputs if o.finished]
        steps -= 1
    record.close()
    return done


def resumed(path: Path, rounds: int = 1000) -> list[RequestOutput]:
    found, end = Journal.read(path)
    engine, record = make_engine(ToyModel(), small_config(certify="startup")), Journal(path, end)
    for state in found:
        record.go_on(engine.resume(state), state)
    done = []
    while engine.has_unfinished() and rounds:
        outputs = engine.step()
        record.take(outputs)
        done += [complete(o) for o in outputs if o.finished]
        rounds -= 1
    record.close()
    return done


def by_prompt(outputs: list[RequestOutput]) -> list[tuple[list[int], list[int], list[float], str, object]]:
    rows = [(o.prompt_token_ids, o.token_ids, o.logprobs, o.text, o.stop_reason) for o in outputs]
    return sorted(rows, key=lambda row: len(row[0]))


def test_a_journal_that_is_cut_anywhere_is_finished(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    wanted = by_prompt(journal(whole))
    data, cut = whole.read_bytes(), tmp_path / "cut"
    begun = len(b"".join(data.splitlines(keepends=True)[:3]))  # both requests have begun
    assert len(data) - begun > 1000
    for end in range(begun, len(data) + 1, 29):
        cut.write_bytes(data[:end])
        resumed(cut, rounds=end % 5)  # and again cut short
        cut.write_bytes(cut.read_bytes()[: -(end % 3) or None])
        if cut.stat().st_size < begun:
            continue
        assert by_prompt(resumed(cut)) == wanted
        found, _ = Journal.read(cut)
        assert sorted(len(s.tokens) for s in found) == sorted(len(row[1]) for row in wanted)


def test_a_journal_holds_all_of_its_requests_or_has_not_begun(tmp_path: Path) -> None:
    """A kill can fall between the pages of the write that begins the requests."""
    path = tmp_path / "journal"
    wanted = by_prompt(journal(path))
    lines = path.read_bytes().splitlines(keepends=True)
    starts = [len(b"".join(lines[:n])) for n in range(4)]
    begun = starts[3]
    for end in sorted({starts[n] + more for n in range(3) for more in (0, 40, len(lines[n]) - 1)} | {begun}):
        path.write_bytes(b"".join(lines)[:end])
        found, at = Journal.read(path)
        assert (len(found), at) == ((2, begun) if end == begun else (0, 0))
        if end < begun:  # begun again on the same file
            assert by_prompt(journal(path)) == wanted
    path.write_bytes(b"".join([*lines[:2], *lines[3:]]))
    with pytest.raises(StateError, match="line 3: damaged"):  # of these some tokens had been written
        Journal.read(path)


def test_an_edited_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal(path, steps=8)
    data = path.read_bytes()
    intact, _ = Journal.read(path)
    for i in range(len(data) - 1):
        path.write_bytes(bytes([*data[:i], data[i] ^ (1 << (i % 8)), *data[i + 1 :]]))
        with pytest.raises(StateError, match=r"line \d+: damaged: it is not as it was written$"):
            Journal.read(path)
    path.write_bytes(data[:-1] + b"x")  # without its end the last line counts as torn
    found, _ = Journal.read(path)
    assert sum(len(s.tokens) for s in found) == sum(len(s.tokens) for s in intact) - 1
    lines = data.split(b"\n")
    path.write_bytes(b"\n".join([*lines[:4], *lines[5:]]))
    with pytest.raises(StateError, match=r"line \d+: damaged"):
        Journal.read(path)


def test_a_journal_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal(path, steps=3)
    with pytest.raises(ConfigError, match="finish it with llm42 resume"):
        Journal(path)
    for bad in (tmp_path, tmp_path / "no" / "folder"):
        with pytest.raises(ConfigError, match="cannot write"):
            Journal(bad)
    with pytest.raises(ConfigError, match="cannot read"):
        Journal.read(tmp_path / "missing")
