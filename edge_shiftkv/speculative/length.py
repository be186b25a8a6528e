"""How many tokens to draft next: as many as pay, by what drafts and target passes were measured to cost.

A round drafts n tokens and gives E(n) tokens of the answer for the time C(n); a plain round gives one for that of a
pass over one token. The best n has the highest E(n) / C(n). Time is counted in plain passes: what else a machine does
slows all passes down alike, so that what a pass over several tokens takes is known better by how many plain ones it
is worth than in seconds. Whether drafts will be accepted differs from answer to answer: where they do not
seem to pay, the draft model now and then reads what the target wrote without it and is judged by how much of that it
would have written, which costs a fraction of a pass. A draft ends where it is in doubt, and
one that has little confidence in itself is not verified: a draft model's confidence tells quite well how often it is
right. All that judging and drafting lose is kept below a small share of the time decoding takes, so that a draft which
never agrees costs no more than that. Measurements may be wrong: see `costs`; those that keep drafts from being used
are doubted after a while.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from edge_shiftkv.speculative.costs import PassCosts, Recent
from edge_shiftkv.speculative.options import MOST_DRAFTED
from edge_shiftkv.speculative.records import Drafted, Judged

MOST = 8
"""The most tokens drafted in a round, if no other number is set."""

_LOSS = 0.02  # share of decoding time that drafts may lose
_MEMORY = 0.97  # weight of what was accepted before, per round or token judged
_PRIOR = (3.0, 2.0)  # accepted and rejected tokens, before there were any
_CARRIED = 12.0  # weight, in tokens, that earlier answers have for the acceptance in a new one
_WAIT, _LONGEST_WAIT = 10, 1024  # tokens without a draft until it is judged
_CREDIT = 16.0  # plain passes that drafts gained and may lose again
_HOPE = 1.0  # standard deviations of the acceptance, by which drafts are given the benefit of the doubt
_FRESH, _REFRESH = 32, 256  # plain passes for which one tells what others are worth, and after which one is measured
_FAR = 1.3  # times what plain passes took before, or a part of it: the machine has changed, if it is so once more
_UNTRIED = 256  # plain passes without a draft, after which it is not known any more what a draft token costs
_FORESEEN = 128  # tokens that an answer is expected to go on for, at most


@dataclass(frozen=True)
class Plan:
    """What to draft in one round.

    n_draft: tokens to draft; 0 decodes without.
    enough: a draft ends with the token at which the probability that all of it is accepted, by its own confidence,
        falls below this.
    judge: the draft model is to be judged first, and the round to be planned again.
    """

    n_draft: int
    enough: float = 0.0
    judge: bool = False


class DraftLength:
    """Plans the rounds of all answers of one runtime, from what the rounds before took.

    fixed: the draft length of every round; None plans it, once passes over one token and over several, and the draft
        model's own, were measured.

    most: tokens of the target that are proposed in a round at most.
    """

    def __init__(self, fixed: int | None = None) -> None:
        self._fixed = fixed
        self.most = MOST if fixed is None else MOST_DRAFTED
        self._plain = Recent()  # seconds; everything else is in plain passes
        self._plain_is_doubtful = False
        self._passes = PassCosts(MOST + 1)
        self._draft_token = Recent()
        self._draft_prompt_token = Recent()
        self._accepted, self._rejected = _PRIOR
        self._proxies_per_token = 1.0
        self._since_plain = self._since_drafted = 0.0
        self._since_seen = 0
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
        if self._since_plain >= _REFRESH or self._plain_is_doubtful:
            return Plan(0)  # to measure it
        reading = unread() * self._draft_prompt_token.value
        foreseen = min(remaining, _FORESEEN)
        n = max(range(1, MOST + 1), key=self._rate)
        saved = 1 - 1 / max(self._rate(k, self._hoped) for k in range(1, MOST + 1))
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
        self._forget(_MEMORY**judged.n)
        self._accepted += judged.n_agreed
        self._rejected += judged.n - judged.n_agreed

    def is_worth(self, drafted: Drafted) -> bool:
        """Whether a draft is worth a pass longer than that of a plain round."""
        n_proposed = len(drafted.proposal.tokens)
        if self._fixed is not None:
            return n_proposed > 0
        expected: float = sum(accumulate(drafted.confidences[: drafted.n_drafted], mul))
        return expected > max(1, self._rate(max(1, drafted.n_drafted))) * (self._pass(1 + n_proposed) - 1)

    def pass_took(self, n_tokens: int, seconds: float) -> None:
        """Note that the target took a pass over so many tokens; over one at first."""
        if n_tokens == 1:
            has_changed = self._since_plain >= _REFRESH and not 1 / _FAR < seconds / self._plain.value < _FAR
            if has_changed:
                self._plain = Recent()
            self._plain_is_doubtful = has_changed
            self._plain.add(seconds)
            self._since_plain = 0.0
        elif self._since_plain < _FRESH:
            self._passes.add(n_tokens, seconds / self._plain.value)

    def read(self, n_tokens: int, seconds: float) -> None:
        """Note that the draft model read tokens at once."""
        self._draft_prompt_token.add(seconds / n_tokens / self._plain.value)

    def drafted(self, n_tokens: int, seconds: float) -> None:
        """Note that the draft model took tokens one by one."""
        self._draft_token.add(seconds / n_tokens / self._plain.value)
        self._since_drafted = 0.0

    def passed(self, drafted: Drafted, n_drawn: int, *, pass_s: float, round_s: float) -> None:
        """Note a round: `n_drawn` tokens of the answer. `pass_s` of its seconds are the target's."""
        if self._fixed is not None:
            return
        n_proposed = len(drafted.proposal.tokens)
        self.pass_took(n_proposed + 1, pass_s)
        # As passes of this length usually are: how fast the machine is at the moment does not matter.
        took = (round_s - pass_s) / self._plain.value + self._passes.of(1 + n_proposed)
        self._spent += took
        self._passes.elapsed(took)
        self._since_plain += took
        self._since_drafted += took
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
        self._forget(_MEMORY)
        self._accepted += n_drawn - 1
        self._rejected += n_drawn <= n_proposed
        if n_drawn > n_proposed:  # what else was drafted counts as its confidence says
            others = list(accumulate(drafted.confidences[n_proposed and drafted.n_drafted :], mul))
            self._accepted += sum(others)
            self._rejected += 1 - others[-1] if others else 0

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
        """Draft n tokens, until one more is not worth its cost, by the chance of those before it."""
        more = (self._time_of(n) - self._time_of(1)) / max(1, n - 1)
        return Plan(n, min(0.9, self._rate(n) * more / max(self.acceptance, 0.1)))

    @property
    def _hoped(self) -> float:
        """The acceptance as it may be, if luck was bad. What comes of too much hope is bounded by what may be lost."""
        a = self.acceptance
        deviation: float = (a * (1 - a) / (1 + self._accepted + self._rejected)) ** 0.5
        return a + _HOPE * deviation

    def _rate(self, n: int, acceptance: float | None = None) -> float:
        """Expected tokens of the answer in the time of a plain pass, with n tokens drafted."""
        a = min(self.acceptance if acceptance is None else acceptance, 0.98)
        expected: float = (1 - a ** (min(n * self._proxies_per_token, MOST) + 1)) / (1 - a)
        return expected / self._time_of(n)

    def _time_of(self, n: int) -> float:
        """Expected time of a round with n tokens drafted, in plain passes."""
        token = self._draft_token.value
        if self._since_drafted >= _UNTRIED:
            token = min(token, self._draft_prompt_token.value)
        return n * token + self._pass(1 + n * self._proxies_per_token)

    def _pass(self, n: float) -> float:
        """Expected time of a pass over n tokens, in plain passes; hopefully, while what it takes can be measured."""
        return self._passes.of(n, hopeful=self._since_plain < _FRESH)
