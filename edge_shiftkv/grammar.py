"""What an answer has to keep to: GBNF, llama.cpp's grammars, or a JSON schema made into one.

llama.cpp reads grammars with calls that call each other as deep as brackets are nested, and rules in their own
beginnings have it go round without end. Either ends the process, so `check_gbnf` comes first; it also says what is
wrong, which llama.cpp only prints.
"""

from __future__ import annotations

import ctypes
import json
import math
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any

import edge_shiftkv.native  # noqa: F401 - first: it says what to do where there is no library

# isort: split
import llama_cpp.llama_cpp as llama
import numpy as np
import numpy.typing as npt
from llama_cpp.llama_grammar import json_schema_to_gbnf

from edge_shiftkv.errors import SettingError, ShiftKVError
from edge_shiftkv.native import logs
from edge_shiftkv.native.calls import Handle, native_call
from edge_shiftkv.native.llama import Model

MAX_GBNF = 1 << 18
"""Characters of a grammar."""

MAX_DEPTH = 1000
"""Brackets in brackets; and half of the rules that may begin with each other."""

MAX_REPEATED = 1000
"""Repetitions of one thing in a JSON schema; llama.cpp takes no more."""

_ESCAPE = r"\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|[trn\\\"\[\]-])"
_TOKENS = re.compile(
    rf"""(?P<space>(?:[ \t\r\n]|\#[^\r\n]*)+)
    | (?P<rule>[a-zA-Z0-9-]+)[ \t]*::=
    | (?P<name>[a-zA-Z0-9-]+)
    | (?P<characters>"(?:{_ESCAPE}|[^"\\])*"|\[(?:{_ESCAPE}|[^\]\\])*\]|\.)
    | (?P<open>\() | (?P<close>\)) | (?P<or>\|)
    | (?P<repeat>[*+?]|\{{[ \t]*[0-9]+[ \t]*(?:,[ \t]*[0-9]*[ \t]*)?\}})
    | (?P<token>!?<)""",
    re.VERBOSE,
)


_PATTERN = re.compile(r"(?:\\.|\[(?:\\.|[^\]\\])*\]|\{[^{}]*\}|[^\[\]{}\\])*", re.DOTALL)
# What the converter takes for a character in text; JSON has no control characters there.
_ANY_LETTER = re.compile(r'^char ::= \[\^"\\\\', re.MULTILINE)
_VALUES = ("const", "enum", "default", "examples")  # which are no schemas

_Item = tuple[str | None, bool]
"""A rule's name, or None for characters; and whether it may be left out."""

_Rules = dict[str, list[list[_Item]]]
"""The ways to write each rule. Groups are rules, too, with names that no rule has."""


def gbnf_of_schema(schema: Mapping[str, Any] | str) -> str:
    """The grammar for JSON of a schema, which may be JSON text itself, by llama-cpp-python's converter.

    It knows types, properties, required ones, arrays, enums, constants, references within the schema, lengths, patterns
    from ^ to $ (without classes such as \\d), dates, times and UUIDs. It leaves out what it does not know, as ranges of
    numbers, lengths above MAX_REPEATED, and additional properties unless the schema names them.

    Raises SettingError for a schema that it cannot convert.
    """
    if not isinstance(schema, Mapping | str):
        raise SettingError(f"json_schema has to be an object or JSON text, not {type(schema).__name__}")
    try:
        text = schema if isinstance(schema, str) else json.dumps(schema)
        if len(text) > MAX_GBNF:
            raise ValueError(f"it has {len(text)} characters; at most {MAX_GBNF} are accepted")
        read = json.loads(text)
        if not isinstance(read, dict):
            raise ValueError("it has to be an object")
        _limit_repetitions(read)
        if "$ref" in read:  # beside one, the converter does not look for others
            read = {**read, "anyOf": [{"$ref": read["$ref"]}]}
            del read["$ref"]
        gbnf = _ANY_LETTER.sub(r"\g<0>\\x00-\\x1F\\x7F", json_schema_to_gbnf(json.dumps(read)))
        check_gbnf(gbnf)
    except RecursionError as error:
        raise SettingError("the JSON schema is too deep, or has too many properties or items") from error
    except Exception as error:  # the converter raises whatever it stumbles over
        reason = str(error) if isinstance(error, ValueError | AssertionError) else f"{type(error).__name__}: {error}"
        raise SettingError(f"the JSON schema cannot be used: {reason}"[:1000]) from error
    return gbnf


