"""Text to token ids and back, from the vocabulary of a GGUF file alone, on the `tokenizers` library.

SentencePiece vocabularies (`llama`) are merged over whole texts with byte fallback, their merges derived from the
scores; byte-level BPE ones (`gpt2`) are cut into words by the pre-tokenizer that the file names. Special tokens are
found first. Results equal llama.cpp's.

Not here: running a model; how chat templates are rendered (chat.py).
Threads: a Tokenizer may be used by several threads at once; a StreamDecoder belongs to one.
"""

from __future__ import annotations

import codecs
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import Regex
from tokenizers import Tokenizer as _Merger
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, PreTokenizer, Split
from tokenizers.pre_tokenizers import Sequence as _Steps

from ._metadata import read_metadata
from ._special import SpecialMatcher
from ._vocab import BYTE, CONTROL, SPACE, UNKNOWN, USER_DEFINED, Vocab
from .chat import ChatTemplates
from .errors import FormatError, RequestError

__all__ = ["StreamDecoder", "Tokenizer"]


class Tokenizer:
    """The tokenizer of a GGUF file; the file may hold nothing but metadata."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._build(read_metadata(path), os.fspath(path))

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], path: str = "<metadata>") -> Tokenizer:
        """From a mapping as `read_metadata` returns it; `path` is for messages."""
        tokenizer = cls.__new__(cls)
        tokenizer._build(metadata, path)
        return tokenizer

    def _build(self, metadata: Mapping[str, Any], path: str) -> None:
        vocab = Vocab(metadata, path)
        self._vocab = vocab
        self._merger = _build_merger(vocab)
        special = vocab.special_ids()
        visible = [i for i in special if vocab.types[i] == USER_DEFINED]
        self._match_all = SpecialMatcher(
            [(vocab.tokens[i], i) for i in special], vocab.strips_right
        )
        self._match_visible = SpecialMatcher(
            [(vocab.tokens[i], i) for i in visible], vocab.strips_right
        )
        self._hidden = frozenset(i for i in special if vocab.types[i] != USER_DEFINED)
        names = {f"{role}_token": vocab.tokens[i] for role, i in vocab.roles.items()}
        self._chat = ChatTemplates.from_metadata(metadata, path, names)

    def __repr__(self) -> str:
        return f"<Tokenizer {self._vocab.kind}, {self.n_vocab} tokens, {self._vocab.path}>"

    # ---- what the vocabulary says ----

    @property
    def kind(self) -> str:
        """ "spm" or "bpe"."""
        return self._vocab.kind

    @property
    def n_vocab(self) -> int:
        return len(self._vocab.tokens)

    @property
    def bos_id(self) -> int | None:
        return self._vocab.roles.get("bos")

    @property
    def eos_id(self) -> int | None:
        return self._vocab.roles.get("eos")

    @property
    def unk_id(self) -> int | None:
        return self._vocab.roles.get("unk")

    @property
    def pad_id(self) -> int | None:
        return self._vocab.roles.get("pad")

    @property
    def eog_ids(self) -> frozenset[int]:
        """Tokens that end a generation: end of text, of turn, of message, however the model calls them."""
        return self._vocab.eog

    @property
    def add_bos(self) -> bool:
        return self._vocab.add_bos

    @property
    def add_eos(self) -> bool:
        return self._vocab.add_eos

    @property
    def special_tokens(self) -> dict[str, int]:
        """Text to id of all control, unknown and user-defined tokens."""
        return {self._vocab.tokens[i]: i for i in self._vocab.special_ids()}

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The file's chat templates by name; the unnamed one is "default"."""
        return self._chat.sources

    def token_id(self, text: str) -> int | None:
        """The id of the token with exactly this text in the vocabulary, or None."""
        return self._vocab.ids.get(text)

    def token_text(self, token: int) -> str:
        """The token as the vocabulary writes it."""
        return self._vocab.tokens[self._check_id(token)]

    def token_to_bytes(self, token: int) -> bytes:
        """The bytes that the token adds to a text; a special token's are its name."""
        return self._vocab.token_bytes(self._check_id(token))

    def token_to_piece(self, token: int) -> str:
        """The same as text; bytes that are no whole character show as U+FFFD."""
        return self.token_to_bytes(token).decode("utf-8", "replace")

    def is_eog(self, token: int) -> bool:
        return token in self._vocab.eog

    # ---- text to ids ----

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Ids of `text`. `add_special`: begin and end tokens where the model wants them. `parse_special`: control
        tokens written in the text count as such; user-defined tokens always do."""
        vocab = self._vocab
        self._check_text(text)
        ids: list[int] = []
        if add_special and vocab.add_bos:
            ids.append(vocab.roles["bos"])
        matcher = self._match_all if parse_special else self._match_visible
        after_special = True
        for part in matcher.split(text):
            if isinstance(part, int):
                ids.append(part)
                after_special = True
                continue
            if vocab.kind == "spm":
                if vocab.add_space_prefix and after_special:
                    part = " " + part
                part = part.replace(" ", SPACE)
            ids += self._merger.encode(part, add_special_tokens=False).ids
            after_special = False
        if add_special and vocab.add_eos:
            ids.append(vocab.roles["eos"])
        return ids

    def encode_chat(self, text: str) -> list[int]:
        """Ids of a rendered chat template: control tokens are parsed, and the begin token isn't doubled where the
        template already wrote it."""
        ids = self.encode(text, add_special=False)
        bos = self.bos_id
        if self.add_bos and bos is not None and ids[:1] != [bos]:
            ids.insert(0, bos)
        return ids

    @staticmethod
    def _check_text(text: str) -> None:
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"text has a lone surrogate at position {error.start}: it is not valid Unicode",
                argument="text",
            ) from None

    # ---- ids to text ----

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of `ids`; undoes encode(). Bytes that are no character become U+FFFD."""
        decoder = StreamDecoder(self, skip_special=skip_special)
        return decoder.push_all(ids) + decoder.flush()

    def _check_id(self, token: int) -> int:
        if isinstance(token, (bool, np.bool_)):
            raise TypeError("a token id must be an int, not bool")
        try:
            token = operator.index(token)
        except TypeError:
            raise TypeError(f"a token id must be an int, not {type(token).__name__}") from None
        if not 0 <= token < self.n_vocab:
            raise RequestError(
                f"token id {token} is outside the vocabulary of {self.n_vocab} tokens",
                argument="ids",
            )
        return token

    def _piece(self, token: int, skip_special: bool) -> bytes:
        token = self._check_id(token)
        return b"" if skip_special and token in self._hidden else self._vocab.token_bytes(token)

    # ---- chat ----

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        **variables: object,
    ) -> str:
        """The conversation as the model's own template writes it. `chat_template`: Jinja text, or the name of one of
        the file's templates; other keywords are the template's variables (`tools`, `enable_thinking`, ...)."""
        return self._chat.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            chat_template=chat_template,
            variables=variables,
        )


