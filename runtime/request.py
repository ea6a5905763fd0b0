"""One request: the only mutable object that the scheduler, the packer and `accept` share.

It is divided by who writes it. The history is the truth, and grows by `accept` alone. A proposal is what a
speculative shape guesses; what is derived from it lies in it and is thrown away with it. KV positions below
the lease's `num_computed` are valid, and canonical when the request is deterministic.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from llm42c.runtime.drafters import DrafterSource
from llm42c.runtime.outputs import FinishReason, Limit, TopLogprobs
from llm42c.runtime.processors import Decode, TextState
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.structured import Matcher
from llm42c.runtime.token_counts import RowCounts


class State(enum.Enum):
    WAITING = "waiting"  # holds no pages; may have committed outputs from before a preemption
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True)
class History:
    """The prompt and the committed outputs. `accept` writes it; a revocation takes outputs back."""

    tokens: list[int]
    text: TextState | None  # None: nobody looks at the text before the end
    logprobs: list[float] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)  # which shape chose each output, as in BlockPool.origin
    tops: list[TopLogprobs] = field(default_factory=list)
    proved: int = 0  # leading outputs that the verifier graph itself chose or audited
    page_keys: list[bytes] = field(default_factory=list)  # of leading full pages; they follow from `tokens`


@dataclass(slots=True)
class Proposal:
    """Speculative outputs. The fast step writes it; `accept`, or a preemption, throws it away.

    Behind what a speculative shape computed stand drafts, which have no keys and values yet. They live within
    one step: what `accept` does not commit of them is gone.
    """

    tokens: list[int] = field(default_factory=list)
    drafted: int = 0  # how many of them, the last ones, are drafts
    ended: bool = False  # they reach an end of the request
    text: TextState | None = None
    blocked: bool = False  # one could not be computed; only the verifier may decide why
    drain: bool = False  # a certified bucket made the last one: verify now, then commit directly


@dataclass(slots=True)
class Lease:
    """Pages for keys and values. The scheduler grants and ends it; `accept` says how far they are filled."""

    block_row: np.ndarray  # [max_pages] int32
    pages: list[int] = field(default_factory=list)
    shared: int = 0  # leading pages that the prefix cache has been offered
    num_computed: int = 0
    proved: int = 0  # leading KV positions that the verifier graph itself wrote or audited

    @classmethod
    def of(cls, max_pages: int, pages: Iterable[int] = ()) -> Lease:
        lease = cls(np.zeros(max_pages, dtype=np.int32))
        for page in pages:
            lease.append(int(page))
        return lease

    def append(self, page: int) -> None:
        self.block_row[len(self.pages)] = page
        self.pages.append(page)


@dataclass(slots=True)
class Delivery:
    """What the user has been given. The engine writes it, and a revocation what it must give again."""

    outputs: int = 0
    characters: int = 0
    promised: dict[int, tuple[int, float]] = field(default_factory=dict)  # delivered, and then taken back
    text: str = ""  # of the whole request, once it has ended


class Request:
    def __init__(
        self,
        request_id: str,
        arrival: int,
        prompt: list[int],
        params: SamplingParams,
        *,
        deterministic: bool,
        stream: bool,
        seed: int,
        max_tokens: int,
        limited_by: Limit = "max_tokens",
        eos_ids: frozenset[int],
        max_pages: int,
        text: TextState | None,
        draft: list[int] | None = None,
        forced: bool = False,
        drafter_source: DrafterSource | None = None,
        wants_receipt: bool = False,
        grammar: Matcher | None = None,
    ) -> None:
        self.id = request_id
        self.arrival = arrival
        self.params = params
        self.deterministic = deterministic
        self.stream = stream
        self.seed = seed
        self.limited_by = limited_by
        self.prompt_len = len(prompt)
        self.limit = len(prompt) + max_tokens
        self.stop_ids = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos_ids)
        self.grammar = grammar
        if grammar is not None:
            self.stop_ids |= grammar.eos_ids
        self.processed = params.processes_logits
        self.draft = draft or []  # outputs that came with the request; emptied by the first wrong one
        self.forced = self.draft if forced else None  # outputs that are taken whatever the model prefers
        self.drafter_source = drafter_source
        self.wants_receipt = wants_receipt
        self.resumed = 0  # leading outputs that an engine before this one has delivered
        self.seen, self.emitted = RowCounts(0), RowCounts(len(prompt))  # for penalties

        self.state = State.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None

        self.history = History(list(prompt), text)
        self.proposal = Proposal()
        self.lease = Lease.of(max_pages)
        self.delivery = Delivery()

    # -- reading ---------------------------------------------------------------------------------------------

    @property
    def num_outputs(self) -> int:
        return len(self.history.tokens) - self.prompt_len

    @property
    def outputs(self) -> list[int]:
        return self.history.tokens[self.prompt_len :]

    @property
    def num_tokens(self) -> int:
        """Committed + proposed, prompt included."""
        return len(self.history.tokens) + len(self.proposal.tokens)

    @property
    def prefilling(self) -> bool:
        """Whether positions before the newest committed token still lack KV."""
        return self.lease.num_computed < len(self.history.tokens) - 1

    def given_draft(self, most: int) -> list[int]:
        """Up to `most` tokens that the request's own draft has behind committed + proposed."""
        done, pending = self.num_outputs, self.proposal.tokens
        if pending and pending != self.draft[done : done + len(pending)]:
            return []
        return self.draft[done + len(pending) : done + len(pending) + most]

    def allowed(self, draft: list[int]) -> list[int]:
        """The beginning of `draft` that the request's grammar, if any, allows behind what is proposed."""
        return draft if self.grammar is None or not draft else self.grammar.allowed(self, draft)

    def token_slice(self, start: int, end: int) -> list[int]:
        """Tokens of positions [start, end) of committed + proposed."""
        tokens = self.history.tokens
        length = len(tokens)
        if end <= length:
            return tokens[start:end]
        return tokens[start:] + self.proposal.tokens[max(0, start - length) : end - length]

    # -- changing --------------------------------------------------------------------------------------------

    def commit(self, token: int, logprob: float, top: TopLogprobs | None, origin: int) -> bool:
        """Append one certain output; returns whether it ends the request (then `finish_reason` is set)."""
        history = self.history
        if self.draft and self.draft[self.num_outputs : self.num_outputs + 1] != [token]:
            self.draft = []
        history.tokens.append(token)
        history.logprobs.append(logprob)
        history.origins.append(origin)
        if top is not None:
            history.tops.append(top)
        if self.delivery.promised:
            self._keep_promise(token, logprob)
        if self.finish_reason is None:
            try:
                ending = self._ending(token, len(history.tokens), history.text)
                self.finish_reason, self.stop_reason = ending
            except Exception as error:  # of the user's detokenizer
                self.fail(f"{type(error).__name__}: {error}")
        return self.finish_reason is not None

    def propose(self, token: int) -> None:
        """Append one speculative output; it may be an end of the request, equally speculative."""
        proposal, text = self.proposal, self.history.text
        if not proposal.tokens and text is not None and text.stops:
            proposal.text = text.copy()
        proposal.tokens.append(token)
        try:
            proposal.ended = self._ending(token, self.num_tokens, proposal.text)[0] is not None
        except Exception:
            proposal.blocked = True  # the error counts only if this token is committed

    def extend_proposal(self, draft: Iterable[int]) -> int:
        """Append drafts, up to an end of the request; returns how many tokens more the model has to read."""
        proposal = self.proposal
        before = len(proposal.tokens)
        for token in draft:
            if proposal.ended or proposal.blocked:
                break
            self.propose(token)
        proposal.drafted = len(proposal.tokens) - before
        return proposal.drafted - (proposal.ended and proposal.drafted > 0)

    def keep_proposal(self, start: int) -> None:
        """Throw away the first `start` proposals, and all drafts; what was derived from them goes with the
        last one."""
        proposal = self.proposal
        rest = proposal.tokens[start : len(proposal.tokens) - proposal.drafted]
        if rest:
            self.proposal.tokens = rest
        else:
            self.proposal = Proposal()

    def take_back_unproved(self) -> None:
        """Drop outputs that only a certificate vouched for; those delivered must come again, bit for bit."""
        self.proposal = Proposal()
        history, keep = self.history, self.history.proved
        for i in range(keep, min(self.delivery.outputs, self.num_outputs)):
            self.delivery.promised[i] = (history.tokens[self.prompt_len + i], history.logprobs[i])
        del history.tokens[self.prompt_len + keep :]
        for of_outputs in (history.logprobs, history.origins, history.tops):
            del of_outputs[keep:]
        self.seen.take_back(len(history.tokens))
        self.emitted.take_back(len(history.tokens))
        history.page_keys.clear()
        if history.text is not None:
            history.text = history.text.restart(self.outputs)

    def close_text(self, decode: Decode | None) -> None:
        """The request ended: fill the delivery's text, without stop token and (unless wanted) stop string."""
        text = self.history.text
        try:
            if text is not None:
                text.finish(isinstance(self.stop_reason, str), self.params.include_stop)
                self.delivery.text = text.text
            elif decode is not None and self.params.detokenize:
                shown = self.outputs[:-1] if isinstance(self.stop_reason, int) else self.outputs
                decoded = decode(shown)
                if not isinstance(decoded, str):
                    raise TypeError(f"the detokenizer returned {type(decoded).__name__}")
                self.delivery.text = decoded
        except Exception as error:  # of the user's detokenizer
            self.fail(f"{type(error).__name__}: {error}")

    def fail(self, message: str) -> None:
        self.finish_reason = "error"
        self.error = message

    def _ending(
        self, token: int, length: int, text: TextState | None
    ) -> tuple[FinishReason | None, int | str | None]:
        """Why the request ends with `token` as the last of `length` tokens; pure but for `text`, which it
        advances.
        """
        enough = length - self.prompt_len >= self.params.min_tokens
        if enough and token in self.stop_ids:
            return "stop", token  # which is not part of the text
        matched = text.push(token) if text is not None else None
        if enough and matched is not None:
            return "stop", matched
        return ("length", None) if length >= self.limit else (None, None)

    def _keep_promise(self, token: int, logprob: float) -> None:
        at = self.num_outputs - 1
        promised = self.delivery.promised.pop(at, None)
        if promised is None or promised == (token, logprob):
            return
        if at < self.resumed:
            self.fail(f"output {at} of the state that was resumed is not what its contract gives")
        else:
            self.fail(
                f"a certificate was revoked after output {at} had been delivered, and the verifier does not "
                "confirm that output"
            )