def _limit_repetitions(schema: Any) -> None:
    """Take limits out that are too high. Raise ValueError for what the converter would write out for too long."""
    if isinstance(schema, dict):
        for low, high in (("minItems", "maxItems"), ("minLength", "maxLength")):
            least, most = schema.get(low), schema.get(high)
            if isinstance(least, int) and least > MAX_REPEATED:
                raise ValueError(f"{low} is {least}; at most {MAX_REPEATED} is accepted")
            if isinstance(most, int) and most > MAX_REPEATED:
                del schema[high]
        pattern = schema.get("pattern")
        if isinstance(pattern, str):
            if not _PATTERN.fullmatch(pattern):
                raise ValueError(f"the pattern has brackets without a partner: {pattern!r}")
            numbers = [int(n[:9]) for n in re.findall(r"[0-9]+", " ".join(re.findall(r"\{[^{}]*\}", pattern)))]
            if math.prod(max(n, 1) for n in numbers) > 100 * MAX_REPEATED or max(numbers, default=0) > MAX_REPEATED:
                raise ValueError(f"the pattern repeats too much: {pattern!r}")
        for name, value in schema.items():
            if name not in _VALUES:
                _limit_repetitions(value)
    elif isinstance(schema, list):
        for value in schema:
            _limit_repetitions(value)


def check_gbnf(text: str) -> None:
    """Raise SettingError for what is no grammar, or one that llama.cpp cannot work with.

    Rules for tokens, such as ``<think>``, are refused: llama.cpp ends the process where one follows characters.
    """
    if not isinstance(text, str):
        raise SettingError(f"grammar has to be GBNF, which is text, not {type(text).__name__}")
    if len(text) > MAX_GBNF:
        raise SettingError(f"the grammar has {len(text)} characters; at most {MAX_GBNF} are accepted")
    if "\0" in text:
        raise SettingError("the grammar has a NUL character in it")
    rules = _rules(text)
    if "root" not in rules:
        raise SettingError("the grammar has no rule root, which answers keep to, as in: root ::= [0-9]+")
    _check_beginnings(rules)


def _rules(text: str) -> _Rules:
    rules: _Rules = {}
    used: dict[str, int] = {}
    groups: list[tuple[str, int]] = []  # that are open: the rule around each, and its line
    name = ""
    for kind, token, line in _tokens(text):
        if not name and kind != "rule":
            raise _wrong(line, "a rule begins with its name and ::=")
        if kind == "rule":
            if groups:
                raise _wrong(groups[-1][1], "a bracket is not closed")
            name = token
            rules[name] = [[]]
        elif kind == "name":
            used.setdefault(token, line)
            rules[name][-1].append((token, False))
        elif kind == "characters":
            rules[name][-1].append((None, token == '""'))
        elif kind == "or":
            rules[name].append([])
        elif kind == "open":
            groups.append((name, line))
            if len(groups) > MAX_DEPTH:
                raise _wrong(line, f"more than {MAX_DEPTH} brackets in each other")
            name = f"({len(rules)}"
            rules[name] = [[]]
        elif kind == "close":
            if not groups:
                raise _wrong(line, "a bracket is closed that was not opened")
            group, (name, _) = name, groups.pop()
            rules[name][-1].append((group, False))
        elif kind == "repeat":
            items = rules[name][-1]
            if not items:
                raise _wrong(line, f"there is nothing before {token}")
            if token in "*?" or re.match(r"\{\s*0+\s*[,}]", token):
                items[-1] = (items[-1][0], True)
    if groups:
        raise _wrong(groups[-1][1], "a bracket is not closed")
    for rule, line in used.items():
        if rule not in rules:
            raise _wrong(line, f"there is no rule {rule!r}")
    return rules


