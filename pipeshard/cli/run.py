"""`pipeshard run`: one prompt, streamed, and a line of what it took.

Threads: none.
"""

from __future__ import annotations

import argparse
import json
import sys

from ..engine import Engine
from ..errors import RequestError
from .common import (
    add_engine_options,
    add_sampling_options,
    add_trace_option,
    note,
    open_engine,
    plan_lines,
    sampling,
    save_trace,
    summary,
)

__all__ = ["add_parser"]


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "run",
        help="continue a prompt",
        description="Streams the text that a model puts behind a prompt, and ends with a line of what it took.",
        usage="pipeshard run [options] [MODEL.gguf] PROMPT",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="PROMPT",
        help="what to continue; a file before it is the model; - or nothing: stdin",
    )
    add_engine_options(parser)
    add_sampling_options(parser, 128)
    add_trace_option(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object in the end, no stream")
    parser.add_argument("-q", "--quiet", action="store_true", help="the text alone")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    if len(options.words) > 2 or (len(options.words) == 2 and options.model is not None):
        raise RequestError(
            "expected one prompt; quote it, or put the model before it", argument="PROMPT"
        )
    if len(options.words) == 2:
        options.model = options.words.pop(0)
    prompt = _read_prompt(options.words)
    with open_engine(options) as engine:
        if options.json:
            _print_json(engine, prompt, options)
            save_trace(engine, options.trace)
            return 0
        if not options.quiet:
            for line in plan_lines(engine):
                note(line)
        if sys.stdout.isatty() and not options.quiet:
            print(prompt, end="", flush=True)
        for piece in engine.stream(prompt, **sampling(options)):
            print(piece, end="", flush=True)
        print(flush=True)
        save_trace(engine, options.trace)
        if not options.quiet:
            print(summary(engine), flush=True)
    return 0


def _read_prompt(words: list[str]) -> str:
    if words and words[0] != "-":
        return words[0]
    if not words and sys.stdin.isatty():
        raise RequestError(
            'no prompt; for example: pipeshard run "Once upon a time"', argument="PROMPT"
        )
    return sys.stdin.read()


def _print_json(engine: Engine, prompt: str, options: argparse.Namespace) -> None:
    answer = engine.create_completion(prompt, **sampling(options))
    assert isinstance(answer, dict)
    choice = answer["choices"][0]
    print(
        json.dumps(
            {
                "text": choice["text"],
                "finish_reason": choice["finish_reason"],
                "model": engine.model.path,
                "device": engine.device_info,
                "stats": engine.stats,
            }
        )
    )
