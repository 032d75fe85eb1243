"""What the scheduler counts."""

import msgspec


class SchedulerStats(msgspec.Struct):
    """Gauges as of now and totals since start; fields mean what `protocol.EngineStats` says. A
    struct: it is copied for every message, which costs a dataclass 5 us."""

    page_size: int
    num_pages_total: int
    num_pages_used: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_waiting_tokens: int = 0
    scheduled_tokens: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_corrupted: int = 0
