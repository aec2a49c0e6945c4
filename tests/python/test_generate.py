"""Generation over a decoder that plays back tokens: arguments, stop strings however the text is cut, finish reasons,
counts, and the dictionaries that llama-cpp-python's users know."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeshard import openai
from pipeshard._vocab import byte_alphabet
from pipeshard.errors import PipeshardError, RequestError
from pipeshard.generate import (
    Generation,
    Request,
    Sampled,
    SamplingParams,
    Source,
    StopFinder,
    make_request,
    prompt_ids,
)
from pipeshard.tokenizer import Tokenizer

PAIRS = ["th", "he", "in", "en", "d.", "\n\n", " a"]


def make_tokenizer() -> Tokenizer:
    """Byte-level, a few pairs of characters, and <|im_end|> for an end."""
    alphabet = byte_alphabet()
    pairs = [[alphabet[b] for b in pair.encode()] for pair in PAIRS]
    tokens = [*alphabet, *("".join(pair) for pair in pairs), "<|im_end|>"]
    return Tokenizer.from_metadata(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [" ".join(pair) for pair in pairs],
            "tokenizer.ggml.token_type": [1] * (len(tokens) - 1) + [3],
            "tokenizer.ggml.eos_token_id": len(tokens) - 1,
            "tokenizer.chat_template": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
            "{% if tools %}{{ tools | tojson }}{% endif %}{{ mood }}",
        }
    )


TOKENIZER = make_tokenizer()
END = TOKENIZER.eos_id
assert END is not None


class Script:
    """A decoder that says the given tokens and nothing after them."""

    def __init__(self, ids: Sequence[int], n_ctx: int = 1000) -> None:
        self.script = list(ids)
        self.n_ctx = n_ctx
        self.prompt: list[int] = []
        self.fed: list[int] = []
        self.params: SamplingParams | None = None

    def prefill(self, ids: Sequence[int], params: SamplingParams) -> Sampled:
        self.prompt, self.params, self.fed = list(ids), params, []
        return self.next()

    def decode(self, token: int) -> Sampled:
        self.fed.append(token)
        return self.next()

    def next(self) -> Sampled:
        assert len(self.prompt) + len(self.fed) <= self.n_ctx
        i = len(self.fed)
        token = self.script[i]
        assert self.params is not None
        if self.params.n_logprobs is None:
            return Sampled(token)
        top = [(token, -0.5), (7, -1.5)][: self.params.n_logprobs]
        return Sampled(token, -0.5 - i, tuple(top))


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special=False)


def source(text: str, *, end: bool = True, n_ctx: int = 1000) -> Source:
    return Source(Script(encode(text) + [END] * end, n_ctx), TOKENIZER, "toy")


def request(**options: Any) -> Request:
    return make_request(n_vocab=TOKENIZER.n_vocab, **options)


# ---- the loop ----


def test_text_and_counts() -> None:
    engine = source("the end.")
    run = Generation(engine, encode("once"), request())
    pieces = list(run)
    assert "".join(piece.text for piece in pieces) == "the end."
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["stop"]
    assert (run.finish_reason, run.n_prompt, run.n_gen) == ("stop", 4, len(encode("the end.")))
    script = engine.decoder
    assert isinstance(script, Script)
    assert script.prompt == encode("once")
    assert script.fed == encode("the end.")


def test_max_tokens() -> None:
    ids = encode("the end.")
    for count in range(len(ids) + 2):
        engine = source("the end.")
        run = Generation(engine, [1], request(max_tokens=count))
        text = "".join(piece.text for piece in run)
        assert text == TOKENIZER.decode(ids[:count])
        assert run.finish_reason == ("length" if count <= len(ids) else "stop")
        script = engine.decoder
        assert isinstance(script, Script)
        assert len(script.fed) == max(0, min(count - 1, len(ids)))  # never one token too many


def test_a_full_context_ends_with_length() -> None:
    for limit in (None, 1000):
        run = Generation(source("x" * 50, end=False, n_ctx=20), [1] * 15, request(max_tokens=limit))
        assert "".join(piece.text for piece in run) == "x" * 5
        assert (run.finish_reason, run.n_prompt + run.n_gen) == ("length", 20)


def test_prompts_that_do_not_fit() -> None:
    for n_prompt in (20, 21, 500):
        with pytest.raises(RequestError) as caught:
            Generation(source("x", n_ctx=20), [1] * n_prompt, request())
        assert caught.value.argument == "prompt"
        assert "20" in str(caught.value)
    with pytest.raises(RequestError) as caught:
        Generation(source("x"), [], request())
    assert caught.value.argument == "prompt"
    Generation(source("x", n_ctx=20), [1] * 19, request())


def test_pieces_are_whole_characters() -> None:
    text = "naïve 😀 北京 é"
    pieces = [piece.text for piece in Generation(source(text), [1], request())]
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)
    assert all(pieces[:-1])  # only the last may be empty
    cut = encode("😀")[:2]
    engine = Source(Script([*cut, END]), TOKENIZER, "toy")
    assert openai.generate(engine, "x") == "\ufffd"


def test_the_decoder_gets_what_was_asked_for() -> None:
    engine = source("a")
    options: dict[str, Any] = {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "seed": 9,
    }
    options |= {"repeat_penalty": 1.25, "presence_penalty": -1, "frequency_penalty": 2}
    openai.generate(engine, "x", logit_bias={"5": -100, 6: -math.inf}, **options)
    script = engine.decoder
    assert isinstance(script, Script)
    assert script.params == SamplingParams(**options, logit_bias={5: -100.0, 6: -math.inf})


def test_seeds() -> None:
    assert request(seed=5).sampling.seed == 5
    assert request(seed=(1 << 64) - 1).sampling.seed == (1 << 64) - 1
    assert len({request().sampling.seed for _ in range(10)}) == 10


# ---- stop strings ----


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The definition: the first stop string to be completed, from its beginning on."""
    for end in range(len(text) + 1):
        starts = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if starts:
            return text[: min(starts)]
    return text


