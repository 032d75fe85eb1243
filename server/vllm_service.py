"""vllm.grpc.engine.VllmEngine, the protocol of `vllm serve --grpc`, from the published package
`smg-grpc-proto`.

The gateway `smg` in front of this port serves the OpenAI and Anthropic APIs.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import NoReturn

import grpc
from smg_grpc_proto import vllm_engine_pb2 as pb
from smg_grpc_proto import vllm_engine_pb2_grpc
from smg_grpc_proto.generated import common_pb2

from jengine import __version__
from jengine.errors import InvalidRequestError
from jengine.server.grpc_errors import answered, refuse
from jengine.server.inference_service import deadline_of
from jengine.server.metrics import ThroughputMeter
from jengine.server.state import ServerState, Status, check_request_id, new_request_id
from jengine.server.tokenizer_bundle import TokenizerBundle, build_bundle
from jengine.server.tracking import Submission, tracked
from jengine.server.vllm_convert import (
    ResponseBuilder,
    check_supported,
    constraint_field,
    to_sampling_params,
)

SERVICE_NAME = pb.DESCRIPTOR.services_by_name["VllmEngine"].full_name
SERVER_TYPE = "vllm-grpc"  # what gateways look for
IDLE_POLL_SECONDS = 0.05
# Fields of generation_config that the gateway applies itself.
_DEFAULT_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class VllmEngineService(vllm_engine_pb2_grpc.VllmEngineServicer):
    """An adapter: every decision is the engine's."""

    def __init__(self, state: ServerState, meter: ThroughputMeter) -> None:
        self._state = state
        self._meter = meter
        self._bundle: asyncio.Task[TokenizerBundle] | None = None

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        async with answered(context):
            engine = self._state.serving_engine()
            check_supported(request)
            text: str | None = None
            if request.WhichOneof("input") == "tokenized":
                ids = list(request.tokenized.input_ids)
            elif request.WhichOneof("input") == "text":
                ids = await engine.encode(request.text)
                text = request.text
            else:
                raise InvalidRequestError("input", "set tokenized or text")
            submission = Submission(
                request_id=check_request_id(request.request_id or new_request_id("req-")),
                prompt_token_ids=ids,
                prompt=text,
                sampling=to_sampling_params(request.sampling_params, stream=request.stream),
                endpoint="grpc.VllmEngine.Generate",
                deadline=deadline_of(context),
                constraint_field=constraint_field(request.sampling_params),
            )
            builder = ResponseBuilder(stream=request.stream)
            async with aclosing(tracked(self._state, submission)) as outputs:
                async for output in outputs:
                    for completion in output.outputs:
                        for response in builder.build(output, completion):
                            yield response

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        """Unknown ids are no error: the request may have ended while the call was on its way."""
        async with answered(context):
            engine = self._state.ready_engine()
            for request_id in request.request_ids:
                await engine.abort(request_id)
            return pb.AbortResponse()

    async def HealthCheck(
        self, request: pb.HealthCheckRequest, context: grpc.aio.ServicerContext
    ) -> pb.HealthCheckResponse:
        status = self._state.status
        return pb.HealthCheckResponse(healthy=status is Status.SERVING, message=status.value)

    async def FlushCache(
        self, request: common_pb2.FlushCacheRequest, context: grpc.aio.ServicerContext
    ) -> common_pb2.FlushCacheResponse:
        """Drop the prefix cache; with a timeout, first wait that long for requests to end."""
        async with answered(context):
            engine = self._state.ready_engine()
            until = time.monotonic() + request.timeout_s
            while self._state.num_active and time.monotonic() < until:
                await asyncio.sleep(IDLE_POLL_SECONDS)
            if self._state.num_active:
                return common_pb2.FlushCacheResponse(
                    success=False, message=f"{self._state.num_active} requests are running"
                )
            success = await engine.reset_prefix_cache()
            message = "the prefix cache is empty" if success else "pages are still in use"
            return common_pb2.FlushCacheResponse(success=success, message=message)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        async with answered(context):
            info = self._state.ready_engine().model_info
            defaults = {
                key: value
                for key, value in info.default_sampling_params.items()
                if key in _DEFAULT_SAMPLING_KEYS
            }
            folder = info.tokenizer_folder
            return pb.GetModelInfoResponse(
                model_path=info.model,
                is_generation=True,
                max_context_length=info.max_model_len,
                vocab_size=info.vocab_size,
                supports_vision=False,
                served_model_name=info.served_model_names[0],
                tokenizer_path=str(folder) if folder is not None else info.model,
                model_type=info.model_type,
                architectures=[info.architecture] if info.architecture else [],
                eos_token_ids=info.eos_token_ids,
                pad_token_id=info.pad_token_id or 0,
                bos_token_id=info.bos_token_id or 0,
                max_req_input_len=info.max_model_len - 1,
                default_sampling_params_json=json.dumps(defaults) if defaults else "",
            )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        async with answered(context):
            state = self._state
            engine = state.ready_engine()
            return pb.GetServerInfoResponse(
                active_requests=state.num_active,
                is_paused=False,
                last_receive_timestamp=state.last_receive_time,
                uptime_seconds=state.uptime_seconds,
                server_type=SERVER_TYPE,
                data_parallel_size=state.config.parallel.data_parallel_size,
                kv_cache_dtype=state.config.cache.kv_cache_dtype,
                block_size=engine.ready.page_size,
                model_dtype=engine.model_info.dtype,
                max_num_seqs=state.config.scheduler.max_num_seqs,
                constrained_decoding_start="",
            )

    async def GetLoads(
        self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadsResponse:
        async with answered(context):
            if request.HasField("dp_rank") and request.dp_rank != 0:
                raise InvalidRequestError(
                    "dp_rank", f"must be 0: there is one rank, got {request.dp_rank}"
                )
            stats = self._state.ready_engine().stats
            usage = stats.num_pages_used / stats.num_pages_total if stats.num_pages_total else 0.0
            max_running = self._state.config.scheduler.max_num_seqs
            hit_rate = stats.prefix_hits / stats.prefix_queries if stats.prefix_queries else 0.0
            load = pb.SchedulerLoad(
                dp_rank=0,
                num_running_reqs=stats.num_running,
                num_waiting_reqs=stats.num_waiting,
                num_total_reqs=stats.num_running + stats.num_waiting,
                num_used_tokens=stats.num_pages_used * stats.page_size,
                max_total_num_tokens=stats.num_pages_total * stats.page_size,
                token_usage=usage,
                gen_throughput=self._meter.tokens_per_second,
                cache_hit_rate=hit_rate,
                utilization=stats.num_running / max_running,
                max_running_requests=max_running,
                num_waiting_uncached_tokens=stats.num_waiting_tokens,
            )
            return pb.GetLoadsResponse(
                timestamp=datetime.now(UTC).isoformat(),
                version=__version__,
                dp_rank_count=1,
                loads=[load],
            )

    async def GetTokenizer(
        self, request: common_pb2.GetTokenizerRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[common_pb2.GetTokenizerChunk]:
        async with answered(context):
            engine = self._state.ready_engine()
            if self._bundle is None:  # built once; a second caller waits for the same task
                build = asyncio.to_thread(
                    build_bundle, engine.tokenizer, engine.model_info.tokenizer_folder
                )
                self._bundle = asyncio.create_task(build)
            bundle = await asyncio.shield(self._bundle)
            for data, sha256 in bundle.chunks():
                yield common_pb2.GetTokenizerChunk(data=data, sha256=sha256)

    async def Embed(self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext) -> NoReturn:
        await refuse(context, "the served model generates text; it gives no embeddings")

    async def StartProfile(
        self, request: common_pb2.StartProfileRequest, context: grpc.aio.ServicerContext
    ) -> NoReturn:
        await refuse(context, "profiling over gRPC is not part of this version")

    async def StopProfile(
        self, request: common_pb2.StopProfileRequest, context: grpc.aio.ServicerContext
    ) -> NoReturn:
        await refuse(context, "profiling over gRPC is not part of this version")

    async def SubscribeKvEvents(
        self, request: common_pb2.SubscribeKvEventsRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[common_pb2.KvEventBatch]:
        await refuse(context, "this version publishes no KV events")
        # never reached; makes this an async generator, as grpc.aio expects
        yield common_pb2.KvEventBatch()
