"""From the logits of one row to one token id: penalties, temperature, top-k, top-p, min-p, and a draw.

Legend: V = vocabulary, n = candidates still in play; logits are float32 [V] or [n] and are never modified.
The order and the definitions are those of transformers' logits processors
(`generation/logits_process.py`); presence and frequency penalties are those of the OpenAI API.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, Protocol

import numpy as np

from gemma3n_onnx.runtime.errors import OptionError, no_token

GROUP_SIZE = 128  # values that share one partial maximum or sum; V / 128 groups are cheap to search
LOWEST = np.finfo(np.float32).min  # the least logit that is not -inf


def _require_integer(name: str, value: Any, low: int, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
        raise OptionError(f"{name} must be a whole number {limits}, not {value!r}.")


def _require_real(name: str, value: Any, accepts: Callable[[float], bool], limits: str) -> None:
    is_number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and accepts(float(value))):
        raise OptionError(f"{name} must be a number {limits}, not {value!r}.")


class Constraint(Protocol):
    """What may come next in one row, such as the continuations of a text that are JSON of a schema."""

    def allow(self, logits: np.ndarray) -> np.ndarray:
        """A copy of logits [V], -inf for what may not come next."""
        ...

    def take(self, token: int) -> None:
        """`token` was chosen."""
        ...


@dataclass(frozen=True)
class GenerationOptions:
    """How tokens are chosen and when to stop; a value out of range is an OptionError that names it.

    temperature: 0 takes the most likely token, and top_k, top_p, min_p and seed then change nothing.
    top_k, top_p, min_p: None keeps every token.
    repetition_penalty: over prompt and generated tokens; 1 is none.
    presence_penalty, frequency_penalty: over generated tokens only, once per token and once per
        occurrence; 0 is none.
    stop: the text ends before the first of these strings; one string may be given bare.
    seed: None draws differently each time.
    logprobs: None reports none, 0 the chosen token's log-probability, N also those of the N most likely
        tokens.
    logit_bias: added to the logits of these tokens before anything else.
    constraint: makes, for each row, what says which tokens may come next.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    constraint: Callable[[], Constraint] | None = None

    def __post_init__(self) -> None:
        _require_integer("max_new_tokens", self.max_new_tokens, 1)
        _require_real("temperature", self.temperature, lambda x: x >= 0, "of at least 0")
        if self.top_k is not None:
            _require_integer("top_k", self.top_k, 1)
        if self.top_p is not None:
            _require_real("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0 and up to 1")
        if self.min_p is not None:
            _require_real("min_p", self.min_p, lambda x: 0 <= x <= 1, "from 0 to 1")
        _require_real("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "above 0")
        _require_real("presence_penalty", self.presence_penalty, lambda x: -2 <= x <= 2, "from -2 to 2")
        _require_real("frequency_penalty", self.frequency_penalty, lambda x: -2 <= x <= 2, "from -2 to 2")
        if self.seed is not None:
            _require_integer("seed", self.seed, 0, 2**64 - 1)
        if self.logprobs is not None:
            _require_integer("logprobs", self.logprobs, 0, 20)
        for token, bias in (self.logit_bias or {}).items():
            _require_integer("A token id of logit_bias", token, 0)
            _require_real(f"logit_bias of token {token}", bias, lambda x: -100 <= x <= 100, "from -100 to 100")
        if self.constraint is not None and not callable(self.constraint):
            raise OptionError(f"constraint must be callable, not {self.constraint!r}.")
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, (tuple, list)) or not all(isinstance(text, str) and text for text in stop):
            raise OptionError(f"stop must be a string or several, none of them empty, not {self.stop!r}.")
        object.__setattr__(self, "stop", tuple(stop))


class TokenCounts:
    """The distinct tokens of one row, and how often each was generated; adding one visits no other."""

    def __init__(self, prompt: Sequence[int] | np.ndarray) -> None:
        distinct = np.unique(np.asarray(prompt, dtype=np.int64))
        self._slot = {token: slot for slot, token in enumerate(distinct.tolist())}
        self._ids = distinct
        self._generated = np.zeros(len(distinct), np.int32)

    def add(self, token: int) -> None:
        """Count one generated token."""
        slot = self._slot.setdefault(token, len(self._slot))
        if slot == len(self._ids):
            room = len(self._ids) + 64
            self._ids = np.concatenate([self._ids, np.empty(room, np.int64)])
            self._generated = np.concatenate([self._generated, np.zeros(room, np.int32)])
        self._ids[slot] = token
        self._generated[slot] += 1

    @property
    def ids(self) -> np.ndarray:
        """int64 [touched]: every token of prompt and generation, once."""
        return self._ids[: len(self._slot)]

    @property
    def generated(self) -> np.ndarray:
        """int32 [touched]: how often each of `ids` was generated."""
        return self._generated[: len(self._slot)]


