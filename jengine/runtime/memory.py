"""The memory plan: what every part takes, from the compiler's own figures, and how many pages are
left for KV.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from jengine.config import CacheConfig
from jengine.kv_spec import KVGroup

CPU_KV_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class ExecutableMemory:
    """Bytes of one executable beyond its arguments, from `memory_analysis()`."""

    temporaries: int
    outputs: int  # not aliased to an argument
    aliased: int
    code: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device. The peak holds two steps' outputs, since a step is dispatched before the
    last is read.
    """

    parameters: int
    kv_cache: int
    row_state: int
    executables: Mapping[str, ExecutableMemory]
    num_pages: tuple[int, ...]
    page_size: int
    budget: int

    @property
    def workspace(self) -> int:
        """Largest temporaries and outputs of any bucket."""
        return max((e.temporaries + 2 * e.outputs for e in self.executables.values()), default=0)

    @property
    def peak(self) -> int:
        return self.parameters + self.kv_cache + self.row_state + self.workspace

    def table(self) -> str:
        """For people."""
        tokens = " + ".join(f"{(n - 1) * self.page_size:,}" for n in self.num_pages)
        rows = [
            ("parameters", self.parameters),
            (f"KV cache ({tokens} tokens)", self.kv_cache),
            ("per-request state", self.row_state),
            ("step workspace", self.workspace),
            ("peak", self.peak),
            ("budget", self.budget),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {size / 2**20:>10,.1f} MiB" for name, size in rows)


def executable_memory(compiled: jax.stages.Compiled) -> ExecutableMemory:
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("this back end does not report the memory of its executables")
    return ExecutableMemory(
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        aliased=analysis.alias_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )


def memory_budget(device: jax.Device, cache: CacheConfig) -> int:
    """Bytes this engine may use on the device in all."""
    stats = device.memory_stats() if device.platform != "cpu" else None
    total = stats["bytes_limit"] if stats else _available_host_bytes()
    return int(total * cache.gpu_memory_utilization)


def plan_pages(
    groups: Sequence[KVGroup],
    cache: CacheConfig,
    *,
    free_bytes: int,
    is_cpu: bool,
    max_model_len: int,
    max_chunk: int,
) -> tuple[int, ...]:
    """Pages of each group's pool, the null page included.

    Groups share the bytes in proportion to what one request of `max_model_len` holds in each, so
    that no group runs out long before another. Raises `ValueError` when not even one such request
    fits.
    """
    needs = [group.max_pages(max_model_len, max_chunk) for group in groups]
    if cache.num_pages is not None:
        return tuple(max(2, cache.num_pages * need // needs[0]) for need in needs)
    available = cache.kv_cache_memory_bytes
    if available is None:
        available = min(free_bytes, CPU_KV_BYTES) if is_cpu else free_bytes
    request_bytes = sum(n * g.bytes_per_page for n, g in zip(needs, groups, strict=True))
    null_bytes = sum(group.bytes_per_page for group in groups)
    requests = (available - null_bytes) / request_bytes
    if requests < 1:
        raise ValueError(
            f"the KV cache has {available:,} bytes but one request of "
            f"max_model_len={max_model_len} needs {request_bytes + null_bytes:,}: "
            "lower max_model_len or give kv_cache_memory_bytes"
        )
    return tuple(int(need * requests) + 1 for need in needs)


def _available_host_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("MemAvailable is missing from /proc/meminfo")
