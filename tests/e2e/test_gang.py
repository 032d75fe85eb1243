"""One engine over several real processes: it answers as one process does, and ends as a whole."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.live import REPO
from tests.server.harness import free_port, get, post, wait_for

START_SECONDS = 240.0
LOST_SECONDS = 20.0
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0, "logprobs": 3},
    {"temperature": 0.8, "seed": 7, "top_k": 40},
    {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    {"temperature": 0, "prompt_logprobs": 2},
    {"temperature": 1.0, "seed": 9, "logit_bias": {"17": 4.0}},
    {"temperature": 0, "min_tokens": 6},
]
REQUESTS = [
    {"model": "tiny", "prompt": [3 + (7 * i + 5 * j) % 250 for j in range(4 + 9 * i)],
     "max_tokens": 24, "ignore_eos": True, **params}
    for i, params in enumerate(PARAMS)
]  # fmt: skip


@dataclass
class Process:
    """A rank; the leader's is the first."""

    popen: subprocess.Popen[bytes]
    log: Path

    def end(self, seconds: float = 30.0) -> int:
        try:
            return self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"has not ended after {seconds} s:\n{self.log.read_text()[-3000:]}")


def command(
    folder: Path, rank: int, size: int, port: int, http: int, host: str = "127.0.0.1"
) -> list[str]:
    words = [sys.executable, "-m", "jengine.server", "serve", str(folder)]
    words += ["--dtype", "float32", "--served-model-name", "tiny", "--max-num-seqs", "4"]
    words += ["--max-num-batched-tokens", "32", "--num-gpu-blocks-override", "48", "--no-grpc"]
    words += ["--max-model-len", "256", "--tensor-parallel-size", str(size), "--port", str(http)]
    if size > 1:
        words += ["--nnodes", str(size), "--node-rank", str(rank)]
        words += ["--master-addr", host, "--master-port", str(port)]
    return words


@contextmanager
def gang(
    folder: Path, tmp: Path, size: int, hosts: Sequence["Host"] = (), more: Sequence[str] = ()
) -> Iterator[tuple[list[Process], str]]:
    """Processes of one engine, and the leader's URL. Whatever is left is killed at the end."""
    port, http = free_port(), free_port()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JENGINE_CACHE": str(tmp / "cache")}
    environment["XLA_FLAGS"] = ""
    processes: list[Process] = []
    try:
        for rank in range(size):
            words = command(folder, rank, size, port, http)
            if hosts:
                words = [
                    *hosts[rank].enter,
                    *command(folder, rank, size, port, http, hosts[0].address),
                ]
            log = tmp / f"rank{rank}.log"
            with log.open("wb") as out:
                popen = subprocess.Popen(
                    [*words, *more], cwd=REPO, env=environment, stdout=out, stderr=out,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            processes.append(Process(popen, log))
        yield processes, f"http://127.0.0.1:{http}"
    finally:
        for process in processes:
            if process.popen.poll() is None:
                os.killpg(process.popen.pid, signal.SIGKILL)
                process.popen.wait()


def wait_ready(processes: Sequence[Process], url: str) -> None:
    def is_ready() -> bool:
        ended = [p.log.read_text()[-3000:] for p in processes if p.popen.poll() is not None]
        assert not ended, ended
        try:
            return get(url + "/ready")[0] == 200
        except OSError:
            return False

    wait_for(is_ready, START_SECONDS)


def answers(url: str) -> list[Any]:
    """To all requests at once: more of them than rows."""

    def ask(body: dict[str, Any]) -> Any:
        status, answer, _ = post(url + "/v1/completions", body)
        assert status == 200, answer
        choice = answer["choices"][0]
        return [choice[name] for name in ("text", "finish_reason")] + [
            (choice.get("logprobs") or {}).get("tokens"),
            [sorted(entry or {}) for entry in choice.get("prompt_logprobs") or []],
        ]

    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        return list(pool.map(ask, REQUESTS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.oracles.tiny_llama import make_tiny_llama

    path = tmp_path_factory.mktemp("tiny")
    make_tiny_llama(path, num_key_value_heads=2)
    return path


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    with gang(folder, tmp_path_factory.mktemp("alone"), 1) as (processes, url):
        wait_ready(processes, url)
        return answers(url)


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 4])
def test_several_processes_answer_as_one_does_and_drain(
    size: int, folder: Path, alone: list[Any], tmp_path: Path
) -> None:
    with gang(folder, tmp_path, size) as (processes, url):
        wait_ready(processes, url)
        assert answers(url) == alone
        assert answers(url) == alone  # prompts are cached now
        for process in processes:  # as launchers do
            process.popen.send_signal(signal.SIGTERM)
        assert [process.end() for process in processes] == [0] * size


@pytest.mark.slow
@pytest.mark.parametrize("case", ["follower killed", "follower stopped", "leader killed"])
def test_one_that_is_lost_ends_all(case: str, folder: Path, tmp_path: Path) -> None:
    with gang(folder, tmp_path, 2) as (processes, url):
        wait_ready(processes, url)
        outcomes: list[str] = []

        def stream() -> None:
            body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 240, "ignore_eos": True}
            while not outcomes:
                try:
                    status, answer, _ = post(url + "/v1/completions", body)
                except OSError as error:
                    outcomes.append(f"connection: {error}")
                else:
                    if status != 200:
                        outcomes.append(f"{status} {answer}")

        client = threading.Thread(target=stream)
        client.start()
        time.sleep(1.0)
        victim = processes[0 if case.startswith("leader") else 1]
        is_stop = case.endswith("stopped")
        os.killpg(victim.popen.pid, signal.SIGSTOP if is_stop else signal.SIGKILL)
        started = time.monotonic()
        survivor = processes[1 if victim is processes[0] else 0]
        code = survivor.end(LOST_SECONDS)
        print(f"{case}: ended with {code} after {time.monotonic() - started:.1f} s")
        assert code != 0
        client.join(30.0)
        assert outcomes and not outcomes[0].startswith("200")
        if is_stop:
            os.killpg(victim.popen.pid, signal.SIGCONT)
            assert victim.end(LOST_SECONDS) != 0


