"""A small Hueshift server in memory, over real gRPC, that fails exactly as a test tells it to."""

import threading
from collections import defaultdict, deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from io import BytesIO
from typing import Any, NoReturn

import grpc
from fake_messages import combined_message, model_message
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from PIL import Image

from hueshift.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    finetune_pb2,
    finetune_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    model_pb2,
    model_pb2_grpc,
)

Context = grpc.ServicerContext
State = finetune_pb2.FineTuneState


@dataclass(frozen=True)
class Failure:
    """One answer that is an error. `after` answers of a stream go out before it."""

    code: grpc.StatusCode
    message: str = "scripted failure"
    reason: str = "SCRIPTED"
    retryable: bool = False
    retry_after: float | None = None
    fields: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    resource: str = ""
    bare: bool = False
    after: int = 0

    def abort(self, context: Context) -> NoReturn:
        """End the call."""
        if not self.bare:
            status = status_pb2.Status(code=self.code.value[0], message=self.message)
            for detail in self._details():
                packed = AnyMessage()
                packed.Pack(detail)
                status.details.append(packed)
            context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(self.code, self.message)
        raise AssertionError("abort returned")

    def _details(self) -> Iterator[Message]:
        retryable = {"retryable": "true" if self.retryable else "false"}
        yield error_details_pb2.ErrorInfo(
            reason=self.reason, domain="hueshift", metadata={**self.metadata, **retryable}
        )
        if self.retry_after is not None:
            info = error_details_pb2.RetryInfo()
            info.retry_delay.FromMilliseconds(round(self.retry_after * 1000))
            yield info
        if self.fields:
            yield error_details_pb2.BadRequest(
                field_violations=[
                    error_details_pb2.BadRequest.FieldViolation(field=name, description=text)
                    for name, text in self.fields.items()
                ]
            )
        if self.resource:
            yield error_details_pb2.ResourceInfo(resource_name=self.resource)


