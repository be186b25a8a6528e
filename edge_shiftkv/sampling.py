"""How the next token is drawn from a model's logits.

A draw depends on the logits, the seed and the place in the answer only, not on how many draws were made before: of the
tokens that the filters leave, it takes the one with the highest log p(token) + Gumbel(seed, place, token). That draws
from p exactly (the Gumbel-max trick), and lets a draft model draw with the same noise (see `speculative.verify`).
"""

from __future__ import annotations

import ctypes
import math
import secrets
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeVar

import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt

from edge_shiftkv.checks import check_number
from edge_shiftkv.errors import ClosedError, SettingError, ShiftKVError
from edge_shiftkv.grammar import Grammar, check_gbnf, gbnf_of_schema
from edge_shiftkv.native.llama import Model
from edge_shiftkv.results import TokenLogprob, TokenLogprobs

MAX_SEED = 0xFFFFFFFF  # LLAMA_DEFAULT_SEED, which means none
_PENALTY_WINDOW = 64  # llama.cpp's default
_MANY = 4096  # choices beyond which bounds are cheaper than noise

_Entry = TypeVar("_Entry", bound=TokenLogprob)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: logit_bias, penalties, top_k, top_p, min_p and temperature, applied in this order.

    A grammar comes last: of the tokens that the filters leave, those are drawn from that it allows; where that is none,
    the filters are applied to all that it allows. So it costs little, and changes nothing while the model keeps to it.

    temperature: 0 takes the most likely token, whatever top_k, top_p and min_p are.
    top_k: keep the k most likely tokens; 0 keeps all.
    top_p: keep the most likely tokens that together have this probability; 1 keeps all.
    min_p: keep tokens with at least this share of the most likely one's probability; 0 keeps all.
    seed: the same seed draws the same tokens; None draws a seed.
    repeat_penalty: divides the logit of a token among the answer's last 64, or multiplies it where negative; 1 is off.
    presence_penalty: subtracted from the logit of a token among these 64; 0 is off.
    frequency_penalty: the same, for each time it is among them.
    logit_bias: token -> what is added to its logit; -inf bans it.
    grammar: GBNF, whose rule ``root`` the answer keeps to; see `grammar.check_gbnf`.
    json_schema: the answer is JSON of this schema, as far as `grammar.gbnf_of_schema` knows it. One that max_tokens
        ends is the beginning of that.
    logprobs: how many alternatives to note for each token, 0 to 20; None notes nothing.

    Raises SettingError when a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int | None = None
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    grammar: str | None = None
    json_schema: Mapping[str, Any] | str | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, 0)
        check_number("top_k", self.top_k, 0, whole=True, note="0 keeps all tokens")
        check_number("top_p", self.top_p, 0, 1, above=True)
        check_number("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            check_number("seed", self.seed, 0, MAX_SEED - 1, whole=True)
        check_number("repeat_penalty", self.repeat_penalty, 0, above=True, note="1 is off")
        for name in ("presence_penalty", "frequency_penalty"):
            check_number(name, getattr(self, name), note="0 is off")
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise SettingError(f"logit_bias is {self.logit_bias!r}: it has to map tokens to numbers"[:1000])
        for token, bias in (self.logit_bias or {}).items():
            if bias != -math.inf:
                check_number(f"the logit_bias of token {token!r}", bias, note="or -inf to ban the token")
        if self.logprobs is not None:
            check_number("logprobs", self.logprobs, 0, 20, whole=True)
        if self.grammar is not None and self.json_schema is not None:
            raise SettingError("there are a grammar and a json_schema: pass one of them")
        if self.grammar is not None:
            check_gbnf(self.grammar)
        _ = self.gbnf

    @cached_property
    def gbnf(self) -> str | None:
        """The grammar that answers keep to, by itself or made of the schema."""
        return self.grammar if self.json_schema is None else gbnf_of_schema(self.json_schema)

    def check(self, n_vocab: int) -> None:
        """Raise SettingError for a bias on what is none of a vocabulary's `n_vocab` tokens."""
        for token in self.logit_bias or ():
            if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < n_vocab:
                raise SettingError(f"logit_bias for token {token!r}: the model's tokens are 0 to {n_vocab - 1}")

    @property
    def penalizes(self) -> bool:
        """Whether a token's logit depends on the tokens before it in the answer."""
        return self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True)
class Choices:
    """What the filters leave of a vocabulary: tokens, and their log-probabilities but for a constant; both [n]."""

    tokens: Ints
    scores: Floats

    def probabilities(self) -> Floats:
        """The probabilities of `tokens`, [n]; they add up to 1."""
        weights = np.exp(self.scores - self.scores.max())
        p: Floats = weights / weights.sum()
        return p


