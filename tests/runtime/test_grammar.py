"""Answers that keep to a grammar or a JSON schema, on random models, which would write noise; and what is refused."""

import itertools
import json
import re
import threading

import jsonschema
import llama_cpp.llama_grammar as shipped
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_shiftkv import Runtime, SettingError, ShiftKVError
from edge_shiftkv.grammar import MAX_DEPTH, Grammar, check_gbnf, gbnf_of_schema

PROMPT = "What is on the picture? " * 3
GREEDY, DRAWN, UNFILTERED = (
    {},
    {"temperature": 1.0, "seed": 5},
    {"temperature": 1.5, "seed": 2, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
)
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "kind": {"enum": ["cat", "dog"]},
        "legs": {"type": "integer"},
        "parts": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
        "code": {"type": "string", "pattern": "^[A-F]{2}-\\d{3}$".replace("\\d", "[0-9]")},
        "next": {"$ref": "#/$defs/end"},
    },
    "required": ["name", "kind", "legs", "parts", "code", "next"],
    "additionalProperties": False,
    "$defs": {"end": {"anyOf": [{"const": "none"}, {"type": "null"}]}},
}


def not_ascii(runtime):
    """Biases against all that is none: of bytes at random, llama.cpp takes some for characters that are not."""
    model = runtime.engine.model
    return {token: -float("inf") for token in range(model.n_vocab) if not model.piece(token).isascii()}


@pytest.mark.parametrize("options", [GREEDY, DRAWN, UNFILTERED])
@pytest.mark.parametrize("as_text", [False, True])
def test_json_of_a_schema(runtime, options, as_text):
    schema = json.dumps(PERSON) if as_text else PERSON
    answer = runtime.generate(PROMPT, json_schema=schema, max_tokens=400, logit_bias=not_ascii(runtime), **options)
    jsonschema.validate(json.loads(answer.text), PERSON)
    assert answer.finish_reason == "stop"
    assert runtime.generate(PROMPT, max_tokens=20, **options).text != answer.text[:20]


@pytest.mark.parametrize("options", [GREEDY, DRAWN, UNFILTERED])
@pytest.mark.parametrize(
    ("gbnf", "regex"),
    [
        ('root ::= "yes" | "no"', "yes|no"),
        ('root ::= [A-C]{3} ("-" digit+ ","){2}\ndigit ::= [0-3] # a comment', "[A-C]{3}(-[0-3]+,){2}"),
        ('root ::= "a" "b"? ("c" | "d" "e")\n', "ab?(c|de)"),
        ('root ::= "é" [à-ö] "😀" .', "é[à-ö]😀(.|\n)"),
        (r'root ::= "\"\\\x41" [^a-zA-Z\]\n\t -~]', r'"\\A[^ -~\n\t]'),
    ],
)
def test_text_of_a_grammar(runtime, gbnf, regex, options):
    answer = runtime.generate(PROMPT, grammar=gbnf, max_tokens=1000, **options)
    assert re.fullmatch(regex, answer.text)
    assert answer.finish_reason == "stop"


def test_text_in_json_has_no_raw_line_feeds(runtime):
    newline = runtime.engine.model.tokenize("\n")[0]
    bias = {**not_ascii(runtime), newline: 3.0}
    options = {"logit_bias": bias, "temperature": 2.0, "seed": 1, "max_tokens": 300}
    short = {"type": "object", "properties": {"a": {"type": "string", "maxLength": 30}}, "required": ["a"]}
    assert set(json.loads(runtime.generate(PROMPT, json_schema=short, **options).text)) == {"a"}
    long = runtime.generate(PROMPT, json_schema={"type": "string"}, **options).text
    assert "\n" not in long
    assert len(long) > 300


def test_a_schema_that_refers_to_itself(runtime):
    """As pydantic writes that of a tree: all of it is a reference to a definition, which has others."""
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}}}
    schema = {"$ref": "#/$defs/Node", "$defs": {"Node": {**node, "required": ["next"]}}}
    answer = runtime.generate(PROMPT, json_schema=schema, temperature=1.0, seed=1, max_tokens=900)
    jsonschema.validate(json.loads(answer.text), schema)


def test_an_answer_that_keeps_to_it_anyway_is_the_same(runtime):
    for options in (GREEDY, DRAWN, UNFILTERED):
        options = {**options, "logit_bias": not_ascii(runtime)}
        free = runtime.generate(PROMPT, max_tokens=12, **options)
        kept = runtime.generate(PROMPT, max_tokens=12, grammar="root ::= .*", **options)
        assert (kept.text, kept.finish_reason) == (free.text, "length")


def test_an_answer_that_max_tokens_ends_is_the_beginning_of_one(runtime):
    whole = runtime.generate(PROMPT, json_schema=PERSON, max_tokens=400)
    part = runtime.generate(PROMPT, json_schema=PERSON, max_tokens=12)
    assert part.finish_reason == "length"
    assert whole.text.startswith(part.text)


