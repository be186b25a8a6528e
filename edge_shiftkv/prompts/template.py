"""Chat templates come with models, from anyone: they run in Jinja's sandbox, and here within limits of work and size.

Nothing is timed or killed. Every round of a loop, call, filter, operation and output is counted before it is done, by
the size of what goes in; what could make more of that is measured first, or is not there. So no single step takes long,
and there are not many.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from edge_shiftkv.prompts.control import MarkedText

MAX_STEPS = 4_000_000
"""Of one rendering: a round of a loop or 64 characters of text are one, a call is eight. Takes a few seconds."""

MAX_TEXT = 16 << 20
"""Characters of any text in it."""

MAX_SOURCE = 1 << 17
"""Characters of a template; the longest that llama.cpp knows has 17,000."""

_MAX_DEPTH = 64  # of macros that call each other, and of lists in lists
_MAX_BITS = 4096  # of a number
_CALL = 8


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_METHODS: Mapping[type, frozenset[str]] = {
    str: _names(
        "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit isidentifier "
        "islower isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix "
        "replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
    ),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
    range: frozenset(),
    int: frozenset(),
    float: frozenset(("is_integer",)),
}
"""Those whose results are no larger than what goes in, but for the few that `call` measures."""

_FILTERS = _names(
    "abs attr batch capitalize count d default dictsort e escape first float format groupby indent int items join last "
    "length list lower map max min reject rejectattr replace reverse round safe select selectattr slice sort string "
    "title tojson trim truncate unique upper wordcount"
)
_NOT_WIDTHS = _names("d default int float map select reject selectattr rejectattr")
_WIDTHS_IN_TEXT = _names("indent tojson")  # these take text to indent with
_AT_ONCE = _names("attr count d default first last length")  # whatever they are given
_ABOUT_ITEMS = _names("batch list map reject rejectattr reverse select selectattr slice")  # not what is in them
_ABOUT_CHARACTERS = _names("batch groupby list map reverse slice sort unique")
_COMPARISONS = _names("!= < <= == > >= eq equalto ge greaterthan gt in le lessthan lt ne")
# Widths in figures, and those that are arguments; of `%` and of `format`.
_WIDE_PERCENT = re.compile(r"%(\([^)]*\))?[^a-zA-Z%]*(\d{4}|\*)")
_WIDE_BRACES = re.compile(r"\{[^{}]*(\d{4}|\{)")


class TemplateLimitError(jinja2.TemplateRuntimeError):
    """A template that takes more than it may."""


class Template:
    """A compiled chat template.

    source: in Jinja.
    bos, eos: the tokens that begin and end a text, as templates write them.

    Raises jinja2.TemplateError when it is no valid template.
    """

    def __init__(self, source: str, *, bos: str, eos: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateLimitError(f"it has {len(source)} characters; at most {MAX_SOURCE} are accepted")
        self._environment = _Environment()
        self._tokens = {"bos_token": bos, "eos_token": eos}
        self._environment.begin()
        try:
            tree: nodes.Template = _Metering().visit(self._environment.parse(source))
            tree.set_environment(self._environment)
            code = self._environment.compile(tree)
            self._template = jinja2.Template.from_code(
                self._environment, code, self._environment.make_globals(None), None
            )
        except jinja2.TemplateError:
            raise
        except Exception as error:  # Python's own limits on code
            raise TemplateLimitError(f"it cannot be compiled: {type(error).__name__}") from error

    def render(self, messages: Sequence[Mapping[str, Any]], mark: str = "", **variables: Any) -> str:
        """The prompt for these messages. Raises whatever the template does, and TemplateLimitError.

        mark: what `ControlTokens.break_up` put into them, for the template to look past.
        variables: more that the template may read, such as `tools`.
        """
        self._environment.begin(mark)
        prompt = self._template.render(
            **self._tokens,
            messages=messages,
            raise_exception=_raise_exception,
            strftime_now=_strftime_now,
            add_generation_prompt=True,
            # As transformers names what there is not.
            **{"functions": None, "function_call": None, "tools": None, "tool_choice": None, **variables},
        )
        return str(prompt)


class _Metering(NodeTransformer):
    """Puts calls of the environment's meters around what Jinja would do without asking it."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """What takes the place of a node."""
        self.generic_visit(node)
        if isinstance(node, nodes.For):
            node.iter = _call("rounds", node.iter)
        elif isinstance(node, nodes.Concat):
            return _call("joined", nodes.List(node.nodes, lineno=node.lineno))
        elif isinstance(node, nodes.Compare):
            node.expr = _weighed(node.expr)
            for operand in node.ops:
                operand.expr = _weighed(operand.expr)
        elif isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
            node.node = _call("measured", node.node)
        elif isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
            return _weighed(node)
        return node


