"""What DeepSeek-V4 says, taken apart while it comes.

The rules are `deepseek_v4_completion.parse_completion`'s, but nothing is refused: what is not as
the model was taught to write it is part of the answer, as it stands. In a block of calls that is
everything from the first wrong thing on; the calls before it are calls.
"""

import re

from jengine.text.deepseek_v4_chat import DSML, END_THINK, SEPARATOR, THINK
from jengine.text.deepseek_v4_completion import (
    BEGIN,
    END,
    Completion,
    ToolCall,
    add_parameter,
    join_parameters,
)

INVOKE, END_INVOKE = f'<{DSML}invoke name="', f"</{DSML}invoke>"
PARAMETER, END_PARAMETER = f'<{DSML}parameter name="', f"</{DSML}parameter>"
END_HEAD = '">'  # of both: names have no quotes
PARAMETER_HEAD = re.compile(r'([^"]*)" string="(true|false)')
SPACE = re.compile(r"\s*")


class CompletionParser:
    """One completion. Whatever pieces it comes in, the joined results of `feed` are the same, and
    the work grows with its length.

    Held back is only what may still become something else: the beginning of a tag, or a call that
    is not complete yet. So a call comes whole, and its arguments are always JSON.
    """

    def __init__(self, *, is_thinking: bool, takes_calls: bool) -> None:
        """`is_thinking`: the prompt ends with <think>. Without `takes_calls` calls are text."""
        self._is_reasoning = is_thinking
        self._is_first = is_thinking  # the model may repeat the <think>
        self._takes_calls = takes_calls
        self._is_block = False
        self._held = ""
        self._at = 0  # up to here the held part of a block is understood
        self._num_searched = 0  # up to here `_find` has looked for what it did not find
        self._opening = ""  # of the block, while there is no call in it
        self._name: str | None = None  # of the call that we are in
        self._pairs: dict[str, str] = {}
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._calls: list[ToolCall] = []

    def feed(self, text: str, *, is_last: bool = False) -> Completion:
        """What is certain since the last time; with `is_last` everything."""
        self._held += text
        while self._advance():
            pass
        if is_last:
            self._end()
        result = Completion("".join(self._reasoning), "".join(self._content), tuple(self._calls))
        self._reasoning, self._content, self._calls = [], [], []
        return result

    def _advance(self) -> bool:
        """One element further. False: not before there is more text."""
        if self._is_reasoning:
            return self._reason()
        if not self._is_block:
            return self._answer()
        self._at = SPACE.match(self._held, self._at).end()  # type: ignore[union-attr]
        return self._read_block() if self._name is None else self._read_call()

    def _reason(self) -> bool:
        if self._is_first:
            if THINK.startswith(self._held) and self._held != THINK:
                return False
            self._held = self._held.removeprefix(THINK)
            self._is_first = False
        before, found, after = self._held.partition(END_THINK)
        if not found:
            before, after = _split_undecided(before, END_THINK)
        self._reasoning.append(before)
        self._held = after
        self._is_reasoning = not found
        return bool(found)

    def _answer(self) -> bool:
        if not self._takes_calls:
            self._content.append(self._held)
            self._held = ""
            return False
        before, found, after = self._held.partition(BEGIN)
        if not found:
            before, after = _split_undecided(before, SEPARATOR + BEGIN, BEGIN)
        elif before.endswith(SEPARATOR):
            before, self._opening = before.removesuffix(SEPARATOR), SEPARATOR + BEGIN
        else:
            self._opening = BEGIN
        self._content.append(before)
        self._held = after
        self._is_block = bool(found)
        return bool(found)

    def _read_block(self) -> bool:
        """Where a call or the end of the block is due."""
        if self._held.startswith(INVOKE, self._at):
            start = self._at + len(INVOKE)
            if (end := self._find(END_HEAD, start)) < 0:
                return False
            name = self._held[start:end]
            if '"' in name:
                return self._leave_block()
            self._name, self._at = name, end + len(END_HEAD)
            return True
        if self._held.startswith(END, self._at):
            if self._opening:  # a block of nothing
                return self._leave_block()
            self._held, self._at = self._held[self._at + len(END) :], 0
            self._is_block = False
            return True
        return self._is_decided(INVOKE, END) and self._leave_block()

    def _read_call(self) -> bool:
        """Where a parameter or the end of the call is due."""
        if self._held.startswith(PARAMETER, self._at):
            return self._read_parameter()
        if self._held.startswith(END_INVOKE, self._at):
            assert self._name is not None
            self._calls.append(ToolCall(self._name, join_parameters(self._pairs)))
            self._held, self._at = self._held[self._at + len(END_INVOKE) :], 0
            self._opening, self._name, self._pairs = "", None, {}
            return True
        return self._is_decided(PARAMETER, END_INVOKE) and self._leave_block()

    def _read_parameter(self) -> bool:
        start = self._at + len(PARAMETER)
        if (end := self._find(END_PARAMETER, start)) < 0:
            return False
        head, found, value = self._held[start:end].partition(END_HEAD)
        match = PARAMETER_HEAD.fullmatch(head)
        self._at = end + len(END_PARAMETER)
        if not found or match is None:
            return self._leave_block()
        try:
            add_parameter(self._pairs, match[1], value, is_string=match[2] == "true")
        except ValueError:
            return self._leave_block()
        return True

    def _leave_block(self) -> bool:
        """It is wrong here: what is held of it is text, and text follows."""
        self._content.append(self._opening + self._held[: self._at])
        self._held, self._at = self._held[self._at :], 0
        self._opening, self._name, self._pairs = "", None, {}
        self._is_block = False
        return True

    def _end(self) -> None:
        is_over = self._is_block and not self._opening and not self._held.strip()
        if not is_over:  # a block that only lacks its end has been told
            text = self._opening + self._held
            (self._reasoning if self._is_reasoning else self._content).append(text)
        self._held, self._opening = "", ""

    def _is_decided(self, *tags: str) -> bool:
        """Whether what is here cannot become one of them any more."""
        rest = self._held[self._at : self._at + max(map(len, tags))]
        return not any(tag.startswith(rest) for tag in tags)

    def _find(self, tag: str, start: int) -> int:
        at = self._held.find(tag, max(start, self._num_searched))
        self._num_searched = 0 if at >= 0 else max(0, len(self._held) - len(tag) + 1)
        return at


def _split_undecided(text: str, *tags: str) -> tuple[str, str]:
    """`text` without the longest end that may become a tag, and that end."""
    for size in range(min(len(text), max(map(len, tags)) - 1), 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return text[:-size], text[-size:]
    return text, ""
