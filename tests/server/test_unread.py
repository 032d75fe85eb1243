"""Outputs that their client does not read."""

import asyncio
from pathlib import Path

from jengine.request import RequestOutputKind, SamplingParams
from jengine.server.tracking import Submission, tracked
from tests.server.harness import RunningServer, echo_server

UNREAD_SECONDS = 0.4


async def read(server: RunningServer, pause: float) -> tuple[str | None, int]:
    """Take an output every `pause` seconds; (finish reason, number of tokens)."""
    params = SamplingParams(max_tokens=100, output_kind=RequestOutputKind.DELTA, temperature=0)
    reason, count = None, 0
    async for output in tracked(server.app.state, Submission("r", [97, 98], params, "test")):
        reason = output.outputs[0].finish_reason
        count += len(output.outputs[0].token_ids)
        await asyncio.sleep(pause)
    return reason, count


def test_who_reads_nothing_for_long_is_ended_who_reads_slowly_is_not(echo_model: Path) -> None:
    behaviour = {"step_seconds": 0.02}
    with echo_server(echo_model, behaviour=behaviour, unread_timeout=UNREAD_SECONDS) as server:
        assert server.call(read(server, UNREAD_SECONDS / 4)) == ("length", 100)
        reason, count = server.call(read(server, 1.0 + 2 * UNREAD_SECONDS))
        assert reason == "abort"
        assert 1 < count < 100  # what was made is delivered
        assert (
            'jengine:requests_stalled_total{endpoint="test"'
            in server.app.state.metrics.render().decode()
        )
        server.wait_idle()
