"""A server on the echo core as a process: `python -m tests.oracles.echo_server PORT FOLDER`.

With `--follow-stdin` it drains when its standard input ends.
"""

import asyncio
import functools
import sys

from jengine.async_engine import AsyncEngine
from jengine.config import EngineConfig
from jengine.server import follow
from jengine.server.app import ServerApp
from jengine.server.settings import ServerSettings
from tests.oracles.echo_core import FACTORY


async def main(port: int, folder: str, *, follow_stdin: bool) -> int:
    config = EngineConfig.from_kwargs(
        folder,
        served_model_name=("echo",),
        hf_overrides={"echo": {"step_seconds": 0.01}},
        load_format="dummy",
        max_model_len=1024,
    )
    create = functools.partial(AsyncEngine.create, in_process=True, core_factory=FACTORY)
    settings = ServerSettings(port=port, grpc_port=None, shutdown_timeout=5.0)
    app = ServerApp(config, settings, create_engine=create)
    app.install_signals()
    if follow_stdin:
        follow.follow_stdin(app.request_stop)
    return await app.run()


if __name__ == "__main__":
    port, folder, *options = sys.argv[1:]
    sys.exit(asyncio.run(main(int(port), folder, follow_stdin=bool(options))))
