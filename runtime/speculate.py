"""When drafters are asked, and how many of their tokens a step takes.

A step of more rows takes longer. How much longer is measured; how often a request's drafter is right is seen
by comparing each guess with what was committed later, whether or not the guess was used. A step takes the
number of drafts that promises the most tokens a second, which is none where they do not pay. A model's
guesses cost passes of its own: it is asked for as many as promise to pay, and stops where it is not sure
enough. Where drafts cost more than they saved all the same, they rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from llm42c.parallel.ranks import ALONE, Ranks
from llm42c.runtime.draft_models import DraftModels, Hold, ModelDrafter
from llm42c.runtime.drafters import ModelSpec
from llm42c.runtime.guesses import BUDGET_S, FIRST_PAUSE, LONGEST_PAUSE, Asker, Guesses, Record
from llm42c.runtime.stats import Stats
from llm42c.runtime.step_times import Ledger, StepTimes

if TYPE_CHECKING:
    from llm42c.runtime.request import Request

LONGEST_DRAFT = 24
MOST_PASSES = 8  # of a draft model for one step
FEW_PASSES = 4  # where rows are computed anyway
TRIAL_PASSES = 2  # where it does not promise to pay, now and then
SUREST = 0.95  # chance of drafts that nobody has seen yet
MARGIN = 1.05  # by how much drafts must be faster than none
UNMEASURED = 0.5  # of a step's time: a pass of a draft model, until one is measured

Step = tuple[float, int]  # chance that a drafted token is committed, index of its request


@dataclass
class _Sure:
    """A model's guesses for one request."""

    record: Record = field(default_factory=Record)
    probabilities: list[float] = field(default_factory=list)


@dataclass
class _Offer:
    """What may be taken for one request."""

    guess: list[int]
    chances: list[float]  # that a token and all before it are right
    asked: Guesses | None = None

    def first(self, count: int) -> _Offer:
        return _Offer(self.guess[:count], self.chances[:count], self.asked)