def test_on_a_cut_cache_and_in_a_session(runtime, tiny):
    runtime.kv_budget = 24
    answer = runtime.generate(PROMPT, [tiny.picture], json_schema=PERSON, max_tokens=400)
    jsonschema.validate(json.loads(answer.text), PERSON)
    with runtime.session(PROMPT) as session:
        assert session.ask("And?", grammar='root ::= "x"+ "y"', max_tokens=300, logit_bias={120: -1000.0}).text == "xy"
        assert session.reply("And?", grammar='root ::= "z"').text == "z"


def test_control_tokens_are_no_text_of_a_grammar(tiny):
    """llama.cpp takes their names for text, which the answer would lack."""
    with Runtime(tiny.text, n_threads=1) as runtime:
        model = runtime.engine.model
        token, _ = model.control_tokens["<|vision_end|>"]
        answer = runtime.generate(PROMPT, grammar='root ::= "<|vision_end|>"', logit_bias={token: 100.0})
        assert answer.text == "<|vision_end|>"


@pytest.mark.parametrize("options", [GREEDY, UNFILTERED])
def test_an_answer_that_cannot_go_on_says_so(runtime, options):
    token = runtime.engine.model.tokenize("a")[0]
    with pytest.raises(ShiftKVError, match="no token that the model may use keeps to the grammar"):
        runtime.generate(PROMPT, grammar='root ::= "a"', logit_bias={token: -float("inf")}, **options)
    assert runtime.generate(PROMPT, grammar='root ::= "a"', **options).text == "a"


@pytest.mark.parametrize(
    ("gbnf", "message"),
    [
        ("", "no rule root"),
        ("# nothing", "no rule root"),
        ('start ::= "a"', "no rule root"),
        ('root ::= "a', "line 1: not GBNF: '\"a'"),
        ('root ::= "a"\n\nb ::= [a', "line 3: not GBNF"),
        ('root ::= "\\q"', "line 1: not GBNF"),
        ('root := "a"', "line 1: a rule begins with its name"),
        ('"a"', "line 1: a rule begins with its name"),
        ('root ::= "a"\nb ::= nothing', "line 2: there is no rule 'nothing'"),
        ('root ::= ("a"', "line 1: a bracket is not closed"),
        ('root ::= ("a"\nb ::= "c")', "line 1: a bracket is not closed"),
        ('root ::= "a")', "a bracket is closed that was not opened"),
        ("root ::= *", r"there is nothing before \*"),
        ('root ::= root "a"', "the rule 'root' begins with itself"),
        ('root ::= a "x" | "y"\na ::= b\nb ::= c\nc ::= root?', "begins with itself"),
        # llama.cpp does not find these, and goes round until the memory is full.
        ('root ::= a root "x" | "y"\na ::= b\nb ::= | "q"', "begins with itself"),
        ('root ::= (("a"?)) root "x" | "y"', "begins with itself"),
        ('root ::= ""{2} root "x" | "y"', "begins with itself"),
        ("root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000, "more than 1000 brackets in each other"),
        (
            "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(9999)) + 'r9999 ::= "a"',
            "more than 2000 rules",
        ),
        ('root ::= "' + "a" * 300_000 + '"', "has 300011 characters"),
        ('root ::= "a"{3000}', "llama.cpp does not take the grammar"),
        ('root ::= "a" <think>', "rules for tokens are not supported"),
        ('root ::= "a" !<[5]>', "rules for tokens are not supported"),
        ('root ::= "a\0b"', "has a NUL"),
        (7, "has to be GBNF, which is text, not int"),
        (shipped.LlamaGrammar.from_string('root ::= "a"'), "not LlamaGrammar"),
    ],
    ids=itertools.count(),
)
def test_what_is_no_grammar(runtime, gbnf, message):
    with pytest.raises(SettingError, match=message):
        runtime.stream(PROMPT, grammar=gbnf)
    assert runtime.generate(PROMPT, grammar='root ::= "a"').text == "a"


def deep(n):
    schema = {"type": "null"}
    for _ in range(n):
        schema = {"type": "array", "items": schema}
    return schema


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "the JSON schema cannot be used: Expecting property name"),
        ("[]", "it has to be an object"),
        ("true", "it has to be an object"),
        (7, "json_schema has to be an object or JSON text, not int"),
        ({"type": "anything"}, "Unrecognized schema"),
        ({"type": "string", "pattern": "[a-z]"}, 'Pattern must start with "\\^"'),
        ({"type": "string", "pattern": "^}$"}, "the pattern has brackets without a partner"),  # would not end
        ({"type": "string", "pattern": "^a]$"}, "the pattern has brackets without a partner"),
        ({"type": "string", "pattern": "^a{9999}$"}, "the pattern repeats too much"),
        ({"type": "string", "pattern": "^((a{999}){999}){999}$"}, "the pattern repeats too much"),
        ({"type": "string", "pattern": "^*$"}, "IndexError"),
        ({"type": "string", "pattern": "^\\d$"}, "the JSON schema cannot be used: grammar, line"),
        ({"type": "array", "items": {"type": "string", "minLength": 10**10}}, "minLength is 10000000000"),
        ({"type": "array", "items": {"type": "null"}, "minItems": 1001}, "minItems is 1001; at most 1000"),
        ({"$ref": "https://example.org/schema.json"}, "Fetching remote schemas is not allowed"),
        ({"$ref": "#/$defs/none"}, "Error resolving ref"),
        (
            {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"enum": [1]}]}}},
            "begins with itself",
        ),
        ({"enum": [{1, 2}]}, "not JSON serializable"),
        ({"properties": {"a": True}}, "AttributeError"),
        (deep(5000), "too deep"),
        (json.dumps({"x": 1})[:-1] + ', "y": ' + "[" * 100_000 + "]" * 100_000 + "}", "too deep"),
        ({"enum": ["x" * 300_000]}, "at most 262144"),
    ],
    ids=itertools.count(),
)
def test_what_is_no_schema(runtime, schema, message):
    with pytest.raises(SettingError, match=message):
        runtime.stream(PROMPT, json_schema=schema)
    with pytest.raises(SettingError, match="pass one of them"):
        runtime.stream(PROMPT, json_schema={"enum": [1]}, grammar='root ::= "a"')
    assert runtime.generate(PROMPT, json_schema={"enum": [1]}).text.strip() == "1"