def test_stop_finder_equals_the_definition() -> None:
    rng = random.Random(17)
    for _ in range(2000):
        text = "".join(rng.choices("ab ", k=rng.randrange(25)))
        stops = ["".join(rng.choices("ab ", k=rng.randint(1, 5))) for _ in range(rng.randint(0, 4))]
        finder = StopFinder(stops)
        found, rest, sent, held_most = False, text, "", 0
        while rest and not found:
            size = rng.randint(1, 4)
            piece, found = finder.push(rest[:size])
            rest, sent = rest[size:], sent + piece
            held_most = max(held_most, len(text) - len(rest) - len(sent) if not found else 0)
        if not found:
            sent += finder.flush()
        assert sent == cut_at(text, stops)
        assert held_most < max(map(len, stops), default=1)  # no more than could be one


@pytest.mark.parametrize(
    ("stops", "text"),
    [
        ("end", "the "),
        (["d."], "the en"),
        (["e end", "nd"], "th"),
        (["xyz", "end.!"], "the end."),
        ([" e"], "the"),
        (["the end."], ""),
        (("t",), ""),
        ([], "the end."),
        (None, "the end."),
        (["end", "end"], "the "),
    ],
)
def test_stop_strings(stops: Any, text: str) -> None:
    run = Generation(source("the end."), [1], request(stop=stops))
    assert "".join(piece.text for piece in run) == text
    assert run.finish_reason == "stop"


def test_stop_strings_across_characters_of_several_tokens() -> None:
    for stop in ("😀", "ï", "é 😀", "京"):
        text = "naïve é 😀 北京 x"
        assert openai.generate(source(text), "x", stop=stop) == text[: text.index(stop)]


def test_what_only_begins_like_a_stop_string_is_text() -> None:
    run = Generation(source("the end.", end=False), [1], request(stop="d.x", max_tokens=6))
    assert "".join(piece.text for piece in run) == TOKENIZER.decode(encode("the end.")[:6])
    assert run.finish_reason == "length"


def test_stopping_does_not_run_the_model_further() -> None:
    engine = source("aaaab" + "c" * 100)
    assert openai.generate(engine, "x", stop="b") == "aaaa"
    script = engine.decoder
    assert isinstance(script, Script)
    assert script.fed == encode("aaaa")


def test_long_stop_strings_cost_little() -> None:
    stops = ["a" * 5000 + chr(0x100 + i) for i in range(64)]
    finder = StopFinder(stops)
    sent = "".join(finder.push("a" * 100)[0] for _ in range(100))
    assert len(sent) == 5000
    assert len(finder.flush()) == 5000


# ---- arguments ----


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", -1),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", 10**400),
        ("top_k", -1),
        ("top_p", -0.1),
        ("top_p", 1.1),
        ("top_p", math.nan),
        ("min_p", 2),
        ("min_p", -1),
        ("repeat_penalty", 0),
        ("repeat_penalty", -1.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", math.nan),
        ("seed", -1),
        ("seed", 1 << 64),
        ("stop", ["x"] * 65),
        ("stop", [""]),
        ("stop", ""),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {10**6: 1.0}),
        ("logit_bias", {"1000000": 1.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
    ],
)
def test_values_out_of_bounds(name: str, value: object) -> None:
    with pytest.raises(RequestError) as caught:
        request(**{name: value})
    assert caught.value.argument == name
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", True),
        ("max_tokens", 1.0),
        ("max_tokens", "5"),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", np.True_),
        ("temperature", None),
        ("temperature", [1.0]),
        ("top_k", 1.5),
        ("top_k", None),
        ("top_p", b"1"),
        ("seed", 1.0),
        ("seed", "1"),
        ("stop", 5),
        ("stop", b"x"),
        ("stop", [b"x"]),
        ("stop", [None]),
        ("stop", {"x": 1}),
        ("logit_bias", [1]),
        ("logit_bias", {"a": 1.0}),
        ("logit_bias", {"\u0663": 1.0}),
        ("logit_bias", {1.0: 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {1: "x"}),
        ("temprature", 1.0),
    ],
)
def test_values_of_wrong_types(name: str, value: object) -> None:
    with pytest.raises(TypeError):
        request(**{name: value})