class FakeService(
    generation_pb2_grpc.GenerationServiceServicer,
    adapters_pb2_grpc.AdapterServiceServicer,
    finetune_pb2_grpc.FineTuneServiceServicer,
    model_pb2_grpc.ModelServiceServicer,
):
    """All services in one. `failures[method]` are answered first, in order; `seen[method]` keeps the requests."""

    def __init__(self) -> None:
        self.failures: dict[str, deque[Failure]] = defaultdict(deque)
        self.seen: dict[str, list[Any]] = defaultdict(list)
        self.metadata: list[dict[str, str | bytes]] = []
        self.times: list[float] = []  # Seconds that each call had left when it came.
        self.adapters: dict[str, adapters_pb2.Adapter] = {}
        self.files: dict[str, bytes] = {}
        self.corrupt_exports = False
        self.report: adapters_pb2.ImportReport | None = None
        self.cancelled = threading.Event()  # Set when a caller gives up a hanging Generate.
        self.hang_generate = False
        self.job = job_message(State.FINE_TUNE_STATE_QUEUED)
        self.events: list[finetune_pb2.WatchFineTuneResponse] = []
        # Events per watch before the stream just ends, as a draining server does; None sends all.
        self.watch_limit: deque[int] = deque()

    def fail(self, method: str, *failures: Failure) -> None:
        """Let the next calls of `method` fail."""
        self.failures[method].extend(failures)

    def Generate(
        self, request: generation_pb2.GenerateRequest, context: Context
    ) -> Iterator[generation_pb2.GenerateResponse]:
        """Queue, one progress per picture, the pictures, the end."""
        failure = self._begin("Generate", request, context)
        if self.hang_generate:
            context.add_callback(self.cancelled.set)
        count = request.count or 1
        for number, answer in enumerate(_generation(request, count)):
            if failure is not None and number == failure.after:
                failure.abort(context)
            yield answer
            if self.hang_generate:
                self.cancelled.wait(30)

    def ImportAdapter(
        self, request_iterator: Iterator[adapters_pb2.ImportAdapterRequest], context: Context
    ) -> adapters_pb2.ImportAdapterResponse:
        """Keep the file."""
        messages = list(request_iterator)
        self._fail_or_go("ImportAdapter", messages, context)
        spec = messages[0].spec
        data = b"".join(message.chunk for message in messages[1:])
        adapter = adapters_pb2.Adapter(
            name=f"tenants/local/adapters/{spec.adapter_id or 'made-up'}",
            display_name=spec.display_name or spec.adapter_id,
            kind=adapters_pb2.ADAPTER_KIND_SPECTRAL,
            revision=1,
            content_hash=sha256(data).hexdigest(),
            size_bytes=len(data),
            method="import",
            labels=spec.labels,
        )
        adapter.create_time.FromSeconds(1_700_000_000)
        adapter.update_time.FromSeconds(1_700_000_000)
        self.adapters[adapter.name] = adapter
        self.files[adapter.name] = data
        return adapters_pb2.ImportAdapterResponse(adapter=adapter, report=self.report)

    def GetStorage(self, request: adapters_pb2.GetStorageRequest, context: Context) -> adapters_pb2.GetStorageResponse:
        """Count the files; a megabyte is allowed."""
        self._fail_or_go("GetStorage", request, context)
        held = sum(map(len, self.files.values()))
        return adapters_pb2.GetStorageResponse(adapter_bytes=held, picture_bytes=7, limit_bytes=1024 * 1024)

    def ExportAdapter(
        self, request: adapters_pb2.ExportAdapterRequest, context: Context
    ) -> Iterator[adapters_pb2.ExportAdapterResponse]:
        """Send the record, then the file in pieces."""
        self._fail_or_go("ExportAdapter", request, context)
        adapter = self._find(request.name, context)
        data = self.files[adapter.name]
        yield adapters_pb2.ExportAdapterResponse(adapter=adapter)
        for begin in range(0, len(data) - self.corrupt_exports, 1000):
            yield adapters_pb2.ExportAdapterResponse(chunk=data[begin : begin + 1000])

    def GetAdapter(self, request: adapters_pb2.GetAdapterRequest, context: Context) -> adapters_pb2.GetAdapterResponse:
        """Return one."""
        self._fail_or_go("GetAdapter", request, context)
        return adapters_pb2.GetAdapterResponse(adapter=self._find(request.name, context))

    def ListAdapters(
        self, request: adapters_pb2.ListAdaptersRequest, context: Context
    ) -> adapters_pb2.ListAdaptersResponse:
        """Return a page; a token is the number of the next one."""
        self._fail_or_go("ListAdapters", request, context)
        begin, size = int(request.page_token or 0), request.page_size or 50
        found = list(self.adapters.values())
        token = str(begin + size) if begin + size < len(found) else ""
        return adapters_pb2.ListAdaptersResponse(adapters=found[begin : begin + size], next_page_token=token)

    def UpdateAdapter(
        self, request: adapters_pb2.UpdateAdapterRequest, context: Context
    ) -> adapters_pb2.UpdateAdapterResponse:
        """Change what the mask names."""
        self._fail_or_go("UpdateAdapter", request, context)
        adapter = self._find(request.adapter.name, context)
        request.update_mask.MergeMessage(request.adapter, adapter)
        return adapters_pb2.UpdateAdapterResponse(adapter=adapter)

    def DeleteAdapter(
        self, request: adapters_pb2.DeleteAdapterRequest, context: Context
    ) -> adapters_pb2.DeleteAdapterResponse:
        """Forget one."""
        self._fail_or_go("DeleteAdapter", request, context)
        adapter = self._find(request.name, context)
        del self.adapters[adapter.name]
        return adapters_pb2.DeleteAdapterResponse(revisions=adapter.revision, bytes=adapter.size_bytes)

    def CombineAdapters(
        self, request: adapters_pb2.CombineAdaptersRequest, context: Context
    ) -> adapters_pb2.CombineAdaptersResponse:
        """Make up an answer."""
        self._fail_or_go("CombineAdapters", request, context)
        return combined_message(request)

    def WarmAdapter(
        self, request: adapters_pb2.WarmAdapterRequest, context: Context
    ) -> adapters_pb2.WarmAdapterResponse:
        """Mark one resident."""
        self._fail_or_go("WarmAdapter", request, context)
        adapter = self._find(request.name, context)
        loaded, adapter.resident = not adapter.resident, True
        if request.HasField("pin"):
            adapter.pinned = request.pin
        return adapters_pb2.WarmAdapterResponse(adapter=adapter, loaded=loaded)

    def CreateFineTune(
        self, request_iterator: Iterator[finetune_pb2.CreateFineTuneRequest], context: Context
    ) -> finetune_pb2.CreateFineTuneResponse:
        """Keep the messages."""
        self._fail_or_go("CreateFineTune", list(request_iterator), context)
        return finetune_pb2.CreateFineTuneResponse(fine_tune=self.job)

    def GetFineTune(
        self, request: finetune_pb2.GetFineTuneRequest, context: Context
    ) -> finetune_pb2.GetFineTuneResponse:
        """Return the job."""
        self._fail_or_go("GetFineTune", request, context)
        return finetune_pb2.GetFineTuneResponse(fine_tune=self.job)

    def ListFineTunes(
        self, request: finetune_pb2.ListFineTunesRequest, context: Context
    ) -> finetune_pb2.ListFineTunesResponse:
        """Return the job, if its state is asked for."""
        self._fail_or_go("ListFineTunes", request, context)
        wanted = not request.states or self.job.state in request.states
        return finetune_pb2.ListFineTunesResponse(fine_tunes=[self.job] if wanted else [])

    def WatchFineTune(
        self, request: finetune_pb2.WatchFineTuneRequest, context: Context
    ) -> Iterator[finetune_pb2.WatchFineTuneResponse]:
        """Send the events after the asked number, up to the scripted limit or failure."""
        failure = self._begin("WatchFineTune", request, context)
        limit = self.watch_limit.popleft() if self.watch_limit else len(self.events)
        sent = 0
        for event in self.events:
            if failure is not None and sent == failure.after:
                failure.abort(context)
            if event.sequence > request.after_sequence and sent < limit:
                sent += 1
                yield event
        if failure is not None:
            failure.abort(context)

    def CancelFineTune(
        self, request: finetune_pb2.CancelFineTuneRequest, context: Context
    ) -> finetune_pb2.CancelFineTuneResponse:
        """Cancel the job."""
        self._fail_or_go("CancelFineTune", request, context)
        self.job.state = State.FINE_TUNE_STATE_CANCELLED
        return finetune_pb2.CancelFineTuneResponse(fine_tune=self.job)

    def DeleteFineTune(
        self, request: finetune_pb2.DeleteFineTuneRequest, context: Context
    ) -> finetune_pb2.DeleteFineTuneResponse:
        """Say that something was removed."""
        self._fail_or_go("DeleteFineTune", request, context)
        return finetune_pb2.DeleteFineTuneResponse(events=5, picture_bytes=2048)

    def RetryFineTune(
        self, request: finetune_pb2.RetryFineTuneRequest, context: Context
    ) -> finetune_pb2.RetryFineTuneResponse:
        """Queue the job again."""
        self._fail_or_go("RetryFineTune", request, context)
        self.job.state = State.FINE_TUNE_STATE_QUEUED
        return finetune_pb2.RetryFineTuneResponse(fine_tune=self.job)

    def GetModel(self, request: model_pb2.GetModelRequest, context: Context) -> model_pb2.GetModelResponse:
        """Return the model."""
        self._fail_or_go("GetModel", request, context)
        return model_pb2.GetModelResponse(model=model_message())

    def ListModels(self, request: model_pb2.ListModelsRequest, context: Context) -> model_pb2.ListModelsResponse:
        """Return the model."""
        self._fail_or_go("ListModels", request, context)
        return model_pb2.ListModelsResponse(models=[model_message()])

    def _begin(self, method: str, request: object, context: Context) -> Failure | None:
        self.seen[method].append(request)
        self.metadata.append(dict(context.invocation_metadata() or ()))
        self.times.append(context.time_remaining())
        return self.failures[method].popleft() if self.failures[method] else None

    def _fail_or_go(self, method: str, request: object, context: Context) -> None:
        failure = self._begin(method, request, context)
        if failure is not None:
            failure.abort(context)

    def _find(self, name: str, context: Context) -> adapters_pb2.Adapter:
        found = self.adapters.get(name) or self.adapters.get(f"tenants/local/adapters/{name}")
        if found is None:
            Failure(
                grpc.StatusCode.NOT_FOUND, f"there is no adapter {name!r}", "ADAPTER_NOT_FOUND", resource=name
            ).abort(context)
        return found


