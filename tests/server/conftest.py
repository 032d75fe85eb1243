from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.oracles.echo_core import make_echo_model
from tests.server.harness import RunningServer, echo_server


@pytest.fixture(scope="session")
def echo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_echo_model(tmp_path_factory.mktemp("echo"))


@pytest.fixture(scope="session")
def server(echo_model: Path) -> Iterator[RunningServer]:
    """Shared by the tests that leave it as they found it."""
    with echo_server(echo_model) as running:
        yield running


@pytest.fixture(scope="session")
def slow_server(echo_model: Path) -> Iterator[RunningServer]:
    """5 ms a token: long enough to interrupt."""
    with echo_server(echo_model, behaviour={"step_seconds": 0.005}) as running:
        yield running
