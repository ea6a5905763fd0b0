"""The engine's thread: it runs steps while there is work, and what others want done in between."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from llm42c.errors import IntegrityError, RequestError
from llm42c.runtime.engine import Engine
from llm42c.runtime.outputs import RequestOutput
from llm42c.runtime.pump import failed_output, settle_future

_log = logging.getLogger(__name__)

T = TypeVar("T")
Deliver = Callable[[list[RequestOutput]], None]


class EngineThread:
    """Owns `engine`: nobody else may call it while the thread lives.

    Each step's outputs go to `deliver`, in this thread, which must not wait for anything. Without requests
    the thread runs probes that are due, then sleeps.
    """

    def __init__(self, engine: Engine, deliver: Deliver) -> None:
        self._engine, self._deliver = engine, deliver
        self._changed = threading.Condition()
        self._inbox: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closing = False
        self._running: dict[str, None] = {}
        self.broken: str | None = None  # why the engine keeps no promise any more
        self._thread = threading.Thread(target=self._run, name="llm42-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Abort every request and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def call(self, action: Callable[[Engine], T]) -> Future[T]:
        """Run `action` between two steps."""
        future: Future[T] = Future()
        with self._changed:
            if self._closing:
                future.set_exception(RequestError("the engine is closed"))
                return future
            self._inbox.append((lambda: action(self._engine), future))
            self._changed.notify()
        return future

    def submit(self, request_id: str, *arguments: Any, **options: Any) -> Future[str]:
        """`Engine.submit` under this id."""

        def enter(engine: Engine) -> str:
            engine.submit(*arguments, request_id=request_id, **options)
            self._running[request_id] = None
            return request_id

        return self.call(enter)

    def abort(self, request_id: str) -> None:
        def leave(engine: Engine) -> None:
            engine.abort(request_id)
            self._running.pop(request_id, None)

        self.call(leave)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._inbox or self._closing or self._has_work()):
                    self._changed.wait()
                actions = list(self._inbox)
                self._inbox.clear()
                closing = self._closing
            for action, future in actions:
                if future.set_running_or_notify_cancel():
                    settle_future(action, future)
            if closing:
                self._engine.close()
                return
            if self._has_work():
                self._step()

    def _has_work(self) -> bool:
        return self._engine.has_unfinished() or self._engine.certificates.due

    def _step(self) -> None:
        try:
            outputs = self._engine.step()
        except Exception as error:
            why = f"a step was broken off: {type(error).__name__}: {error}"
            _log.error("%s", why)
            if isinstance(error, IntegrityError):
                self.broken = str(error)
            outputs = [failed_output(request_id, why) for request_id in self._running]
            for output in outputs:
                self._engine.abort(output.request_id)  # an IntegrityError leaves them in the engine
        for output in outputs:
            if output.finished:
                self._running.pop(output.request_id, None)
        if outputs:
            self._deliver(outputs)
