"""Ranks that run one engine in lockstep: what is shared and compared, and who is named when one fails."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import rank_world
import torch
import torch.distributed as dist
from toy import ToyModel, ToySampler, reference, small_config, toy_decode

from llm42c.errors import RankFailureError, RanksDifferError
from llm42c.parallel import ranks as ranking
from llm42c.runtime.engine import Engine
from llm42c.runtime.lockstep import LockstepModel, batch_digest
from llm42c.runtime.packing import Packer
from llm42c.runtime.probe import Reference
from llm42c.runtime.sampling import SamplingParams


def toy_engine(**changes: object) -> Engine:
    """An engine on a toy model, which needs no collective of its own."""
    config, ranks = small_config(**changes), ranking.world()
    verifier = ToyModel(fixed=(config.verify_tokens, config.verify_seqs, config.rows))
    models = [LockstepModel(model, ranks) for model in (ToyModel(), verifier)]
    return Engine(*models, config, sampler=ToySampler(), decode=toy_decode, ranks=ranks)


def message(call: Any) -> str:
    try:
        call()
    except (RankFailureError, RanksDifferError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def in_step(rank: int, folder: str) -> dict[str, Any]:
    """Deterministic and random requests together, certificates on disk, and the comparisons."""
    ranks, out = ranking.world(), {}
    engine = toy_engine(certificates_path=folder)
    params = SamplingParams(max_tokens=12, temperature=1.0, ignore_eos=True)
    for i in range(4):
        engine.submit([i, 5, 9], params, deterministic=i % 2 == 0, request_id=str(i))
    answers: dict[str, Any] = {}
    while engine.has_unfinished():
        answers |= {o.request_id: (o.token_ids, o.logprobs) for o in engine.step() if o.finished}
    out["answers"], out["contract"] = answers, engine.contract
    while engine.certificates.advance():
        pass
    out["files"] = len(list(Path(folder).glob("*.json"))) if rank == 0 else 0
    ranks.share(None)  # rank 1 must not list the folder before rank 0 wrote
    out["reloaded"] = dict(toy_engine(certificates_path=folder).certificates.status)
    out["status"] = dict(engine.certificates.status)
    out["shared"] = ranks.share({"of": rank})
    out["agreed"] = ranks.agree(torch.tensor([True, rank == 0, False])).tolist()
    out["differ"] = message(lambda: ranks.require_same("the colour", "red" if rank else "blue"))
    out["same"] = message(lambda: ranks.require_same("the colour", "red"))
    out["weights"] = message(lambda: other_weights(rank))
    ranks.meet("the end")
    return out


def other_weights(rank: int) -> None:
    """Compile a model that is another one on rank 1."""
    import tiny

    from llm42c.compile.compiler import ModelCompiler

    model = tiny.model("llama", layers=1)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += rank
    ModelCompiler(model, ranks=ranking.world())


def test_ranks_in_step(tmp_path: Path):
    first, second = rank_world.run(2, in_step, str(tmp_path))
    assert first["answers"] == second["answers"]
    assert len(first["answers"]) == 4
    assert first["contract"] == second["contract"]
    assert first["contract"].tp_size == 2
    assert first["status"] == second["status"] == first["reloaded"] == second["reloaded"]
    assert first["status"]
    assert first["files"] == 1
    for out in (first, second):
        assert out["shared"] == {"of": 0}
        assert out["agreed"] == [True, False, False]
        assert out["differ"] == "RanksDifferError: rank 1 and rank 0 differ in the colour: red and blue"
        assert out["same"] == ""
        assert out["weights"].startswith("RanksDifferError: rank 1 and rank 0 differ in the weights")


def misbehave(rank: int, how: str) -> str:
    """Rank 1 does something else in the middle of a generation; what the others say."""
    engine = toy_engine()
    engine.certificates.verifier_checked = True
    prompt = [3, 1, 4] if not (how == "diverge" and rank == 1) else [3, 1, 5]
    engine.submit(prompt, SamplingParams(max_tokens=40, ignore_eos=True))
    for step in range(100):
        if rank == 1 and step == 3 and how == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and step == 3 and how == "hang":
            time.sleep(600)
        if found := message(engine.step):
            return found
        if not engine.has_unfinished():
            break
    return ""


@pytest.mark.parametrize("how", ["die", "hang"])
def test_a_rank_that_fails_is_named_by_the_others_in_time(how: str, tmp_path: Path):
    start = time.monotonic()
    healthy = (0, 2) if how == "die" else (0,)
    size = 3 if how == "die" else 2
    codes = rank_world.start(
        size, tmp_path, report, str(tmp_path), how, timeout=90, collective_s=4, wait_for=healthy
    )
    assert time.monotonic() - start < 90
    assert all(codes[rank] == 7 for rank in healthy)
    assert codes[1] == (-signal.SIGKILL if how == "die" else None)
    words = "failed" if how == "die" else "failed to answer"
    for rank in healthy:
        said = (tmp_path / f"{rank}.txt").read_text()
        assert said.startswith(f"RankFailureError: rank 1 {words} during"), said


def report(rank: int, folder: str, how: str) -> None:
    """Write what this rank says, and end at once, as the command line does."""
    with ranking.heart(ranking.world()):
        (Path(folder) / f"{rank}.txt").write_text(misbehave(rank, how))
        os._exit(7)


def test_a_rank_that_computes_another_batch_is_named():
    for said in rank_world.run(2, misbehave, "diverge"):
        assert said.startswith("RanksDifferError: rank 1 and rank 0 differ in the batch")


def test_alone_nothing_is_exchanged():
    assert not dist.is_initialized()
    alone = ranking.world()
    assert alone is ranking.ALONE
    assert alone.share(3) == 3
    assert alone.agree(torch.tensor([True, False])).tolist() == [True, False]
    alone.require_same("anything", "x")
    alone.meet("anywhere")
    with pytest.raises(RuntimeError, match="gloo"), alone.watch("work"):
        raise RuntimeError("gloo: not ours to explain")


def test_errors_of_the_program_are_not_taken_for_failed_ranks():
    with pytest.raises(RuntimeError, match="shapes"), ranking.Ranks(0, 2, "0").watch("work"):
        raise RuntimeError("shapes do not match")


def test_the_digest_of_a_batch_sees_every_field():
    packer = Packer(8, 2, 8, 4, 4)
    inputs = packer.pack([], 4, 2)
    before = batch_digest("graph", inputs)
    assert before == batch_digest("graph", inputs)
    assert before != batch_digest("other graph", inputs)
    for name in vars(inputs):
        tensor = getattr(inputs, name)
        tensor.view(-1)[-1] += 1
        assert batch_digest("graph", inputs) != before, name
        tensor.view(-1)[-1] -= 1
    assert 0 <= before < 2**63


class Breaking(ToyModel):
    """Fails at buckets of `tokens`, once `armed`."""

    tokens = 6
    armed = True

    def forward(self, inputs: Any, cache: Any) -> Any:
        if self.armed and len(inputs.input_ids) == self.tokens:
            raise MemoryError("no memory in a forward")
        return super().forward(inputs, cache)


def a_probe_fails(rank: int, folder: str, where: str) -> dict[str, Any]:
    """Rank 1 fails in the probe of 6 tokens between forwards, or both do in one, while requests run."""
    engine = toy_engine(certificates_path=folder, num_pages=512)
    engine.certificates.verifier_checked = True
    probe = engine.certificates._probe
    if where == "in a forward":
        broken = Breaking()
        probe.fast = LockstepModel(broken, ranking.world())
    elif rank == 1:
        agrees = Reference.agrees

        def failing(self: Any, spans: Any, logits: Any) -> bool:
            if sum(s.num_tokens for s in spans) == 6:
                raise MemoryError("no memory beside a forward")
            return agrees(self, spans, logits)

        Reference.agrees = failing  # type: ignore[method-assign]
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    for i in range(6):
        engine.submit([i, 5, 9, 2], params, request_id=str(i))
    answers: dict[str, Any] = {}
    while engine.has_unfinished():
        answers |= {o.request_id: o.token_ids for o in engine.step() if o.finished}
    engine.certificates.want((6, 6))
    engine.certificates.settle()
    return {
        "answers": answers,
        "failures": engine.stats().probe_failures,
        "status": dict(engine.certificates.status),
    }


@pytest.mark.parametrize("where", ["in a forward", "beside a forward"])
def test_a_probe_that_fails_on_ranks_leaves_requests_alone(where: str, tmp_path: Path):
    first, second = rank_world.run(2, a_probe_fails, str(tmp_path), where)
    assert first == second
    assert first["failures"] == 1
    assert first["status"][6, 6] == "speculative"
    assert "certified" in first["status"].values()
    assert first["answers"] == {str(i): reference([i, 5, 9, 2], 24, frozenset()) for i in range(6)}


def fails_alone(rank: int) -> str:
    """Rank 1 fails in a forward that rank 0 goes through, after both failed in one of another engine."""
    ranks = ranking.world()
    ranks.report_s = 1.0
    engine = toy_engine()
    engine.certificates.verifier_checked = True
    broken = Breaking()
    engine.certificates._probe.fast = LockstepModel(broken, ranks)
    engine.certificates._probe._ranks = ranks
    engine.certificates.want((6, 6))
    engine.certificates.settle()
    assert engine.stats().probe_failures == 1, "both failed"
    again = toy_engine()
    again.certificates.verifier_checked = True
    broken.armed = rank == 1
    again.certificates._probe.fast = LockstepModel(broken, ranks)
    again.certificates._probe._ranks = ranks
    again.certificates.want((6, 6))
    return message(again.certificates.settle)


def report_alone(rank: int, folder: str) -> None:
    with ranking.heart(ranking.world()):
        (Path(folder) / f"{rank}.txt").write_text(fails_alone(rank))
        os._exit(7)


def test_a_rank_that_fails_alone_in_a_probe_s_forward_ends_the_step(tmp_path: Path):
    codes = rank_world.start(2, tmp_path, report_alone, str(tmp_path), collective_s=4)
    assert codes == [7, 7]
    assert (tmp_path / "1.txt").read_text() == (
        "RankFailureError: a probe failed on rank 1 and not on all: MemoryError: no memory in a forward"
    )
    assert (tmp_path / "0.txt").read_text().startswith("RankFailureError: ")