@dataclass(frozen=True)
class FakeServer:
    """The service, its address and its health."""

    service: FakeService
    health: HealthServicer
    address: str


def start_fake_server() -> tuple[FakeServer, grpc.Server]:
    """Start it on a free loopback port, serving. The caller stops it."""
    service, health = FakeService(), HealthServicer()
    server = grpc.server(ThreadPoolExecutor(8), options=[("grpc.max_receive_message_length", 16 * 1024 * 1024)])
    generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, server)
    adapters_pb2_grpc.add_AdapterServiceServicer_to_server(service, server)
    finetune_pb2_grpc.add_FineTuneServiceServicer_to_server(service, server)
    model_pb2_grpc.add_ModelServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    health.set("", health_pb2.HealthCheckResponse.SERVING)
    return FakeServer(service, health, f"127.0.0.1:{port}"), server


def png(red: int = 200) -> bytes:
    """Return a small PNG."""
    buffer = BytesIO()
    Image.new("RGB", (8, 8), (red, 40, 40)).save(buffer, "PNG")
    return buffer.getvalue()


def job_message(state: State.ValueType, step: int = 0, sequence: int = 0) -> finetune_pb2.FineTune:
    """Return a job."""
    job = finetune_pb2.FineTune(
        name="tenants/local/fineTunes/job-1",
        state=state,
        method=finetune_pb2.FINE_TUNE_METHOD_SVDIFF,
        subject=finetune_pb2.FINE_TUNE_SUBJECT_STYLE,
        step=step,
        steps=4,
        adapter="tenants/local/adapters/style-1",
        sequence=sequence,
    )
    job.create_time.FromSeconds(1_700_000_000)
    if state == State.FINE_TUNE_STATE_SUCCEEDED:
        job.revision = 1
        job.scores.CopyFrom(finetune_pb2.FineTuneScores(clip_i=0.75, clip_t=0.25, clip_i_base=0.125))
    if state == State.FINE_TUNE_STATE_FAILED:
        job.error.CopyFrom(finetune_pb2.FineTuneError(reason="TRAINING_DIVERGED", message="the loss is not finite"))
    return job


