"""From a prompt to text, one token at a time: checked arguments, stop strings, finish reasons, counts.

The model itself is behind the two methods of `Decoder`. Arguments are checked when a `Generation` is made, before
anything runs; iterating over it runs the model and yields pieces of text that are final: what may yet turn out to be
part of a stop string is held back, half characters too.

Not here: the model, the arithmetic of sampling, OpenAI's dictionaries (openai.py).
Threads: a Generation belongs to one thread.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from .errors import RequestError
from .tokenizer import StreamDecoder, Tokenizer

__all__ = [
    "Decoder",
    "Generation",
    "Piece",
    "Request",
    "Sampled",
    "SamplingParams",
    "Source",
    "StopFinder",
    "Token",
    "make_request",
    "prompt_ids",
]

MAX_STOPS = 64
MAX_TOP_LOGPROBS = 64  # as the core's sampler has it
_MAX_FLOAT = 3.4e38  # what reaches the core is 32 bits wide

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen; names and meanings as in the core's sampler."""

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_last_n: int = 64
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int = 0
    n_logprobs: int | None = None  # None: no log-probabilities; 0: of the token alone


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What a caller wants of one generation, checked. `max_tokens` None: until the context is full."""

    sampling: SamplingParams
    max_tokens: int | None
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token as the decoder chose it; `top`: the most probable ones with their log-probabilities."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Decoder(Protocol):
    """What runs the model."""

    @property
    def n_ctx(self) -> int:
        """Tokens that fit, prompt and answer together."""

    def prefill(self, ids: Sequence[int], params: SamplingParams) -> Sampled:
        """A fresh sequence: runs the prompt and chooses the first token."""

    def decode(self, token: int) -> Sampled:
        """Appends `token`, the last one chosen, and chooses the next."""


@dataclass(frozen=True, slots=True)
class Source:
    """What a generation needs: the model, its vocabulary, and the name that answers carry."""

    decoder: Decoder
    tokenizer: Tokenizer
    name: str


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token and where its text begins in the answer, in characters."""

    id: int
    offset: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """New text (only the last piece may be without any), its tokens, and in the last piece why it is the last."""

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None


# ---- arguments ----


def make_request(
    *,
    n_vocab: int,
    max_tokens: int | None = 128,
    temperature: float = 0.8,
    top_k: int = 40,
    top_p: float = 0.95,
    min_p: float = 0.05,
    repeat_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    logit_bias: Mapping[int, float] | Mapping[str, float] | None = None,
    seed: int | None = None,
    stop: str | Sequence[str] | None = (),
    n_logprobs: int | None = None,
) -> Request:
    """Checks every argument. RequestError where a value is out of bounds, TypeError where it is of the wrong type.

    `max_tokens` None: until the context is full. `temperature` 0: greedy. `top_k` 0: no limit. `seed` None: another
    one each time. `logit_bias`: token id to what is added to its logit, minus infinity to forbid it."""
    if max_tokens is not None:
        max_tokens = check_int("max_tokens", max_tokens, 0)
    sampling = SamplingParams(
        temperature=check_number("temperature", temperature, low=0.0),
        top_k=min(check_int("top_k", top_k, 0), n_vocab),
        top_p=check_number("top_p", top_p, low=0.0, high=1.0),
        min_p=check_number("min_p", min_p, low=0.0, high=1.0),
        repeat_penalty=_check_positive("repeat_penalty", repeat_penalty),
        presence_penalty=check_number("presence_penalty", presence_penalty),
        frequency_penalty=check_number("frequency_penalty", frequency_penalty),
        logit_bias=_check_bias(logit_bias, n_vocab),
        seed=secrets.randbits(64) if seed is None else check_int("seed", seed, 0, (1 << 64) - 1),
        n_logprobs=None
        if n_logprobs is None
        else check_int("logprobs", n_logprobs, 0, MAX_TOP_LOGPROBS),
    )
    return Request(sampling=sampling, max_tokens=max_tokens, stop=_check_stop(stop))