class StreamDecoder:
    """Text of tokens as they come: never half a character, and all pieces together equal decode() of all ids.

    `continuing`: the tokens go on behind a text, so that a leading space is theirs and stays.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, continuing: bool = False
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        # encode() puts a space before the first word of an SPM text; it is no part of the text.
        self._drop_space = tokenizer._vocab.add_space_prefix and not continuing

    def push(self, token: int) -> str:
        """The characters that `token` completes: often none, sometimes several."""
        return self._decode(self._tokenizer._piece(token, self._skip_special), final=False)

    def push_all(self, ids: Iterable[int]) -> str:
        piece, skip = self._tokenizer._piece, self._skip_special
        return self._decode(b"".join([piece(token, skip) for token in ids]), final=False)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for the beginnings of characters that never ended."""
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, final: bool) -> str:
        if self._drop_space and data:
            self._drop_space = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data, final)


# ---- the merging machine ----


def _build_merger(vocab: Vocab) -> _Merger:
    if vocab.kind == "spm":
        key, merges = "tokenizer.ggml.tokens", _derive_merges(vocab)
    else:
        key, merges = "tokenizer.ggml.merges", _read_merges(vocab)
    try:
        model = BPE(
            vocab.ids,
            merges,
            byte_fallback=vocab.kind == "spm",
            unk_token=vocab.tokens[vocab.roles["unk"]] if vocab.kind == "spm" else None,
            ignore_merges=bool(vocab.pre and vocab.pre.whole_words),
        )
    except Exception as error:
        raise _explain_merges(vocab, merges, key, error) from error
    merger = _Merger(model)
    if vocab.pre is not None:
        cuts: list[PreTokenizer] = [Split(Regex(p), "isolated") for p in vocab.pre.patterns]
        merger.pre_tokenizer = _Steps(
            [*cuts, ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)]
        )
    return merger


def _read_merges(vocab: Vocab) -> list[tuple[str, str]]:
    # A repeated merge keeps its first rank.
    merges = [_split_merge(vocab, text) for text in dict.fromkeys(vocab.merges)]
    return merges


def _split_merge(vocab: Vocab, text: str) -> tuple[str, str]:
    gap = text.find(" ", 1)
    if gap < 0:
        raise FormatError(
            f"{vocab.path}: tokenizer.ggml.merges: {text!r} does not name two tokens",
            path=vocab.path,
            field="tokenizer.ggml.merges",
        )
    return text[:gap], text[gap + 1 :]


def _derive_merges(vocab: Vocab) -> list[tuple[str, str]]:
    """An SPM file has no merges: every split of a token into two tokens is one, ranked by the token's score, highest
    first, then by the ids of the parts. Control and byte tokens are never the result of merging text."""
    ids, tokens, types = vocab.ids, vocab.tokens, vocab.types
    never = (CONTROL, UNKNOWN, BYTE)
    merges: list[tuple[str, str]] = []
    group: list[tuple[int, int]] = []  # the splits of all tokens with the score in hand
    score = float("nan")
    scores = vocab.scores.tolist()
    for i in np.argsort(-vocab.scores, kind="stable").tolist():
        text = tokens[i]
        if len(text) < 2 or types[i] in never:
            continue
        if scores[i] != score:
            group.sort()
            merges += [(tokens[left], tokens[right]) for left, right in group]
            group, score = [], scores[i]
        for cut in range(1, len(text)):
            left = ids.get(text[:cut])
            if left is not None:
                right = ids.get(text[cut:])
                if right is not None:
                    group.append((left, right))
    group.sort()
    merges += [(tokens[left], tokens[right]) for left, right in group]
    return merges


def _explain_merges(
    vocab: Vocab, merges: list[tuple[str, str]], key: str, error: Exception
) -> FormatError:
    for left, right in merges:
        for text in (left, right, left + right):
            if text not in vocab.ids:
                return FormatError(
                    f"{vocab.path}: {key}: {left!r} + {right!r} needs {text!r}, which is no token",
                    path=vocab.path,
                    field=key,
                )
    return FormatError(f"{vocab.path}: {key}: {error}", path=vocab.path, field=key)