class Noise:
    """Numbers that depend on a seed, a place in the answer and a token, and otherwise on nothing.

    Counter-based: SplitMix64's mixing (Steele, Lea, Flood 2014) of the three, so that any of them can be had alone.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = secrets.randbelow(MAX_SEED) if seed is None else seed

    def uniform(self, place: int, tokens: Ints) -> Floats:
        """Uniform variates in (0, 1), [n], for `tokens` [n]; other numbers than tokens give further variates."""
        x = tokens.astype(np.uint64)
        x *= _GOLDEN
        x += np.uint64(_mixed(_mixed(self.seed) + place))
        x ^= x >> np.uint64(30)
        x *= _MIX_1
        x ^= x >> np.uint64(27)
        x *= _MIX_2
        x ^= x >> np.uint64(31)
        # 52 bits: both ends are left out, and 1 - u is exact.
        u: Floats = ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        return u

    def gumbel(self, place: int, tokens: Ints) -> Floats:
        """Standard Gumbel variates, [n], for `tokens` [n]."""
        return _gumbel(self.uniform(place, tokens))

    def pick(self, place: int, choices: Choices) -> int:
        """Draw one of `choices`: the token with the highest score + Gumbel variate."""
        tokens, scores = choices.tokens, choices.scores
        if len(tokens) <= _MANY:
            return int(tokens[np.argmax(scores + self.gumbel(place, tokens))])
        # -log(-log(1 - u)) <= -log(u), which is cheap to know for all: few can be above the best one's true value.
        u = self.uniform(place, tokens)
        bounds = scores - np.log(u.astype(np.float32))
        best = np.argmax(bounds)
        few = np.flatnonzero(bounds >= scores[best] + _gumbel(u[best : best + 1]) - 1e-3)
        return int(tokens[few[np.argmax(scores[few] + _gumbel(u[few]))]])


_GOLDEN, _MIX_1, _MIX_2 = (np.uint64(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mixed(x: int) -> int:
    """SplitMix64's output function after one step."""
    x = (x + int(_GOLDEN)) % 2**64
    x = (x ^ (x >> 30)) * int(_MIX_1) % 2**64
    x = (x ^ (x >> 27)) * int(_MIX_2) % 2**64
    return x ^ (x >> 31)


def _gumbel(u: Floats) -> Floats:
    gumbel: Floats = -np.log(-np.log1p(-u))
    return gumbel


class Outputs(Protocol):
    """Where logits are: a `Context` after `decode`."""

    def logits(self, output: int = -1) -> npt.NDArray[np.float32]:
        """The logits, [n_vocab], by output counted from the last one backwards: -1, -2, ..."""
        ...