def check_int(name: str, value: object, low: int, high: int | None = None) -> int:
    if isinstance(value, (bool, float)):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, not {type(value).__name__}") from None
    if number < low or (high is not None and number > high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise RequestError(f"{name} must be {bounds}, not {number}", argument=name)
    return number


def check_bool(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, not {type(value).__name__}")
    return value


def check_number(
    name: str, value: object, *, low: float | None = None, high: float | None = None
) -> float:
    if isinstance(value, (bool, np.bool_)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    at_least = -_MAX_FLOAT if low is None else low
    at_most = _MAX_FLOAT if high is None else high
    if not at_least <= number <= at_most:  # NaN too
        wanted = "finite" if low is None else f"at least {low:g}"
        if high is not None:
            wanted = f"between {at_least:g} and {high:g}"
        raise RequestError(f"{name} must be {wanted}, not {value}", argument=name)
    return number


def _check_positive(name: str, value: object) -> float:
    number = check_number(name, value, low=0.0)
    if number < 1e-30:
        raise RequestError(f"{name} must be above 0, not {value}", argument=name)
    return number


def _check_bias(
    bias: Mapping[int, float] | Mapping[str, float] | None, n_vocab: int
) -> dict[int, float]:
    if bias is None:
        return {}
    if not isinstance(bias, Mapping):
        raise TypeError(f"logit_bias must be a dict, not {type(bias).__name__}")
    checked: dict[int, float] = {}
    for key, value in bias.items():
        # JSON has only text for keys, and so have OpenAI's clients.
        is_number = isinstance(key, str) and key.isascii() and key.isdigit() and len(key) < 12
        token = check_int("logit_bias", int(key) if is_number else key, 0, n_vocab - 1)
        forbidden = isinstance(value, float) and value == -math.inf
        checked[token] = -math.inf if forbidden else check_number("logit_bias", value)
    return checked


def _check_stop(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    if stop is None:
        return ()
    if isinstance(stop, str):
        stop = (stop,)
    if isinstance(stop, (bytes, Mapping)) or not isinstance(stop, Iterable):
        raise TypeError(f"stop must be a str or a list of them, not {type(stop).__name__}")
    stops = tuple(stop)
    for text in stops:
        if not isinstance(text, str):
            raise TypeError(f"stop must hold strings, not {type(text).__name__}")
        if not text:
            raise RequestError("stop must not hold an empty string", argument="stop")
    if len(stops) > MAX_STOPS:
        raise RequestError(
            f"stop holds {len(stops)} strings; at most {MAX_STOPS} are allowed", argument="stop"
        )
    return tuple(dict.fromkeys(stops))


def prompt_ids(tokenizer: Tokenizer, prompt: str | Sequence[int]) -> list[int]:
    """A prompt as ids: text with the vocabulary's begin token, or ids as they are."""
    if isinstance(prompt, str):
        try:
            return tokenizer.encode(prompt)
        except RequestError as error:
            raise RequestError(str(error), argument="prompt") from None
    if isinstance(prompt, (bytes, bytearray, Mapping)) or not isinstance(prompt, Iterable):
        raise TypeError(f"prompt must be text or token ids, not {type(prompt).__name__}")
    return [check_int("prompt", token, 0, tokenizer.n_vocab - 1) for token in prompt]


# ---- stop strings ----


class StopFinder:
    """Finds the first stop string to be completed in a text that comes in pieces, however it is cut.

    One Knuth-Morris-Pratt state a stop string: how much of it the text now ends with. The largest of them is also
    what has to be held back, and a long stop string costs no more per character than a short one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._states = [0] * len(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What is now certain to be no part of a stop string, and whether one is complete: then that was all."""
        buffer = self._held + text
        for i, char in enumerate(text, len(self._held)):
            starts = self._step(i, char)
            if starts:
                return buffer[: min(starts)], True
        sure = len(buffer) - max(self._states, default=0)
        self._held = buffer[sure:]
        return buffer[:sure], False

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _step(self, i: int, char: str) -> list[int]:
        """Where the stop strings begin that `char`, at place i, completes."""
        starts = []
        for n, (stop, borders) in enumerate(self._stops):
            state = self._states[n]
            while state and stop[state] != char:
                state = borders[state - 1]
            if stop[state] == char:
                state += 1
            if state == len(stop):
                starts.append(i + 1 - state)
            self._states[n] = state
        return starts


def _borders(text: str) -> list[int]:
    """For each prefix the length of its longest proper border: where to go on after a mismatch."""
    borders = [0] * len(text)
    size = 0
    for i in range(1, len(text)):
        while size and text[i] != text[size]:
            size = borders[size - 1]
        if text[i] == text[size]:
            size += 1
        borders[i] = size
    return borders


# ---- the loop ----


class Generation:
    """One answer in the making. Iterate over it once; then its counts and `finish_reason` are final."""

    def __init__(self, source: Source, ids: Sequence[int], request: Request) -> None:
        """RequestError for a prompt that is empty or leaves no room."""
        n_ctx = source.decoder.n_ctx
        if not ids:
            raise RequestError(
                "the prompt is empty, and this vocabulary has no begin token to start from",
                argument="prompt",
            )
        if len(ids) >= n_ctx:
            raise RequestError(
                f"the prompt has {len(ids)} tokens and must be shorter than the context of {n_ctx}; "
                "shorten it or open the engine with a larger n_ctx",
                argument="prompt",
            )
        self.ids = list(ids)
        self.n_gen = 0  # tokens of the answer; one that only ends it does not count
        self.finish_reason: FinishReason | None = None
        room = n_ctx - len(self.ids)
        self._limit = room if request.max_tokens is None else min(request.max_tokens, room)
        self._source = source
        self._request = request
        self._text = StreamDecoder(source.tokenizer, continuing=True)
        self._stops = StopFinder(request.stop)
        self._n_decoded = 0  # characters so far, held back ones too
        self._n_sent = 0
        self._waiting: list[Token] = []

    @property
    def n_prompt(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Piece]:
        decoder, is_eog = self._source.decoder, self._source.tokenizer.is_eog
        last: int | None = None
        while self.n_gen < self._limit:
            sampled = (
                decoder.prefill(self.ids, self._request.sampling)
                if last is None
                else decoder.decode(last)
            )
            if is_eog(sampled.id):
                yield self._end("stop")
                return
            last = sampled.id
            self.n_gen += 1
            self._waiting.append(Token(sampled.id, self._n_decoded, sampled.logprob, sampled.top))
            text, stopped = self._push(self._text.push(sampled.id))
            if stopped:
                yield self._cut(text)
                return
            if text:
                yield self._piece(text)
        yield self._end("length")

    def _push(self, text: str) -> tuple[str, bool]:
        self._n_decoded += len(text)
        return self._stops.push(text)

    def _end(self, reason: FinishReason) -> Piece:
        """The model is done, or the room: what was held back is text after all."""
        text, stopped = self._push(self._text.flush())
        return self._cut(text) if stopped else self._piece(text + self._stops.flush(), reason)

    def _cut(self, text: str) -> Piece:
        """A stop string: it and the tokens that only made it are no part of the answer."""
        end = self._n_sent + len(text)
        self._waiting = [token for token in self._waiting if token.offset < end]
        return self._piece(text, "stop")

    def _piece(self, text: str, reason: FinishReason | None = None) -> Piece:
        tokens, self._waiting = tuple(self._waiting), []
        self.finish_reason = reason
        self._n_sent += len(text)
        return Piece(text, tokens, reason)
