"""Templates come with models: those of real ones are rendered as Jinja would, others do not hang or fill the memory."""

import re
import resource
import sys
import threading

import pytest
from llama_cpp.llama_chat_format import Jinja2ChatFormatter
from support.templates import real_templates

from edge_shiftkv.prompts import template
from edge_shiftkv.prompts.control import ControlTokens
from edge_shiftkv.prompts.template import MAX_SOURCE, Template, TemplateLimitError

MESSAGES = [
    {"role": "system", "content": "Rules: 100%."},
    {"role": "user", "content": ' Say "hello" to <b>them</b>\n'},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello, {them}!"},
    {"role": "user", "content": "x"},
]
CONVERSATIONS = [MESSAGES, MESSAGES[1:], MESSAGES[1:2], [{"role": "user", "content": [{"type": "text", "text": "x"}]}]]


def render(source, messages=MESSAGES):
    return Template(source, bos="<s>", eos="</s>").render(messages)


def outcome(function):
    try:
        return function()
    except TemplateLimitError:
        raise
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", real_templates())
def test_a_real_template(name):
    """The same as without limits; also with marks for every control token that a template may look for."""
    source = real_templates()[name]
    plain = Jinja2ChatFormatter(source, bos_token="<s>", eos_token="</s>")
    ours = Template(source, bos="<s>", eos="</s>")
    mark = "\ue000123\ue001"
    markers = re.findall(r"<[^<>\s'{}]{2,40}>|\[/?[A-Z_]{3,}\]", source)
    control = ControlTokens({marker: (i, 0) for i, marker in enumerate(["<think>", "</think>", *markers])})
    for messages in CONVERSATIONS:
        expected = outcome(lambda messages=messages: plain(messages=messages).prompt)
        assert outcome(lambda messages=messages: ours.render(messages)) == expected
        if isinstance(messages[0]["content"], str):
            marked = [{**message, "content": control.break_up(message["content"], mark)} for message in messages]
            found = outcome(lambda marked=marked: ours.render(marked, mark))
            assert (found.replace(mark, "") if isinstance(found, str) else found) == expected


def test_a_long_conversation():
    for name in ("Qwen3-Coder", "Qwen-Qwen3-0.6B", "google-gemma-4-31B-it", "Kimi-K2-Instruct"):
        messages = [*MESSAGES[:1], *MESSAGES[1:3] * 250, MESSAGES[3]]
        messages = [{**message, "content": message["content"] * 20} for message in messages]
        assert len(render(real_templates()[name], messages)) > 100_000