@pytest.mark.parametrize("n", [1000, 1001, 10**10])
def test_long_text_and_lists(runtime, n):
    """Limits that llama.cpp takes are kept to; others are left out."""
    for schema in (
        {"type": "string", "maxLength": n},
        {"type": "string", "minLength": 3, "maxLength": n},
        {"type": "array", "items": {"enum": [1]}, "maxItems": n},
        {"type": "object", "properties": {"maxLength": {"const": {"maxLength": n}}}, "required": ["maxLength"]},
    ):
        gbnf = gbnf_of_schema(schema)
        Grammar(runtime.engine.model, gbnf).close()
        assert (gbnf.count("(") > 990) == (n == 1000 and schema["type"] != "object")
    assert f'maxLength\\": {n}}}' in gbnf


def test_a_deep_schema_is_taken_as_far_as_threads_have_room(runtime):
    """Also a thread with the smallest stack that systems give."""
    before = threading.stack_size(512 << 10)
    found = []
    gbnf = "root ::= " + "(" * MAX_DEPTH + '"a"' + ")" * MAX_DEPTH

    def read():
        for text in (gbnf, gbnf_of_schema(deep(100))):
            check_gbnf(text)
            Grammar(runtime.engine.model, text).close()
            found.append(text)

    try:
        thread = threading.Thread(target=read)
        thread.start()
        thread.join()
    finally:
        threading.stack_size(before)
    assert len(found) == 2
    assert runtime.generate(PROMPT, json_schema=deep(20), max_tokens=400).text.replace(" ", "").startswith("[")


@pytest.mark.parametrize("name", [name for name in vars(shipped) if name.endswith("_GBNF")])
def test_grammars_that_llama_cpp_comes_with_are_taken(runtime, name):
    gbnf = getattr(shipped, name)
    check_gbnf(gbnf)
    Grammar(runtime.engine.model, gbnf).close()


ITEMS = st.tuples(
    st.sampled_from(["a", "b", "c", '"x"', '""', '("x" | )', "(a b)", "(b?)"]), st.sampled_from(["", "?", "{2}"])
)
WAYS = st.lists(st.lists(ITEMS, max_size=3), min_size=1, max_size=2)


def begins(rules):
    """By closure: which of the rules can be nothing, and which can begin with which."""
    empty = {'""'}

    def is_empty(item):
        text, repeat = item
        inside = {'("x" | )': True, "(b?)": True, "(a b)": {"a", "b"} <= empty}
        return repeat == "?" or inside.get(text, text in empty)

    for _ in rules:
        empty |= {name for name, ways in rules.items() if any(all(map(is_empty, way)) for way in ways)}
    starts = {name: set() for name in rules}
    for name, ways in rules.items():
        for way in ways:
            for item in way:
                inside = {"(a b)": ["a", *(["b"] if "a" in empty else [])], "(b?)": ["b"]}
                starts[name] |= set(inside.get(item[0], [item[0]] if item[0] in rules else []))
                if not is_empty(item):
                    break
    for _ in rules:
        for name in rules:
            starts[name] |= set().union(*(starts[other] for other in starts[name]))
    return starts


@settings(max_examples=300, deadline=None)
@given(rules=st.fixed_dictionaries(dict.fromkeys("abc", WAYS)))
def test_rules_that_begin_with_themselves_are_found(rules):
    text = "root ::= a\n"
    for name, ways in rules.items():
        text += f"{name} ::= {' | '.join(' '.join(map(''.join, way)) for way in ways)}\n"
    starts = begins(rules)
    if any(name in starts[name] for name in rules):
        with pytest.raises(SettingError, match="begins with itself"):
            check_gbnf(text)
    else:
        check_gbnf(text)
