"""How many tokens to draft next: as many as pay, by what drafts and target passes were measured to cost.

A round drafts n tokens and gives E(n) tokens of the answer for the time C(n); a plain round gives one for that of a
pass over one token. The best n has the highest E(n) / C(n). Time is counted in plain passes: what else a machine does
slows all passes down alike, so that what a pass over several tokens takes is known better by how many plain ones it
is worth than in seconds. Whether drafts will be accepted differs from answer to answer: where they do not
seem to pay, the draft model now and then reads what the target wrote without it and is judged by how much of that it
would have written, which costs a fraction of a pass. And a draft that has little confidence in itself is not verified:
a draft model's confidence tells quite well how often it is right. All that judging and drafting lose is kept below a
small share of the time decoding takes, so that a draft which never agrees costs no more than that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from statistics import median_low

import numpy as np

from edge_shiftkv.speculative.records import Drafted, Judged

MOST = 8
"""The most tokens drafted in a round, if no other number is set."""

_LOSS = 0.02  # share of decoding time that drafts may lose
_MEMORY = 0.93  # weight of what was accepted before, per round or token judged
_PRIOR = (3.0, 2.0)  # accepted and rejected tokens, before there were any
_TRUST = 8.0  # tokens that a draft's confidence foresaw rightly, before there were any
_CARRIED = 5.0  # weight, in tokens, that earlier answers have for the acceptance in a new one
_WAIT, _LONGEST_WAIT = 10, 1024  # tokens without a draft until it is judged
_CREDIT = 16.0  # plain passes that drafts gained and may lose again
_FRESH, _REFRESH = 32, 256  # tokens for which a plain pass tells what others are worth, and after which one is measured
_FORESEEN = 128  # tokens that an answer is expected to go on for, at most


@dataclass(frozen=True)
class Plan:
    """What to draft in one round.

    n_draft: tokens to draft; 0 decodes without.
    enough: a draft ends when the probability that all of it is accepted, by its own confidence, falls below this.
    judge: the draft model is to be judged first, and the round to be planned again.
    """

    n_draft: int
    enough: float = 0.0
    judge: bool = False


class _Recent:
    """The median of the last measurements; the lower one of two."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=9)

    def add(self, value: float) -> None:
        self._values.append(value)

    @property
    def n(self) -> int:
        return len(self._values)

    @property
    def value(self) -> float:
        return median_low(self._values) if self._values else 0.0


def _expected(drafted: Drafted) -> float:
    """How many tokens of a draft will be accepted, by its confidence."""
    expected: float = sum(accumulate(drafted.confidences[: drafted.n_drafted], mul))
    return expected