N = "{% set n = namespace(a='x', b='x', l=[1], m=[1]) %}"
DOUBLE = N + "{% for i in range(60) %}"
END = "{% endfor %}"
BIG = "{% set a = 'x' * 16000000 %}{% set b = 'x' * 16000000 %}{% for i in range(99999) %}"
LIMITED = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a filtered loop": "{% for a in range(99999) if a < 0 %}{% endfor %}" * 200,
    "a macro": "{% macro a() %}{{ a() }}{{ a() }}{% endmacro %}{{ a() }}",
    "macros": "{% macro a(n) %}{% if n %}{{ a(n - 1) }}{{ a(n - 1) }}{% endif %}{% endmacro %}{{ a(40) }}",
    "a recursive loop": "{% for a in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    "recursive loops": (
        "{% for a in range(2) recursive %}{% if loop.depth < 40 %}{{ loop(range(99999)) }}{% endif %}{% endfor %}"
    ),
    "much output": "{% set x = 'x' * 9999999 %}{% for i in range(9999) %}{{ x }}{% endfor %}",
    "a block": "{% set a %}{% for i in range(99999) %}{{ 'x' * 9999 }}{% endfor %}{% endset %}",
    "times": "{{ 'x' * 10**10 }}",
    "times, the other way": "{{ 10**10 * 'x' }}",
    "times, marked safe": "{{ ('x' | safe) * 10**10 }}",
    "a list, times": "{{ ([0] * 10**10) | length }}",
    "power": "{{ 10**1000000000 }}",
    "squares": "{% set n = namespace(a=9) %}{% for i in range(99) %}{% set n.a = n.a * n.a %}{% endfor %}",
    "join": "{{ range(99999) | join('x' * 99999) }}",
    "join of a filter": "{{ range(99999) | map('string') | join('x' * 99999) }}",
    "the method join": "{{ ('x' * 99999).join(['a'] * 99999) }}",
    "the method join of a filter": "{{ ('x' * 99999).join(range(99999) | map('string')) }}",
    "replace": "{{ ('x' * 99999) | replace('x', 'y' * 99999) }}",
    "replace nothing": "{{ ('x' * 99999).replace('', 'y' * 99999) }}",
    "map and replace": "{{ range(99999) | map('string') | map('replace', '9', 'x' * 9999) | join | length }}",
    "~": DOUBLE + "{% set n.a = n.a ~ n.a %}" + END,
    "+": DOUBLE + "{% set n.a = n.a + n.a %}" + END,
    "+ of lists": DOUBLE + "{% set n.l = n.l + n.l %}" + END,
    "doubled by join": DOUBLE + "{% set n.a = [n.a, n.a] | join %}" + END,
    "doubled by %": DOUBLE + "{% set n.a = '%s%s' % (n.a, n.a) %}" + END,
    "doubled by format": DOUBLE + "{% set n.a = '%s%s' | format(n.a, n.a) %}" + END,
    "doubled by the method format": DOUBLE + "{% set n.a = '{}{}'.format(n.a, n.a) %}" + END,
    "doubled by replace": DOUBLE + "{% set n.a = n.a.replace('x', 'xx') %}" + END,
    "doubled by a block": DOUBLE + "{% set b %}{{ n.a }}{{ n.a }}{% endset %}{% set n.a = b %}" + END,
    "lists in lists": DOUBLE + "{% set n.l = [n.l, n.l] %}" + END + "{{ n.l }}",
    "tuples in tuples": DOUBLE + "{% set n.l = (n.l, n.l) %}" + END + "{{ {n.l: 1} }}",
    "dicts in dicts": DOUBLE + "{% set n.l = dict(a=n.l, b=n.l) %}" + END + "{{ n.l | tojson }}",
    "lists that are compared": DOUBLE
    + "{% set n.l = [n.l, n.l] %}{% set n.m = [n.m, n.m] %}"
    + END
    + "{{ n.l == n.m }}",
    "a circle": N + "{% set n.l = [n, n] %}{{ n.l }}",
    "what namespaces hold": (
        "{% set a = namespace() %}{% set b = namespace() %}{% set l = [a, a] %}"
        "{% set a.x = [b] * 9999 %}{% set b.x = [1] * 9999 %}{{ l | string }}"
    ),
    "%d": "{{ '%1000000000d' % 1 }}",
    "%*d": "{{ '%*d' % (10**9, 1) }}",
    "%(a)d": "{{ '%(a)1000000000d' % {'a': 1} }}",
    "%f": "{{ '%.1000000000f' | format(1) }}",
    "{:}": "{{ '{:1000000000}'.format(1) }}",
    "{:{}}": "{{ '{:{}}'.format(1, 10**9) }}",
    "{0}": "{{ ('{0}' * 9999).format('x' * 99999) }}",
    "indent": "{{ ('a\n' * 99999) | indent(10**6) }}",
    "indent with text": "{{ ('a\n' * 99999) | indent('x' * 99999) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "tojson": "{{ [[[1]]] | tojson(indent=10**9) }}",
    "separators": "{{ (range(9999) | list) | tojson(separators=('x' * 99999, 'y' * 99999)) }}",
    "strftime": "{{ strftime_now('%c' * 99999) }}",
    "characters": "{{ ('é' * 16000000) | list | length }}",
    "sorted": "{{ ('ab' * 8000000) | sort }}",
    "split": "{{ ('a,' * 8000000).split(',') | length }}",
    "==": BIG + "{% if a == b %}{% endif %}" + END,
    "is eq": BIG + "{% if a is eq b %}{% endif %}" + END,
    "in": BIG + "{% if 'y' in a %}{% endif %}" + END,
    "[1:]": BIG + "{% set c = a[1:] %}" + END,
    "upper": BIG + "{% set c = a.upper() %}" + END,
    "the filter upper": BIG + "{% set c = a | upper %}" + END,
    "count": BIG + "{% set c = a.count('xy') %}" + END,
    "in a list": "{% set l = range(99999) | list %}{% for i in l %}{% if -1 in l %}{% endif %}{% endfor %}",
    "index": "{% set l = range(99999) | list %}{% for i in l %}{% set c = l.index(99998) %}{% endfor %}",
    "max": "{% for i in range(99999) %}{% set c = range(99999) | max %}{% endfor %}",
    "selectattr": "{% for i in range(99999) %}{% set c = messages | selectattr('a', 'eq', 1) | list %}{% endfor %}",
    "brackets": "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
    "lists": "{{ " + "[" * 9999 + "]" * 9999 + " }}",
    "not": "{{ " + "not " * 9999 + "1 }}",
    "blocks": "{% for a in [1] %}" * 999 + "{% endfor %}" * 999,
    "attributes": "{{ a" + ".b" * 9999 + " }}",
    "terms": "{{ 1" + "+1" * 9999 + " }}",
    "figures": "{{ " + "9" * 99999 + " }}",
    "a long source": "x" * (MAX_SOURCE + 1),
}


