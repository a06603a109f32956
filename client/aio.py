"""The asyncio client: the same surface as the blocking one, every call awaited or iterated with `async for`."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack, cast

import grpc

from hueshift.client import adapters, jobs
from hueshift.client import model as models
from hueshift.client.calls import UNARY_SECONDS, UPLOAD_SECONDS, CallTimes, Paged, Stubs, Unary, Upload
from hueshift.client.choices import AdapterFormat, JobState
from hueshift.client.combination import CombinedAdapter, Operation, combine_call
from hueshift.client.connection import DEFAULT_ADDRESS, Connection, Tls
from hueshift.client.conversion import Conversion
from hueshift.client.errors import HueshiftClientError, from_rpc_error
from hueshift.client.generation import GenerateEvent, GenerateOptions, Picture, generate_request, read_event
from hueshift.client.health import check_ready_async, not_ready
from hueshift.client.retry import Deadline, Reconnects, RetryPolicy
from hueshift.client.uploads import Source, read_source

T = TypeVar("T")


class AsyncClient:
    """Calls a Hueshift server from the event loop it is made in.

    Every method raises a HueshiftClientError where the call fails. Calls that fail with an error the server marks as
    retryable are repeated within their time; calls that change something carry an idempotency key, so a repeat does
    nothing twice. `timeout` is that time in seconds, `file_timeout` that of calls that carry pictures to learn from or
    adapter files; `generate` takes one of its own, and a watch has none.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        api_key: str | None = None,
        *,
        tls: Tls | None = None,
        allow_plaintext: bool = False,
        retry: RetryPolicy | None = None,
        timeout: float = UNARY_SECONDS,
        file_timeout: float = UPLOAD_SECONDS,
    ) -> None:
        self._times = CallTimes(timeout, file_timeout)
        connection = Connection(address, api_key, tls, allow_plaintext)
        self._metadata = connection.metadata()
        self._channel = connection.open_async()
        # The stubs are typed for a blocking channel; on this one their calls are awaited or iterated, hence Any below.
        self._stubs = Stubs(cast(grpc.Channel, self._channel))
        self._retry = retry or RetryPolicy()

    async def close(self) -> None:
        """Close the channel; running calls are cancelled."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        """Return the client."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the channel."""
        await self.close()

    async def wait_until_ready(self, seconds: float = 60.0, service: str = "") -> None:
        """Return once the server serves `service` (empty: all of it). Raises Unavailable after `seconds`."""
        deadline = Deadline(seconds)
        last = ""
        while (left := deadline.remaining()) is None or left > 0:
            last = await check_ready_async(self._channel, service, self._metadata, left)
            if not last:
                return
            await asyncio.sleep(min(0.2, deadline.remaining() or 0.0))
        raise not_ready(seconds, last)

    async def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> AsyncGenerator[GenerateEvent, None]:
        """Yield what happens: Queued, Progress, Preview, Picture, Finished. Closing the iterator cancels the call."""
        request = generate_request(prompt, **options)
        deadline = Deadline(options.get("timeout"))
        for failed in count(1):
            begun = False
            call: Any = self._stubs.generation.Generate(request, timeout=deadline.remaining(), metadata=self._metadata)
            try:
                async for response in call:
                    begun = True
                    event = read_event(response)
                    if event is not None:
                        yield event
            except grpc.RpcError as rpc_error:
                # Once an event came, a repeat would show its beginning twice.
                await self._wait_or_raise(rpc_error, failed if not begun else self._retry.attempts, deadline)
            else:
                return
            finally:
                call.cancel()

    async def generate_images(self, prompt: str, **options: Unpack[GenerateOptions]) -> list[Picture]:
        """Return the finished pictures, in order."""
        async with aclosing(self.generate(prompt, **options)) as events:
            return sorted([e async for e in events if isinstance(e, Picture)], key=lambda picture: picture.index)

    async def fine_tune(self, pictures: Sequence[Source], **options: Unpack[jobs.FineTuneOptions]) -> jobs.FineTune:
        """Queue a job that learns an adapter from the pictures (paths or bytes), and return it."""
        return await self._upload(await asyncio.to_thread(jobs.create_call, pictures, **options))

    async def get_job(self, name: str) -> jobs.FineTune:
        """Return a job."""
        return await self._unary(jobs.get_call(name))

    def list_jobs(self, states: Sequence[JobState] = (), page_size: int = 0) -> AsyncIterator[jobs.FineTune]:
        """Yield the tenant's jobs, newest first, fetching pages as needed."""
        return self._pages(jobs.list_call(states, page_size))

    async def cancel_job(self, job: str | jobs.FineTune) -> jobs.FineTune:
        """Ask a job to stop, and return it."""
        return await self._unary(jobs.cancel_call(jobs.name_of(job)))

    async def retry_job(self, job: str | jobs.FineTune) -> jobs.FineTune:
        """Queue a failed job again, from its last checkpoint, and return it; the server says which can be retried."""
        return await self._unary(jobs.retry_call(jobs.name_of(job)))

    async def delete_job(self, job: str | jobs.FineTune) -> jobs.DeletedJob:
        """Remove a job that waits or has ended, with its pictures, samples and checkpoints; its adapter stays."""
        return await self._unary(jobs.delete_call(jobs.name_of(job)))

    async def watch(self, job: str | jobs.FineTune, after_sequence: int = 0) -> AsyncGenerator[jobs.JobEvent, None]:
        """Yield a job's events after a sequence number until it ends, across lost connections and server restarts."""
        cursor = jobs.WatchCursor(jobs.name_of(job), after_sequence)
        reconnects = Reconnects(self._retry)
        while not cursor.ended:
            failure: HueshiftClientError | None = None
            reconnects.opened()
            call: Any = self._stubs.finetune.WatchFineTune(cursor.request(), metadata=self._metadata)
            try:
                async for response in call:
                    event = cursor.take(response)
                    reconnects.heard()
                    if event is not None:
                        yield event
            except grpc.RpcError as rpc_error:
                failure = from_rpc_error(rpc_error)
            finally:
                call.cancel()
            if not cursor.ended:
                delay = reconnects.delay(failure)
                if delay is None:
                    raise failure or jobs.watch_ended_early(jobs.name_of(job))
                await asyncio.sleep(delay)

    async def wait_for_job(
        self, job: str | jobs.FineTune, on_event: Callable[[jobs.JobEvent], None] | None = None
    ) -> jobs.FineTune:
        """Watch a job to its end and return it. Raises FineTuneFailed unless it succeeded."""
        async for event in self.watch(job):
            if on_event is not None:
                on_event(event)
        return jobs.succeeded(await self.get_job(jobs.name_of(job)))

    async def import_adapter(
        self,
        source: Source,
        *,
        adapter_id: str = "",
        display_name: str = "",
        labels: Mapping[str, str] | None = None,
        idempotency_key: str = "",
        conversion: Conversion | None = None,
    ) -> adapters.ImportedAdapter:
        """Store an adapter file (a path or its bytes) as a new adapter, or a new revision of an existing one.

        Files of other programs are converted, as `conversion` says; the answer's report tells how.
        """
        return await self._upload(
            adapters.import_call(
                await asyncio.to_thread(read_source, source),
                adapter_id=adapter_id,
                display_name=display_name,
                labels=labels,
                idempotency_key=idempotency_key,
                conversion=conversion,
            )
        )

    async def export_adapter(
        self,
        name: str,
        revision: int = 0,
        *,
        form: AdapterFormat = AdapterFormat.HUESHIFT,
        partial: bool = False,
    ) -> adapters.ExportedAdapter:
        """Return an adapter's file; revision 0 is the newest. Raises CorruptAnswer where the hash does not match.

        Another `form` is what another program reads; with `partial` it may leave out what it cannot hold.
        """

        async def attempt(seconds: float | None) -> adapters.ExportedAdapter:
            assembly = adapters.ExportAssembly(form)
            request = adapters.export_request(name, revision, form, partial)
            call: Any = self._stubs.adapters.ExportAdapter(request, timeout=seconds, metadata=self._metadata)
            async for message in call:
                assembly.take(message)
            return assembly.finish(revision)

        return await self._repeat(attempt, self._times.files)

    async def get_adapter(self, name: str) -> adapters.Adapter:
        """Return an adapter's record."""
        return await self._unary(adapters.get_call(name))

    def list_adapters(
        self, labels: Mapping[str, str] | None = None, page_size: int = 0
    ) -> AsyncIterator[adapters.Adapter]:
        """Yield the tenant's adapters that carry the labels, newest first, fetching pages as needed."""
        return self._pages(adapters.list_call(labels, page_size))

    async def update_adapter(
        self, name: str, *, display_name: str | None = None, labels: Mapping[str, str] | None = None
    ) -> adapters.Adapter:
        """Change the display name or the labels; None leaves as is."""
        return await self._unary(adapters.update_call(name, display_name=display_name, labels=labels))

    async def delete_adapter(self, name: str) -> adapters.Deleted:
        """Remove an adapter with all its revisions and files, and its ended jobs."""
        return await self._unary(adapters.delete_call(name))

    async def storage(self) -> adapters.StorageUse:
        """Return what your adapters and training pictures take, and how much they may."""
        return await self._unary(adapters.storage_call())

    async def combine_adapters(
        self,
        operation: Operation,
        *,
        adapter_id: str = "",
        display_name: str = "",
        labels: Mapping[str, str] | None = None,
        idempotency_key: str = "",
    ) -> CombinedAdapter:
        """Store a sum, interpolation or block mix of adapters as a new adapter, or a new revision of one."""
        return await self._unary(
            combine_call(
                operation,
                adapter_id=adapter_id,
                display_name=display_name,
                labels=labels,
                idempotency_key=idempotency_key,
            )
        )

    async def warm_adapter(self, name: str, *, revision: int = 0, pin: bool | None = None) -> adapters.Warmed:
        """Load an adapter before it is needed; True pins it, False unpins it, None leaves the pin."""
        return await self._unary(adapters.warm_call(name, revision=revision, pin=pin))

    async def model(self, name: str = "") -> models.Model:
        """Return a base model with its defaults and limits; an empty name is the default one."""
        return await self._unary(models.get_call(name))

    def list_models(self) -> AsyncIterator[models.Model]:
        """Yield the base models."""
        return self._pages(models.list_call(0))

    async def _unary(self, call: Unary[Any, Any, T]) -> T:
        method: Any = call.method(self._stubs)
        answer = await self._repeat(
            lambda seconds: method(call.request, timeout=seconds, metadata=self._metadata), self._times.unary
        )
        return call.decode(answer)

    async def _upload(self, call: Upload[Any, Any, T]) -> T:
        method: Any = call.method(self._stubs)
        answer = await self._repeat(
            lambda seconds: method(call.messages(), timeout=seconds, metadata=self._metadata), self._times.files
        )
        return call.decode(answer)

    async def _pages(self, paged: Paged[T]) -> AsyncIterator[T]:
        token = ""
        while True:
            page = await self._unary(paged(token))
            for item in page.items:
                yield item
            token = page.next_token
            if not token:
                return

    async def _repeat(self, attempt: Callable[[float | None], Awaitable[T]], seconds: float) -> T:
        deadline, failed = Deadline(seconds), 0
        while True:
            try:
                return await attempt(deadline.remaining())
            except grpc.RpcError as rpc_error:
                failed += 1
                await self._wait_or_raise(rpc_error, failed, deadline)

    async def _wait_or_raise(self, rpc_error: grpc.RpcError, failed: int, deadline: Deadline) -> None:
        failure = from_rpc_error(rpc_error)
        delay = self._retry.delay(failed, failure, deadline.remaining())
        if delay is None:
            raise failure from rpc_error
        await asyncio.sleep(delay)