def job_events(final: State.ValueType = State.FINE_TUNE_STATE_SUCCEEDED) -> list[finetune_pb2.WatchFineTuneResponse]:
    """Return a whole job's events: running, two of progress, a sample, the end."""
    events = [
        finetune_pb2.WatchFineTuneResponse(state_change=job_message(State.FINE_TUNE_STATE_RUNNING)),
        finetune_pb2.WatchFineTuneResponse(
            progress=finetune_pb2.FineTuneProgress(step=2, steps=4, loss=0.5, seconds_per_step=0.25)
        ),
        finetune_pb2.WatchFineTuneResponse(
            progress=finetune_pb2.FineTuneProgress(step=4, steps=4, loss=0.25, seconds_per_step=0.25)
        ),
        finetune_pb2.WatchFineTuneResponse(
            sample=finetune_pb2.FineTuneSample(step=4, prompt="a sks emoji", data=png())
        ),
        finetune_pb2.WatchFineTuneResponse(state_change=job_message(final, step=4, sequence=5)),
    ]
    for number, event in enumerate(events, start=1):
        event.sequence = number
        event.time.FromSeconds(1_700_000_000 + number)
    return events


def _generation(request: generation_pb2.GenerateRequest, count: int) -> Iterator[generation_pb2.GenerateResponse]:
    made = [
        generation_pb2.AppliedAdapter(adapter=use.adapter, revision=use.revision or 1, weight=use.weight)
        for use in request.adapters
    ]
    seeds = list(request.seeds) or [1]
    seeds += range(seeds[-1] + 1, seeds[-1] + 1 + count - len(seeds))
    yield generation_pb2.GenerateResponse(queued=generation_pb2.Queued(position=0, request_id="req-1"))
    for step in range(1, count + 1):
        yield generation_pb2.GenerateResponse(progress=generation_pb2.Progress(step=step, of=count))
    # Later pictures first: clients must not rely on the order of arrival.
    for index in reversed(range(count)):
        image = generation_pb2.Image(
            index=index, data=png(index), media_type="image/png", seed=seeds[index], adapters=made, plans=["dense"]
        )
        image.timings.denoise.FromMilliseconds(1500)
        yield generation_pb2.GenerateResponse(image=image)
    done = generation_pb2.Finished(images=count, request_id="req-1", truncated_tokens=len(request.prompt) // 100)
    yield generation_pb2.GenerateResponse(finished=done)
