"""The memory plan: what every part takes, from the compiler's own figures, and how many pages are
left for KV.

    budget = gpu_memory_utilization of the device
           = outside (CUDA's own) + pool (what XLA's allocator may hand out)
    pool   = parameters + per-request state + workspace + reserve + KV pages
"""

import dataclasses
import gc
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from jengine import jax_compat
from jengine.config import CacheConfig, device_memory_share, set_device_memory_share
from jengine.kv_spec import MAX_LIVE_STATES, KVGroup

CPU_KV_BYTES = 1 << 30
# Of a GPU's memory, what CUDA takes beside XLA's pool: context, code, graphs. 0.8 GB of 80.
OUTSIDE_SHARE = 0.01
# Pages are counted from a multiple of this, so that two hosts with cards of one kind, whose totals
# differ by some megabytes, come to the same number: it is part of every stored executable's key.
ROUNDING_BYTES = 64 << 20
# Kept free in the pool beside the largest parameter: see `reserve_bytes`.
RESERVE_BYTES = 512 << 20
# States (of linear attention) planned for each request that may run: it holds two at most, and as
# many may stay behind to be found again.
STATES_PER_SEQ = 2 * MAX_LIVE_STATES
STATES_SHARE = 0.5  # of the cache, at most


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """What this engine may use of a device. On a CPU, memory is not planned but taken as needed."""

    budget: int
    pool: int
    is_planned: bool

    @property
    def outside(self) -> int:
        return self.budget - self.pool


@dataclasses.dataclass(frozen=True)
class ExecutableMemory:
    """Bytes of one executable beyond parameters, KV and rows, from `memory_analysis()`."""

    temporaries: int
    outputs: int  # not aliased to an argument
    inputs: int  # the packed batch, copied to the device
    aliased: int
    code: int


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device. The peak holds two steps' inputs and outputs, since a step is dispatched
    before the last is read; their temporaries are the same bytes, since steps run one by one.
    """

    parameters: int
    kv_cache: int
    row_state: int
    executables: Mapping[str, ExecutableMemory]
    num_pages: tuple[int, ...]
    groups: tuple[KVGroup, ...]
    device: DeviceMemory
    reserve: int = 0

    @property
    def workspace(self) -> int:
        """Of the largest program."""
        return max(map(workspace_bytes, self.executables.values()), default=0)

    @property
    def peak(self) -> int:
        """What `memory_stats()["peak_bytes_in_use"]` comes to when the largest step has run."""
        return self.parameters + self.kv_cache + self.row_state + self.workspace

    @property
    def total(self) -> int:
        return self.peak + self.reserve + self.device.outside

    def table(self) -> str:
        """For people."""
        pools = list(zip(self.groups, self.num_pages, strict=True))
        tokens = [f"{(n - 1) * g.page_size:,}" for g, n in pools if not g.spec.is_state]
        holds = [f"{' + '.join(tokens)} tokens"] if tokens else []
        holds += [f"{n - 1:,} states" for g, n in pools if g.spec.is_state]
        rows = [
            ("parameters", self.parameters),
            (f"KV cache ({', '.join(holds)})", self.kv_cache),
            ("per-request state", self.row_state),
            ("step workspace", self.workspace),
            ("peak", self.peak),
        ]
        if self.device.is_planned:
            rows += [
                ("reserve (tuning, figures that differ)", self.reserve),
                ("outside the pool (CUDA)", self.device.outside),
                ("total", self.total),
            ]
        rows.append(("budget", self.device.budget))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {size / 2**20:>10,.1f} MiB" for name, size in rows)


def workspace_bytes(executable: ExecutableMemory) -> int:
    return executable.temporaries + 2 * (executable.outputs + executable.inputs)


def executable_memory(compiled: jax.stages.Compiled, inputs: int) -> ExecutableMemory:
    """`inputs`: bytes of the arguments that are neither parameters nor donated state."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        raise ValueError("this back end does not report the memory of its executables")
    return ExecutableMemory(
        temporaries=analysis.temp_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        inputs=inputs,
        aliased=analysis.alias_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
    )


def open_devices(
    cache: CacheConfig, num_devices: int = 1
) -> tuple[tuple[jax.Device, ...], DeviceMemory]:
    """The devices, and what we may use of each. Starts the back end, its pool sized as planned,
    unless it runs already. Raises `ValueError` if there are too few.
    """
    jax_compat.quiet_without_gpu()
    if not jax_compat.backends_are_initialized():
        set_device_memory_share(cache.gpu_memory_utilization - OUTSIDE_SHARE)
    devices = tuple(jax.devices()[:num_devices])
    if len(devices) < num_devices or (jax.process_count() > 1 and jax.device_count() > num_devices):
        raise ValueError(
            f"tensor_parallel_size times data_parallel_size is {num_devices}, "
            f"but {jax.device_count()} devices are there"
        )
    gc.collect()  # arrays of an engine that was closed
    own = [device for device in devices if device.process_index == jax.process_index()]
    memories = (device_memory(device, cache, len(own)) for device in own)
    return devices, min(memories, key=lambda memory: memory.pool)


