"""What the processes of one engine say to each other: a leader that schedules, and followers that
execute the same programs on the same inputs. Host side only.

Two planes. On the *step* plane the leader sends each step, once, to every follower. On the
*control* plane they greet, prove that they live, and say why they end. There is no repair: whatever
goes wrong ends every process of the gang, and the launcher starts all anew.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

import msgspec
import numpy as np

from jengine.config import EngineConfig
from jengine.errors import ExitCode, JengineError

WIRE_VERSION = 1
LEADER = 0  # its rank
_SAME_PACKAGES = ("jengine", "jax", "jaxlib", "numpy")


class GangError(JengineError):
    """This process and its gang must end. `exit_code` says whether a restart can help."""

    def __init__(self, message: str, exit_code: ExitCode = ExitCode.RESTART) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class ProgramCall:
    """What a follower needs to do what the leader does: a program by name, and those of its
    arguments that come from the host, in their order. No requests, no plan.

    A step is such a call, and so is what sets the rows of a new request before it. Arrays that came
    over the wire are read-only.
    """

    program: str
    arrays: tuple[np.ndarray, ...]


@dataclass(frozen=True, slots=True)
class GangTiming:
    """Seconds. A lost process is noticed within `lost + heartbeat`, which must stay below 20."""

    join: float = 600.0  # from a process's start until all have come: images are pulled meanwhile
    heartbeat: float = 2.0
    lost: float = 10.0  # silence after which a process counts as lost

    def __post_init__(self) -> None:
        if not 0 < 2 * self.heartbeat < self.lost:
            raise ValueError(
                f"lost ({self.lost} s) must exceed two heartbeats ({self.heartbeat} s each)"
            )


class Hello(msgspec.Struct, tag="hello", array_like=True):
    """A follower's first word. `facts` must be the leader's own, see `facts_of`."""

    rank: int
    num_processes: int
    facts: dict[str, str]
    wire_version: int = WIRE_VERSION


class Welcome(msgspec.Struct, tag="welcome", array_like=True):
    """All have come. `epoch` names this gang: what carries another is of an earlier one."""

    epoch: int


class Refusal(msgspec.Struct, tag="refusal", array_like=True):
    """The gang does not form, or has formed without the one that hears this."""

    reason: str
    exit_code: int


class Heartbeat(msgspec.Struct, tag="alive", array_like=True):
    epoch: int


class Failure(msgspec.Struct, tag="failure", array_like=True):
    """The sender ends, and so must whoever hears this."""

    epoch: int
    reason: str
    exit_code: int


class Goodbye(msgspec.Struct, tag="goodbye", array_like=True):
    """The sender has done all steps, and is not lost when it falls silent."""

    epoch: int


ToLeader = Hello | Heartbeat | Failure | Goodbye
ToFollower = Welcome | Refusal | Heartbeat | Failure


def facts_of(config: EngineConfig, sources: str) -> dict[str, str]:
    """What must be the same in all processes, or they would compute different things without an
    error: package versions, the configuration, and `sources`, the digest of what programs are
    traced from.
    """
    facts = {f"version of {name}": _version(name) for name in _SAME_PACKAGES}
    plain = msgspec.to_builtins(config)
    plain["compile"]["cache_dir"] = None  # hosts may keep their executables where they like
    plain["gang"] = None  # each has its own place
    for part, value in plain.items():
        facts[f"configuration ({part})"] = msgspec.json.encode(value, order="sorted").decode()
    return {**facts, "sources": sources}


def differences(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    """One line for each fact that is not the same."""
    names = sorted({*ours, *theirs})
    return [
        f"{name}: {theirs.get(name, 'nothing')} there, {ours.get(name, 'nothing')} at the leader"
        for name in names
        if ours.get(name) != theirs.get(name)
    ]


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a clone that runs uninstalled
        return "not installed"