@pytest.mark.slow
def test_other_flags_are_refused(folder: Path, tmp_path: Path) -> None:
    """Before anything is computed: exit code 78, and both say what differs."""
    port, http = free_port(), free_port()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JENGINE_CACHE": str(tmp_path / "cache")}
    logs = [tmp_path / "leader.log", tmp_path / "follower.log"]
    popens = []
    for rank, log in enumerate(logs):
        words = [*command(folder, rank, 2, port, http), *(["--seed", "5"] if rank else [])]
        with log.open("wb") as out:
            popens.append(
                subprocess.Popen(words, cwd=REPO, env=environment, stdout=out, stderr=out)
            )
    try:
        assert popens[1].wait(120) == 78
        assert popens[0].wait(30) != 0
        assert all("configuration (model)" in log.read_text() for log in logs)
    finally:
        for popen in popens:
            popen.kill()


@dataclass
class Host:
    """A network and a name of its own, which leads to its address, as a real host has them."""

    name: str
    address: str
    hosts_file: Path

    @property
    def enter(self) -> list[str]:
        """What starts a command there. Gloo, which carries XLA's collectives on CPUs, binds what
        the host's name stands for.
        """
        script = f'hostname {self.name}; mount --bind "{self.hosts_file}" /etc/hosts; exec "$@"'
        inside = ["unshare", "--uts", "--mount", "sh", "-c", script, "sh"]
        return ["ip", "netns", "exec", self.name, *inside]


@contextmanager
def two_hosts(tmp: Path) -> Iterator[list[Host]]:
    """Joined by a cable. Skips where they cannot be made."""
    tag = f"jg{os.getpid() % 100_000}"
    hosts_file = tmp / "hosts"
    hosts = [Host(f"{tag}-{i}", f"10.231.7.{i + 1}", hosts_file) for i in range(2)]
    lines = ["127.0.0.1 localhost", *(f"{host.address} {host.name}" for host in hosts)]
    hosts_file.write_text("\n".join(lines) + "\n")

    def ip(*words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    try:
        try:
            for host in hosts:
                ip("netns", "add", host.name)
            ends = [f"{tag}v{i}" for i in range(2)]
            ip("link", "add", ends[0], "netns", hosts[0].name, "type", "veth",
               "peer", "name", ends[1], "netns", hosts[1].name)  # fmt: skip
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        for host, end in zip(hosts, ends, strict=True):
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", end)
            ip("-n", host.name, "link", "set", end, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for host in hosts:
            subprocess.run(["ip", "netns", "del", host.name], check=False, capture_output=True)


ASK = """
import json, sys
from tests.e2e.test_gang import answers, wait_ready
wait_ready([], sys.argv[1])
print(json.dumps(answers(sys.argv[1])))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")
def test_on_two_hosts(folder: Path, alone: list[Any], tmp_path: Path) -> None:
    """They share no loopback and no name. The second is cut off at the end: both processes end."""
    with two_hosts(tmp_path) as hosts, gang(folder, tmp_path, 2, hosts) as (processes, url):
        asked = subprocess.run(
            [*hosts[0].enter, sys.executable, "-c", ASK, url], cwd=REPO, capture_output=True,
            text=True, timeout=START_SECONDS,
        )  # fmt: skip
        logs = [process.log.read_text()[-2000:] for process in processes]
        assert asked.returncode == 0, [asked.stderr[-2000:], *logs]
        assert json.loads(asked.stdout) == json.loads(json.dumps(alone))
        links = ["ip", "-n", hosts[1].name, "link", "set", f"{hosts[1].name[:-2]}v1", "down"]
        subprocess.run(links, check=True)
        codes = [process.end(2 * LOST_SECONDS) for process in processes]
        assert all(code not in (0, None) for code in codes), codes


@pytest.mark.slow
def test_experts_move_between_processes(tmp_path: Path) -> None:
    from tests.oracles.tiny_llama import make_tiny_llama

    make_tiny_llama(
        tmp_path / "moe", family="Mixtral", num_local_experts=16, num_experts_per_tok=2,
        intermediate_size=32,
    )  # fmt: skip
    balanced = ["--enable-expert-parallel", "--enable-eplb", "--num-redundant-experts", "2"]
    balanced += [
        "--eplb-config",
        '{"window_size": 4, "step_interval": 6, "log_balancedness": true}',
    ]
    with gang(tmp_path / "moe", tmp_path, 1) as (processes, url):
        wait_ready(processes, url)
        expected = answers(url)
    with gang(tmp_path / "moe", tmp_path, 2, more=balanced) as (processes, url):
        wait_ready(processes, url)
        for _ in range(3):
            assert answers(url) == expected
        assert processes[0].log.read_text().count("the busiest rank had") > 2
        assert all(process.popen.poll() is None for process in processes)