class DraftLength:
    """Plans the rounds of all answers of one runtime, from what the rounds before took.

    fixed: the draft length of every round; None plans it, once passes over one token and over several, and the draft
        model's own, were measured.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self._plain = _Recent()  # seconds; everything else is in plain passes
        self._passes: dict[int, _Recent] = {}
        self._line: tuple[float, float] | None = None
        self._draft_token = _Recent()
        self._draft_prompt_token = _Recent()
        self._accepted, self._rejected = _PRIOR
        self._proxies_per_token = 1.0
        self._right, self._foreseen_right = _TRUST, _TRUST
        self._since_plain = self._since_seen = 0
        self._wait = _WAIT
        self._spent = 0.0
        self._lost = 0.0
        self._invested = 0.0
        self._is_judged = False

    @property
    def acceptance(self) -> float:
        """The estimated probability that a proposed token is accepted, if those before it are."""
        return self._accepted / (self._accepted + self._rejected)

    def begin(self) -> None:
        """Begin an answer."""
        self._invested = 0.0
        self._since_seen = 0
        self._wait = _WAIT
        self._is_judged = False
        # Whether a draft's confidence can be trusted differs from answer to answer, too.
        self._right, self._foreseen_right = (self._right + _TRUST) / 2, (self._foreseen_right + _TRUST) / 2
        self._forget(min(1.0, _CARRIED / (self._accepted + self._rejected)))

    def plan(self, *, remaining: int, unread: Callable[[], int]) -> Plan:
        """Decide on the next round.

        remaining: tokens the answer may still have.
        unread: tells how many tokens the draft model has to read before it can go on.
        """
        if remaining < 2:
            return Plan(0)
        if self._fixed is not None:
            return Plan(self._fixed)
        if self._since_plain >= _REFRESH:
            return Plan(0)  # to measure it
        reading = unread() * self._draft_prompt_token.value
        foreseen = min(remaining, _FORESEEN)
        n = max(range(1, MOST + 1), key=self._rate)
        saved = 1 - 1 / self._rate(n)
        allowed = _LOSS * (self._spent + foreseen)
        pays = saved * foreseen > 2 * reading
        # What was spent on reading in this answer may still come in.
        if pays and (self._lost - self._invested if self._is_judged else self._lost + reading) < allowed:
            return self._worth(n)
        return Plan(0, judge=self._since_seen >= self._wait and self._lost + reading < allowed)

    def judged(self, judged: Judged) -> None:
        """Note how well the draft model foresaw the answer."""
        took = judged.seconds / self._plain.value
        self._lost += took
        self._invested += took
        self._spent += took
        self._is_judged = True
        self._since_seen = 0
        self._wait = min(2 * self._wait, _LONGEST_WAIT)
        if judged.n_read >= MOST:
            self.read(judged.n_read, judged.seconds)
        self._note_trust(judged.n_agreed, judged.n_foreseen)
        self._forget(_MEMORY**judged.n)
        self._accepted += judged.n_agreed
        self._rejected += judged.n - judged.n_agreed

    def is_worth(self, drafted: Drafted) -> bool:
        """Whether a draft is worth a pass longer than that of a plain round."""
        n_proposed = len(drafted.proposal.tokens)
        if self._fixed is not None:
            return n_proposed > 0
        rate = max(1, self._rate(max(1, drafted.n_drafted)))
        longer = self._pass(1 + n_proposed) - 1
        return _expected(drafted) * self._right / self._foreseen_right > rate * longer

    def pass_took(self, n_tokens: int, seconds: float) -> None:
        """Note that the target took a pass over so many tokens; over one at first."""
        if n_tokens == 1:
            if self._since_plain >= _REFRESH:
                self._plain = _Recent()
            self._plain.add(seconds)
            self._since_plain = 0
        elif self._since_plain < _FRESH:
            self._passes.setdefault(n_tokens, _Recent()).add(seconds / self._plain.value)
            self._line = None

    def read(self, n_tokens: int, seconds: float) -> None:
        """Note that the draft model read tokens at once."""
        self._draft_prompt_token.add(seconds / n_tokens / self._plain.value)

    def drafted(self, n_tokens: int, seconds: float) -> None:
        """Note that the draft model took tokens one by one."""
        self._draft_token.add(seconds / n_tokens / self._plain.value)

    def passed(self, drafted: Drafted, n_drawn: int, *, pass_s: float, round_s: float) -> None:
        """Note a round: `n_drawn` tokens of the answer. `pass_s` of its seconds are the target's."""
        if self._fixed is not None:
            return
        n_proposed = len(drafted.proposal.tokens)
        self.pass_took(n_proposed + 1, pass_s)
        # As passes of this length usually are: how fast the machine is at the moment does not matter.
        took = (round_s - pass_s) / self._plain.value + self._pass(1 + n_proposed)
        self._spent += took
        self._since_plain += n_drawn
        self._since_seen += n_drawn
        if drafted.n_read == 0:
            return
        self._note_draft(drafted)
        loss = took - n_drawn
        self._wait = _WAIT if loss < 0 else min(2 * self._wait, _LONGEST_WAIT)
        # What drafts gained may be lost again, but not much of it.
        self._lost = max(self._lost + loss, -_CREDIT)
        if drafted.n_read >= MOST:
            self._invested += drafted.reading_s / self._plain.value
        self._since_seen = 0
        if n_proposed:
            self._proxies_per_token += 0.1 * (n_proposed / drafted.n_drafted - self._proxies_per_token)
            self._note_trust(n_drawn - 1, _expected(drafted))
        self._forget(_MEMORY)
        self._accepted += n_drawn - 1
        self._rejected += n_drawn <= n_proposed
        if n_drawn > n_proposed:  # what else was drafted counts as its confidence says
            others = list(accumulate(drafted.confidences[n_proposed and drafted.n_drafted :], mul))
            self._accepted += sum(others)
            self._rejected += 1 - others[-1] if others else 0

    def _note_trust(self, right: int, foreseen: float) -> None:
        """Note how many tokens were right and how many should have been, by the draft's confidence."""
        self._right = _MEMORY * self._right + right
        self._foreseen_right = _MEMORY * self._foreseen_right + foreseen

    def _forget(self, kept: float) -> None:
        """Let what was accepted and rejected count less."""
        self._accepted *= kept
        self._rejected *= kept

    def _note_draft(self, drafted: Drafted) -> None:
        seconds, n_passes = drafted.model_s + drafted.bridge_s, drafted.n_passes
        if drafted.n_read < MOST:
            n_passes += 1
        else:
            seconds -= drafted.reading_s
            self.read(drafted.n_read, drafted.reading_s)
        if n_passes:
            self.drafted(n_passes, seconds)

    def _worth(self, n: int) -> Plan:
        """Draft n tokens, but for those whose cost is not worth their chance."""
        last = self._time_of(n) - self._time_of(n - 1)
        return Plan(n, min(0.5, self._rate(n) * last))

    def _rate(self, n: int) -> float:
        """Expected tokens of the answer in the time of a plain pass, with n tokens drafted."""
        a = min(self.acceptance, 0.98)
        expected: float = (1 - a ** (n * self._proxies_per_token + 1)) / (1 - a)
        return expected / self._time_of(n)

    def _time_of(self, n: int) -> float:
        """Expected time of a round with n tokens drafted, in plain passes."""
        return n * self._draft_token.value + self._pass(1 + n * self._proxies_per_token)

    def _pass(self, n: float) -> float:
        """Expected time of a pass over n tokens, in plain passes: on a line through those over 2 and more."""
        if n <= 1:
            return 1.0
        if self._line is None:
            times = [recent.value for recent in self._passes.values()]
            weights = [recent.n**0.5 for recent in self._passes.values()]
            slope, start = np.polyfit([*self._passes], times, 1, w=weights)
            if slope < 0:
                slope, start = 0.0, np.average(times, weights=np.square(weights))
            self._line = float(start), float(slope)
        start, slope = self._line
        return max(1.0, start + slope * n)
