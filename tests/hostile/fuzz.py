"""A coverage-guided fuzzer over the path from bytes to `CoreRequest`s: HTTP bodies, messages of
both gRPC services, conversations.

    pip install atheris
    python -m tests.hostile.fuzz MODEL_FOLDER [-max_total_time=300] [CORPUS_FOLDER]

The first byte chooses the door. Anything but a refusal that names its field is a finding: atheris
prints the input and ends. It starts from the valid requests that the corpus is made of.
"""

import importlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from google.protobuf.message import DecodeError

from jengine.config import EngineConfig
from jengine.errors import JengineError
from jengine.input_processor import InputProcessor
from jengine.model_info import ModelInfo
from jengine.request import SamplingParams
from jengine.server import inference_convert, vllm_convert
from jengine.server.grpc_errors import status_details, status_of
from jengine.server.http_errors import describe, from_validation
from jengine.server.openai_protocol import ChatRequest, CompletionRequest
from jengine.server.proto import engine_pb2 as pb
from jengine.server.request_limits import check_sizes
from jengine.text.tokenizer import Tokenizer
from tests.hostile.grpc_cases import bases
from tests.hostile.http_cases import CHAT_FIELDS, COMPLETION_FIELDS, USER, VALUES, spliced

MAX_MODEL_LEN = 64
VOCAB_SIZE = 512


class Doors:
    """What turns bytes into core requests, as the handlers do it."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = Tokenizer.from_folder(folder)
        info = ModelInfo(
            model="fuzz",
            served_model_names=("fuzz",),
            architecture="",
            model_type="llama",
            vocab_size=VOCAB_SIZE,
            max_model_len=MAX_MODEL_LEN,
            eos_token_ids=(2,),
            bos_token_id=1,
            pad_token_id=0,
            dtype="float32",
            default_sampling_params={},
            tokenizer_folder=None,
        )
        config = EngineConfig.from_kwargs(str(folder))
        self._inputs = InputProcessor(config, info, self._tokenizer, lambda: 1)
        self._doors: list[Callable[[bytes], None]] = [
            self.completions,
            self.chat,
            self.ours,
            self.ours_chat,
            self.vllm,
        ]

    def open(self, data: bytes) -> None:
        """Raises for a finding."""
        if not data:
            return
        try:
            self._doors[data[0] % len(self._doors)](data[1:])
        except JengineError as error:
            assert getattr(error, "field", "request"), error
            body, status = describe(error)
            msgspec.json.encode(body)
            code, reason = status_of(error)
            status_details(code, reason, error)
            assert 400 <= status < 500, error
        except DecodeError:
            pass  # `DecodingInterceptor` answers

    def completions(self, data: bytes) -> None:
        body = self._decode(data, CompletionRequest)
        body.check_completion()
        sampling = body.build_sampling(
            {}, max_tokens=body.max_tokens, logprobs=body.logprobs, prompt_logprobs=None
        )
        for prompt in body.prompts():
            self._prepare(prompt, sampling, body.priority, body.cache_salt or "")

    def chat(self, data: bytes) -> None:
        body = self._decode(data, ChatRequest)
        body.check_chat(trust_template=False)
        messages = [message.render(index) for index, message in enumerate(body.messages)]
        text = self._inputs.render_chat(messages, **body.template_arguments())
        sampling = body.build_sampling(
            {}, max_tokens=body.max_tokens, logprobs=body.top_logprobs, prompt_logprobs=None
        )
        self._prepare(text, sampling, body.priority, body.cache_salt or "")

    def ours(self, data: bytes) -> None:
        request = pb.GenerateRequest.FromString(data)
        sampling = inference_convert.to_sampling_params(request.sampling, request.output)
        prompt: Any = request.text or list(request.token_ids.ids)
        self._prepare(prompt, sampling, request.priority, request.cache_salt)

    def ours_chat(self, data: bytes) -> None:
        request = pb.ChatRequest.FromString(data)
        sampling = inference_convert.to_sampling_params(request.sampling, request.output)
        text = self._inputs.render_chat(
            inference_convert.to_messages(request.messages),
            **inference_convert.to_template_kwargs(request.chat_template_kwargs_json),
        )
        self._prepare(text, sampling, request.priority, request.cache_salt)

    def vllm(self, data: bytes) -> None:
        request = vllm_convert.pb.GenerateRequest.FromString(data)
        vllm_convert.check_supported(request)
        sampling = vllm_convert.to_sampling_params(request.sampling_params, stream=request.stream)
        self._prepare(request.text or list(request.tokenized.input_ids), sampling, 0, "")

    def _decode(self, data: bytes, kind: Any) -> Any:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise from_validation(error) from None

    def _prepare(self, prompt: Any, sampling: SamplingParams, priority: int, salt: str) -> None:
        check_sizes(sampling, salt, VOCAB_SIZE)
        # Grammars go to a process of their own, which costs milliseconds a try.
        sampling = sampling.clone(structured_outputs=None)
        prepared = self._inputs.prepare(prompt, sampling, "r", priority=priority, cache_salt=salt)
        for child in prepared.children:
            msgspec.msgpack.encode(child)  # it crosses to the core


def seeds() -> list[bytes]:
    """One valid input for each door."""
    completion = {"prompt": "ab", "max_tokens": 2, "stop": ["x"], "logit_bias": {"5": 1.5}, "n": 1}
    chat = {"messages": USER, "chat_template_kwargs": {"x": 1}, "seed": 5, "bad_words": ["a"]}
    bodies = [spliced(completion), spliced(chat)]
    bodies += [message.SerializeToString() for _, message in bases()]
    return [bytes([door]) + body for door, body in enumerate(bodies)]


def dictionary() -> list[bytes]:
    """Names and values of JSON that chance would not write."""
    names = {*COMPLETION_FIELDS, *CHAT_FIELDS, "role", "content", "tool_calls", "function"}
    words = [f'"{name}":'.encode() for name in sorted(names)]
    return words + [text.encode() for text in VALUES.values() if len(text) < 40]


def _escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


def main() -> None:
    atheris: Any = importlib.import_module("atheris")  # not among our requirements

    folder, options = Path(sys.argv[1]), sys.argv[2:]
    atheris.instrument_all()
    doors = Doors(folder)
    with tempfile.TemporaryDirectory(prefix="jengine-fuzz-") as scratch:
        words, start = Path(scratch) / "words", Path(scratch) / "start"
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in dictionary()))
        start.mkdir()
        for number, seed in enumerate(seeds()):
            (start / str(number)).write_bytes(seed)
        folders = [option for option in options if not option.startswith("-")]
        flags = [option for option in options if option.startswith("-")]
        arguments = [sys.argv[0], f"-dict={words}", *flags, *folders, str(start)]
        atheris.Setup(arguments, doors.open)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
