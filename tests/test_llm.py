"""LLM: vLLM's offline API over a core that echoes; test_llm_real.py has the real one."""

import asyncio
import logging
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jengine
from jengine import LLM, SamplingParams
from jengine.errors import (
    EngineDeadError,
    InvalidRequestError,
    ModelNotFoundError,
    UnsupportedError,
)
from jengine.protocol import CoreRequests
from jengine.request import RequestOutputKind
from tests.oracles.echo_core import FACTORY, make_echo_model

REPO = Path(__file__).resolve().parents[1]
GREEDY = SamplingParams(temperature=0.0, max_tokens=4)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_echo_model(tmp_path / "echo")


def make_echo_llm(folder: Path, **kwargs: Any) -> LLM:
    echo = {"hf_overrides": {"echo": kwargs.pop("echo", {})}}
    kwargs = {"load_format": "dummy", "core_factory": FACTORY, **echo, **kwargs}
    return LLM(str(folder), **kwargs)


@pytest.fixture
def llm(folder: Path) -> Iterator[LLM]:
    with make_echo_llm(folder) as engine:
        yield engine


def test_the_core_reports_at_the_end_unless_a_stop_string_is_looked_for(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[Any] = []
    send = llm._engine._client.send
    monkeypatch.setattr(llm._engine._client, "send", lambda m: (sent.append(m), send(m)))
    params = [GREEDY, GREEDY.clone(stop="d"), GREEDY.clone(logprobs=1)]
    outputs = llm.generate(["abcd"] * 3, params, use_tqdm=False)
    assert texts(outputs) == ["abcd", "abc", "abcd"]
    (together,) = [m for m in sent if isinstance(m, CoreRequests)]  # one message, one first step
    assert [request.is_streamed for request in together.requests] == [False, True, False]


def texts(outputs: list[jengine.RequestOutput]) -> list[str]:
    return [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("abcd", ["abcd"]),
        (["abcd", "xyz", "q"], ["abcd", "xyzx", "qqqq"]),
        ([97, 98], ["abab"]),
        ([[97, 98], [99]], ["abab", "cccc"]),
        (np.array([97, 98]), ["abab"]),
        ([np.array([97, 98])], ["abab"]),
        ({"prompt": "abcd"}, ["abcd"]),
        ([{"prompt_token_ids": [97]}, "b", {"prompt": "c"}], ["aaaa", "bbbb", "cccc"]),
        ([], []),
    ],
)
def test_forms_of_prompts(llm: LLM, prompts: Any, expected: list[str]) -> None:
    assert texts(llm.generate(prompts, GREEDY, use_tqdm=False)) == expected


def test_outputs_are_final_and_in_order(llm: LLM) -> None:
    params = [GREEDY.clone(max_tokens=n, output_kind=RequestOutputKind.DELTA) for n in (9, 1, 5)]
    outputs = llm.generate(["ab", "cd", "ef"], params, use_tqdm=False)
    assert texts(outputs) == ["ababababa", "c", "efefe"]
    assert [output.request_id for output in outputs] == ["0", "1", "2"]
    assert all(output.finished for output in outputs)
    assert all(output.metrics is not None for output in outputs)


def test_default_sampling_is_the_models(llm: LLM, folder: Path) -> None:
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=7)
    assert texts(llm.generate("abc", use_tqdm=False)) == ["abcabca"]
    with make_echo_llm(folder, generation_config="vllm") as other:
        assert other.get_default_sampling_params() == SamplingParams()


def test_chat_renders_and_answers(llm: LLM) -> None:
    one = [{"role": "user", "content": "hi"}]
    params = GREEDY.clone(max_tokens=30)
    (output,) = llm.chat(one, params, use_tqdm=False)
    assert output.prompt == "[user]hi[assistant]"
    assert output.outputs[0].text == "[user]hi[assistant][user]hi[as"
    outputs = llm.chat([one, one + one], params, use_tqdm=False, add_generation_prompt=False)
    assert [output.prompt for output in outputs] == ["[user]hi", "[user]hi[user]hi"]
    (output,) = llm.chat(
        one, params, use_tqdm=False, chat_template="{{ x }}", chat_template_kwargs={"x": "y"}
    )
    assert output.prompt == "y"


def test_enqueue_then_wait(llm: LLM) -> None:
    assert llm.enqueue(["ab", "cd"], GREEDY) == ["0", "1"]
    assert llm.enqueue("ef", GREEDY) == ["2"]
    assert texts(llm.generate("gh", GREEDY, use_tqdm=False)) == ["ghgh"]
    assert texts(llm.wait_for_completion(use_tqdm=False)) == ["abab", "cdcd", "efef"]
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_several_completions_of_a_prompt(llm: LLM) -> None:
    params = SamplingParams(n=4, seed=1, max_tokens=10)
    (output,) = llm.generate("ab", params, use_tqdm=False)
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
    assert len({completion.text for completion in output.outputs}) == 4
    assert llm.generate("ab", params, use_tqdm=False)[0].outputs == output.outputs