def penalize(
    logits: np.ndarray, counts: TokenCounts, repetition: float, presence: float, frequency: float
) -> np.ndarray:
    """Logits [V] with the tokens already seen made less likely (more likely, for a penalty that says so).

    Repetition (Keskar et al. 2019, arXiv 1909.05858) divides a positive logit and multiplies a negative
    one.
    """
    seen = logits[counts.ids]
    seen = np.where(seen < 0, seen * repetition, seen / repetition)
    seen -= presence * (counts.generated > 0) + frequency * counts.generated
    penalized = logits.copy()
    penalized[counts.ids] = seen
    return penalized


def apply_bias(logits: np.ndarray, bias: Mapping[int, float]) -> np.ndarray:
    """Logits [V] with what is given for some tokens added; an id beyond the vocabulary is an OptionError."""
    if (largest := max(bias)) >= len(logits):
        raise OptionError(f"logit_bias names the token {largest}; the largest id is {len(logits) - 1}.")
    biased = logits.copy()
    biased[list(bias)] += np.fromiter(bias.values(), np.float32, len(bias))
    return biased


def apply_temperature(logits: np.ndarray, temperature: float) -> np.ndarray:
    """(logits - max) / temperature, [n]: taking the maximum off first keeps any temperature finite."""
    scaled = logits - logits.max()
    with np.errstate(over="ignore"):  # a low temperature sends the unlikely to -inf, as it should
        scaled /= np.clip(temperature, np.finfo(np.float32).tiny, np.finfo(np.float32).max).astype(np.float32)
    return scaled


def _relative_weights(logits: np.ndarray) -> np.ndarray:
    """exp(logits - max), float32 [n], in one new array: a temporary costs as much as the arithmetic."""
    weights = logits - logits.max()
    return np.exp(weights, out=weights)


def _kth_largest(values: np.ndarray, k: int) -> np.float32:
    """The k-th largest of values [n], 1 <= k <= n, without ordering the rest."""
    groups = len(values) // GROUP_SIZE
    if k <= groups // 4:
        # At least k values reach the k-th largest group maximum, and few others do.
        maxima = values[: groups * GROUP_SIZE].reshape(GROUP_SIZE, groups).max(axis=0)
        values = values[values >= np.partition(maxima, groups - k)[groups - k]]
    return np.partition(values, len(values) - k)[len(values) - k]


def top_k_positions(logits: np.ndarray, k: int) -> np.ndarray:
    """Positions, ascending, of the k largest of logits [n] and all equal to the k-th; none is -inf."""
    return np.flatnonzero(logits >= max(_kth_largest(logits, min(k, len(logits))), LOWEST))


def top_p_positions(logits: np.ndarray, p: float) -> np.ndarray:
    """Positions, ascending, of the fewest largest of logits [n] that hold p, and all equal to the least.

    Nucleus sampling (Holtzman et al. 2019, arXiv 1904.09751).
    """
    wanted = p * _relative_weights(logits).sum(dtype=np.float64)
    for count in (256, 4096, len(logits)):  # mostly the nucleus is small: sort no more than it needs
        head = logits if count >= len(logits) else logits[logits >= _kth_largest(logits, count)]
        head = np.sort(head)[::-1]
        mass = np.cumsum(_relative_weights(head), dtype=np.float64)
        if mass[-1] >= wanted:
            break
    last = min(int(np.searchsorted(mass, wanted)), len(mass) - 1)
    return np.flatnonzero(logits >= max(head[last], LOWEST))


def min_p_positions(logits: np.ndarray, p: float) -> np.ndarray:
    """Positions, ascending, of logits [n] at least p times as likely as the likeliest (arXiv 2407.01082)."""
    return np.flatnonzero(logits >= max(logits.max() + math.log(p), LOWEST))


def _draw_weighted(weights: np.ndarray, rng: np.random.Generator) -> int:
    """Position i of weights [n] with probability weights[i] / sum; never one of weight 0."""
    cumulative = np.cumsum(weights, dtype=np.float64)
    below = min(rng.random() * cumulative[-1], np.nextafter(cumulative[-1], 0))
    return int(np.searchsorted(cumulative, below, side="right"))


