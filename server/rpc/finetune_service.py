"""FineTuneService: the jobs of the caller's tenant. Uploads end on disk, jobs in the table; workers do the rest."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import grpc
import structlog

from hueshift.adapters.errors import HueshiftError, InvalidArgument, Unavailable
from hueshift.server.file_threads import FileThreads
from hueshift.server.ingestion import PictureLimits
from hueshift.server.job_folders import JobFolders
from hueshift.server.job_news import JobNews
from hueshift.server.logs import tenant_hash
from hueshift.server.rpc.call import current_call
from hueshift.server.rpc.finetune_messages import read_priority, read_spec, read_states, to_event, to_message, to_plan
from hueshift.server.rpc.finetune_pictures import ingest_pictures
from hueshift.server.rpc.finetune_targets import TargetFit
from hueshift.server.rpc.finetune_upload import announced_bytes, receive_pictures, receive_spec
from hueshift.server.rpc.names import adapter_name, make_id, parse_fine_tune_name
from hueshift.server.rpc.pages import check_page_size, decode_token, encode_token
from hueshift.server.settings import LimitSettings
from hueshift.server.store.idempotency import check_key, hash_request
from hueshift.server.store.job_records import JobEvent, JobRecord, NewJob
from hueshift.server.store.job_removal import DeletedJob, JobRemoval
from hueshift.server.store.job_retry import not_retryable
from hueshift.server.store.job_store import JobStore
from hueshift.server.tenant_turns import TenantTurns
from hueshift.training.cost import Cost
from hueshift.training.spec import TrainingSpec
from hueshift.v1 import finetune_pb2 as pb
from hueshift.v1 import finetune_pb2_grpc

P = ParamSpec("P")
T = TypeVar("T")
_LOG = structlog.get_logger()
# Each decodes in a process of its own; more at once would only take the processor from serving.
_INGESTIONS = 2
_EVENTS_PER_READ = 100


class FineTuneService(finetune_pb2_grpc.FineTuneServiceServicer):
    """Queues, shows, cancels, retries and deletes jobs.

    `check_words` raises InvalidArgument when the base model's tokenizer cannot hold a spec's identifiers, `fit_targets`
    when this server could not serve what the job makes; `estimate` tells what a job costs, if that is known; `on_retry`
    hears of every failed job that is queued again.
    """

    def __init__(
        self,
        jobs: JobStore,
        folders: JobFolders,
        limits: LimitSettings,
        *,
        default_identifier: str,
        check_words: Callable[[TrainingSpec], None],
        fit_targets: TargetFit,
        estimate: Callable[[TrainingSpec], Cost | None],
        removal: JobRemoval,
        on_retry: Callable[[], object] = lambda: None,
        files: FileThreads | None = None,
    ) -> None:
        self._jobs, self._removal = jobs, removal
        self._news = JobNews(jobs.sequences)
        self._folders = folders
        # What moves pictures waits there.
        self._files = files or FileThreads()
        self._limits = limits
        self._pictures = PictureLimits(max_bytes=limits.max_picture_bytes, max_pixels=limits.max_picture_pixels)
        self._default_identifier = default_identifier
        self._check_words, self._fit_targets, self._estimate = check_words, fit_targets, estimate
        self._on_retry = on_retry
        self._ingestions = TenantTurns(_INGESTIONS)
        self._unfinished: set[asyncio.Task[Any]] = set()

    async def CreateFineTune(
        self,
        request_iterator: AsyncIterator[pb.CreateFineTuneRequest],
        context: "grpc.aio.ServicerContext[Any, Any]",
    ) -> pb.CreateFineTuneResponse:
        """Queue a job; see the contract."""
        tenant = current_call().tenant
        messages = aiter(request_iterator)
        message = await receive_spec(messages, self._limits)
        spec, priority = read_spec(message, self._default_identifier), read_priority(message)
        self._check_words(spec)
        asked = {field.name for field, _ in message.settings.ListFields()}
        spec = self._fit_targets(spec, asked, message.allow_unserved)
        cost = await asyncio.to_thread(self._estimate, spec)
        if message.validate_only:
            adapter = adapter_name(tenant, message.adapter_id) if message.adapter_id else ""
            return pb.CreateFineTuneResponse(fine_tune=to_plan(spec, adapter, cost, priority))
        limit, size = self._limits.tenant_queued_jobs, announced_bytes(message)
        await asyncio.to_thread(self._jobs.check_quota, tenant, limit, message.idempotency_key, size)
        staged = self._folders.stage()
        try:
            hashes = await receive_pictures(messages, message, staged)
            request_hash = hash_request([_without_key(message), *hashes])
            known = await asyncio.to_thread(self._jobs.recall, tenant, message.idempotency_key, request_hash)
            if known is None:
                async with self._ingestions.taken(tenant):
                    await ingest_pictures(staged, len(spec.captions), spec.masked_pictures, self._pictures)
        except BaseException:
            self._folders.discard(staged)
            raise
        if known is not None:
            self._folders.discard(staged)
            return pb.CreateFineTuneResponse(fine_tune=to_message(known, cost), replayed=True)
        job, replayed = await self._to_the_end(self._queue, tenant, message, spec, request_hash, staged)
        return pb.CreateFineTuneResponse(fine_tune=to_message(job, cost), replayed=replayed)

    async def GetFineTune(
        self, request: pb.GetFineTuneRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.GetFineTuneResponse:
        """Return a job."""
        tenant = current_call().tenant
        job = await asyncio.to_thread(self._jobs.get, tenant, parse_fine_tune_name(request.name, tenant))
        cost = await asyncio.to_thread(self._estimate, job.spec)
        return pb.GetFineTuneResponse(fine_tune=to_message(job, cost))

    async def ListFineTunes(
        self, request: pb.ListFineTunesRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.ListFineTunesResponse:
        """Return a page of jobs, newest first."""
        size = check_page_size(request.page_size)
        after = decode_token(request.page_token)
        states = read_states(request.states)
        tenant = current_call().tenant
        jobs = await asyncio.to_thread(self._jobs.list_jobs, tenant, size + 1, after, states)
        page = jobs[:size]
        token = encode_token(page[-1].created, page[-1].job_id) if len(jobs) > size else ""
        return pb.ListFineTunesResponse(fine_tunes=[to_message(job) for job in page], next_page_token=token)

    async def WatchFineTune(
        self, request: pb.WatchFineTuneRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> AsyncIterator[pb.WatchFineTuneResponse]:
        """Stream events until the one that ends the job. The table is the only source, so any server can answer."""
        tenant = current_call().tenant
        job_id = parse_fine_tune_name(request.name, tenant)
        after = request.after_sequence
        if after < 0:
            raise InvalidArgument.for_field("after_sequence", f"{after} given; allowed: 0 or a number seen before")
        while True:
            job, events = await asyncio.to_thread(self._read_events, tenant, job_id, after)
            if after > job.sequence:
                text = f"{after} given; allowed: 0 to {job.sequence}, the number of the job's newest event"
                raise InvalidArgument.for_field("after_sequence", text)
            for event in events:
                yield to_event(job, event)
                after = event.sequence
            if job.state.ended and after >= job.sequence:
                return
            if not events or after >= job.sequence:
                await self._news.wait(job_id, job.sequence)

    async def CancelFineTune(
        self, request: pb.CancelFineTuneRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.CancelFineTuneResponse:
        """Ask a job to stop."""
        tenant = current_call().tenant
        job = await self._files.run(self._cancel, tenant, parse_fine_tune_name(request.name, tenant))
        return pb.CancelFineTuneResponse(fine_tune=to_message(job))

    async def RetryFineTune(
        self, request: pb.RetryFineTuneRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.RetryFineTuneResponse:
        """Queue a failed job again; see the contract."""
        tenant, key = current_call().tenant, check_key(request.idempotency_key)
        job_id = parse_fine_tune_name(request.name, tenant)
        job, replayed = await self._files.run(self._retry, tenant, job_id, key)
        return pb.RetryFineTuneResponse(fine_tune=to_message(job), replayed=replayed)

    async def DeleteFineTune(
        self, request: pb.DeleteFineTuneRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> pb.DeleteFineTuneResponse:
        """Remove a job with its pictures; see the contract."""
        tenant, key = current_call().tenant, check_key(request.idempotency_key)
        job_id = parse_fine_tune_name(request.name, tenant)
        deleted = await self._to_the_end(self._delete, tenant, job_id, key)
        return pb.DeleteFineTuneResponse(events=deleted.events, picture_bytes=deleted.picture_bytes)

    async def _to_the_end(self, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
        """Run in a thread, to the end even if the caller leaves: no job may stand without its folder, nor inversely."""
        task = asyncio.create_task(self._files.run(work, *arguments, **named))
        self._unfinished.add(task)
        task.add_done_callback(self._ended)
        return await asyncio.shield(task)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._unfinished.discard(task)
        # Read, so that an error whose caller has left is not reported as forgotten; the caller, if there, raises it.
        if not task.cancelled() and task.exception() is not None:
            _LOG.info("job.change_failed", error=type(task.exception()).__name__)

    def _queue(
        self, tenant: str, message: pb.FineTuneSpec, spec: TrainingSpec, request_hash: str, staged: Path
    ) -> tuple[JobRecord, bool]:
        """Give the pictures to a job and queue it. Owns the staged folder."""
        job_id = make_id("ft")
        new = NewJob(
            job_id=job_id,
            tenant=tenant,
            spec=spec,
            adapter_id=message.adapter_id or make_id("adapter"),
            display_name=message.display_name,
            labels=dict(message.labels),
            priority=read_priority(message),
            picture_bytes=self._folders.stored_bytes(staged),
        )
        try:
            # The folder first: a worker may take the job the moment its row is there.
            self._folders.adopt(staged, job_id)
        except BaseException:
            self._folders.remove(job_id)
            raise
        finally:
            self._folders.discard(staged)
        try:
            job, replayed = self._jobs.create(
                new,
                tenant_limit=self._limits.tenant_queued_jobs,
                idempotency_key=message.idempotency_key,
                request_hash=request_hash,
            )
        except HueshiftError as error:
            # A database that is lost while it commits may have the job all the same, and another call with the key
            # would be told of it: then its pictures must be there. Without a row they go with the next sweep.
            if not isinstance(error, Unavailable):
                self._folders.remove(job_id)
            raise
        if job.job_id != job_id:
            self._folders.remove(job_id)
        _LOG.info(
            "job.queued",
            job=job.job_id,
            tenant_hash=tenant_hash(tenant),
            method=spec.method,
            pictures=len(spec.captions),
            steps=spec.steps,
            replayed=replayed,
        )
        return job, replayed

    def _read_events(self, tenant: str, job_id: str, after: int) -> tuple[JobRecord, list[JobEvent]]:
        # The job first: once it has ended, all of its events are there to be read.
        job = self._jobs.get(tenant, job_id)
        return job, self._jobs.events(job_id, after, _EVENTS_PER_READ) if job.sequence > after else []

    def _cancel(self, tenant: str, job_id: str) -> JobRecord:
        job = self._jobs.cancel(tenant, job_id)
        # A failed job is returned as it is, and may be queued again before its folder were gone.
        if job.state.ended and not self._jobs.can_retry(job):
            self._folders.end(job_id)
        return job

    def _delete(self, tenant: str, job_id: str, key: str) -> DeletedJob:
        deleted = self._removal.delete(tenant, job_id, key)
        # Rows first: nothing may take a job whose pictures are going.
        self._folders.remove(job_id)
        _LOG.info("job.deleted", job=job_id, tenant_hash=tenant_hash(tenant), events=deleted.events)
        return deleted

    def _retry(self, tenant: str, job_id: str, key: str) -> tuple[JobRecord, bool]:
        job = self._jobs.get(tenant, job_id)
        # Looked at first, since nothing removes the files of a job that can be retried.
        if self._jobs.can_retry(job) and not self._folders.holds_inputs(job_id, len(job.spec.captions)):
            raise not_retryable(job_id, "its pictures are gone; send it anew with its pictures")
        limit = self._limits.tenant_queued_jobs
        job, replayed = self._jobs.retry_failed(tenant, job_id, tenant_limit=limit, idempotency_key=key)
        if not replayed:
            self._on_retry()
        _LOG.info("job.retried", job=job_id, tenant_hash=tenant_hash(tenant), step=job.step, replayed=replayed)
        return job, replayed


def _without_key(message: pb.FineTuneSpec) -> bytes:
    plain = pb.FineTuneSpec()
    plain.CopyFrom(message)
    plain.ClearField("idempotency_key")
    return plain.SerializeToString(deterministic=True)