@pytest.fixture(scope="module")
def memory():
    """The most that this process has ever had, before these tests."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("name", LIMITED)
def test_a_template_that_would_not_end(name, memory, monkeypatch):
    monkeypatch.setattr(template, "MAX_STEPS", 400_000)  # which takes a tenth of the time
    with pytest.raises(TemplateLimitError):
        render(LIMITED[name])
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * unit < 1 << 30


@pytest.mark.parametrize(
    "source",
    [
        "{{ range(10**9) | join }}",
        "{{ 'x' | center(10**9) }}",
        "{{ 'x'.ljust(10**9) }}",
        "{{ 'x'.zfill(10**9) }}",
        "{{ '\t'.expandtabs(10**9) }}",
        "{{ 'a'.translate({97: 'x' * 9999}) }}",
        "{{ (1).to_bytes(10**10, 'big') }}",
        "{{ lipsum(10**9) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{% include 'x' %}",
    ],
)
def test_what_templates_cannot_do(source):
    with pytest.raises(Exception, match=r"Range too big|No filter|unsafe|undefined|no loader"):
        render(source)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (
            "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ '!' if loop.last }} {% endfor %}",
            "1/4 2/4 3/4 4/4! ",
        ),
        ("{% for a in [[1, [2]], [3]] recursive %}{{ loop(a) if a is iterable else a }}{% endfor %}", "123"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% else %}no{% endfor %}", "a1"),
        ("{% for x in [] %}{% else %}no{% endfor %}{% for x in [1, 2, 3] if x > 1 %}{{ x }}{% endfor %}", "no23"),
        ("{{ 'a' ~ 1 ~ none ~ [1, 'b'] }}", "a1None[1, 'b']"),
        ("{{ '%05.1f|%s' % (2.25, 'x') }}{{ '{:>5}|{a}'.format('x', a=2024) }}", "002.2|x    x|2024"),
        ("{{ 'In 2024: {}'.format(1) }}{{ '100% of %s' | replace('% o', 'o') }}", "In 2024: 1100of %s"),
        (
            "{{ [3, 1, 2] | sort | join(', ') }}{{ 2**10 }}{{ 7 // 2 }}{{ 'ab' * 2 }}{{ [1] + [2] }}",
            "1, 2, 310243abab[1, 2]",
        ),
        ("{{ [1, 2, 3][1:] }}{{ messages[::-1][0].content }}{{ 'abc'[::-1] }}", "[2, 3]xcba"),
        ("{{ {'b': [1, {'a': 'ä'}]} | tojson }}{{ [1] | tojson(indent=2) }}", '{"b": [1, {"a": "ä"}]}[\n  1\n]'),
        ("{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | length }}", "2"),
        ("{% macro m(a, b=2) %}{{ a }}{{ b }}{{ caller() if caller }}{% endmacro %}{{ m(1) }}", "12"),
        ("{% macro m(a) %}{{ a }}{{ caller() }}{% endmacro %}{% call m(3) %}c{% endcall %}", "3c"),
        ("{% set n = namespace(x=0) %}{% for m in messages %}{% set n.x = n.x + 1 %}{% endfor %}{{ n.x }}", "4"),
        (
            "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role[0] }}{% break %}{% endfor %}",
            "u",
        ),
        ("{{ 1 < 2 < 3 }}{{ 'a' in ['a', 'b'] }}{{ 'a' not in 'bc' }}{{ (1, 2) == (1, 2) }}", "TrueTrueTrueTrue"),
        ("{% generation %}a{% endgeneration %}{{ bos_token }}{{ eos_token }}{{ tools is none }}", "a<s></s>True"),
    ],
)
def test_what_templates_can_do(source, text):
    assert render(source) == text
    assert Jinja2ChatFormatter(source, bos_token="<s>", eos_token="</s>")(messages=MESSAGES).prompt == text


def test_threads_count_for_themselves():
    loops = Template("{% for i in range(9000) %}{% for j in range(90) %}{% endfor %}{% endfor %}x", bos="", eos="")
    found = []
    threads = [threading.Thread(target=lambda: found.append(loops.render(MESSAGES))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["x"] * 3


def test_every_rendering_counts_anew():
    loops = Template("{% for i in range(9999) %}{% for j in range(150) %}{% endfor %}{% endfor %}x", bos="", eos="")
    assert [loops.render(MESSAGES) for _ in range(3)] == ["x"] * 3
