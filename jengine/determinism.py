"""Does a request give the same bits in any company? The check that the property tests make on tiny
models, for a user's own: token ids and log-probabilities of a few probes, alone and under
everything that must not matter.
"""

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Sequence

from jengine.config import EngineConfig
from jengine.input_processor import TokensPrompt
from jengine.kv_spec import DEFAULT_PAGE_SIZE
from jengine.llm import LLM
from jengine.outputs import CompletionOutput
from jengine.request import SamplingParams

PROBE_LENGTHS = (5, 21, 64, 150, 700)  # tokens; none longer than a third of the context
MAX_TOKENS = 24
NUM_LOGPROBS = 3
COMPANIONS = (1, 7, 63, 255)  # as far as `max_num_seqs` goes
SMALL_CHUNK = 48  # tokens of a step

Report = Callable[[str], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """The first place where a probe's answer was another."""

    condition: str
    probe: str
    position: int  # of the output token
    field: str
    expected: object
    got: object

    def __str__(self) -> str:
        return (
            f"{self.condition}: {self.probe}, output token {self.position}: {self.field} "
            f"{self.got!r} instead of {self.expected!r}"
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """A request whose answer is known."""

    name: str
    token_ids: tuple[int, ...]
    params: SamplingParams


Answer = list[tuple[int, dict[int, float]]]  # of each output token: id, log-probabilities by id


def check(config: EngineConfig, report: Report, seed: int = 0) -> list[Difference]:
    """Run every condition on the model; the first difference of each probe in each is returned.

    The answers compared with are those of the engine as configured, one request at a time. Loads
    the model once for each engine: as configured, in small chunks with one step a dispatch and no
    planning ahead, and with few pages.
    """
    found: list[Difference] = []
    expected: list[Answer] = []
    probes: list[Probe] = []
    for engine, run_config in _engines(config):
        with LLM.from_config(run_config) as llm:
            rng = random.Random(seed)
            if not probes:
                info = llm.model_info
                probes = make_probes(rng, info.vocab_size, info.max_model_len)
                expected = [_answers(llm, [probe])[0] for probe in probes]
            limit = run_config.scheduler.max_num_seqs
            conditions = _conditions(llm, probes, rng, limit)
            if run_config is config:
                repeated = _teacher_forced(llm, probes, expected)
                conditions = itertools.chain(conditions, [("teacher-forced", repeated)])
            for condition, answers in conditions:
                name = f"{engine}, {condition}"
                differences = list(compare(name, probes, expected, answers))
                found += differences
                report(f"{name}: " + ("; ".join(map(str, differences)) or "equal"))
            report(f"{engine}: {num_preemptions(llm)} preemptions")
    return found


def make_probes(rng: random.Random, vocab_size: int, context: int) -> list[Probe]:
    """Greedy and seeded requests for prompts of several lengths."""
    probes = []
    for length in PROBE_LENGTHS:
        length = min(length, context // 3)
        token_ids = tuple(rng.randrange(vocab_size) for _ in range(length))
        for kind, temperature in (("greedy", 0.0), ("seeded", 0.9)):
            params = SamplingParams(
                temperature=temperature,
                seed=length,
                max_tokens=min(MAX_TOKENS, context // 3),
                ignore_eos=True,
                logprobs=NUM_LOGPROBS,
                detokenize=False,
            )
            probes.append(Probe(f"{kind} prompt of {length}", token_ids, params))
    return probes


def compare(
    condition: str,
    probes: Sequence[Probe],
    expected: Sequence[Answer],
    answers: Sequence[Answer],
) -> Iterator[Difference]:
    """The first difference of each probe, if there is one."""
    for probe, ours, theirs in zip(probes, expected, answers, strict=True):
        for position, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            if one[0] != other[0]:
                yield Difference(condition, probe.name, position, "token", one[0], other[0])
                break
            if one[1] != other[1]:
                yield Difference(
                    condition, probe.name, position, "log-probabilities", one[1], other[1]
                )
                break


def num_preemptions(llm: LLM) -> int:
    """So far. None in the last engine means that its pages were not few enough to show anything."""
    (metric,) = (m for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    return int(metric.value)


def _engines(config: EngineConfig) -> Iterator[tuple[str, EngineConfig]]:
    scheduler, page_size = config.scheduler, config.cache.page_size or DEFAULT_PAGE_SIZE
    yield "as configured", config
    yield (
        "small chunks, no planning ahead",
        dataclasses.replace(
            config,
            scheduler=dataclasses.replace(
                scheduler,
                max_num_seqs=min(scheduler.max_num_seqs, SMALL_CHUNK),
                max_num_batched_tokens=SMALL_CHUNK,
                async_scheduling=False,
                max_decode_steps=1,
            ),
        ),
    )
    # About three of the longest probes: the others are preempted again and again.
    pages = 3 * -(-(max(PROBE_LENGTHS) + MAX_TOKENS) // page_size) + 2
    context = page_size * (pages - 2) // 2
    yield (
        "few pages, so that requests are preempted",
        dataclasses.replace(
            config,
            model=dataclasses.replace(
                config.model, max_model_len=min(config.model.max_model_len or context, context)
            ),
            cache=dataclasses.replace(config.cache, num_pages=pages),
        ),
    )


def _conditions(
    llm: LLM, probes: Sequence[Probe], rng: random.Random, limit: int
) -> Iterator[tuple[str, list[Answer]]]:
    yield "alone", [_answers(llm, [probe])[0] for probe in probes]
    yield "alone again, the prompt cached", [_answers(llm, [probe])[0] for probe in probes]
    yield "all together", _answers(llm, probes)
    for number in COMPANIONS:
        if number >= limit:
            break
        together = [*probes, *(_companion(rng, llm) for _ in range(number))]
        order = list(range(len(together)))
        rng.shuffle(order)
        answers = _answers(llm, [together[i] for i in order])
        place = {i: answer for i, answer in zip(order, answers, strict=True)}
        yield f"among {number} random companions", [place[i] for i in range(len(probes))]


def _teacher_forced(llm: LLM, probes: Sequence[Probe], expected: Sequence[Answer]) -> list[Answer]:
    """The same answers with the log-probabilities of their tokens from `LLM.logprobs`."""
    tokens = [[token_id for token_id, _ in answer] for answer in expected]
    scores = llm.logprobs([(p.token_ids, t) for p, t in zip(probes, tokens, strict=True)])
    return [
        [
            (token_id, {**entries, token_id: float(score)})
            for (token_id, entries), score in zip(answer, of_answer, strict=True)
        ]
        for answer, of_answer in zip(expected, scores, strict=True)
    ]


def _companion(rng: random.Random, llm: LLM) -> Probe:
    info = llm.model_info
    length = rng.randrange(1, min(100, info.max_model_len // 3))
    params = SamplingParams(
        temperature=rng.choice((0.0, 0.7, 1.5)),
        top_p=rng.choice((1.0, 0.9)),
        seed=rng.randrange(1000),
        max_tokens=rng.randrange(1, 30),
        ignore_eos=True,
        detokenize=False,
    )
    return Probe("", tuple(rng.randrange(info.vocab_size) for _ in range(length)), params)


def _answers(llm: LLM, probes: Sequence[Probe]) -> list[Answer]:
    prompts = [TokensPrompt(prompt_token_ids=list(probe.token_ids)) for probe in probes]
    outputs = llm.generate(prompts, [probe.params for probe in probes], use_tqdm=False)
    return [_answer(output.outputs[0]) for output in outputs]


def _answer(output: CompletionOutput) -> Answer:
    scores = output.logprobs or [{} for _ in output.token_ids]
    return [
        (token_id, {i: entry.logprob for i, entry in entries.items()})
        for token_id, entries in zip(output.token_ids, scores, strict=True)
    ]
