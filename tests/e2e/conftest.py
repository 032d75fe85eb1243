from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.live import LiveServer, live_server


@pytest.fixture(scope="session")
def live(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One server for all tests that leave it as they found it."""
    with live_server(tmp_path_factory.mktemp("live") / "server.log") as server:
        yield server