def test_a_run_repeats_with_the_engines_seed(folder: Path) -> None:
    def run(**kwargs: Any) -> list[str]:
        with make_echo_llm(folder, **kwargs) as llm:
            return texts(llm.generate(["ab", "ab"], SamplingParams(), use_tqdm=False))

    first = run()
    assert first[0] != first[1]
    assert run() == first
    assert run(seed=1) != first


def test_more_requests_than_the_queue_takes(folder: Path) -> None:
    with make_echo_llm(folder, max_num_waiting=3) as llm:
        prompts = [f"{i:02}" for i in range(50)]
        assert texts(llm.generate(prompts, GREEDY, use_tqdm=False)) == [p + p for p in prompts]
        many = SamplingParams(n=5)  # one request may be larger than the bound is
        with pytest.raises(jengine.QueueFullError):
            llm.generate("a", many, use_tqdm=False)
        assert texts(llm.generate(prompts[:5], GREEDY, use_tqdm=False))


def test_one_bad_request_starts_none(llm: LLM) -> None:
    with pytest.raises(InvalidRequestError, match="prompt"):
        llm.generate(["ab", ""], GREEDY, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match="2 prompts but 1"):
        llm.generate(["ab", "cd"], [GREEDY], use_tqdm=False)
    with pytest.raises(UnsupportedError, match="lora_request"):
        llm.generate("ab", GREEDY, lora_request=object())  # type: ignore[arg-type]
    assert llm._engine.call("running") == []
    assert texts(llm.generate("ab", GREEDY, use_tqdm=False)) == ["abab"]


def test_ctrl_c_aborts_and_leaves_the_engine_usable(folder: Path) -> None:
    script = f"""
from jengine import LLM, SamplingParams
llm = LLM({str(folder)!r}, load_format="dummy", core_factory={FACTORY!r}, max_model_len=10**6,
          hf_overrides={{"echo": {{"step_seconds": 0.01}}}})
greedy = SamplingParams(temperature=0.0, max_tokens=4)
print("ready", flush=True)
try:
    llm.generate(["ab", "cd"], greedy.clone(max_tokens=None), use_tqdm=False)
except KeyboardInterrupt:
    print(len(llm._engine.call("aborted")), llm._engine.call("running"))
    print(llm.generate("ef", greedy, use_tqdm=False)[0].outputs[0].text)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPO, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=20)
    assert shown == "2 []\nefef\n"
    assert process.returncode == 0


def test_progress_bar(llm: LLM, capsys: pytest.CaptureFixture) -> None:
    llm.generate(["ab", "cd"], GREEDY)
    shown = capsys.readouterr().err
    assert "Processed prompts: 100%" in shown
    assert "toks/s" in shown
    made: list[dict[str, Any]] = []

    def make_bar(**kwargs: Any) -> Any:
        made.append(kwargs)
        return jengine.llm.tqdm(disable=True, **kwargs)

    llm.generate(["ab", "cd"], GREEDY, use_tqdm=make_bar)
    assert made[0]["total"] == 2


def test_a_dead_core_is_an_error_now_and_later(folder: Path) -> None:
    with make_echo_llm(folder, echo={"die_at_step": 2}) as llm:
        for _ in range(2):
            with pytest.raises(EngineDeadError, match="as it was told"):
                llm.generate("ab", GREEDY, use_tqdm=False)


def test_what_cannot_start_says_why(folder: Path) -> None:
    with pytest.raises(EngineDeadError, match="tensor x"):
        make_echo_llm(folder, echo={"fail_to_load": "tensor x is missing"})
    with pytest.raises(EngineDeadError, match="protocol version 9"):
        make_echo_llm(folder, echo={"protocol_version": 9})
    with pytest.raises(ModelNotFoundError):
        LLM(str(folder / "nowhere"))


def engine_threads() -> set[threading.Thread]:
    """Also those of other tests' engines: fixtures of the session keep some alive."""
    return {thread for thread in threading.enumerate() if thread.name == "engine-core"}


def test_close_stops_the_thread(folder: Path) -> None:
    before = engine_threads()
    llm = make_echo_llm(folder)
    assert len(engine_threads() - before) == 1
    llm.close()
    llm.close()
    assert engine_threads() == before
    with pytest.raises(EngineDeadError, match="closed"):
        llm.generate("ab", GREEDY, use_tqdm=False)


def test_an_engine_that_nobody_holds_is_stopped(folder: Path) -> None:
    before = engine_threads()
    llm = make_echo_llm(folder)
    del llm
    assert engine_threads() == before


