"""Chat templates: rendered exactly as `transformers` does (recorded in tests/data/chat), and no template, however
hostile, takes more than bounded time and memory or ends in anything but a typed error."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeshard.chat import ChatTemplates
from pipeshard.errors import FormatError, RequestError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
HI = [{"role": "user", "content": "hi"}]
DATA = Path(__file__).parent.parent / "data" / "chat"
CASES: dict[str, Any] = json.loads((DATA / "cases.json").read_text())
EXPECTED: dict[str, Any] = json.loads((DATA / "expected.json").read_text())["results"]


def templates(source: str, **named: str) -> ChatTemplates:
    return ChatTemplates({"default": source, **named}, "x.gguf", TOKENS)


def render(source: str, messages: list[dict[str, Any]] | None = None, **variables: object) -> str:
    return templates(source).render(HI if messages is None else messages, variables=variables)


# ---- as transformers does ----


@pytest.mark.parametrize("case", sorted(CASES))
@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*.jinja")))
def test_equals_transformers(name: str, case: str) -> None:
    chat = templates((DATA / f"{name}.jinja").read_text())
    variables = dict(CASES[case].get("variables", {}))
    prompt = variables.pop("add_generation_prompt", True)
    expected = EXPECTED[name][case]
    messages = CASES[case]["messages"]
    before = json.dumps(messages)
    if "text" in expected:
        text = chat.render(messages, add_generation_prompt=prompt, variables=variables)
        assert text == expected["text"]
    else:
        with pytest.raises(RequestError) as caught:
            chat.render(messages, add_generation_prompt=prompt, variables=variables)
        assert caught.value.argument == "messages"
        assert expected["error"] in str(caught.value)
    assert json.dumps(messages) == before


def test_a_recorded_result_exists_for_every_pair() -> None:
    assert {name: sorted(cases) for name, cases in EXPECTED.items()} == {
        path.stem: sorted(CASES) for path in DATA.glob("*.jinja")
    }
    assert sum("text" in r for cases in EXPECTED.values() for r in cases.values()) > 50


def test_variables() -> None:
    source = "{{ bos_token }}{{ eos_token }}{{ extra }}{{ tools is none }}{{ documents is none }}"
    assert render(source, extra="x") == "<s></s>xTrueTrue"
    assert render(source, bos_token="<other>", tools=[]) == "<other></s>FalseTrue"
    assert render("{{ add_generation_prompt }}") == "True"
    text = templates("{{ add_generation_prompt }}").render(HI, add_generation_prompt=False)
    assert text == "False"
    year = time.strftime("%Y")
    assert render("{{ strftime_now('%Y') }}") in (year, str(int(year) + 1))


def test_values_of_other_kinds_become_plain() -> None:
    messages = ({"role": np.str_("user"), "content": np.float64(1.5), "n": (np.int64(2), None)},)
    assert templates("{{ messages }}").render(messages) == str(
        [{"role": "user", "content": 1.5, "n": (2, None)}]
    )


def test_choice_of_template() -> None:
    chat = templates("plain", tool_use="tools", rag="rag")
    assert chat.render(HI) == "plain"
    assert chat.render(HI, variables={"tools": [{}]}) == "tools"
    assert chat.render(HI, chat_template="rag") == "rag"
    assert chat.render(HI, chat_template="{{ messages[0].content }}!") == "hi!"
    assert dict(chat.sources) == {"default": "plain", "tool_use": "tools", "rag": "rag"}
    metadata = {"tokenizer.chat_template.rag": b"r", "tokenizer.chat_templates": ["rag"]}
    named = ChatTemplates.from_metadata(metadata, "x.gguf", {})
    assert dict(named.sources) == {"rag": "r"}
    for empty in (named, ChatTemplates({}, "x.gguf", {})):
        with pytest.raises(RequestError, match="no chat template") as caught:
            empty.render(HI)
        assert caught.value.argument == "chat_template"


def test_wrong_arguments() -> None:
    chat = templates("x")
    for bad in (
        None,
        "hi",
        b"hi",
        5,
        {"role": "user"},
        [5],
        ["hi"],
        [None],
        [[]],
        [{"content": {1}}],
    ):
        with pytest.raises(TypeError):
            chat.render(bad)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        chat.render(HI, chat_template=5)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        chat.render(HI, add_generation_prompt=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        chat.render(HI, variables={"tools": [lambda x: x]})
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(RequestError) as caught:
        chat.render(HI, variables={"documents": endless})
    assert caught.value.argument == "documents"


def test_whose_fault_it_is() -> None:
    """The file's template, the caller's template, or the messages."""
    broken, runaway = "{% for %}", "{{ 'a' * 10**10 }}"
    for source in (broken, runaway):
        with pytest.raises(FormatError) as caught:
            render(source)
        assert (caught.value.field, caught.value.path) == ("tokenizer.chat_template", "x.gguf")
        with pytest.raises(FormatError) as caught:
            templates("x", rag=source).render(HI, chat_template="rag")
        assert caught.value.field == "tokenizer.chat_template.rag"
        with pytest.raises(RequestError) as theirs:
            templates("x").render(HI, chat_template=source)
        assert theirs.value.argument == "chat_template"
    for source in (
        "{{ raise_exception('no ' ~ 'way') }}",
        "{{ messages[0].a.b }}",
        "{{ 1 + 'a' }}",
    ):
        with pytest.raises(RequestError) as theirs:
            render(source)
        assert theirs.value.argument == "messages"
    with pytest.raises(RequestError, match="refuses these messages: no way"):
        render("{{ raise_exception('no ' ~ 'way') }}")
    with pytest.raises(FormatError) as caught:
        ChatTemplates.from_metadata({"tokenizer.chat_template": 5}, "x.gguf", {})
    assert caught.value.field == "tokenizer.chat_template"


# ---- bounded ----

_TWICE = (
    "{% set n = namespace(s=START) %}{% for i in range(99999) %}{% set n.s = STEP %}{% endfor %}"
)
_BIG = "{% set s = 'a' * 1000000 %}"
_LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}BODY{% endfor %}{% endfor %}"
_TUPLES = (
    "{% set n = namespace(s=('a',), t=('a',)) %}{% for i in range(18) %}"
    "{% set n.s = (n.s, n.s) %}{% set n.t = (n.t, n.t) %}{% endfor %}"
)


def twice(start: str, step: str) -> str:
    return _TWICE.replace("START", start).replace("STEP", step)


RUNAWAYS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "endless range": "{{ range(10**30) }}",
    "nested loops": _LOOP.replace("BODY", ""),
    "loops that take nothing": _LOOP.replace(") %}BODY", ") if false %}"),
    "string times": "{{ 'a' * 10**10 }}",
    "times string": "{{ 10000000000 * 'a' }}",
    "list times": "{% set x = [0] * 10**9 %}",
    "tuple times": "{% set x = (0, 1) * 10**9 %}",
    "doubled by ~": twice("'aaaa'", "n.s ~ n.s"),
    "doubled by +": twice("'aaaa'", "n.s + n.s"),
    "lists doubled": twice("[1]", "n.s + n.s"),
    "list of itself": twice("['a']", "[n.s, n.s]") + "{{ n.s }}",
    "dict of itself": twice("{'a': 1}", "{'a': n.s, 'b': n.s}") + "{{ n.s | tojson }}",
    "namespaces of each other": "".join(f"{{% set n{i} = namespace() %}}" for i in range(60))
    + "".join(f"{{% set n{i}.x = [n{i + 1}, n{i + 1}] %}}" for i in range(59))
    + "{{ n0 }}",
    "namespace in itself": "{% set a = namespace() %}{% set a.x = [a, a] %}{{ a }}",
    "tuples as keys": _TUPLES + _LOOP.replace("BODY", "{% set x = {}[n.s] %}"),
    "tuples in dicts": _TUPLES + _LOOP.replace("BODY", "{% set x = {n.s: 1} %}"),
    "tuples compared": _TUPLES + _LOOP.replace("BODY", "{% set x = n.s == n.t %}"),
    "tuples in a test": _TUPLES + _LOOP.replace("BODY", "{% set x = n.s is eq(n.t) %}"),
    "power": "{{ 2 ** (2**40) }}",
    "negative power": "{{ 2 ** -(10**10) }}",
    "squares": twice("3", "n.s * n.s"),
    "integers doubled": twice("1", "n.s + n.s"),
    "two calls each": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "deep recursion": "{% macro f(n) %}{{ f(n+1) }}{% endmacro %}{{ f(0) }}",
    "text of macros doubled": "{% macro f(n) %}{% if n %}{% set a %}{{ f(n-1) }}{% endset %}"
    "{{ a }}{{ a }}{% endif %}abcd{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "block in itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "percent width": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "percent precision": "{{ '%.1000000000f' % 1 }}",
    "percent key with brackets": "{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}",
    "percent many": "{% set f = '%(a)s' * 100000 %}{{ f % {'a': 'a' * 100000} }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format map": "{{ '{a:1000000000}'.format_map({'a': 1}) }}",
    "format many": "{% set f = '{0}' * 100000 %}{{ f.format('a' * 100000) }}",
    "format of markup": "{{ ('{:1000000000}' | safe).format(1) }}",
    "center": "{{ 'x'.center(10**10) }}",
    "center filter": "{{ 'x' | center(10000000000) }}",
    "center by name": "{{ ('x' | attr('center'))(10**10) }}",
    "center through map": "{{ ['x'] | map('center', 10**10) | list }}",
    "zfill": "{{ 'x'.zfill(10**10) }}",
    "tabs": "{{ ('\t' * 1000000).expandtabs(1000000) }}",
    "indent": "{{ ('a\n' * 100000) | indent(100000) }}",
    "indent by text": "{{ ('a\n' * 100000) | indent(width='a' * 100000) }}",
    "tojson indent": "{{ [[[1]]] | tojson(indent=10**10) }}",
    "tojson separators": "{{ ([1] * 100000) | tojson(separators=('a' * 100000, ':')) }}",
    "replace": _BIG + "{{ s.replace('a', s) }}",
    "replace filter": _BIG + "{{ s | replace('a', s) }}",
    "replace by keywords": _BIG + "{{ s | replace(old='a', new=s) }}",
    "replace nothing": _BIG + "{{ s.replace('', s) }}",
    "join": _BIG + "{{ s.join(s) }}",
    "join filter": _BIG + "{{ range(90000) | join(d=s) }}",
    "join a list of one text": _BIG + "{{ ([s] * 10000) | join }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "round": "{{ 1 | round(10**9, 'floor') }}",
    "sum of lists": "{{ ([[1]] * 100000) | sum(start=[]) }}",
    "sums": _LOOP.replace("BODY", "{{ range(99999) | sum }}"),
    "lists from streams": _LOOP.replace("BODY", "{% set x = range(99999) | map('abs') | list %}"),
    "sorts": _LOOP.replace("BODY", "{% set x = range(50000) | sort %}"),
    "searches": _BIG + _LOOP.replace("BODY", "{% if ('a' * 1000 ~ 'b') in s %}{% endif %}"),
    "slices": _BIG + _LOOP.replace("BODY", "{% set x = s[1:] %}"),
    "splits": "{% set s = 'ab ' * 300000 %}" + _LOOP.replace("BODY", "{% set x = s.split() %}"),
    "splits kept": "{% set s = 'ab ' * 300000 %}"
    + "".join(f"{{% set x{i} = s.split() %}}" for i in range(99)),
    "copies": "{% set d = dict.fromkeys(range(9000)) %}"
    + _LOOP.replace("BODY", "{% set x = d.copy() %}"),
    "upper of lists": "{% set x = [1] * 1000 %}" + _LOOP.replace("BODY", "{% set y = x | upper %}"),
    "text in a buffer": _BIG + "{% set b %}" + _LOOP.replace("BODY", "{{ s }}") + "{% endset %}",
    "own text in a buffer": "{% set b %}" + _LOOP.replace("BODY", "a" * 10000) + "{% endset %}",
    "text kept": twice("[]", "n.s + ['abcdefgh' ~ i * 100000]"),
    "truncate": "{{ ('a' * 1000) | truncate(5, end='b' * 9000000) }}",
    "date": "{{ strftime_now('%c' * 1000000) }}",
    "long output": _LOOP.replace("BODY", "abcdefgh"),
    "long source": "a" * 300000,
    "deep brackets": "{{ " + "(" * 50000 + "1" + ")" * 50000 + " }}",
    "long sum": "{{ 1" + "+1" * 50000 + " }}",
    "many elifs": "{% if 0 %}" + "{% elif 0 %}" * 10000 + "{% endif %}",
    "deep blocks": "{% for a in [1] %}" * 30 + "{% endfor %}" * 30,
    "long number": "{{ " + "9" * 100000 + " }}",
}
ESCAPES = {
    "class": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}",
    "by index": "{{ messages['__class__']['__base__'] }}",
    "by format": "{{ '{0.__class__.__base__}'.format(messages) }}",
    "by attr": "{{ (messages | attr('__class__')).__base__ }}",
    "by map": "{{ messages | map(attribute='__class__') | map(attribute='__base__') | list }}",
    "mutation": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({'a': 1}) }}",
    "namespace": "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "namespace of dict": "{{ namespace(**{'__class__': 1}) }}",
    "bytes": "{{ (1).to_bytes(10**10) }}",
    "encode": "{{ 'a'.encode() }}",
    "dict class": "{{ dict.__class__.__base__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
}


@pytest.mark.parametrize("name", sorted(RUNAWAYS))
def test_runaways_are_stopped(name: str) -> None:
    chat = templates(RUNAWAYS[name])
    start = time.perf_counter()
    with pytest.raises(FormatError) as caught:
        chat.render(HI)
    assert caught.value.field == "tokenizer.chat_template"
    assert time.perf_counter() - start < 30  # two or three seconds; a busy machine gets room
    assert render("{{ messages[0].content }}") == "hi"  # and the next render is as good as new


def test_runaways_take_little_memory() -> None:
    """The peak of a process that ran nothing else (getrusage would also count the parent's)."""
    script = """if True:
        import re, sys
        from pipeshard.chat import ChatTemplates
        from pipeshard.errors import FormatError
        for source in sys.argv[1:]:
            try:
                ChatTemplates({"default": source}, "x", {}).render([{"role": "user"}])
            except FormatError:
                print(re.search("VmHWM:\\s*([0-9]+)", open("/proc/self/status").read())[1])
    """
    sources = [RUNAWAYS[name] for name in ("text kept", "splits kept", "copies", "doubled by ~")]
    done = subprocess.run(
        [sys.executable, "-P", "-c", script, *sources], capture_output=True, text=True, check=True
    )
    peaks = [int(line) >> 10 for line in done.stdout.split()]
    assert len(peaks) == len(sources)
    assert max(peaks) < 500  # MiB


@pytest.mark.parametrize("name", sorted(ESCAPES))
def test_nothing_can_be_reached(name: str) -> None:
    with pytest.raises((FormatError, RequestError)):
        render(ESCAPES[name])


def test_long_conversations_are_no_runaways() -> None:
    messages = [
        {"role": "assistant" if i % 2 else "user", "content": f"turn {i} " * 50}
        for i in range(2001)
    ]
    for name in sorted(path.stem for path in DATA.glob("*.jinja")):
        text = templates((DATA / f"{name}.jinja").read_text()).render(messages)
        assert text.count("turn 2000") >= 50
    long = [{"role": "user", "content": "x" * 20_000_000}]
    assert len(render("{{ messages[0].content | trim }}!", long)) == 20_000_001


def test_threads_have_meters_of_their_own() -> None:
    busy = "{% for i in range(2000) %}{% if 'b' in 'a' ~ i %}{% endif %}{% endfor %}"
    chat = templates(busy + "{{ messages[0].content }}")
    found: list[str] = []

    def work(i: int) -> None:
        found.append(chat.render([{"role": "user", "content": str(i)}]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found, key=int) == [str(i) for i in range(20)]
