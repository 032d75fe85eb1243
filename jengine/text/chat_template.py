"""Chat templates: the Jinja dialect that Hugging Face models ship, rendered byte for byte as
transformers does.

Templates come with models, so they run sandboxed, and a rendering is bounded: so many loop turns
and calls, so much text. The bounds stop accidents and the usual bombs, not every attack: take
templates from clients only where they are trusted.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.parser import Parser
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from jengine.errors import InvalidRequestError
from jengine.text.messages import CONTENT, normalise_messages, normalise_tools

MAX_TURNS = 500_000  # of all loops and calls together; long conversations need some thousands
MAX_CHARS = 32 << 20  # of the prompt, and of any string computed on the way
CONTINUE_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # its space shows whether the template strips messages

# What code in a template can raise. Their texts ("can only concatenate str...") are the template
# author's clue.
RENDER_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RuntimeError,  # RecursionError among them
)


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt. Raises `InvalidRequestError`: field `chat_template` if the template is no
    template, `tools` or `messages` if they have the wrong form or the template rejects them.
    """
    if add_generation_prompt and continue_final_message:
        raise InvalidRequestError(
            "continue_final_message",
            "cannot be combined with add_generation_prompt: one opens a new message",
        )
    compiled, takes_parts = _compile(template)
    try:
        chat = normalise_messages(messages, takes_parts=takes_parts)
        tools = normalise_tools(tools)
    except RecursionError:
        raise InvalidRequestError("messages", "are nested too deeply") from None
    final = _mark_final(chat) if continue_final_message else None
    values = {
        **(variables or {}),
        "messages": chat,
        "tools": tools,
        "documents": (variables or {}).get("documents"),
        "add_generation_prompt": add_generation_prompt,
    }
    text = _render(compiled, values)
    return text if final is None else _cut_after_final(text, final)


@lru_cache(maxsize=64)
def _compile(template: str) -> tuple[jinja2.Template, bool]:
    """(compiled, whether it reads content as a list of parts)."""
    try:
        return _ENVIRONMENT.from_string(template), _reads_parts(_ENVIRONMENT.parse(template))
    except jinja2.TemplateError as error:
        raise InvalidRequestError("chat_template", f"is not a valid template: {error}") from error


def _render(template: jinja2.Template, values: Mapping[str, Any]) -> str:
    blocks, num_chars = [], 0
    try:
        with _fresh_budget():
            for block in template.generate(values):
                num_chars += len(block)
                _check_size(num_chars)
                blocks.append(block)
    except RENDER_ERRORS as error:
        raise InvalidRequestError("messages", f"the chat template rejects them: {error}") from error
    return "".join(blocks)


def _mark_final(chat: list[dict[str, Any]]) -> str:
    """Append the tag to the final message, so that its end can be found in the prompt. Returns its
    text.
    """
    final = chat[-1]
    content = final.get(CONTENT)
    if isinstance(content, str):
        final[CONTENT] = content + CONTINUE_TAG
        return content
    for part in reversed(content or ()):
        if "text" in part:
            text = part["text"]
            part["text"] = text + CONTINUE_TAG
            return text
    raise InvalidRequestError("continue_final_message", "the final message has no text to continue")


def _cut_after_final(prompt: str, final: str) -> str:
    tag = CONTINUE_TAG.strip()
    if final.strip() not in prompt or tag not in prompt:
        raise InvalidRequestError(
            "continue_final_message", "the chat template leaves the final message out or changes it"
        )
    end = prompt.rindex(tag)
    kept = prompt[:end]
    # Without its space the tag shows that the template strips messages: then the text to continue
    # is stripped too.
    return kept if prompt.startswith(CONTINUE_TAG, end) else kept.rstrip()


def _reads_parts(tree: nodes.Template) -> bool:
    """Whether the template loops over a message's content, hence understands a list of parts."""
    names: set[str] = set()  # variables set from it, as in `{% set text = message.content %}`
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            names.add(assign.target.name)
    return any(_is_content(loop.iter, names) for loop in tree.find_all(nodes.For))


def _is_content(node: nodes.Node, names: set[str]) -> bool:
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == CONTENT
    if isinstance(node, nodes.Getattr):
        return node.attr == CONTENT
    if isinstance(node, nodes.Filter) and node.node is not None:
        return _is_content(node.node, names)
    return isinstance(node, nodes.Name) and node.name in names


# --- the environment --------------------------------------------------------------------------

_turns_left: ContextVar[int] = ContextVar("turns_left", default=MAX_TURNS)


@contextmanager
def _fresh_budget() -> Iterator[None]:
    token = _turns_left.set(MAX_TURNS)
    try:
        yield
    finally:
        _turns_left.reset(token)


def _spend(count: int) -> None:
    left = _turns_left.get() - count
    _turns_left.set(left)
    if left < 0:
        raise jinja2.TemplateRuntimeError(f"more than {MAX_TURNS} loop turns and calls")


def _check_size(size: int) -> None:
    if size > MAX_CHARS:
        raise jinja2.TemplateRuntimeError(f"more than {MAX_CHARS} characters of text")


def _bounded_loop(values: Any) -> Any:
    """Filter put around the iterable of every loop."""
    if isinstance(values, (str, Sequence, Mapping)) or hasattr(values, "__len__"):
        _spend(len(values))
        return values
    return _counted(values) if isinstance(values, Iterable) else values


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _spend(1)
        yield value


def _bounded_text(value: str) -> str:
    """Filter put around every `~`."""
    _check_size(len(value))
    return value


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for trainers; here its body is simply rendered.

    As in transformers it is a call block: what the body sets is not seen outside.
    """

    tags = {"generation"}  # noqa: RUF012  (Jinja's own declaration)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Any) -> str:
        return caller()


class _ClosedNamespace(Namespace):
    """Jinja's `namespace()`, without names that reach into Python."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, args = args[0], args[1:]
        values = dict(*args, **kwargs)
        for name in values:
            _ClosedNamespace._check(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _ClosedNamespace._check(name)
        Namespace.__setitem__(self, name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold {name!r}")


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Sandboxed, with the bounds woven into every template."""

    intercepted_binops = frozenset({"+", "*", "**"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _wrap(loop.iter, "bounded_loop")
        return _WrapConcat().visit(tree)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and (not isinstance(right, (int, float)) or abs(right) > 64):
            raise jinja2.TemplateRuntimeError("exponent beyond 64")
        sized = (str, list, tuple)
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, sized) and isinstance(times, int):
                    _check_size(len(value) * times)
        elif operator == "+" and isinstance(left, sized) and isinstance(right, sized):
            _check_size(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        _spend(1)  # macros that call each other loop without a loop
        return super().call(context, obj, *args, **kwargs)


class _WrapConcat(NodeTransformer):
    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        return _wrap(self.generic_visit(node), "bounded_text")


def _wrap(node: nodes.Node, filter_name: str) -> nodes.Filter:
    wrapped = nodes.Filter(node, filter_name, [], [], None, None)
    wrapped.set_lineno(node.lineno)
    return wrapped


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which models were not trained on."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)


class _DictFactory:
    """`dict(...)` in a template, without the attributes of Python's class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


def _build_environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters |= {
        "tojson": _tojson,
        "bounded_loop": _bounded_loop,
        "bounded_text": _bounded_text,
    }
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "dict": _DictFactory(),
        "namespace": _ClosedNamespace,
    }
    del environment.globals["lipsum"]  # makes text of any length
    return environment


_ENVIRONMENT = _build_environment()
