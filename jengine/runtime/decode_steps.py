"""How many decode steps one dispatch may hold on a device."""

DISPATCH_SECONDS = 8e-3  # a newcomer waits so long at most, and a stream jumps by so much
MAX_DECODE_STEPS = 8  # by then the host's share of a step is an eighth; more only delays newcomers
BYTES_PER_SECOND = 3e12  # an H100 copies at 3.0 TB/s


def choose_max_decode_steps(platform: str, parameter_bytes: int) -> int:
    """A power of two. A decode step reads every parameter once, so it takes at least the time that
    memory needs for it: 5 ms for 8B parameters in bfloat16 (then 1), 0.4 ms for 0.6B (then 8).

    On CPU one: there steps are longer than what the host does between them.
    """
    if platform != "gpu":
        return 1
    num_steps = int(DISPATCH_SECONDS * BYTES_PER_SECOND / max(parameter_bytes, 1))
    return min(MAX_DECODE_STEPS, 1 << max(num_steps.bit_length() - 1, 0))
