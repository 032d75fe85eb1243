"""HTTP bodies: every field with every hostile value, then whatever a generator comes up with."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.hostile.corpus import SEED, STATUSES, HttpCase, mutations
from tests.hostile.wire import CHAT, COMPLETIONS

HAND_MADE = Path(__file__).with_name("hand_made.json")
REPEATED = re.compile(r"«(.+?)\*(\d+)»", re.DOTALL)
DEPTH = 100_000
# JSON texts: several are none.
VALUES: dict[str, str] = {
    "null": "null",
    "true": "true",
    "zero": "0",
    "minus one": "-1",
    "two": "2",
    "int32 over": str(2**31),
    "uint32 over": str(2**32),
    "int64 max": str(2**63 - 1),
    "int64 over": str(2**63),
    "uint64 over": str(2**64),
    "int64 under": str(-(2**63) - 1),
    "30 digits": "1" + "0" * 30,
    "5000 digits": "9" * 5000,
    "half": "0.5",
    "minus zero": "-0.0",
    "1e-320": "1e-320",
    "1e300": "1e300",
    "1e400": "1e400",
    "NaN": "NaN",
    "Infinity": "-Infinity",
    "empty text": '""',
    "text": '"a"',
    "digits": '"5"',
    "NUL": '"a\\u0000b"',
    "raw NUL": '"a\0b"',
    "lone surrogate": '"\\ud800"',
    "reversed pair": '"\\udc00\\ud800"',
    "emoji": '"\\ud83d\\ude00"',
    "direction": '"\\u202e\\ufeff\\uffff"',
    "template": '"{{ messages.__class__.__mro__ }}{% for i in range(999999999) %}x{% endfor %}"',
    "format": '"%s%n{0.__class__}${jndi:ldap://x}"',
    "long text": '"' + "a " * 50_000 + '"',
    "empty list": "[]",
    "list of null": "[null]",
    "list of lists": "[[[]]]",
    "negative id": "[-1]",
    "huge id": "[" + "9" * 30 + "]",
    "NaN id": "[1, NaN]",
    "fraction": "[1.5]",
    "ids": "[3, 4, 5]",
    "texts": '["a", "b"]',
    "empty texts": '["", ""]',
    "many ids": "[" + "3," * 20_000 + "3]",
    "many texts": "[" + '"ab",' * 20_000 + '"ab"]',
    "empty object": "{}",
    "object": '{"a": 1}',
    "bias": '{"5": 1e300}',
    "negative key": '{"-1": 1}',
    "huge key": '{"' + "9" * 30 + '": 1}',
    "many keys": "{" + ",".join(f'"{i}": 1' for i in range(5000)) + "}",
    "deep list": "[" * DEPTH + "]" * DEPTH,
    "deep object": '{"a":' * DEPTH + "1" + "}" * DEPTH,
    "less deep list": "[" * 500 + "]" * 500,
    "less deep object": '{"a":' * 900 + "1" + "}" * 900,
}
SHARED_FIELDS = (
    *("model", "n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty"),
    *("presence_penalty", "repetition_penalty", "seed", "stop", "stop_token_ids", "min_tokens"),
    *("max_tokens", "truncate_prompt_tokens", "prompt_logprobs", "allowed_token_ids", "bad_words"),
    *("logit_bias", "stream", "stream_options", "priority", "request_id", "cache_salt", "logprobs"),
    *("response_format", "structured_outputs", "repetition_detection", "vllm_xargs"),
    *("logprob_token_ids", "thinking_token_budget", "use_beam_search", "length_penalty"),
)
COMPLETION_FIELDS = ("prompt", *SHARED_FIELDS, "echo", "suffix", "best_of")
CHAT_FIELDS = (
    *("messages", "chat_template_kwargs", "max_completion_tokens", "top_logprobs", "tools"),
    *("tool_choice", "documents", "chat_template", "continue_final_message"),
)
USER = [{"role": "user", "content": "hi"}]


def spliced(fields: dict[str, Any], **texts: str) -> bytes:
    """A JSON object of values, and of texts as they are."""
    parts = [f"{json.dumps(k)}:{json.dumps(v)}" for k, v in fields.items() if k not in texts]
    parts += [f"{json.dumps(k)}:{text}" for k, text in texts.items()]
    return ("{" + ",".join(parts) + "}").encode("utf-8", "surrogatepass")


def http_cases() -> Iterator[HttpCase]:
    yield from hand_made()
    yield from matrix()
    yield from inside()
    yield from envelopes()
    yield from mutated()
    yield from combined()


def hand_made() -> Iterator[HttpCase]:
    """A list of [path, body as text, status, field that the error names]. «x*3» stands for xxx;
    status 0 means that it depends on the machine's speed.
    """
    for number, (path, body, status, param) in enumerate(json.loads(HAND_MADE.read_text())):
        name = f"hand made {number}"
        body = REPEATED.sub(lambda match: match[1] * int(match[2]), body)
        data = body.encode("utf-8", "surrogatepass")
        statuses = frozenset({status}) if status else STATUSES
        yield HttpCase(name, path, data, statuses=statuses, param=param)


def matrix() -> Iterator[HttpCase]:
    """Each field, alone, with each value."""
    completion = {"prompt": "ab", "max_tokens": 2}
    chat = {"messages": USER, "max_tokens": 2}
    tables = (
        (COMPLETIONS, COMPLETION_FIELDS, completion),
        (CHAT, CHAT_FIELDS, chat),
        ("/tokenize", ("prompt", "messages", "add_special_tokens"), {"prompt": "ab"}),
        ("/detokenize", ("tokens", "model"), {"tokens": [3]}),
    )
    for path, names, base in tables:
        for name in names:
            for kind, text in VALUES.items():
                yield HttpCase(f"{path} {name}: {kind}", path, spliced(base, **{name: text}))


def inside() -> Iterator[HttpCase]:
    """Values where templates, tool calls and grammars meet them."""
    for kind, text in VALUES.items():
        quoted = json.dumps(text)
        for place, message in (
            ("role", f'{{"role": {text}, "content": "a"}}'),
            ("content", f'{{"role": "user", "content": {text}}}'),
            ("part", f'{{"role": "user", "content": [{{"type": "text", "text": {text}}}]}}'),
            ("call", f'{{"role": "assistant", "tool_calls": [{{"function": {text}}}]}}'),
            (
                "arguments",
                '{"role": "assistant", "tool_calls": [{"function": {"arguments": '
                f"{quoted}}}}}]}}",
            ),
        ):
            body = spliced({"max_tokens": 2}, messages=f"[{message}]")
            yield HttpCase(f"{place} of a message: {kind}", CHAT, body)
        body = spliced({"messages": USER, "max_tokens": 2}, chat_template_kwargs=f'{{"x": {text}}}')
        yield HttpCase(f"template variable: {kind}", CHAT, body)
        for name in ("json", "regex", "choice"):
            body = spliced({"prompt": "ab"}, structured_outputs=f'{{"{name}": {text}}}')
            yield HttpCase(f"structured_outputs.{name}: {kind}", COMPLETIONS, body)
    for name in ("self", "function", "template", "args", "kwargs", "messages", "text", "text_pool"):
        kwargs = json.dumps({name: "x"})
        body = spliced({"messages": USER, "max_tokens": 2}, chat_template_kwargs=kwargs)
        yield HttpCase(f"template variable called {name}", CHAT, body)


def envelopes() -> Iterator[HttpCase]:
    """Headers and methods."""
    body = spliced({"prompt": "ab", "max_tokens": 2})
    refused = frozenset({415})
    for kind in (
        "text/plain",
        "multipart/form-data",
        "application/xml",
        "\xff",
        "application/json2",
    ):
        yield HttpCase(
            f"type {kind}", COMPLETIONS, body, headers={"content-type": kind}, statuses=refused
        )
    for kind in ("gzip", "br", "identity, gzip", "zstd"):
        yield HttpCase(
            f"encoding {kind}",
            COMPLETIONS,
            body,
            headers={"content-encoding": kind},
            statuses=refused,
        )
    for method in ("GET", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"):
        yield HttpCase(f"{method}", COMPLETIONS, body, method, statuses=frozenset({405}))
    for path in ("/", "/v1", "//v1/completions", "/v1/../metrics", "/%00", "/" + "a" * 8000):
        yield HttpCase(f"path {path[:20]}", path, body, statuses=frozenset({404}))
    for value in ("a b", "a" * 129, "\xff", "ü", "a\tb"):
        yield HttpCase(
            f"request id {value[:5]!r}",
            COMPLETIONS,
            body,
            headers={"x-request-id": value},
            statuses=frozenset({400}),
            param="x-request-id",
        )
    large = {"headers": {f"x-{i}": "a" * 1000 for i in range(70)}, "statuses": frozenset({431})}
    yield HttpCase("70 kB of headers", COMPLETIONS, body, **large)
    many = {"headers": {f"x-{i}": "a" for i in range(130)}, "statuses": frozenset({431})}
    yield HttpCase("130 headers", COMPLETIONS, body, **many)


def mutated() -> Iterator[HttpCase]:
    rng = random.Random(SEED)
    completion = {"prompt": "ab", "max_tokens": 2, "stop": ["x"], "logit_bias": {"5": 1.5}}
    chat = {"messages": USER, "max_tokens": 2, "logprobs": True, "top_logprobs": 1}
    for path, fields in ((COMPLETIONS, completion), (CHAT, chat), ("/tokenize", {"prompt": "ab"})):
        for number, data in enumerate(mutations(json.dumps(fields).encode(), 120, rng)):
            yield HttpCase(f"{path} mutated {number}", path, data)


def combined() -> Iterator[HttpCase]:
    """Several fields at once, mostly of the right type."""
    rng = random.Random(SEED + 1)
    plausible: dict[str, list[Any]] = {
        "n": [1, 2, 3, 128],
        "temperature": [0, 0.5, 1, 2, 100, 1e-6],
        "top_p": [0.0001, 0.5, 1],
        "top_k": [-1, 0, 1, 511, 10**6],
        "min_p": [0, 0.5, 1],
        "repetition_penalty": [1e-3, 1, 2, 1e30, 1e300],
        "presence_penalty": [-2, 2],
        "frequency_penalty": [-2, 2],
        "max_tokens": [1, 2, 3],
        "min_tokens": [0, 1, 2],
        "stop": ["a", ["a", "b"], ["\n"]],
        "stop_token_ids": [[1], list(range(200)), [511]],
        "allowed_token_ids": [[5], list(range(512))],
        "logit_bias": [{"5": 100}, {str(i): -100 for i in range(512)}],
        "bad_words": [["a"], ["the quick"], ["x"] * 100],
        "logprobs": [0, 1, 20],
        "prompt_logprobs": [0, 20],
        "echo": [True],
        "stream": [True],
        "ignore_eos": [True],
        "truncate_prompt_tokens": [-1, 1, 5],
        "seed": [-1, 0, 2**62],
        "logprob_token_ids": [[5], list(range(128)), [511] * 3],
        "use_beam_search": [True],
        "length_penalty": [-32, 0, 0.5, 32],
        "prompt": ["ab", [3], ["a", "b"], [[3], [4]], "é" * 100],
    }
    for number in range(250):
        names = rng.sample(sorted(plausible), rng.randrange(2, 8))
        fields = {"prompt": "ab", "max_tokens": 2}
        fields |= {name: rng.choice(plausible[name]) for name in names}
        yield HttpCase(f"combined {number}", COMPLETIONS, spliced(fields))