def test_values_that_are_fine() -> None:
    fine = request(max_tokens=np.int32(5), temperature=np.float32(0), top_k=0, top_p=1, min_p=0)
    assert (fine.max_tokens, fine.sampling.temperature, fine.sampling.top_k) == (5, 0.0, 0)
    assert request(top_k=1 << 70).sampling.top_k == TOKENIZER.n_vocab
    assert request(stop=["x"] * 64).stop == ("x",)
    assert replace(request(seed=1)) == request(seed=1)


def test_prompts() -> None:
    assert prompt_ids(TOKENIZER, "the") == encode("the")
    assert prompt_ids(TOKENIZER, np.array([1, 2])) == [1, 2]
    assert prompt_ids(TOKENIZER, (1, 2)) == [1, 2]
    for bad in (-1, TOKENIZER.n_vocab):
        with pytest.raises(RequestError) as caught:
            prompt_ids(TOKENIZER, [1, bad])
        assert caught.value.argument == "prompt"
    with pytest.raises(RequestError) as caught:
        prompt_ids(TOKENIZER, "\ud800")
    assert caught.value.argument == "prompt"
    for wrong in (None, 5, b"x", [True], [1.0], ["x"], {"x": 1}):
        with pytest.raises(TypeError):
            prompt_ids(TOKENIZER, wrong)  # type: ignore[arg-type]


# ---- OpenAI's dictionaries ----


def check_frame(answer: dict[str, Any], prefix: str, kind: str) -> None:
    assert answer["id"].startswith(prefix + "-")
    assert (answer["object"], answer["model"]) == (kind, "toy")
    assert isinstance(answer["created"], int)
    assert len(answer["choices"]) == 1
    assert answer["choices"][0]["index"] == 0


def test_completion() -> None:
    answer = openai.create_completion(source("the end."), "once")
    assert isinstance(answer, dict)
    check_frame(answer, "cmpl", "text_completion")
    n_gen = len(encode("the end."))
    assert answer["choices"][0] == {
        "text": "the end.",
        "index": 0,
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": n_gen,
        "total_tokens": 4 + n_gen,
    }
    assert list(answer) == ["id", "object", "created", "model", "choices", "usage"]


def test_completion_stream() -> None:
    chunks = list(openai.create_completion(source("the end."), "once", stream=True))
    assert len({chunk["id"] for chunk in chunks}) == 1
    for chunk in chunks:
        check_frame(chunk, "cmpl", "text_completion")
        assert "usage" not in chunk
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "the end."
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