def draw(logits: np.ndarray, rng: np.random.Generator) -> int:
    """Position i of logits [n] with probability softmax(logits)[i]: first its group, then itself."""
    weights = _relative_weights(logits)
    starts = np.arange(0, len(weights), GROUP_SIZE)
    start = int(starts[_draw_weighted(np.add.reduceat(weights, starts, dtype=np.float64), rng)])
    return start + _draw_weighted(weights[start : start + GROUP_SIZE], rng)


@dataclass(frozen=True)
class Sampler:
    """The choice of a token as the options ask; it keeps nothing between calls."""

    options: GenerationOptions

    @property
    def takes_likeliest(self) -> bool:
        """Whether the choice is always the largest logit as the model gives it."""
        return self.options.temperature == 0 and not self._changes

    @property
    def candidates(self) -> int | None:
        """So many of the largest logits, and the equals of the least of them, are all that the choice is made of; None
        where it takes them all."""
        return None if self._changes or self.options.temperature == 0 else self.options.top_k

    @property
    def _changes(self) -> bool:
        """Whether logits of single tokens are changed before they are compared."""
        return self._penalizes or bool(self.options.logit_bias) or self.options.constraint is not None

    @property
    def _penalizes(self) -> bool:
        o = self.options
        return (o.repetition_penalty, o.presence_penalty, o.frequency_penalty) != (1, 0, 0)

    def choose(self, logits: np.ndarray, counts: TokenCounts, rng: np.random.Generator) -> int:
        """The next token's id from logits float32 [V], the row's tokens so far and its random stream.

        -inf excludes a token. ProviderError: a logit is NaN or +inf, or every token is excluded.
        """
        o = self.options
        if o.logit_bias:
            logits = apply_bias(logits, o.logit_bias)
        if self._penalizes:
            logits = penalize(logits, counts, o.repetition_penalty, o.presence_penalty, o.frequency_penalty)
        likeliest = int(logits.argmax())  # the first NaN, where there is one
        if not np.isfinite(logits[likeliest]):
            raise no_token(float(logits[likeliest]))
        if o.temperature == 0:
            return likeliest
        return self._draw(logits, None, rng)

    def choose_among(self, ids: np.ndarray, logits: np.ndarray, rng: np.random.Generator) -> int:
        """As `choose`, from ascending `ids` [n] and their logits [n], the largest of them finite, which have what
        `candidates` wants."""
        return self._draw(logits, ids, rng)

    def _draw(self, logits: np.ndarray, ids: np.ndarray | None, rng: np.random.Generator) -> int:
        """`ids` None stands for every id."""
        logits = apply_temperature(logits, self.options.temperature)
        for positions_to_keep in self._filters():
            kept = positions_to_keep(logits)
            ids = kept if ids is None else ids[kept]
            logits = logits[kept]
        drawn = draw(logits, rng)
        return drawn if ids is None else int(ids[drawn])

    def _filters(self) -> list[Callable[[np.ndarray], np.ndarray]]:
        o = self.options
        filters: list[Callable[[np.ndarray], np.ndarray]] = []
        if o.top_k is not None:
            filters.append(partial(top_k_positions, k=o.top_k))
        if o.top_p is not None and o.top_p < 1:
            filters.append(partial(top_p_positions, p=o.top_p))
        if o.min_p is not None and o.min_p > 0:
            filters.append(partial(min_p_positions, p=o.min_p))
        return filters


@dataclass(frozen=True)
class TokenLogprob:
    """Natural-log probability of a chosen token, and of the likeliest tokens, most likely first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def log_probabilities(logits: np.ndarray, chosen: int, top: int) -> TokenLogprob:
    """Log-probabilities under softmax(logits), logits float32 [V] as the model gave them.

    That is before penalties, temperature and filters: what the model thinks, not what the sampler was told
    to do. `top` is how many of the likeliest tokens to list, the chosen one among them if it is that
    likely; equals come in the order of their ids, and tokens of probability 0 are not listed.
    """
    log_total = float(logits.max()) + math.log(_relative_weights(logits).sum(dtype=np.float64))
    likeliest = top_k_positions(logits, top) if top else np.empty(0, np.int64)
    likeliest = likeliest[np.argsort(-logits[likeliest], kind="stable")][:top]
    return TokenLogprob(
        token_id=chosen,
        logprob=float(logits[chosen]) - log_total,
        top=tuple((int(token), float(logits[token]) - log_total) for token in likeliest),
    )


def rng_for(seed: int | None, sample: int = 0) -> np.random.Generator:
    """A row's own random stream.

    The row's place in a batch is no part of it: with a seed, each prompt of a batch draws what it draws
    alone. `sample` tells apart several continuations of one prompt, whose streams are independent. Without
    a seed every stream is new.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(sample,))))