def test_inside_a_running_event_loop(folder: Path) -> None:
    """As in a notebook."""

    async def cell() -> list[str]:
        with make_echo_llm(folder) as llm:
            return texts(llm.generate("ab", GREEDY, use_tqdm=False))

    assert asyncio.run(cell()) == ["abab"]


def test_control(llm: LLM) -> None:
    assert llm.get_tokenizer().encode("a") == [97]
    assert llm.get_world_size() == 1
    assert llm.reset_prefix_cache() is True
    assert llm.memory_plan == "echo"
    llm.generate("ab", GREEDY, use_tqdm=False)
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    assert metrics["vllm:num_requests_running"].value == 0
    assert metrics["vllm:kv_cache_usage_perc"].labels["engine"] == "0"


# --- scripts written for vLLM


def test_arguments_of_vllm(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    neutral = {
        "tensor_parallel_size": 1,
        "enforce_eager": True,
        "trust_remote_code": True,
        "disable_custom_all_reduce": True,
        "swap_space": 8,
        "quantization": None,
        "max_num_seqs": 8,
    }
    with caplog.at_level(logging.WARNING), make_echo_llm(folder, **neutral) as llm:
        assert texts(llm.generate("ab", GREEDY, use_tqdm=False)) == ["abab"]
    assert not caplog.records
    with caplog.at_level(logging.WARNING), make_echo_llm(folder, cpu_offload_gb=4):
        assert "cpu_offload_gb=4" in caplog.text


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"pipeline_parallel_size": 2}, UnsupportedError),
        ({"quantization": "awq"}, UnsupportedError),
        ({"runner": "pooling"}, UnsupportedError),
        ({"hf_overrides": lambda config: config}, UnsupportedError),
        ({"no_such_argument": 1}, TypeError),
    ],
)
def test_arguments_that_are_refused(folder: Path, kwargs: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(kwargs))):
        LLM(str(folder), **kwargs)


# The first example of vLLM's documentation (offline_inference/basic/basic.py), but for the model.
VLLM_SCRIPT = """
from vllm import LLM, SamplingParams

prompts = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
sampling_params = SamplingParams(temperature=0.8, top_p=0.95)


def main():
    llm = LLM(model="MODEL")
    outputs = llm.generate(prompts, sampling_params)
    print("\\nGenerated Outputs:\\n" + "-" * 60)
    for output in outputs:
        prompt = output.prompt
        generated_text = output.outputs[0].text
        print(f"Prompt:    {prompt!r}")
        print(f"Output:    {generated_text!r}")
        print("-" * 60)


if __name__ == "__main__":
    main()
"""


def test_a_vllm_script_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    module = types.ModuleType("vllm")
    module.LLM = lambda model: make_echo_llm(Path(model))  # type: ignore[attr-defined]
    module.SamplingParams = SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    exec(VLLM_SCRIPT.replace("MODEL", str(folder)), {"__name__": "__main__"})
    shown = capsys.readouterr().out
    assert shown.count("Output:") == 4
    assert "Prompt:    'The capital of France is'" in shown


@pytest.mark.slow
def test_a_vllm_script_runs_on_the_demo_model(smollm2_gguf: Path) -> None:
    """The real engine, in a process that closes nothing: it must end by itself, and cleanly."""
    script = VLLM_SCRIPT.replace("from vllm", "from jengine").replace("MODEL", str(smollm2_gguf))
    result = run_script(script)
    assert result.stdout.count("Output:") == 4


def run_script(script: str) -> "subprocess.CompletedProcess[str]":
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=REPO, capture_output=True, text=True, timeout=280
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr
    return result


@pytest.mark.parametrize("ending", ["", "sys.exit(0)", "llm.enqueue('ab', endless)"])
def test_a_script_that_forgets_close_ends_by_itself(folder: Path, ending: str) -> None:
    run_script(
        f"""
import sys
from jengine import LLM, SamplingParams
endless = SamplingParams(temperature=0.0, max_tokens=None)
llm = LLM({str(folder)!r}, load_format="dummy", core_factory={FACTORY!r}, max_model_len=10**6,
          hf_overrides={{"echo": {{"step_seconds": 0.01}}}})
llm.generate("ab", SamplingParams(max_tokens=3))
{ending}
"""
    )


# --- the package


def test_public_names_are_all_there() -> None:
    for name in jengine.__all__:
        assert getattr(jengine, name) is not None
    with pytest.raises(AttributeError, match="nothing_such"):
        _ = jengine.nothing_such


def test_importing_the_package_imports_no_jax() -> None:
    code = "import sys, jengine; jengine.AsyncEngine; print('jax' in sys.modules)"
    assert run_script(code).stdout.strip() == "False"