def test_completion_echo() -> None:
    answer = openai.create_completion(source("!"), "once", echo=True)
    assert isinstance(answer, dict)
    assert answer["choices"][0]["text"] == "once!"
    chunks = list(openai.create_completion(source("!"), encode("once"), echo=True, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "once!"
    answer = openai.create_completion(source("!"), "once", echo=True, max_tokens=0)
    assert isinstance(answer, dict)
    assert answer["choices"][0]["text"] == "once"


def test_completion_logprobs() -> None:
    answer = openai.create_completion(source("the end."), "once", logprobs=2, stop="d.")
    assert isinstance(answer, dict)
    found = answer["choices"][0]["logprobs"]
    ids = encode("the en")
    assert found["tokens"] == [TOKENIZER.token_to_piece(i) for i in ids]
    assert found["token_logprobs"] == [-0.5 - i for i in range(len(ids))]
    assert found["text_offset"][0] == 4
    assert found["text_offset"] == [4 + len(TOKENIZER.decode(ids[:i])) for i in range(len(ids))]
    assert all(
        top[token] == -0.5
        for top, token in zip(found["top_logprobs"], found["tokens"], strict=True)
    )
    chunks = list(openai.create_completion(source("the end."), "once", logprobs=0, stream=True))
    tokens = [t for chunk in chunks for t in chunk["choices"][0]["logprobs"]["tokens"]]
    assert "".join(tokens) == "the end."


def test_chat_completion() -> None:
    engine = source("Hi!")
    messages = [{"role": "user", "content": "hello"}]
    answer = openai.create_chat_completion(engine, messages)
    assert isinstance(answer, dict)
    check_frame(answer, "chatcmpl", "chat.completion")
    assert answer["choices"][0] == {
        "index": 0,
        "message": {"role": "assistant", "content": "Hi!"},
        "logprobs": None,
        "finish_reason": "stop",
    }
    script = engine.decoder
    assert isinstance(script, Script)
    assert TOKENIZER.decode(script.prompt) == "[user]hello"
    assert answer["usage"]["prompt_tokens"] == len(script.prompt)


def test_chat_variables_reach_the_template() -> None:
    engine = source("x")
    messages = [{"role": "user", "content": "a"}]
    script = engine.decoder
    assert isinstance(script, Script)
    openai.create_chat_completion(
        engine, messages, tools=[{"name": "f"}], chat_template_kwargs={"mood": "gay"}
    )
    assert TOKENIZER.decode(script.prompt) == '[user]a[{"name": "f"}]gay'
    openai.create_chat_completion(engine, messages, chat_template="{{ messages[0].content }}?")
    assert TOKENIZER.decode(script.prompt) == "a?"


def test_chat_completion_stream() -> None:
    messages = [{"role": "user", "content": "hello"}]
    chunks = list(openai.create_chat_completion(source("Hi é!"), messages, stream=True))
    for chunk in chunks:
        check_frame(chunk, "chatcmpl", "chat.completion.chunk")
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant"}
    assert deltas[-1] == {}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == "Hi é!"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]


def test_chat_logprobs() -> None:
    messages = [{"role": "user", "content": "hello"}]
    answer = openai.create_chat_completion(
        source("é!"), messages, logprobs=True, top_logprobs=1, max_tokens=2
    )
    assert isinstance(answer, dict)
    content = answer["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9]]
    assert content[0]["logprob"] == -0.5
    assert content[0]["top_logprobs"][0]["bytes"] == [0xC3]
    assert answer["choices"][0]["finish_reason"] == "length"
    chunks = list(openai.create_chat_completion(source("é!"), messages, logprobs=True, stream=True))
    parts = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert sum(len(part["content"]) for part in parts if part) == 3


@pytest.mark.parametrize(
    ("options", "error", "argument"),
    [
        ({"stream": 1}, TypeError, None),
        ({"logprobs": 65}, RequestError, "logprobs"),
        ({"logprobs": -1}, RequestError, "logprobs"),
        ({"logprobs": True}, TypeError, None),
        ({"echo": "yes"}, TypeError, None),
        ({"max_tokens": -5}, RequestError, "max_tokens"),
        ({"suffix": "x"}, TypeError, None),
        ({"stop": ["x"] * 65}, RequestError, "stop"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_completion_arguments_fail_at_once(
    options: dict[str, Any], error: type[Exception], argument: str | None, stream: bool
) -> None:
    engine = source("x")
    with pytest.raises(error) as caught:
        openai.create_completion(engine, "once", **({"stream": stream} | options))
    assert getattr(caught.value, "argument", None) == argument
    assert isinstance(engine.decoder, Script)
    assert engine.decoder.prompt == []  # nothing ran


@pytest.mark.parametrize(
    ("options", "error", "argument"),
    [
        ({"messages": "hi"}, TypeError, None),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, RequestError, "messages"),
        ({"messages": [{"role": "user", "content": "x" * 2000}]}, RequestError, "prompt"),
        ({"logprobs": 1}, TypeError, None),
        ({"top_logprobs": 3}, RequestError, "top_logprobs"),
        ({"chat_template_kwargs": 5}, TypeError, None),
        ({"chat_template": "{% x %}"}, RequestError, "chat_template"),
        ({"temperature": -1}, RequestError, "temperature"),
        ({"n": 2}, TypeError, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_chat_arguments_fail_at_once(
    options: dict[str, Any], error: type[Exception], argument: str | None, stream: bool
) -> None:
    arguments = {"messages": [{"role": "user", "content": "hi"}], "stream": stream} | options
    with pytest.raises(error) as caught:
        openai.create_chat_completion(source("x"), **arguments)
    assert getattr(caught.value, "argument", None) == argument
    assert error is TypeError or isinstance(caught.value, PipeshardError)


def test_streams_of_text() -> None:
    pieces = list(openai.stream(source("the end."), "x", stop="d."))
    assert "".join(pieces) == "the en"
    assert len(pieces) > 1
    assert all(pieces)
    assert openai.generate(source("the end."), [1, 2], max_tokens=1) == "th"
    with pytest.raises(RequestError):
        openai.stream(source("x"), "x", max_tokens=-1)  # at once, not when it is read
