"""The chat templates of a model file, rendered as the `transformers` library renders them.

A template is part of the file, so it runs in a sandbox and on a meter (_sandbox.py): one that does not compile or runs
away is a FormatError that names its key (a RequestError where the caller passed it); one that refuses the messages, or
trips over them, is a RequestError.

Not here: tokenising the result. Threads: may be used by several threads at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jinja2
import numpy as np
from jinja2.exceptions import SecurityError

from ._sandbox import (
    MAX_SOURCE_CHARS,
    RaisedByTemplate,
    RunawayTemplate,
    make_environment,
    render,
)
from ._vocab import Keys
from .errors import FormatError, RequestError

__all__ = ["ChatTemplates"]

_KEY = "tokenizer.chat_template"
_DEFAULT = "default"
# A message's thoughts go by several names; templates read the first or the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_CACHE_LIMIT = 16


class ChatTemplates:
    """The file's templates by name, compiled when first used."""

    def __init__(self, sources: Mapping[str, str], path: str, tokens: Mapping[str, str]) -> None:
        """`tokens`: what `bos_token` and its like stand for in the templates."""
        self.sources: Mapping[str, str] = MappingProxyType(dict(sources))
        self._path = path
        self._tokens = dict(tokens)
        self._environment: jinja2.Environment | None = None  # made when first needed
        self._compiled: dict[str, jinja2.Template] = {}

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], path: str, tokens: Mapping[str, str]
    ) -> ChatTemplates:
        keys = Keys(metadata, path)
        sources: dict[str, str] = {}
        for key in metadata:
            if key == _KEY or key.startswith(_KEY + "."):
                text = keys.text(key)
                if text:
                    sources[key[len(_KEY) + 1 :] or _DEFAULT] = text
        return cls(sources, path, tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        given = dict(variables or {})
        name, source = self._choose(chat_template, given.get("tools"))
        if not isinstance(add_generation_prompt, bool):
            raise TypeError("add_generation_prompt must be a bool")
        template = self._compile(name, source)
        context: dict[str, Any] = {
            **self._tokens,
            "tools": None,
            "documents": None,
            **{key: self._plain(key, value) for key, value in given.items()},
            "messages": self._plain_messages(messages),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return render(template, context)
        except (RunawayTemplate, SecurityError, RecursionError, MemoryError) as error:
            raise self._template_error(name, "it was stopped", error) from error
        except RaisedByTemplate as error:
            raise RequestError(
                f"the chat template refuses these messages: {error}", argument="messages"
            ) from error
        except Exception as error:
            raise RequestError(
                f"the chat template failed on these messages: {type(error).__name__}: {error}",
                argument="messages",
            ) from error

    def _choose(self, wanted: str | None, tools: object) -> tuple[str | None, str]:
        """Name (None for a text of the caller's) and source."""
        if wanted is not None:
            if not isinstance(wanted, str):
                raise TypeError(f"chat_template must be a str, not {type(wanted).__name__}")
            return (wanted, self.sources[wanted]) if wanted in self.sources else (None, wanted)
        name = "tool_use" if tools is not None and "tool_use" in self.sources else _DEFAULT
        if name not in self.sources:
            named = f"; it has {', '.join(sorted(self.sources))}" if self.sources else ""
            raise RequestError(
                f"{self._path} has no chat template of its own{named}; pass chat_template=",
                argument="chat_template",
            )
        return name, self.sources[name]

    def _compile(self, name: str | None, source: str) -> jinja2.Template:
        template = self._compiled.get(source)
        if template is None:
            try:
                if len(source) > MAX_SOURCE_CHARS:
                    raise RunawayTemplate(f"it is {len(source)} characters long")
                if self._environment is None:
                    self._environment = make_environment()
                template = self._environment.from_string(source)
            except Exception as error:  # Jinja, and Python's own compiler, have many
                raise self._template_error(name, "it does not compile", error) from error
            if len(self._compiled) >= _CACHE_LIMIT:
                self._compiled.clear()
            self._compiled[source] = template
        return template

    def _template_error(self, name: str | None, what: str, error: BaseException) -> Exception:
        reason = str(error) or type(error).__name__
        if isinstance(error, jinja2.TemplateSyntaxError):
            reason += f" (line {error.lineno})"
        if name is None:
            return RequestError(f"chat_template: {what}: {reason}", argument="chat_template")
        key = _KEY if name == _DEFAULT else f"{_KEY}.{name}"
        return FormatError(f"{self._path}: {key}: {what}: {reason}", path=self._path, field=key)

    def _plain_messages(self, messages: object) -> list[Any]:
        if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Iterable):
            raise TypeError(f"messages must be a list of dicts, not {type(messages).__name__}")
        plain = self._plain("messages", list(messages))
        for message in plain:
            if not isinstance(message, dict):
                raise TypeError("each message must be a dict with a role and a content")
        return [_with_reasoning(message) for message in plain]

    def _plain(self, name: str, value: Any) -> Any:
        """A copy in plain Python types: what a template can call methods of is then known, and nothing that it
        does reaches the caller's objects."""
        try:
            return _plain_value(value)
        except RecursionError:
            raise RequestError(f"{name} is nested too deeply", argument=name) from None


def _plain_value(value: Any) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, np.generic):
        return _plain_value(value.item())
    if isinstance(value, (str, int, float)):
        base = str if isinstance(value, str) else int if isinstance(value, int) else float
        return base(value)
    if isinstance(value, Mapping):
        return {_plain_value(key): _plain_value(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain_value(item) for item in value)
    if isinstance(value, list):
        return [_plain_value(item) for item in value]
    raise TypeError(
        f"a chat template takes text, numbers, lists and dicts, not {type(value).__name__}"
    )


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    thoughts = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if thoughts is None:
        return message
    return {"thinking": thoughts, **message, "reasoning_content": thoughts}