def device_memory(device: jax.Device, cache: CacheConfig, num_devices: int = 1) -> DeviceMemory:
    """Call it before anything is allocated: what is in use by then is somebody else's. All devices
    of a CPU share its memory.
    """
    if device.platform == "cpu":
        available = _available_host_bytes() // num_devices
        budget = int(available * cache.gpu_memory_utilization)
        return DeviceMemory(budget, budget, is_planned=False)
    stats = device.memory_stats()
    if stats is None:  # another allocator than XLA's pool: the user must say how many pages
        return DeviceMemory(0, 0, is_planned=True)
    limit = stats["bytes_limit"]
    total = limit / device_memory_share()
    taken = -(-stats["bytes_in_use"] // ROUNDING_BYTES) * ROUNDING_BYTES
    pool = min(limit, int(total * (cache.gpu_memory_utilization - OUTSIDE_SHARE)))
    return DeviceMemory(pool - taken + int(total * OUTSIDE_SHARE), pool - taken, is_planned=True)


def reserve_bytes(device: DeviceMemory, largest_tuned: int) -> int:
    """Kept free in the pool.

    Buckets that are compiled while we serve are tuned meanwhile: XLA times matrix products on
    copies of their operands, of which the largest parameter has `largest_tuned` bytes. And a tuned
    kernel's temporaries may exceed the figure planned with.
    """
    return RESERVE_BYTES + largest_tuned if device.is_planned else 0


def plan_pages(
    groups: Sequence[KVGroup],
    cache: CacheConfig,
    *,
    free_bytes: int,
    is_planned: bool,
    max_model_len: int,
    max_chunk: int,
    max_num_seqs: int,
) -> tuple[int, ...]:
    """Pages of each group's pool, the null page included. States come last, as in `build_groups`.

    Groups share the bytes in proportion to what one request of `max_model_len` holds in each, so
    that no group runs out long before another. States do not grow with the tokens: requests are
    mostly shorter, and more of them run; so there are states for `max_num_seqs`, or for as many as
    half of the bytes hold. Raises `ValueError` when not even one such request fits.
    """
    needs = [group.max_pages(max_model_len, max_chunk) for group in groups]
    num_states = STATES_PER_SEQ * max_num_seqs + 1
    if cache.num_pages is not None:
        given = cache.num_pages
        return tuple(
            max(1 + need, min(num_states, given))
            if group.spec.is_state
            else max(2, given * need // needs[0])
            for group, need in zip(groups, needs, strict=True)
        )
    available = cache.kv_cache_memory_bytes
    if available is None and is_planned:
        available = _round_down(free_bytes)
    elif available is None:
        available = min(free_bytes, CPU_KV_BYTES)
    request_bytes = sum(n * g.bytes_per_page for n, g in zip(needs, groups, strict=True))
    null_bytes = sum(group.bytes_per_page for group in groups)
    if available - null_bytes < request_bytes:
        raise ValueError(
            f"the KV cache has {available:,} bytes but one request of "
            f"max_model_len={max_model_len} needs {request_bytes + null_bytes:,}: "
            "lower max_model_len or give kv_cache_memory_bytes"
        )
    states = [group for group in groups if group.spec.is_state]
    grow = [(need, g) for need, g in zip(needs, groups, strict=True) if not g.spec.is_state]
    null_bytes = sum(g.bytes_per_page for _, g in grow)
    request_bytes = sum(need * g.bytes_per_page for need, g in grow)
    if states:
        state_bytes = sum(group.bytes_per_page for group in states)
        share = int(available * STATES_SHARE) if grow else available
        affordable = min(share, available - null_bytes - request_bytes) // state_bytes
        num_states = max(1 + needs[-1], min(num_states, affordable))
        available -= num_states * state_bytes
    requests = (available - null_bytes) / max(1, request_bytes)
    return (*(int(need * requests) + 1 for need, _ in grow), *(num_states for _ in states))


def _round_down(size: int) -> int:
    """To a multiple of ROUNDING_BYTES, where that costs little."""
    return size - size % ROUNDING_BYTES if size >= 16 * ROUNDING_BYTES else size


def _available_host_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("MemAvailable is missing from /proc/meminfo")
