"""A process without a front end: it runs what the leader of its engine runs."""

import logging
import signal

from jengine.config import EngineConfig
from jengine.distributed.channel import FollowerChannel
from jengine.distributed.protocol import GangError
from jengine.distributed.watchdog import end_process
from jengine.runtime.gang import follow, join_world
from jengine.runtime.phases import Phases
from jengine.runtime.start import start_runner

log = logging.getLogger(__name__)


def run(config: EngineConfig) -> None:
    """Until the leader ends in good order; if it does not, the process ends with 75 or 78. The
    leader drains on SIGTERM; here it is ignored, for launchers send it to all.
    """
    try:
        _follow(config)
    except GangError as error:
        end_process(error.exit_code, str(error))


def _follow(config: EngineConfig) -> None:
    if config.gang is None:
        raise ValueError("config.gang: a follower needs a leader")
    cluster = join_world(config.gang)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    started = start_runner(config, Phases(), cluster=cluster)
    if not isinstance(started.gang, FollowerChannel):
        raise ValueError(f"rank {cluster.process_id} of {cluster.num_processes} leads")
    log.info("following: rank %d of %d", cluster.process_id, cluster.num_processes)
    follow(started.runner, started.gang)
