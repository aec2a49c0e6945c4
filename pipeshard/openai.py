"""Answers as dictionaries of OpenAI's shape, as users of llama-cpp-python know them.

Arguments are checked when a function is called, streams included; the model runs while a stream is read.
Tool calls stay text: `tools` reaches the template, and what the model writes is the message's content.

Not here: the loop itself (generate.py), HTTP. Threads: see generate.py.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .errors import RequestError
from .generate import (
    Generation,
    Piece,
    Source,
    Token,
    check_bool,
    check_int,
    make_request,
    prompt_ids,
)
from .tokenizer import Tokenizer

__all__ = ["create_chat_completion", "create_completion", "generate", "stream"]

Json = dict[str, Any]


def stream(source: Source, prompt: str | Sequence[int], **options: Any) -> Iterator[str]:
    """New text as it becomes final. `options` as make_request takes them."""
    run = _start(source, prompt_ids(source.tokenizer, prompt), options)
    return (piece.text for piece in run if piece.text)


def generate(source: Source, prompt: str | Sequence[int], **options: Any) -> str:
    """The whole new text."""
    return "".join(stream(source, prompt, **options))


def _start(source: Source, ids: Sequence[int], options: Mapping[str, Any]) -> Generation:
    request = make_request(n_vocab=source.tokenizer.n_vocab, **options)
    return Generation(source, ids, request)


# ---- completions ----


def create_completion(
    source: Source,
    prompt: str | Sequence[int] = "",
    *,
    stream: bool = False,
    echo: bool = False,
    logprobs: int | None = None,
    model: str | None = None,
    **options: Any,
) -> Json | Iterator[Json]:
    """`echo`: the prompt's text comes first. `logprobs`: how many alternatives are reported for each token."""
    check_bool("stream", stream)
    check_bool("echo", echo)
    if logprobs is not None:
        options["n_logprobs"] = check_int("logprobs", logprobs, 0)
    tokenizer = source.tokenizer
    ids = prompt_ids(tokenizer, prompt)
    run = _start(source, ids, options)
    text = prompt if isinstance(prompt, str) else tokenizer.decode(ids)
    frame = _frame("cmpl", "text_completion", model or source.name)
    lead = text if echo else ""
    chunks = _completion_chunks(run, tokenizer, frame, lead, len(text), logprobs is not None)
    return chunks if stream else _join_completion(list(chunks), run)


def _completion_chunks(
    run: Generation, tokenizer: Tokenizer, frame: Json, lead: str, offset: int, logprobs: bool
) -> Iterator[Json]:
    for piece in run:
        details = _completion_logprobs(piece.tokens, tokenizer, offset) if logprobs else None
        yield frame | {"choices": [_choice(piece, lead + piece.text, details)]}
        lead = ""


def _choice(piece: Piece, text: str, logprobs: Json | None) -> Json:
    return {
        "text": text,
        "index": 0,
        "logprobs": logprobs,
        "finish_reason": piece.finish_reason,
    }


def _completion_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer, offset: int) -> Json:
    spell = tokenizer.token_to_piece
    return {
        "tokens": [spell(token.id) for token in tokens],
        "text_offset": [offset + token.offset for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{spell(i): logprob for i, logprob in token.top} for token in tokens],
    }


def _join_completion(chunks: list[Json], run: Generation) -> Json:
    choices = [chunk["choices"][0] for chunk in chunks]
    whole = choices[-1] | {"text": "".join(choice["text"] for choice in choices)}
    if whole["logprobs"] is not None:
        whole["logprobs"] = {
            key: [item for choice in choices for item in choice["logprobs"][key]]
            for key in whole["logprobs"]
        }
    return chunks[-1] | {"choices": [whole], "usage": _usage(run)}


# ---- chat ----


def create_chat_completion(
    source: Source,
    messages: Sequence[Mapping[str, Any]],
    *,
    stream: bool = False,
    logprobs: bool = False,
    top_logprobs: int | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    model: str | None = None,
    **options: Any,
) -> Json | Iterator[Json]:
    """An answer to a conversation; `max_tokens` None: until the model ends it or the context is full."""
    check_bool("stream", stream)
    check_bool("logprobs", logprobs)
    if top_logprobs is not None:
        options["n_logprobs"] = check_int("top_logprobs", top_logprobs, 0)
        if not logprobs:
            raise RequestError("top_logprobs needs logprobs=True", argument="top_logprobs")
    elif logprobs:
        options["n_logprobs"] = 0
    tokenizer = source.tokenizer
    if chat_template_kwargs is not None and not isinstance(chat_template_kwargs, Mapping):
        raise TypeError("chat_template_kwargs must be a dict")
    extra = dict(chat_template_kwargs or {})
    text = tokenizer.apply_chat_template(
        messages, chat_template=chat_template, **({"tools": tools} | extra)
    )
    try:
        ids = tokenizer.encode_chat(text)
    except RequestError as error:
        raise RequestError(str(error), argument="messages") from None
    run = _start(source, ids, options | {"max_tokens": max_tokens})
    name = model or source.name
    if stream:
        frame = _frame("chatcmpl", "chat.completion.chunk", name)
        return _chat_chunks(run, tokenizer, frame, logprobs)
    frame = _frame("chatcmpl", "chat.completion", name)
    return _whole_chat(list(run), run, tokenizer, frame, logprobs)


def _chat_chunks(
    run: Generation, tokenizer: Tokenizer, frame: Json, logprobs: bool
) -> Iterator[Json]:
    def chunk(delta: Json, details: Json | None, reason: str | None) -> Json:
        choice = {"index": 0, "delta": delta, "logprobs": details, "finish_reason": reason}
        return frame | {"choices": [choice]}

    yield chunk({"role": "assistant"}, None, None)
    for piece in run:
        details = _chat_logprobs(piece.tokens, tokenizer) if logprobs else None
        if piece.text or piece.tokens:
            yield chunk({"content": piece.text}, details, None)
        if piece.finish_reason is not None:
            yield chunk({}, None, piece.finish_reason)


def _whole_chat(
    pieces: list[Piece], run: Generation, tokenizer: Tokenizer, frame: Json, logprobs: bool
) -> Json:
    tokens = [token for piece in pieces for token in piece.tokens]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "".join(piece.text for piece in pieces)},
        "logprobs": _chat_logprobs(tokens, tokenizer) if logprobs else None,
        "finish_reason": run.finish_reason,
    }
    return frame | {"choices": [choice], "usage": _usage(run)}


def _chat_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer) -> Json:
    def entry(token: int, logprob: float | None) -> Json:
        data = tokenizer.token_to_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}

    return {
        "content": [
            entry(token.id, token.logprob)
            | {"top_logprobs": [entry(i, logprob) for i, logprob in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


# ---- what all answers have ----


def _frame(prefix: str, kind: str, model: str) -> Json:
    return {
        "id": f"{prefix}-{uuid.uuid4()}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }


def _usage(run: Generation) -> Json:
    return {
        "prompt_tokens": run.n_prompt,
        "completion_tokens": run.n_gen,
        "total_tokens": run.n_prompt + run.n_gen,
    }