class Speculator:
    """The drafters of one engine's requests. Of several ranks the first decides."""

    def __init__(
        self, vocab_size: int, stats: Stats, ranks: Ranks = ALONE, models: DraftModels | None = None
    ) -> None:
        self.times = StepTimes()  # of steps that commit, a row a token
        self.ledger = Ledger()
        self._asker = Asker(vocab_size, stats)
        self._stats = stats
        self._ranks = ranks
        self._models = models
        self._sure: WeakKeyDictionary[Request, _Sure] = WeakKeyDictionary()
        self._turn = 0
        self._deciding = 0.0  # seconds since the last step
        self._base = 0.0  # seconds that the step under way would take without drafts
        self._asked, self._drafted = False, False  # drafters were, and drafts came of it
        self._pause, self._resume = 0, 0  # turns without a trial of draft models, and the turn after them

    def choose(
        self, requests: Sequence[Request], num_tokens: int, sizes: Sequence[int], room: int, hold: Hold
    ) -> list[list[int]]:
        """Drafts for a committing step of `num_tokens` tokens without them, in one of the larger `sizes`.

        One for each of `requests`, which may be empty; `room` tokens together at most. `hold` gets pages.
        """
        return self._decide(requests, room, lambda: self._choose(requests, num_tokens, sizes, room, hold))

    def fill(self, requests: Sequence[Request], room: int, hold: Hold) -> list[list[int]]:
        """Drafts for rows that are computed anyway: as many as there are, first come first served."""
        return self._decide(requests, room, lambda: self._fill(requests, room, hold))

    def took(self, num_tokens: int, requests: int, rows: int, seconds: float, committed: int) -> None:
        """A committing step of decodes: its size, how many requests shared it with how many rows, what came
        of it."""
        if self._asked:
            drafted = self._drafted and rows > requests
            saved = self._base * committed / requests - seconds if drafted else 0.0
            self.ledger.took(requests, saved - self._deciding, seconds)
        self._deciding, self._drafted, self._asked = 0.0, False, False
        self.times.took(num_tokens, seconds)

    def _decide(
        self, requests: Sequence[Request], room: int, decide: Callable[[], list[list[int]]]
    ) -> list[list[int]]:
        if room <= 0 or all(r.drafter_source is None for r in requests):
            return [[] for _ in requests]
        start = time.perf_counter()
        drafts: list[list[int]] = self._ranks.share(decide() if self._ranks.rank == 0 else None)
        self._deciding += time.perf_counter() - start
        return drafts

    def _fill(self, requests: Sequence[Request], room: int, hold: Hold) -> list[list[int]]:
        self._turn += 1
        drafts: list[list[int]] = [[] for _ in requests]
        for i, _, guess in self._ask(requests, room, BUDGET_S):
            drafts[i] = guess[:room]
            room -= len(drafts[i])
        alone = [i for i, r in enumerate(requests) if _model_only(r)]
        count = min(FEW_PASSES, room // max(1, len(alone)))
        sure = self._run_models(requests, alone, count, hold, lambda _, chance: chance > 0.5)
        for i, offer in sure.items():
            drafts[i] = offer.guess
        return drafts

    def _choose(
        self, requests: Sequence[Request], num_tokens: int, sizes: Sequence[int], room: int, hold: Hold
    ) -> list[list[int]]:
        self._turn += 1
        drafts: list[list[int]] = [[] for _ in requests]
        base = self.times.of(sizes[0])
        if not base or self.ledger.rests(len(requests)):
            return drafts  # nothing is measured yet, or drafts did not pay
        plan = _Plan(num_tokens, sizes, room, self.times)
        if not plan.could_pay():
            return drafts
        self._asked, self._base = True, base
        offers: dict[int, _Offer] = {}
        for i, guesses, guess in self._ask(requests, room, base):
            chance = guesses.record.chance
            offers[i] = _Offer(guess, [chance ** (j + 1) for j in range(len(guess))], guesses)
        best = plan.best(offers)
        for i, offer in self._ask_models(requests, offers, plan, best, hold).items():
            offers[i] = _Offer(offer.guess, offer.chances, offers[i].asked if i in offers else None)
        for i, count in plan.best(offers)[1].items():
            drafts[i] = offers[i].guess[:count]
        self._drafted = any(drafts)
        for i, offer in offers.items():
            if offer.asked is not None:
                gain = sum(offer.chances[: len(drafts[i])])
                self._asker.judge(offer.asked, gain * base / num_tokens, self._turn)
        return drafts

    def _ask(
        self, requests: Sequence[Request], room: int, budget: float
    ) -> Iterator[tuple[int, Guesses, list[int]]]:
        """Index, drafter and guess of each request that has a drafter, until `budget` seconds are spent."""
        end = time.perf_counter() + budget
        for i, request in enumerate(requests):
            guesses = self._asker.drafter_of(request, self._turn)
            if guesses is not None and time.perf_counter() <= end:
                yield i, guesses, self._asker.ask(request, guesses, min(LONGEST_DRAFT, room))

    # -- draft models ----------------------------------------------------------------------------------------

    def _ask_models(
        self,
        requests: Sequence[Request],
        offers: dict[int, _Offer],
        plan: _Plan,
        best: tuple[float, dict[int, int]],
        hold: Hold,
    ) -> dict[int, _Offer]:
        """Guesses of draft models, where they promise more than `best`, which is had without them."""
        asked = self._with_one_model(requests)
        if not asked or self._models is None:
            return {}
        drafter = self._models.of(_model_of(requests[asked[0]]))
        for i in asked:
            self._learn(drafter, requests[i])
        chances = {i: self._record(requests[i]).chance for i in asked}
        # Behind a match of n-grams that is as good, a model costs more than it brings.
        asked = [i for i in asked if i not in offers or sum(offers[i].chances) < chances[i] * 2]
        if not asked:
            return {}
        seconds = drafter.times.of(len(asked)) or plan.base * UNMEASURED
        rate, count = best[0], 0
        others = {i: offers[i].first(n) for i, n in best[1].items() if i not in asked}
        for k in range(1, MOST_PASSES + 1):
            tried = {i: _Offer([0] * k, [chances[i] ** (j + 1) for j in range(k)]) for i in asked}
            reached = plan.rate_of(others | tried, k * seconds)
            if reached > rate:
                rate, count = reached, k
        if count:
            self._pause = 0
        elif not self._is_trial(drafter, len(asked)):
            return {}
        row = plan.row(len(asked) * max(1, count))
        going = dict.fromkeys(asked, 1.0)

        def worth(i: int, chance: float) -> bool:
            """Whether one more token is: it costs its share of a pass, and a row of the step."""
            going[i] *= chance
            return going[i] * chances[i] / rate > seconds / len(asked) + row

        most = min(MOST_PASSES if count else TRIAL_PASSES, plan.room // len(asked))
        return self._run_models(requests, asked, most, hold, worth)

    def _with_one_model(self, requests: Sequence[Request]) -> list[int]:
        """Those for which the same model drafts as for the first one that has any."""
        models = [r.drafter_source.model if r.drafter_source is not None else None for r in requests]
        first = next((model for model in models if model is not None), None)
        return [i for i, model in enumerate(models) if model is not None and model == first]

    def _is_trial(self, drafter: ModelDrafter, requests: int) -> bool:
        """Whether a model that does not promise to pay is asked all the same: times and chances change."""
        if self._turn < self._resume:
            return False
        if drafter.times.settled(requests):
            self._pause = min(LONGEST_PAUSE, max(FIRST_PAUSE, 2 * self._pause))
            self._resume = self._turn + self._pause
        return True

    def _run_models(
        self,
        requests: Sequence[Request],
        asked: list[int],
        count: int,
        hold: Hold,
        worth: Callable[[int, float], bool],
    ) -> dict[int, _Offer]:
        """At most `count` tokens for each of the requests `asked`, by the model that each of them has."""
        offers: dict[int, _Offer] = {}
        if self._models is None or count < 1:
            return offers
        start = time.perf_counter()
        groups: dict[ModelDrafter, list[int]] = {}
        for i in asked:
            groups.setdefault(self._models.of(_model_of(requests[i])), []).append(i)
        for drafter, members in groups.items():
            some = [requests[i] for i in members]
            for request in some:
                self._learn(drafter, request)
            found = drafter.guess(
                some,
                count,
                hold,
                lambda j, p, d=drafter, m=members: worth(m[j], d.chance(requests[m[j]], p)),  # type: ignore[misc]
            )
            for i, (guess, probabilities) in zip(members, found, strict=True):
                sure = self._sure[requests[i]]
                sure.record.say(requests[i].num_tokens, guess)
                sure.probabilities = probabilities
                chances, chance = [], 1.0
                for p in probabilities:
                    chance *= drafter.chance(requests[i], p)
                    chances.append(chance)
                if guess:
                    offers[i] = _Offer(guess, chances)
        self._stats.seconds_draft += time.perf_counter() - start
        return offers

    def _record(self, request: Request) -> Record:
        return self._sure.setdefault(request, _Sure()).record

    def _learn(self, drafter: ModelDrafter, request: Request) -> None:
        """Look what became of the model's last guess."""
        record = self._record(request)
        right = record.compare(request.history.tokens)
        drafter.learn(request, self._sure[request].probabilities, right)


@dataclass
class _Plan:
    """A step of `num_tokens` rows without drafts, in one of `sizes`, the smallest first."""

    num_tokens: int
    sizes: Sequence[int]
    room: int
    times: StepTimes

    @property
    def base(self) -> float:
        return self.times.of(self.sizes[0])

    def could_pay(self) -> bool:
        """Whether drafts that are hardly ever wrong would be faster than none."""
        least = self.num_tokens / self.base * MARGIN
        added = ((s, min(self.room, s - self.num_tokens)) for s in self.sizes if s > self.num_tokens)
        return any((self.num_tokens + SUREST * more) / self.times.of(s) > least for s, more in added)

    def row(self, count: int) -> float:
        """Seconds that each of `count` more rows costs."""
        return max(0.0, self._seconds(count) - self.base) / max(1, count)

    def rate_of(self, offers: dict[int, _Offer], before: float) -> float:
        """Tokens a second if all of the offers are taken, after `before` seconds."""
        count = sum(len(o.chances) for o in offers.values())
        if count > self.room or self.num_tokens + count > self.sizes[-1]:
            return 0.0
        gain = sum(sum(o.chances) for o in offers.values())
        return (self.num_tokens + gain) / (self._seconds(count) + before)

    def best(self, offers: dict[int, _Offer]) -> tuple[float, dict[int, int]]:
        """With how many tokens of each offer most tokens are committed a second, and how many then are."""
        steps: list[Step] = [(chance, i) for i, o in offers.items() for chance in o.chances]
        steps.sort(key=lambda s: -s[0])
        del steps[self.room :]
        best_rate, best = self.num_tokens / self.base * MARGIN, 0
        for size in self.sizes:
            count = min(len(steps), size - self.num_tokens)
            if count <= 0:
                continue
            gain = sum(chance for chance, _ in steps[:count])
            # Rows that would be padding cost nothing.
            rate = (self.num_tokens + gain) / self.times.of(size) * (MARGIN if size == self.sizes[0] else 1)
            if rate > best_rate:
                best_rate, best = rate, count
            if count == len(steps):
                break
        counts: dict[int, int] = {}
        for _, i in steps[:best]:
            counts[i] = counts.get(i, 0) + 1
        return best_rate, counts

    def _seconds(self, count: int) -> float:
        size = next((s for s in self.sizes if s >= self.num_tokens + count), self.sizes[-1])
        return self.times.of(size)


def _model_only(request: Request) -> bool:
    source = request.drafter_source
    return source is not None and source.model is not None and source.make is None


def _model_of(request: Request) -> ModelSpec:
    assert request.drafter_source is not None
    assert request.drafter_source.model is not None
    return request.drafter_source.model
