"""The core as a child process: it dies with its parent, and its own death is noticed at once."""

import asyncio
import logging
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import zmq

from jengine.async_engine import AsyncEngine
from jengine.config import EngineConfig
from jengine.core_client import ProcessCoreClient
from jengine.errors import EngineDeadError
from jengine.protocol import CoreDead, CoreReady, FromCore
from jengine.request import RequestOutputKind, SamplingParams
from tests.oracles.echo_core import FACTORY, make_echo_model

REPO = Path(__file__).resolve().parents[1]
ENDLESS = SamplingParams(temperature=0.0, max_tokens=None, output_kind=RequestOutputKind.DELTA)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_echo_model(tmp_path / "echo")


def config_of(model: Path, **echo: object) -> EngineConfig:
    return EngineConfig.from_kwargs(
        str(model), load_format="dummy", max_model_len=100_000, hf_overrides={"echo": echo}
    )


async def read_until_error(engine: AsyncEngine, request_id: str) -> float:
    """When the stream's error came."""
    with pytest.raises(EngineDeadError):
        async for _ in engine.generate("abc", ENDLESS, request_id):
            pass
    return time.monotonic()


def pid_of(engine: AsyncEngine) -> int:
    assert isinstance(engine._client, ProcessCoreClient)
    return engine._client.pid


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
async def test_a_killed_core_wakes_every_stream_within_a_second(
    model: Path, how: signal.Signals
) -> None:
    engine = await AsyncEngine.create(config_of(model, step_seconds=0.01), core_factory=FACTORY)
    readers = [asyncio.create_task(read_until_error(engine, f"r{i}")) for i in range(8)]
    await asyncio.sleep(0.2)
    killed_at = time.monotonic()
    os.kill(pid_of(engine), how)
    woken_at = await asyncio.gather(*readers)
    assert max(woken_at) - killed_at < 1.0
    assert engine.is_dead
    assert how.name in (engine.dead_error or "")
    with pytest.raises(EngineDeadError, match=how.name):
        await anext(engine.generate("abc", ENDLESS, "late"))
    with pytest.raises(EngineDeadError):
        await engine.reset_prefix_cache()
    await engine.shutdown()


@pytest.mark.parametrize(
    ("echo", "says"),
    [({"die_at_step": 3}, "died as it was told"), ({"exit_at_step": 3}, "exit code 7")],
)
async def test_a_core_that_fails_says_why_or_its_exit_code_does(
    model: Path, echo: dict, says: str
) -> None:
    engine = await AsyncEngine.create(config_of(model, **echo), core_factory=FACTORY)
    await read_until_error(engine, "r")
    assert says in (engine.dead_error or "")
    await engine.shutdown()


@pytest.mark.parametrize("in_process", [True, False])
@pytest.mark.parametrize(
    ("echo", "says"),
    [
        ({"fail_to_load": "tensor x is missing"}, "tensor x is missing"),
        ({"protocol_version": 99}, "protocol version 99"),
    ],
)
async def test_a_core_that_cannot_start(
    model: Path, in_process: bool, echo: dict, says: str
) -> None:
    with pytest.raises(EngineDeadError, match=says):
        await AsyncEngine.create(
            config_of(model, **echo), in_process=in_process, core_factory=FACTORY
        )


async def test_signals_are_the_parents_business(model: Path) -> None:
    engine = await AsyncEngine.create(config_of(model, step_seconds=0.01), core_factory=FACTORY)
    stream = engine.generate("abc", ENDLESS, "r")
    await anext(stream)
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pid_of(engine), number)
    await asyncio.sleep(0.2)
    await anext(stream)
    await stream.aclose()
    await engine.shutdown()


async def test_shutdown_leaves_nothing_behind(model: Path) -> None:
    engine = await AsyncEngine.create(config_of(model), core_factory=FACTORY)
    client = engine._client
    assert isinstance(client, ProcessCoreClient)
    folder = Path(client._folder.name)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    await engine.shutdown()
    assert client._child.returncode == 0
    assert not folder.exists()
    await engine.shutdown()


PARENT = """
import asyncio, os, sys
from jengine.async_engine import AsyncEngine
from tests.test_core_process import config_of
from tests.oracles.echo_core import FACTORY
from pathlib import Path

async def main():
    engine = await AsyncEngine.create(config_of(Path(sys.argv[1])), core_factory=FACTORY)
    if sys.argv[2] == "fork":  # a process that keeps the child's standard input open
        if (pid := os.fork()) == 0:
            os.execvp("sleep", ["sleep", "3"])
    print(engine._client.pid, engine._client._folder.name, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("how", ["plain", "fork"])
def test_the_core_follows_a_killed_parent(model: Path, how: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", PARENT, str(model), how],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        line = parent.stdout.readline()
        parent.kill()
        assert line, parent.stderr.read() if parent.stderr else ""
    pid, folder = line.split()
    deadline = time.monotonic() + 3.0
    while _is_running(int(pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _is_running(int(pid))
    assert not Path(folder).exists()


def _is_running(pid: int) -> bool:
    """A zombie whose new parent has not looked yet does not run."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_messages_arrive_in_order_and_the_last_words_too(model: Path) -> None:
    """Without AsyncEngine: what a client delivers."""
    received: list[FromCore] = []
    done = asyncio.Event()

    def deliver(messages: list[FromCore]) -> None:
        received.extend(messages)
        if isinstance(received[-1], CoreDead):
            done.set()

    client = ProcessCoreClient(config_of(model, fail_to_load="no"), FACTORY)
    client.attach(asyncio.get_running_loop(), deliver)
    await asyncio.wait_for(done.wait(), 10)
    await asyncio.sleep(0.3)  # its exit must not be reported a second time
    assert received == [CoreDead("no")]
    client.stop()
    client.join()


async def test_an_unreadable_message_is_the_end(model: Path) -> None:
    received: list[FromCore] = []
    client = ProcessCoreClient(config_of(model), FACTORY)
    client.attach(asyncio.get_running_loop(), received.extend)
    while not received:
        await asyncio.sleep(0.01)
    assert isinstance(received[0], CoreReady)
    address = f"ipc://{client._folder.name}/from_core"
    with client._context.socket(zmq.PUSH) as socket:
        socket.connect(address)
        socket.send(b"\xc1")
    while len(received) < 2:
        await asyncio.sleep(0.01)
    assert isinstance(received[1], CoreDead)
    assert "unreadable" in received[1].error
    client.stop()
    client._child.kill()  # it takes no more messages, not even Shutdown
    client.join()


async def test_the_childs_log_level_is_ours(model: Path, capfd: pytest.CaptureFixture) -> None:
    logging.getLogger("jengine").setLevel(logging.INFO)
    try:
        engine = await AsyncEngine.create(config_of(model, log="hello"), core_factory=FACTORY)
        await engine.shutdown()
    finally:
        logging.getLogger("jengine").setLevel(logging.NOTSET)
    assert "INFO core: hello" in capfd.readouterr().err
