"""The process in which grammars are tried before an engine sees them: the other end of `Checker`.

A grammar comes from a stranger. Whatever compiling it does (recursion, memory, time) it does here,
where it costs nobody else anything: this process has a limit of memory, and is killed and replaced
when it takes too long.
"""

import contextlib
import signal
import sys
import threading
from pathlib import Path
from typing import IO

import msgspec

from jengine.grammar import limits
from jengine.grammar.checker import LENGTH_BYTES, Verdict, VocabularyFacts, pack
from jengine.grammar.sources import build_grammar
from jengine.grammar.vocabulary import GrammarError, Vocabulary
from jengine.structured_outputs import StructuredOutputsParams


def main() -> None:
    """Answer until standard input ends: then the parent is gone, or wants no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is meant for the parent
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    facts = msgspec.msgpack.decode(_read(source), type=VocabularyFacts)
    vocabulary = Vocabulary(facts.table, facts.special_ids, facts.eos_ids, facts.vocab_size)
    special_tokens = {
        vocabulary.tokens[i].decode("utf-8", "replace") for i in vocabulary.special_ids
    }
    _limit_memory()
    threading.stack_size(limits.CHECK_STACK_BYTES)
    decoder = msgspec.msgpack.Decoder(StructuredOutputsParams)
    sink.write(pack(Verdict()))  # ready
    sink.flush()
    while data := _read(source):
        verdict = Verdict(error="the check failed")

        def check(data: bytes = data) -> None:
            nonlocal verdict
            try:
                grammar = build_grammar(decoder.decode(data), special_tokens)
                vocabulary.build(grammar)
                verdict = Verdict(grammar)
            except GrammarError as error:
                verdict = Verdict(error=str(error))
            except MemoryError:
                verdict = Verdict(error="takes too much memory")

        thread = threading.Thread(target=check)  # for its stack
        thread.start()
        thread.join()
        sink.write(pack(verdict))
        sink.flush()


def _read(source: IO[bytes]) -> bytes:
    """The next message; empty at the end."""
    length = source.read(LENGTH_BYTES)
    return source.read(int.from_bytes(length, "big")) if len(length) == LENGTH_BYTES else b""


def _limit_memory() -> None:
    """Of what is written to, not of addresses: allocators reserve many more of those."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not on every system
        import resource

        status = Path("/proc/self/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmData"))
        most = int(line.split()[1]) * 1024 + limits.CHECK_MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