def _call(name: str, argument: nodes.Node) -> nodes.Call:
    attribute = nodes.EnvironmentAttribute(name, lineno=argument.lineno)
    return nodes.Call(attribute, [argument], [], None, None, lineno=argument.lineno)


def _weighed(node: Any) -> Any:
    items = [pair.value for pair in node.items] if isinstance(node, nodes.Dict) else getattr(node, "items", [node])
    return node if all(isinstance(item, nodes.Const) for item in items) else _call("weighed", node)


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, set up as transformers has it, with a meter."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Jinja2ChatFormatter.IgnoreGenerationTags, "jinja2.ext.loopcontrols"],
            finalize=self._output,
            optimized=False,  # which would run filters ahead
        )
        self._meter = threading.local()
        self.filters["tojson"] = Jinja2ChatFormatter.tojson
        self.filters = {
            name: self._metered(name, function) for name, function in self.filters.items() if name in _FILTERS
        }
        self.tests = {
            name: self._metered(name, test) if name in _COMPARISONS else test for name, test in self.tests.items()
        }
        del self.globals["lipsum"]

    def begin(self, mark: str = "") -> None:
        """Start counting for the calling thread."""
        self._meter.mark = mark
        self._meter.left = MAX_STEPS
        self._meter.depth = 0

    # What `_Metering` calls.

    def rounds(self, items: Iterable[Any]) -> Iterator[Any]:
        """The items, each counted."""
        for item in items:
            self._spend(1)
            yield item

    def weighed(self, value: Any) -> Any:
        """The value, counted as it would be written out."""
        self._weigh(value)
        return value

    def measured(self, value: Any) -> Any:
        """The value, counted by its length."""
        self._measured(value)
        return value

    def joined(self, values: Sequence[Any]) -> str:
        """What `~` gives."""
        return self.concat([str(self.weighed(value)) for value in values])

    # What Jinja calls.

    def concat(self, pieces: Iterable[str]) -> str:
        """The pieces as one text, if it is not too long."""
        kept = []
        length = 0
        for piece in pieces:
            length += len(piece)
            self._fits(length)
            self._spend(1 + len(piece) // 64)
            kept.append(str(piece))
        return self._marked("".join(kept))  # type: ignore[no-any-return]

    def _output(self, value: Any) -> Any:
        return self.weighed(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._spend(_CALL)
        if isinstance(left, int | float) and isinstance(right, int | float):
            if isinstance(left, int) and isinstance(right, int):
                bits = left.bit_length() * (abs(right) if operator == "**" else 1)
                if max(bits, right.bit_length()) > _MAX_BITS:
                    raise TemplateLimitError("a number is too large")
        elif operator == "*":
            size, times = (left, right) if isinstance(right, int) else (right, left)
            if isinstance(size, str | list | tuple) and isinstance(times, int):
                self._fits(len(size) * times)
                self._spend(len(size) * max(0, times) // (64 if isinstance(size, str) else 1))
        elif operator == "%" and isinstance(left, str):
            self._check_format(_WIDE_PERCENT, left, right)
        elif isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self._fits(len(left) + len(right))
            self._spend((len(left) + len(right)) // (64 if isinstance(left, str) else 1))
        return self._marked(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as Jinja's
        self = __self
        self._spend(_CALL)
        if isinstance(__obj, LoopContext) and args:
            args = (self.rounds(args[0]), *args[1:])
        elif not isinstance(__obj, Macro) and getattr(__obj, "__self__", None) is not self:
            args = tuple(self._listed(value) for value in args)
            self._weigh([*args, *kwargs.values()])
            self._measure(__obj, args)
        self._meter.depth += 1
        try:
            if self._meter.depth > _MAX_DEPTH:
                raise TemplateLimitError(f"its macros call each other more than {_MAX_DEPTH} deep")
            return self._marked(super().call(__context, __obj, *args, **kwargs))
        finally:
            self._meter.depth -= 1

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for kind, methods in _METHODS.items():
            if isinstance(obj, kind):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def _measure(self, function: Any, arguments: Sequence[Any]) -> None:
        """Count what a method will do to its text or list."""
        name = getattr(function, "__name__", "")
        text = getattr(getattr(function, "__wrapped__", function), "__self__", None)
        if isinstance(text, list | tuple):
            self._weigh(text)
        if not isinstance(text, str):
            return
        self._spend(len(text) // (4 if "split" in name else 64))
        if name == "replace" and len(arguments) > 1:
            self._check_replace(text, arguments[0], arguments[1])
        elif name == "join" and arguments:
            self._fits(self._weigh(arguments[0]) * len(text))
        elif name == "format":
            self._check_format(_WIDE_BRACES, text, arguments)

    def _metered(self, name: str, function: Any) -> Callable[..., Any]:
        """A filter or a test that counts what goes in."""
        n_passed = 1 if hasattr(function, "jinja_pass_arg") else 0

        @functools.wraps(function)  # also what Jinja is to pass it
        def metered(*arguments: Any, **options: Any) -> Any:
            self._spend(_CALL)
            passed, rest = arguments[:n_passed], [*arguments[n_passed:]]
            if name in _AT_ONCE:
                return function(*passed, *rest, **options)
            rest = [self._listed(value) for value in rest]
            options = {key: self._listed(value) for key, value in options.items()}
            weight = self._measured(rest[0]) if rest and name in _ABOUT_ITEMS else self._weigh(rest[:1])
            others = [*rest[1:], *options.values()]
            self._weigh(others)
            if rest and isinstance(rest[0], str) and name in _ABOUT_CHARACTERS:
                self._spend(len(rest[0]))
            if name not in _NOT_WIDTHS:
                for other in others:
                    if isinstance(other, int):
                        self._fits(64 * weight * abs(other))
                    elif name in _WIDTHS_IN_TEXT:
                        self._fits(64 * weight * 64 * self._weigh(other))
            if name == "replace" and len(rest) > 2:
                self._check_replace(str(rest[0]), rest[1], rest[2])
                if isinstance(rest[0], MarkedText):  # of which the filter would take the bare text
                    return rest[0].replace(str(rest[1]), str(rest[2]), *(n for n in others[2:] if n is not None))
            elif name == "join":
                separator = rest[1] if len(rest) > 1 else options.get("d", "")
                self._fits(weight * len(str(separator)))
            elif name == "format" and rest:
                self._check_format(_WIDE_PERCENT, str(rest[0]), rest[1:])
            return self._marked(function(*passed, *rest, **options))

        return metered

    def _check_replace(self, text: str, old: Any, new: Any) -> None:
        times = text.count(str(old)) if str(old) else len(text) + 1
        self._fits(len(text) + times * len(str(new)))
        self._spend(times * len(str(new)) // 64)

    def _check_format(self, wide: re.Pattern[str], pattern: str, values: Any) -> None:
        if wide.search(pattern):
            raise TemplateLimitError("a format is too wide")
        fields = pattern.count("%") + pattern.count("{") + 1
        self._fits(len(pattern) + 64 * fields * self._weigh(values))

    def _marked(self, value: Any) -> Any:
        """A text that has marks as one that is searched without them."""
        mark = self._meter.mark
        if not mark or not isinstance(value, str) or isinstance(value, MarkedText) or mark not in value:
            return value
        return MarkedText(value, mark)

    def _fits(self, length: int) -> None:
        if length > MAX_TEXT:
            raise TemplateLimitError(f"a text is longer than {MAX_TEXT >> 20} million characters")

    def _spend(self, steps: int) -> None:
        self._meter.left -= steps
        if self._meter.left < 0:
            raise TemplateLimitError(f"it takes more than {MAX_STEPS // 1_000_000} million steps")

    def _listed(self, value: Any) -> Any:
        """What an iterator gives, counted; other values as they are."""
        return list(self.rounds(value)) if isinstance(value, Iterator) else value

    def _measured(self, value: Any) -> int:
        """Count a value by its length only, and return that."""
        length = len(value) if isinstance(value, Sized) else 1
        self._spend(length // 64)
        return 1 + length

    def _weigh(self, value: Any, depth: int = 0) -> int:
        """Count a value as written out; return how much it was."""
        if depth > _MAX_DEPTH:
            raise TemplateLimitError(f"lists are more than {_MAX_DEPTH} deep in each other")
        before = self._meter.left
        if isinstance(value, str):
            self._fits(len(value))
            self._spend(2 + len(value) // 64)
            return 2 + len(value) // 64
        self._spend(4)
        inside: Iterable[Any] = ()
        if isinstance(value, Mapping):
            inside = (part for item in value.items() for part in item)
        elif isinstance(value, Namespace):
            inside = getattr(value, "_Namespace__attrs").values()  # noqa: B009 - which Python would mangle
        elif isinstance(value, list | tuple | set | frozenset | type({}.items()) | type({}.keys()) | type({}.values())):
            inside = value
        elif isinstance(value, range):
            self._spend(len(value))
        for part in inside:
            self._weigh(part, depth + 1)
        return int(before - self._meter.left)


def _raise_exception(message: str) -> None:
    raise ValueError(str(message)[:500])


def _strftime_now(pattern: str) -> str:
    if len(pattern) > 100:
        raise TemplateLimitError("a format is too wide")
    return Jinja2ChatFormatter.strftime_now(pattern)
