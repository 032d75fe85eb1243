"""What is refused at the door, how fast, and that the door stays open."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jengine.errors import EngineDeadError, InvalidRequestError
from jengine.grammar import limits
from jengine.grammar.checker import NUM_REMEMBERED, Checker, VocabularyFacts
from jengine.structured_outputs import StructuredOutputsParams
from jengine.text.tokenizer import Tokenizer
from tests.oracles.grammars import HOSTILE, PERSON

VOCAB_SIZE = 512


def facts(folder: Path) -> VocabularyFacts:
    tokenizer = Tokenizer.from_folder(folder)
    return VocabularyFacts(tokenizer.pieces.table, tokenizer.all_special_ids, [2], VOCAB_SIZE)


@pytest.fixture(scope="module")
def checker(tiny_llama: Path) -> Iterator[Checker]:
    checker = Checker(lambda: facts(tiny_llama))
    yield checker
    checker.close()


@pytest.mark.parametrize(
    "params",
    [
        StructuredOutputsParams(json=PERSON),
        StructuredOutputsParams(json='{"type": "object"}', whitespace_pattern=" ?"),
        StructuredOutputsParams(json=PERSON, disable_additional_properties=True),
        StructuredOutputsParams(json_object=True),
        StructuredOutputsParams(regex=r"^\d{3}-[a-z/]+$"),
        StructuredOutputsParams(choice=["yes", 'n"o\n', "", "世界 😀"]),
        StructuredOutputsParams(grammar='start: "a" b+\nb: "x" | "y"'),
        StructuredOutputsParams(grammar='root ::= "hello " [a-z]+ "!"'),
        StructuredOutputsParams(
            structural_tag='{"triggers": ["<f"], "structures": '
            '[{"begin": "<f=a>", "schema": {"type": "object"}, "end": "</f>"}]}'
        ),
    ],
    ids=lambda p: p.kind,
)
def test_what_is_valid_passes(checker: Checker, params: StructuredOutputsParams) -> None:
    assert checker.check(params)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_constraints_are_answered_in_time(checker: Checker, name: str) -> None:
    fields, is_refused = HOSTILE[name]
    params = StructuredOutputsParams(**fields)
    started = time.monotonic()
    if is_refused:
        with pytest.raises(InvalidRequestError) as caught:
            checker.check(params)
        assert caught.value.field == f"structured_outputs.{params.kind}"
        assert len(caught.value.message) <= limits.MAX_MESSAGE_CHARS
    else:
        checker.check(params)
    assert time.monotonic() - started < limits.CHECK_SECONDS + 1
    assert checker.check(StructuredOutputsParams(choice=["still", "here"]))


def test_a_schema_nested_beyond_python(checker: Checker) -> None:
    schema: dict = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(InvalidRequestError, match="nested too deeply"):
        checker.check(StructuredOutputsParams(json=schema))
    while schema:  # taken apart by hand: the interpreter would recurse
        schema = schema.pop("items")


def test_what_hangs_is_killed_and_replaced(
    checker: Checker, monkeypatch: pytest.MonkeyPatch
) -> None:
    checker.check(StructuredOutputsParams(choice=["before"]))
    monkeypatch.setattr(limits, "CHECK_SECONDS", 0.3)
    os.kill(child_of(checker), signal.SIGSTOP)
    slow = StructuredOutputsParams(choice=["hangs"])
    with pytest.raises(InvalidRequestError, match="takes longer than"):
        checker.check(slow)
    monkeypatch.undo()
    assert checker.check(slow), "the machine was slow, not the grammar: nothing is remembered"


def test_what_crashes_is_refused_and_the_process_replaced(checker: Checker) -> None:
    checker.check(StructuredOutputsParams(choice=["before the crash"]))
    pid = child_of(checker)
    os.kill(pid, signal.SIGSTOP)
    timer = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))  # as the kernel without memory
    timer.start()
    crash = StructuredOutputsParams(choice=["crash"])
    with pytest.raises(InvalidRequestError, match="cannot be compiled"):
        checker.check(crash)
    timer.join()
    assert checker.check(crash)
    assert child_of(checker) != pid


def test_a_process_that_died_meanwhile_is_replaced(checker: Checker) -> None:
    checker.check(StructuredOutputsParams(choice=["before it dies"]))
    pid = child_of(checker)
    os.kill(pid, signal.SIGINT)
    assert checker.check(StructuredOutputsParams(choice=["Ctrl-C is not for it"]))
    assert child_of(checker) == pid
    os.kill(pid, signal.SIGSEGV)
    time.sleep(0.2)
    assert checker.check(StructuredOutputsParams(choice=["after it died"]))


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_the_process_has_a_limit_of_memory() -> None:
    code = (
        "from jengine.grammar import limits, check_process\n"
        "limits.CHECK_MEMORY_BYTES = 20_000_000\n"
        "check_process._limit_memory()\n"
        "try:\n  x = bytearray(40_000_000)\nexcept MemoryError:\n  print('refused')"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "refused\n"


def test_verdicts_are_remembered(tiny_llama: Path) -> None:
    reads = []
    checker = Checker(lambda: reads.append(1) or facts(tiny_llama))
    params = StructuredOutputsParams(regex="[a-z]{3}")
    bad = StructuredOutputsParams(regex="[a-z")
    grammar = checker.check(params)
    with pytest.raises(InvalidRequestError) as first:
        checker.check(bad)
    os.kill(child_of(checker), signal.SIGSTOP)  # nobody is asked again
    assert checker.check(params) == grammar
    with pytest.raises(InvalidRequestError) as second:
        checker.check(bad)
    assert str(first.value) == str(second.value)
    os.kill(child_of(checker), signal.SIGCONT)
    for i in range(NUM_REMEMBERED + 5):
        checker.check(StructuredOutputsParams(choice=[str(i)]))
    assert len(checker._known) == NUM_REMEMBERED
    assert reads == [1]
    checker.close()


def test_closing_while_a_check_runs(tiny_llama: Path) -> None:
    checker = Checker(lambda: facts(tiny_llama))
    checker.check(StructuredOutputsParams(choice=["a"]))
    os.kill(child_of(checker), signal.SIGSTOP)
    errors: list[Exception] = []

    def ask() -> None:
        try:
            checker.check(StructuredOutputsParams(choice=["b"]))
        except InvalidRequestError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.1)
    started = time.monotonic()
    checker.close()
    thread.join()
    assert time.monotonic() - started < 2
    assert len(errors) == 1
    with pytest.raises(EngineDeadError):
        checker.check(StructuredOutputsParams(choice=["c"]))
    checker.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choice": ["a"]}, "got regex, choice"),
        ({"json_object": False}, "exactly one"),
        ({"choice": []}, "must not be empty"),
    ],
)
def test_exactly_one_constraint(fields: dict, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        StructuredOutputsParams(**fields)


def child_of(checker: Checker) -> int:
    assert checker._process is not None
    return checker._process._child.pid