class Sampler:
    """Draws the tokens of one answer, in their order.

    noise: what it draws with.
    n_drawn: tokens of the answer so far.
    logprobs: how likely each was, where that is wanted.

    Raises SettingError for a grammar that llama.cpp does not take.
    """

    def __init__(self, model: Model, sampling: Sampling) -> None:
        self.sampling = sampling
        self.noise = Noise(sampling.seed)
        self.n_drawn = 0
        self._n_vocab = model.n_vocab
        biases = {**(sampling.logit_bias or {}), **dict.fromkeys(model.suppressed_tokens, -math.inf)}
        self._biased = np.array([*biases], np.int64)
        self._biases = np.array([*biases.values()], np.float32)
        self._recent: deque[int] = deque(maxlen=_PENALTY_WINDOW)
        self.logprobs: list[TokenLogprobs] = []
        self._model = model
        self._seen: npt.NDArray[np.float32] | None = None  # the logits that the next token is drawn from
        self._grammar = Grammar(model, sampling.gbnf) if sampling.gbnf else None
        self._filters = _Filters(model.n_vocab, sampling) if sampling.temperature > 0 else None

    def close(self) -> None:
        """Free the filters and the grammar."""
        self._n_vocab = 0
        if self._grammar:
            self._grammar.close()
        if self._filters:
            self._filters.close()

    def sample(self, outputs: Outputs, output: int = -1) -> int:
        """Draw the answer's next token from one of the logits of the last `decode`."""
        logits = outputs.logits(output)
        adjusted = self._adjusted(logits)
        choices = self._filtered(adjusted)
        token = self._pick(choices)
        # The one that is drawn from all is, if it is allowed, the one that is drawn from those allowed.
        if self._grammar and not self._grammar.allows(np.array([token]))[0]:
            token = self._pick(self._allowed(self._grammar, choices, adjusted))
        self._seen = logits
        self.accept(token)
        return token

    def choices(self, logits: npt.NDArray[np.float32]) -> Choices:
        """The tokens that the next one is drawn from, by logits of shape [n_vocab]."""
        self._seen = logits
        adjusted = self._adjusted(logits)
        choices = self._filtered(adjusted)
        return self._allowed(self._grammar, choices, adjusted) if self._grammar else choices

    def accept(self, token: int) -> None:
        """Note the answer's next token. Raises ShiftKVError for one that the grammar does not allow."""
        if self._grammar:
            self._grammar.accept(token)
        if self._seen is not None and self.sampling.logprobs is not None:
            self.logprobs.append(self._logprobs(token, self._seen))
        self._seen = None
        self.n_drawn += 1
        self._recent.append(token)

    def _filtered(self, adjusted: npt.NDArray[np.float32]) -> Choices:
        if not self._n_vocab:
            raise ClosedError("the sampler is closed")
        if self._filters is None:
            best = np.argmax(adjusted)
            return Choices(np.array([best]), np.zeros(1))
        return self._filters.apply(adjusted)

    def _pick(self, choices: Choices) -> int:
        if self._filters is None:
            return int(choices.tokens[0])
        return self.noise.pick(self.n_drawn, choices)

    def _allowed(self, grammar: Grammar, choices: Choices, adjusted: npt.NDArray[np.float32]) -> Choices:
        """Those of the filters' choices that the grammar allows; or, if that is none, the filters' choices of those."""
        allowed = grammar.allows(choices.tokens) & (adjusted[choices.tokens] > -np.inf)
        if allowed.any():
            return Choices(choices.tokens[allowed], choices.scores[allowed])
        allowed = grammar.allows(np.arange(self._n_vocab)) & (adjusted > -np.inf)
        if not allowed.any():
            raise ShiftKVError("the answer cannot go on: no token that the model may use keeps to the grammar")
        choices = self._filtered(np.where(allowed, adjusted, np.float32(-np.inf)))
        left = allowed[choices.tokens]
        return Choices(choices.tokens[left], choices.scores[left])

    def _logprobs(self, token: int, logits: npt.NDArray[np.float32]) -> TokenLogprobs:
        scores = logits.astype(np.float64)
        scores -= scores.max()
        scores -= math.log(np.exp(scores).sum())
        n = self.sampling.logprobs or 0
        best = np.argpartition(-scores, n - 1)[:n] if n < len(scores) else np.arange(len(scores))
        best = best[np.argsort(-scores[best], kind="stable")] if n else best[:0]

        def entry(kind: type[_Entry], token: int, **more: Any) -> _Entry:
            piece = self._model.piece(token)
            return kind(piece.decode(errors="replace"), piece, float(scores[token]), **more)

        top = tuple(entry(TokenLogprob, int(other)) for other in best)
        return entry(TokenLogprobs, token, top=top)

    def _adjusted(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The logits with biases and penalties, [n_vocab]; llama.cpp's own would look up each of its tokens."""
        penalized = self._recent if self.sampling.penalizes else ()
        if not len(self._biased) and not penalized:
            return logits
        adjusted: npt.NDArray[np.float32] = logits.copy()
        adjusted[self._biased] += self._biases
        if penalized:
            counts = Counter(penalized)
            tokens, times = np.array(list(counts)), np.array(list(counts.values()), np.float32)
            values = adjusted[tokens]
            repeat = np.float32(self.sampling.repeat_penalty)
            values = np.where(values <= 0, values * repeat, values / repeat)
            values -= times * np.float32(self.sampling.frequency_penalty) + np.float32(self.sampling.presence_penalty)
            adjusted[tokens] = values
        return adjusted


class _Filters:
    """llama.cpp's samplers for top_k, top_p, min_p and temperature."""

    def __init__(self, n_vocab: int, sampling: Sampling) -> None:
        self._chain: Any = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        for filtering in (
            llama.llama_sampler_init_top_k(sampling.top_k),
            llama.llama_sampler_init_top_p(sampling.top_p, 1),
            llama.llama_sampler_init_min_p(sampling.min_p, 1),
            llama.llama_sampler_init_temp(sampling.temperature),
        ):
            llama.llama_sampler_chain_add(self._chain, filtering)
        self._tokens = np.arange(n_vocab, dtype=np.int32)
        self._data = np.zeros(n_vocab, [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        self._array: Any = llama.llama_token_data_array()

    def close(self) -> None:
        chain, self._chain = self._chain, None
        if chain:
            llama.llama_sampler_free(chain)

    def apply(self, logits: npt.NDArray[np.float32]) -> Choices:
        self._data["id"] = self._tokens
        self._data["logit"] = logits
        array = self._array
        array.data = ctypes.cast(self._data.ctypes.data, llama.llama_token_data_p)
        array.size, array.selected, array.sorted = len(self._data), -1, False
        llama.llama_sampler_apply(self._chain, ctypes.byref(array))
        left = self._data[: array.size]
        return Choices(left["id"].astype(np.int64), left["logit"].astype(np.float64))
