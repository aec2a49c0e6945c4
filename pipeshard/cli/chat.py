"""`pipeshard chat`: a conversation, streamed, with a history and commands.

Not here: chat templates (chat.py of the package). Threads: none.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable
from typing import Any

from ..engine import Engine
from ..errors import RequestError
from .common import (
    add_engine_options,
    add_sampling_options,
    note,
    open_engine,
    sampling,
    summary,
    take_file,
)

__all__ = ["add_parser"]

# For models without a template of their own, which continue any text that looks like a conversation.
_PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ {'system': '', 'user': 'User: ', 'assistant': 'Assistant: '}[m.role] }}"
    "{{ m.content | trim }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}"
)
_PLAIN_STOP = "\nUser:"

_HELP = """\
/help            this
/reset           begin anew; the system message stays
/system TEXT     set the system message and begin anew; without TEXT: show it
/history         the conversation so far
/undo            take back the last question and its answer
/retry           answer the last question again
/stats           what the last answer took
/plan            where the model's parts are
/exit, /quit     leave, as Ctrl-D does; Ctrl-C ends an answer"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "chat",
        help="talk with a model",
        description="A conversation with a model. /help lists the commands inside.",
    )
    parser.add_argument("file", nargs="?", metavar="MODEL.gguf", help="the same as --model")
    add_engine_options(parser)
    add_sampling_options(parser, None)
    parser.add_argument("--system", default="", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--template", metavar="JINJA", help="instead of the model's own chat template"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    take_file(options)
    with open_engine(options) as engine:
        chat = Chat(engine, options)
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  line editing for input()
            note(f"{engine.model.name}; /help for commands, Ctrl-D to leave")
        return chat.loop()


class Chat:
    def __init__(self, engine: Engine, options: argparse.Namespace) -> None:
        self._engine = engine
        self._options = sampling(options)
        self._template: str | None = options.template
        if self._template is None and "default" not in engine.tokenizer.chat_templates:
            note("this model has no chat template; it continues a plain conversation instead")
            self._template = _PLAIN_TEMPLATE
            self._options["stop"] = [*self._options["stop"], _PLAIN_STOP]
        self._messages: list[dict[str, str]] = []
        self._system: str = options.system
        self._commands: dict[str, Callable[[str], bool]] = {
            "help": lambda _: self._show(_HELP),
            "reset": lambda _: self._reset(),
            "system": self._set_system,
            "history": lambda _: self._show(self._history()),
            "undo": lambda _: self._undo(),
            "retry": lambda _: self._retry(),
            "stats": lambda _: self._show(summary(engine)),
            "plan": lambda _: self._show(engine.plan.explain()),
            "exit": lambda _: False,
            "quit": lambda _: False,
        }
        self._reset()

    def loop(self) -> int:
        prompt = "> " if sys.stdin.isatty() else ""
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                if prompt:
                    print()
                return 0
            except KeyboardInterrupt:
                print()
                continue
            if line.startswith("/"):
                name, _, rest = line[1:].partition(" ")
                command = self._commands.get(name)
                if command is None:
                    note(f"there is no command /{name}; /help lists them")
                elif not command(rest.strip()):
                    return 0
            elif line:
                self._ask(line)

    # ---- commands: False ends the conversation ----

    def _show(self, text: str) -> bool:
        print(text, flush=True)
        return True

    def _reset(self) -> bool:
        self._messages = [{"role": "system", "content": self._system}] if self._system else []
        return True

    def _set_system(self, text: str) -> bool:
        if not text:
            return self._show(self._system or "there is no system message")
        self._system = text
        return self._reset()

    def _history(self) -> str:
        return "\n".join(f"{m['role']}: {m['content']}" for m in self._messages) or "nothing yet"

    def _undo(self) -> bool:
        while self._messages and self._messages[-1]["role"] != "system":
            if self._messages.pop()["role"] == "user":
                return True
        note("there is nothing to take back")
        return True

    def _retry(self) -> bool:
        question = next(
            (m["content"] for m in reversed(self._messages) if m["role"] == "user"), None
        )
        if question is None:
            note("there is no question yet")
        else:
            self._undo()
            self._ask(question)
        return True

    # ---- answers ----

    def _ask(self, question: str) -> None:
        self._messages.append({"role": "user", "content": question})
        answer = ""
        try:
            chunks: Any = self._engine.create_chat_completion(
                self._messages, stream=True, chat_template=self._template, **self._options
            )
            with contextlib.closing(chunks):
                for chunk in chunks:
                    choice = chunk["choices"][0]
                    piece = choice["delta"].get("content", "")
                    answer += piece
                    print(piece, end="", flush=True)
                    if choice["finish_reason"] == "length":
                        note("\n(cut off: the limit of tokens, or the end of the context)")
        except KeyboardInterrupt:
            note("\n(interrupted)")
        except RequestError as error:
            self._messages.pop()
            hint = "; /reset or /undo make room" if error.argument == "prompt" else ""
            note(f"{error}{hint}")
            return
        print(flush=True)
        self._messages.append({"role": "assistant", "content": answer.strip()})
