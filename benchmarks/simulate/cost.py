"""What a step of one expert-parallel world costs: bytes and operations over rates.

Rates of the GPU are those that docs/benchmarks.md reports of our kernels; those of links, and how
collectives use them, are assumptions. Nothing overlaps: a layer computes, sends, computes.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from jengine.kv_spec import KVGroup, build_groups
from jengine.layers.expert_exchange import capacity
from jengine.layers.param import abstract_parameters
from jengine.models.deepseek_v4.config import DeepseekV4Config
from jengine.models.deepseek_v4.model import DeepseekV4ForCausalLM

Exchange = Literal["gather", "padded"]
MAX_MODEL_LEN = 1 << 15
GPUS_PER_HOST = 8
WINDOW, SELECTED = 128, 1024


@dataclasses.dataclass(frozen=True)
class Gpu:
    """Bytes, bytes a second, operations a second."""

    name: str
    memory: float
    bandwidth: float  # weights: products of few rows reach 93 % of 3.0 TB/s, experts 97 %
    products: float = 600e12  # dense, many rows (Llama 8B prefill, attention apart)
    experts: float = 390e12  # of 8,192 tokens: 52 % of 750
    attention: float = 0.7  # of the bandwidth: latents at 64 x 4k
    layer: float = 70e-6  # beside all of it: V2-Lite takes 3.5 ms for 27 layers of 1.6 ms of bytes


H100 = Gpu("H100 80 GB", 80e9, 3.0e12 * 0.95)
H200 = Gpu("H200 141 GB", 141e9, 4.2e12 * 0.95)


@dataclasses.dataclass(frozen=True)
class Links:
    """Of each GPU, one way. A gathering ring brings every row to a host once and passes it on
    inside; an all-to-all sends it to each GPU that wants it by itself.
    """

    inside: float = 360e9  # NVLink: 80 % of 450 GB/s
    between: float = 45e9  # 400 Gb/s
    call_inside: float = 15e-6  # until the first byte
    call_between: float = 30e-6
    per_peer: float = 0.2e-6  # of an all-to-all


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of DeepSeek-V4-Pro; weights stay as published: experts of 4.25 bits, the rest of 8."""

    cfg: DeepseekV4Config
    dense: float  # parameters that every token uses, shared experts among them
    expert: float  # of one
    embedding: float

    @property
    def dense_bytes(self) -> float:
        return self.dense

    @property
    def expert_bytes(self) -> float:
        return self.expert * 4.25 / 8

    def weight_bytes(self, num_ranks: int, num_redundant: int) -> float:
        """On one GPU: all but the experts, as data-parallel attention asks for, and its slots."""
        slots = (self.cfg.moe.num_experts + num_redundant) / num_ranks
        layers = self.cfg.num_hidden_layers
        return self.dense_bytes + self.embedding + layers * slots * self.expert_bytes

    @property
    def groups(self) -> tuple[KVGroup, ...]:
        return build_groups(DeepseekV4ForCausalLM.kv_specs(self.cfg), None)


def v4_pro() -> Model:
    fields = json.loads((Path(__file__).parent / "v4_pro.json").read_text())
    cfg = DeepseekV4Config.from_hf(
        fields, dtype="bfloat16", kv_dtype="bfloat16", max_model_len=MAX_MODEL_LEN
    )
    infos = abstract_parameters(DeepseekV4ForCausalLM(cfg))
    sizes = {path: math.prod(info.shape) for path, info in infos.items()}
    experts = {p for p, info in infos.items() if info.logical_axes[:1] == ("experts",)}
    tables = {p for p in infos if p.startswith("embed_tokens") or p.endswith("tid2eid")}
    dense = sum(n for p, n in sizes.items() if p not in experts | tables)
    one = sum(sizes[p] for p in experts) / cfg.num_hidden_layers / cfg.moe.num_experts
    return Model(cfg, dense, one, sum(sizes[p] for p in tables))


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one rank in one step."""

    num_tokens: int
    contexts: Sequence[tuple[int, int]]  # of each request: tokens of this step, context they end at


@dataclasses.dataclass(frozen=True)
class World:
    """GPUs that share the experts out, each with requests of its own."""

    model: Model
    gpu: Gpu
    links: Links
    num_ranks: int
    # Busiest rank over average: 1.1 is what balancing leaves, tests/sharding/test_expert_slots.py.
    imbalance: float = 1.1

    def seconds(self, work: Sequence[Work], bucket_tokens: int) -> float:
        """Of a step of all ranks. All wait for the slowest in every layer; every rank computes its
        dense layers over the bucket's rows, padding too, and skips it elsewhere.
        """
        attention = max(self._attention(each) for each in work)
        num_tokens = sum(each.num_tokens for each in work)
        layer = min(self.exchange_seconds(each, bucket_tokens) for each in get_args(Exchange))
        beside = self.model.cfg.num_hidden_layers * (layer + self.gpu.layer)
        return self._dense(bucket_tokens) + self._experts(num_tokens) + attention + beside

    def exchange_seconds(self, exchange: Exchange, rows: int) -> float:
        """There and back, in one layer, of so many rows of each rank in bfloat16."""
        R, links, row = self.num_ranks, self.links, 2 * self.model.cfg.hidden_size
        remote = max(0, R - GPUS_PER_HOST)
        call = links.call_between if remote else links.call_inside
        if exchange == "gather":
            inside = rows * (R - 1) * row / links.inside
            between = rows * remote / GPUS_PER_HOST * row / links.between
            return 4 * call + 2 * max(inside, between)
        sent = capacity(rows, self.model.cfg.moe.num_experts_per_tok, R)
        inside = sent * (min(R, GPUS_PER_HOST) - 1) * row / links.inside
        between = sent * remote * row / links.between
        return 5 * call + 4 * R * links.per_peer + 2 * max(inside, between)

    def _dense(self, rows: int) -> float:
        read = self.model.dense_bytes / self.gpu.bandwidth
        return max(read, 2 * self.model.dense * rows / self.gpu.products)

    def _experts(self, num_tokens: int) -> float:
        """Of the busiest rank: the experts that any token of any rank chose, or their products."""
        moe, layers = self.model.cfg.moe, self.model.cfg.num_hidden_layers
        chosen = num_tokens * moe.num_experts_per_tok
        touched = moe.num_experts * (1 - (1 - 1 / moe.num_experts) ** chosen)
        read = touched / self.num_ranks * self.model.expert_bytes / self.gpu.bandwidth
        products = 2 * self.model.expert * chosen / self.num_ranks / self.gpu.experts
        return layers * self.imbalance * max(read, products)

    def _attention(self, work: Work) -> float:
        """Bytes of the cache, which are read once for each request, or the arithmetic of scores."""
        cfg = self.model.cfg
        num_bytes, operations = 0.0, 0.0
        for num_tokens, context in work.contexts:
            picked = min(SELECTED, context // 4)
            window, sparse, far = cfg.num_hidden_layers, 30, 31  # layers
            index_bytes = sparse * context / 4 * 256
            entry_bytes = 1024 * (window * WINDOW + sparse * picked + far * context / 128)
            num_bytes += index_bytes + entry_bytes
            scores = window * WINDOW + sparse * picked + far * context / 128
            heads = cfg.num_attention_heads
            indexer = sparse * context / 4 * 64 * 128 * 2
            operations += num_tokens * (4 * heads * 512 * scores + indexer)
        read = num_bytes / (self.gpu.bandwidth * self.gpu.attention)
        return max(read, operations / (self.gpu.products * 0.5))
