"""One engine shared by any number of threads: whoever waits for outputs drives it.

An engine is not thread-safe. Here a caller that finds no news for its requests runs one step and hands the
outputs of the others to their mailboxes, so concurrent `generate` calls share batches without a thread of
their own. Submissions and aborts that arrive during a step run right after it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from llm42c.errors import RequestError
from llm42c.runtime.drafters import AS_ENGINE, Speculate
from llm42c.runtime.engine import Engine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.sampling import SamplingParams

T = TypeVar("T")


class Pump:
    """Thread-safe access to an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._changed = threading.Condition()
        self._stepping = False
        self._driver = 0  # the thread that runs the step under way
        self._inbox: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._mail: dict[str, list[RequestOutput]] = {}

    def submit(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        *,
        stream: bool,
        speculate: Speculate = AS_ENGINE,
    ) -> str:
        """Queue a deterministic request; returns its id. Raises RequestError as `Engine.submit` does."""

        def enter() -> str:
            request_id = self.engine.submit(prompt, params, stream=stream, speculate=speculate)
            self._mail[request_id] = []
            return request_id

        return self._between_steps(enter)

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests; those that ended, or are unknown, are left alone."""
        wanted = list(request_ids)

        def leave() -> None:
            for request_id in wanted:
                self.engine.abort(request_id)
                self._mail.pop(request_id, None)

        if wanted:
            self._between_steps(leave)

    def settle(self) -> None:
        """Probe every batch shape that the engine has met, now."""
        self._between_steps(self.engine.certificates.settle)

    def poll(self, request_ids: Sequence[str]) -> list[RequestOutput]:
        """Wait until one of these requests has news; returns all of it. Empty if none of them is running."""
        while True:
            with self._changed:
                while True:
                    if not any(i in self._mail for i in request_ids):
                        return []
                    mail = [o for i in request_ids for o in self._collect(i)]
                    if mail:
                        return mail
                    if not self._stepping:
                        self._stepping, self._driver = True, threading.get_ident()
                        break
                    self._changed.wait()
            self._step()

    def _collect(self, request_id: str) -> list[RequestOutput]:
        mail = self._mail.get(request_id, [])
        if mail:
            self._mail[request_id] = []
            if mail[-1].finished:
                del self._mail[request_id]
        return mail

    def _step(self) -> None:
        outputs: list[RequestOutput] = []
        try:
            outputs = self.engine.step()
        except BaseException as error:
            why = f"a step was broken off: {type(error).__name__}"
            outputs = [failed_output(request_id, why) for request_id in list(self._mail)]
            for output in outputs:
                self.engine.abort(output.request_id)  # an IntegrityError leaves them in the engine
            raise
        finally:
            with self._changed:
                self._stepping, self._driver = False, 0
                for output in outputs:
                    if output.request_id in self._mail:
                        self._mail[output.request_id].append(output)
                while self._inbox:
                    settle_future(*self._inbox.popleft())
                self._changed.notify_all()

    def _between_steps(self, action: Callable[[], T]) -> T:
        future: Future[T] = Future()
        with self._changed:
            if self._driver == threading.get_ident():
                raise RequestError("a logits processor cannot call the model that it belongs to")
            if self._stepping:
                self._inbox.append((action, future))
            else:
                settle_future(action, future)
        return future.result()


def failed_output(request_id: str, why: str) -> RequestOutput:
    """The last output of a request that a broken step took along."""
    return RequestOutput(request_id, [], [], finished=True, finish_reason="error", error=why)


def settle_future(action: Callable[[], Any], future: Future[Any]) -> None:
    """Run `action`; its result or exception is the future's."""
    try:
        future.set_result(action())
    except Exception as error:
        future.set_exception(error)
