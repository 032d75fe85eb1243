"""The draft block of DeepSeek-V4 in the paged cache, step by step beside the model, against golden
logits: whatever is cut, cached or mixed. Unused pages hold NaN.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jengine.core.plan import StepPlan
from jengine.request import Request, SamplingParams
from jengine.runtime.batch import build_batch, unpack_batch
from jengine.runtime.row_mirror import RowMirror
from jengine.runtime.step import attention_metadata
from tests.oracles.deepseek_v4 import GOLDEN, golden
from tests.oracles.driver import Driver

TOLERANCE = 1e-4
NAMES = ("tinyA", "tinyB")
ONE = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


class Drafter:
    """Steps that the scheduler plans, each through the model and then through its draft block."""

    def __init__(self, name: str, **kwargs: object) -> None:
        options = dict(
            max_model_len=golden(name)["input_ids"].shape[1] + 20,
            hf_overrides={"architectures": ["DeepseekV4MTPForCausalLM"]},
        )
        self.driver = Driver(GOLDEN / name, **{**options, **kwargs})
        self.runner = self.driver.runner
        self.kv = self.runner.kv
        layout = self.runner._layouts[self.runner.buckets[0]]
        self.mirror = RowMirror(len(self.runner.groups), layout.num_rows, layout.pages_per_seq)
        self.programs = {b: jax.jit(self.program(b)) for b in self.runner.buckets}

    def program(self, bucket):
        layout, spec = self.runner._layouts[bucket], self.runner.spec

        def step(leaves, kv, tables, packed, next_ids_T):
            masks = jnp.zeros(layout.mask_shape, jnp.int32)
            batch, model = unpack_batch(packed, masks, layout), spec.model(leaves)
            metadata = attention_metadata(spec, layout, tables, batch)
            streams_TCD, kv = model.streams(batch.token_ids, kv, metadata)
            hidden_TD, _, kv = model.draft(streams_TCD, next_ids_T, kv, metadata)
            return model.logits(hidden_TD, batch.num_tokens), kv

        return step

    def run(self, plan: StepPlan, texts: dict[str, Sequence[int]]) -> dict[str, np.ndarray]:
        """Draft logits of the step's tokens, by request. A text goes on beyond the prompt."""
        bucket = self.runner.pick_bucket((plan,))
        layout = self.runner._layouts[bucket]
        packed = build_batch(plan, layout, self.mirror).packed
        tables = np.zeros(
            (len(self.runner.groups), layout.num_seqs, layout.pages_per_seq), np.int32
        )
        next_ids = np.zeros(layout.num_tokens, np.int32)
        at = 0
        for s, item in enumerate(plan.scheduled):
            for group, pages in enumerate(item.page_tables):
                tables[group, s, : len(pages)] = pages
            text = texts[item.request.request_id]
            stop = item.start + item.num_tokens
            next_ids[at : at + item.num_tokens] = text[item.start + 1 : stop + 1]
            at += item.num_tokens
        logits, self.kv = self.programs[bucket](
            self.runner.leaves, self.kv, tuple(tables), packed, next_ids
        )
        ends = np.cumsum([item.num_tokens for item in plan.scheduled])
        pieces = np.split(np.asarray(logits)[:at], ends[:-1])
        return {
            item.request.request_id: piece
            for item, piece in zip(plan.scheduled, pieces, strict=True)
        }

    def serve(
        self, requests: Sequence[Request], texts: dict[str, Sequence[int]]
    ) -> dict[str, list]:
        """[(first position, logits)] of each request's steps, up to its first token."""
        found: dict[str, list] = {request.request_id: [] for request in requests}
        for request in requests:
            self.driver.scheduler.add(request)
        while (plan := self.driver.scheduler.schedule()) is not None:
            starts = {item.request.request_id: item.start for item in plan.scheduled}
            for request_id, logits in self.run(plan, texts).items():
                found[request_id].append((starts[request_id], logits))
            handle = self.runner.dispatch(plan)  # the runner's own arrays: for the sampled tokens
            self.driver.scheduler.update(plan, self.runner.collect(handle))
        return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_drafts_match_however_their_texts_are_cut_and_mixed(name: str) -> None:
    """Prompts one token short of the golden texts, whole or cut by a budget, together; then what
    begins alike, from the cache; a lone text token by token."""
    data = golden(name)
    texts = [row.tolist() for row in data["input_ids"]]
    length = len(texts[0])
    drafter = Drafter(
        name, max_num_seqs=3, prefill_buckets=(45,), decode_buckets=(3,), num_pages=60,
        max_num_batched_tokens=45,
    )  # fmt: skip
    for lengths in ([length - 1, 7, 33], [length - 2, length - 1, 40]):
        requests = [Request(f"{n}", texts[n % 2][:n], ONE) for n in lengths]
        found = drafter.serve(requests, {f"{n}": texts[n % 2] for n in lengths})
        for n in lengths:
            for start, logits in found[f"{n}"]:
                expected = data["mtp_logits"][n % 2, start : start + len(logits)]
                assert np.abs(logits - expected).max() <= TOLERANCE, (n, start)
            assert (
                sum(len(logits) for _, logits in found[f"{n}"])
                + requests[lengths.index(n)].num_cached_tokens
                == n
            )
    assert sum(request.num_cached_tokens for request in requests) > 0


@pytest.mark.slow
def test_the_model_beside_its_draft_block_is_the_same() -> None:
    """It loads the block, leaves its window alone, and gives the same hidden states."""
    data = golden("tinyA")
    text = data["input_ids"][0].tolist()
    hidden = []
    for architecture in ("DeepseekV4ForCausalLM", "DeepseekV4MTPForCausalLM"):
        driver = Driver(
            GOLDEN / "tinyA", max_model_len=80, num_pages=16, max_num_seqs=1,
            hf_overrides={"architectures": [architecture]}, prefill_buckets=(32,),
            decode_buckets=(1,), max_num_batched_tokens=32,
        )  # fmt: skip
        driver.logits(text, [32, 29])
        hidden.append(driver.hidden)
        drafts = [path for path in driver.runner.params if path.startswith("mtp.")]
        assert bool(drafts) == ("MTP" in architecture)
    np.testing.assert_array_equal(*hidden)
