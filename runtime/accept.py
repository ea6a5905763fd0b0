"""What a committing graph's answer means for a request: commit, or roll back. There is no other way for a
request to get a token.

Following LLM-42 (arXiv 2601.17768, section 4): the window [last committed, pending…] is replayed at the fixed
shape; the matching prefix is committed together with the verifier's own next token, so each replay makes
progress. Unlike there, a chunk of a prompt, a window, a recomputation and a certified shape's step are one
thing: canonical positions continued from `num_computed`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm42c.runtime.packing import Chunk
from llm42c.runtime.sampling import Sampled

VERIFIER = 0  # origin of what the verifier graph itself computed
NO_TOKEN = "no token can be chosen: the logits hold NaN, or none of them is finite"


@dataclass(slots=True)
class Verdict:
    """What one chunk of a step led to."""

    committed: int = 0
    rolled_back: bool = False
    dropped: int = 0  # proposals thrown away, drafts not counted
    drafts_accepted: int = 0
    finished: bool = False


def accept(chunk: Chunk, sampled: Sampled, first: int, origin: int) -> Verdict:
    """Apply rows `first`, `first + 1`, … of `sampled`, which `origin` computed, to the chunk's request.

    Row j predicts the token after position `chunk.first_row + j`. It counts only while every earlier row
    agreed with the proposal there; the first that does not is committed in the proposal's place, wherever in
    the window it is. Only the verifier proves what it commits.
    """
    request, verdict = chunk.request, Verdict()
    pending = request.proposal.tokens
    computed = len(pending) - request.proposal.drafted  # proposals that a shape made; drafts follow
    keep = computed  # where what stays proposed begins
    for j in range(chunk.num_rows):
        row = first + j
        problem = row_problem(sampled, row)
        if problem is not None:
            request.fail(problem)
            verdict.finished = True
            break
        token = sampled.tokens[row]
        verdict.committed += 1
        verdict.finished = request.commit(token, sampled.logprobs[row], sampled.tops.get(row), origin)
        agreed = j < len(pending) and token == pending[j]
        verdict.drafts_accepted += agreed and j >= computed
        if verdict.finished or not agreed:
            verdict.rolled_back = j < computed and not agreed
            break
    else:
        # Every row agreed, so proposals beyond the chunk are still possible.
        keep = verdict.committed
    verdict.dropped = max(0, keep - verdict.committed + verdict.rolled_back)
    request.keep_proposal(keep)
    request.lease.num_computed = min(chunk.end, len(request.history.tokens) - 1)
    if origin == VERIFIER and request.deterministic:
        prove(chunk, verdict.committed)
    return verdict


def row_problem(sampled: Sampled, row: int) -> str | None:
    """Why a row has no token, if it has none."""
    if row in sampled.errors:
        return sampled.errors[row]
    return NO_TOKEN if sampled.tokens[row] < 0 else None


def prove(chunk: Chunk, outputs: int) -> None:
    """Canonical so far by the verifier's own hand: leading positions and outputs, without a gap."""
    request, lease, history = chunk.request, chunk.request.lease, chunk.request.history
    if chunk.start > lease.proved:
        return
    lease.proved = max(lease.proved, min(chunk.end, lease.num_computed))
    first_output = chunk.first_row - (request.prompt_len - 1)
    if outputs and first_output <= history.proved:
        history.proved = max(history.proved, first_output + outputs)
