"""JAX takes the settings: two processes find each other, SIGTERM is not swallowed, one address is
bound."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jengine.config import child_environment
from tests.server.harness import free_port, wait_for

pytestmark = pytest.mark.slow
REPO = Path(__file__).resolve().parents[1]
PROCESS = """
import time, jax
from jengine.cluster import VARIABLES, ClusterFlags, discover
from jengine.config import environment

found = discover(ClusterFlags(), environment(VARIABLES))
for name, value in found.jax_config().items():
    jax.config.update(name, value)
jax.distributed.initialize(**found.jax_initialize())
print(jax.process_index(), jax.process_count(), jax.device_count(), flush=True)
time.sleep(60)
"""


def test_two_processes(tmp_path: Path) -> None:
    port = free_port()
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(2):
            variables = {
                "JENGINE_PROCESS_ID": str(rank),
                "JENGINE_NUM_PROCESSES": "2",
                "JENGINE_COORDINATOR_HOST": "127.0.0.1",
                "JENGINE_COORDINATOR_PORT": str(port),
                "JAX_PLATFORMS": "cpu",
            }
            with (tmp_path / f"out{rank}").open("wb") as out:
                command = [sys.executable, "-c", PROCESS]
                environment = child_environment(variables)
                processes.append(subprocess.Popen(command, cwd=REPO, env=environment, stdout=out))
        said = [tmp_path / f"out{rank}" for rank in range(2)]
        wait_for(lambda: all(path.read_text() for path in said), 60.0)
        assert [path.read_text().split() for path in said] == [["0", "2", "2"], ["1", "2", "2"]]
        assert listeners(port) == {"0100007F"}  # 127.0.0.1, as /proc writes it
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(10) == -signal.SIGTERM
        assert processes[1].wait(30) != 0  # its coordinator is gone
    finally:
        for process in processes:
            process.kill()
            process.wait()


def listeners(port: int) -> set[str]:
    """Local addresses, in hexadecimal, that listen on a port."""
    found = set()
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            match = re.match(r"\s*\d+: ([0-9A-F]+):([0-9A-F]{4}) \S+ 0A", line)
            if match and int(match[2], 16) == port:
                # IPv4 as an IPv6 socket sees it
                found.add(match[1].removeprefix("0000000000000000FFFF0000"))
    return found
