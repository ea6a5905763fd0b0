"""One request: the only mutable object that the scheduler, the packer and the verifier share.

`tokens` (prompt + committed outputs) is the truth. `pending` holds proposals of a speculative bucket;
everything that depends on it is a copy and is thrown away with it. KV positions below `num_computed` are
valid, and canonical when the request is deterministic.
"""

from __future__ import annotations

import enum

import numpy as np

from llm42c.runtime.outputs import FinishReason, Limit, TopLogprobs
from llm42c.runtime.processors import Decode, TextState
from llm42c.runtime.sampling import SamplingParams
from llm42c.runtime.token_counts import RowCounts


class State(enum.Enum):
    WAITING = "waiting"  # holds no pages; may have committed outputs from before a preemption
    RUNNING = "running"
    FINISHED = "finished"


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
    ) -> None:
        self.id = request_id
        self.arrival = arrival
        self.params = params
        self.deterministic = deterministic
        self.stream = stream
        self.seed = seed
        self.max_tokens = max_tokens
        self.limited_by = limited_by
        self.prompt_len = len(prompt)
        self.limit = len(prompt) + max_tokens
        self.eos_ids = frozenset() if params.ignore_eos else eos_ids
        self.stop_ids = self.eos_ids | frozenset(params.stop_token_ids)
        self.processed = params.processes_logits
        self.seen, self.emitted = RowCounts(0), RowCounts(len(prompt))  # for penalties

        self.tokens = list(prompt)
        self.logprobs: list[float] = []
        self.origins: list[
            int
        ] = []  # which shape chose each output: 0 = verifier, else as in BlockPool.origin
        self.top_logprobs: list[TopLogprobs] = []
        self.text = text  # None: nobody looks at the text before the end
        self.state = State.WAITING
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | str | None = None
        self.error: str | None = None

        self.pending: list[int] = []
        self.spec_done = False  # the proposals reach an end of the request
        self.spec_text: TextState | None = None
        self.blocked = False  # a proposal could not be computed; only the verifier may decide why
        self.drain = False  # a certified bucket made the last proposal: verify now, then commit directly

        self.pages: list[int] = []
        self.block_row = np.zeros(max_pages, dtype=np.int32)
        self.page_keys: list[bytes] = []  # of leading full pages; a function of `tokens` alone
        self.shared_pages = 0  # leading pages that the prefix cache has been offered
        self.num_computed = 0
        self.proved = 0  # leading KV positions that the verifier graph itself wrote or audited
        self.proved_outputs = 0  # leading outputs that the verifier graph itself chose or audited

        self.delivered = 0  # outputs already handed to the user
        self.text_sent = 0
        self.final_text = ""
        self.promised: dict[int, tuple[int, float]] = {}  # delivered outputs that a revocation took back

    # -- reading ---------------------------------------------------------------------------------------------

    @property
    def num_outputs(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def outputs(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def prefilling(self) -> bool:
        """Whether positions before the newest committed token still lack KV."""
        return self.num_computed < len(self.tokens) - 1

    def token_slice(self, start: int, end: int) -> list[int]:
        """Tokens of positions [start, end) of committed + pending."""
        length = len(self.tokens)
        if end <= length:
            return self.tokens[start:end]
        return self.tokens[start:] + self.pending[max(0, start - length) : end - length]

    # -- changing --------------------------------------------------------------------------------------------

    def commit(self, token: int, logprob: float, top: TopLogprobs | None, origin: int) -> bool:
        """Append one certain output; returns whether it ends the request (then `finish_reason` is set)."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.origins.append(origin)
        if top is not None:
            self.top_logprobs.append(top)
        if self.promised:
            self._keep_promise(token, logprob)
        if self.finish_reason is None:
            try:
                self.finish_reason, self.stop_reason = self._ending(token, len(self.tokens), self.text)
            except Exception as error:  # of the user's detokenizer
                self.fail(f"{type(error).__name__}: {error}")
        return self.finish_reason is not None

    def propose(self, token: int) -> None:
        """Append one speculative output; it may be an end of the request, equally speculative."""
        if not self.pending and self.text is not None and self.text.stops:
            self.spec_text = self.text.copy()
        self.pending.append(token)
        try:
            reason, _ = self._ending(token, len(self.tokens) + len(self.pending), self.spec_text)
            self.spec_done = reason is not None
        except Exception:
            self.blocked = True  # the error counts only if this token is committed

    def drop_pending(self) -> int:
        """Throw away every proposal and all that was derived from it; returns how many there were."""
        count = len(self.pending)
        self.pending = []
        self.spec_done = self.blocked = self.drain = False
        self.spec_text = None
        return count

    def keep_pending(self, start: int) -> None:
        """The first `start` proposals were committed; the rest stays speculative."""
        self.pending = self.pending[start:]
        if not self.pending:
            self.drop_pending()

    def take_back_unproved(self) -> None:
        """Drop outputs that only a certificate vouched for; those delivered must come again, bit for bit."""
        self.drop_pending()
        keep = self.proved_outputs
        for i in range(keep, min(self.delivered, self.num_outputs)):
            self.promised[i] = (self.tokens[self.prompt_len + i], self.logprobs[i])
        del self.tokens[self.prompt_len + keep :]
        del self.logprobs[keep:]
        del self.origins[keep:]
        del self.top_logprobs[keep:]
        self.seen.take_back(len(self.tokens))
        self.emitted.take_back(len(self.tokens))
        self.page_keys.clear()
        if self.text is not None:
            self.text = self.text.restart(self.outputs)

    def close_text(self, decode: Decode | None) -> None:
        """The request ended: fill `final_text`, without stop token and (unless wanted) stop string."""
        try:
            if self.text is not None:
                self.text.finish(isinstance(self.stop_reason, str), self.params.include_stop)
                self.final_text = self.text.text
            elif decode is not None and self.params.detokenize:
                shown = self.outputs[:-1] if isinstance(self.stop_reason, int) else self.outputs
                text = decode(shown)
                if not isinstance(text, str):
                    raise TypeError(f"the detokenizer returned {type(text).__name__}")
                self.final_text = text
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
        promised = self.promised.pop(self.num_outputs - 1, None)
        if promised is not None and promised != (token, logprob):
            self.fail(
                "a certificate was revoked after output "
                f"{self.num_outputs - 1} had been delivered, and the verifier does not confirm that output"
            )