def _tokens(text: str) -> Iterator[tuple[str, str, int]]:
    """What a grammar is made of: its kind, the text, and the line."""
    at, line = 0, 1
    while at < len(text):
        match = _TOKENS.match(text, at)
        kind = (match and match.lastgroup) or ""
        if not match or not kind:
            raise _wrong(line, f"not GBNF: {text[at : at + 40]!r}")
        if kind == "token":
            raise _wrong(line, f"rules for tokens are not supported: {text[at : at + 40]!r}")
        if kind != "space":
            yield kind, match[kind], line
        line += match[0].count("\n")
        at = match.end()


def _wrong(line: int, what: str) -> SettingError:
    return SettingError(f"grammar, line {line}: {what}")


def _empty(rules: _Rules) -> set[str]:
    """The rules that may be nothing at all."""
    holders: dict[str, list[tuple[str, int]]] = {name: [] for name in rules}
    missing: dict[tuple[str, int], int] = {}  # items of a way that have to be something, as far as is known
    for name, ways in rules.items():
        for i, way in enumerate(ways):
            needed = [rule for rule, optional in way if not optional]
            if None not in needed:
                missing[name, i] = len(needed)
                for rule in needed:
                    holders[rule or ""].append((name, i))
    todo = [name for (name, _), n in missing.items() if n == 0]
    result = set(todo)
    while todo:
        for at in holders[todo.pop()]:
            missing[at] -= 1
            if missing[at] == 0 and at[0] not in result:
                result.add(at[0])
                todo.append(at[0])
    return result


def _check_beginnings(rules: _Rules) -> None:
    """Raise SettingError for a rule that begins with itself, or with too many others in each other."""
    empty = _empty(rules)
    begins: dict[str, set[str]] = {name: set() for name in rules}
    for name, ways in rules.items():
        for way in ways:
            for rule, optional in way:
                if rule is not None:
                    begins[name].add(rule)
                if not optional and rule not in empty:
                    break
    try:
        order = list(TopologicalSorter(begins).static_order())
    except CycleError as error:
        cycle = [name for name in error.args[1] if not name.startswith("(")] or ["?"]
        raise SettingError(f"grammar: the rule {cycle[0]!r} begins with itself, which llama.cpp cannot read") from error
    depths: dict[str, int] = {}
    for name in order:
        depths[name] = 1 + max((depths[rule] for rule in begins[name]), default=0)
    if max(depths.values()) > 2 * MAX_DEPTH:
        raise SettingError(f"the grammar has more than {2 * MAX_DEPTH} rules that begin with each other")


class Grammar(Handle):
    """Where an answer is in a grammar: llama.cpp's sampler for it, a `llama_sampler *`.

    gbnf: checked with `check_gbnf`.

    Raises SettingError where llama.cpp does not take it.
    """

    def __init__(self, model: Model, gbnf: str) -> None:
        with native_call() as errors:
            pointer = llama.llama_sampler_init_grammar(model.vocab, gbnf.encode(errors="replace"), b"root")
        super().__init__("grammar", pointer, llama.llama_sampler_free)
        if not pointer:
            raise SettingError(f"llama.cpp does not take the grammar{logs.explain(errors)}")
        # Their names are text for the grammar, but not in the answer.
        hidden = (token for token, _ in model.control_tokens.values() if not model.ends_generation(token))
        self._hidden = np.array([token for token in hidden if not model.piece(token)], np.int64)

    def allows(self, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which of some tokens, [n], the answer can go on with: [n]."""
        data = np.zeros(len(tokens), [("id", np.int32), ("logit", np.float32), ("p", np.float32)])
        data["id"] = tokens
        array: Any = llama.llama_token_data_array()
        array.data = ctypes.cast(data.ctypes.data, llama.llama_token_data_p)
        array.size, array.selected, array.sorted = len(data), -1, False
        with native_call():
            llama.llama_sampler_apply(self.pointer, ctypes.byref(array))
        allowed: npt.NDArray[np.bool_] = (data["logit"] == 0) & ~np.isin(tokens, self._hidden)
        return allowed

    def accept(self, token: int) -> None:
        """Go on after a token. Raises ShiftKVError for one that is not allowed, which would end the process."""
        if not self.allows(np.array([token]))[0]:
            raise ShiftKVError(f"the grammar does not allow token {token}")
        with native_call():
            llama.llama_sampler_accept(self.pointer, token)
