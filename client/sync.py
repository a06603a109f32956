"""The blocking client. Safe to share between threads."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

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
from hueshift.client.health import check_ready, not_ready
from hueshift.client.retry import Deadline, Reconnects, RetryPolicy
from hueshift.client.uploads import Source, read_source

T = TypeVar("T")


class Client:
    """Calls a Hueshift server. Every method raises a HueshiftClientError where the call fails.

    Calls that fail with an error the server marks as retryable are repeated within their time; calls that change
    something carry an idempotency key, so a repeat does nothing twice. `timeout` is that time in seconds,
    `file_timeout` that of calls that carry pictures to learn from or adapter files; `generate` takes one of its own,
    and a watch has none.
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
        self._channel = connection.open()
        self._stubs = Stubs(self._channel)
        self._retry = retry or RetryPolicy()

    def close(self) -> None:
        """Close the channel; running calls are cancelled."""
        self._channel.close()

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the channel."""
        self.close()

    def wait_until_ready(self, seconds: float = 60.0, service: str = "") -> None:
        """Return once the server serves `service` (empty: all of it). Raises Unavailable after `seconds`."""
        deadline = Deadline(seconds)
        last = ""
        while (left := deadline.remaining()) is None or left > 0:
            last = check_ready(self._channel, service, self._metadata, left)
            if not last:
                return
            time.sleep(min(0.2, deadline.remaining() or 0.0))
        raise not_ready(seconds, last)

    def generate(self, prompt: str, **options: Unpack[GenerateOptions]) -> Generator[GenerateEvent, None, None]:
        """Yield what happens: Queued, Progress, Preview, Picture, Finished. Closing the iterator cancels the call."""
        request = generate_request(prompt, **options)
        deadline = Deadline(options.get("timeout"))
        for failed in count(1):
            begun = False
            call = self._stubs.generation.Generate(request, timeout=deadline.remaining(), metadata=self._metadata)
            try:
                for response in call:
                    begun = True
                    event = read_event(response)
                    if event is not None:
                        yield event
            except grpc.RpcError as rpc_error:
                # Once an event came, a repeat would show its beginning twice.
                self._wait_or_raise(rpc_error, failed if not begun else self._retry.attempts, deadline)
            else:
                return
            finally:
                call.cancel()

    def generate_images(self, prompt: str, **options: Unpack[GenerateOptions]) -> list[Picture]:
        """Return the finished pictures, in order."""
        with closing(self.generate(prompt, **options)) as events:
            return sorted((e for e in events if isinstance(e, Picture)), key=lambda picture: picture.index)

    def fine_tune(self, pictures: Sequence[Source], **options: Unpack[jobs.FineTuneOptions]) -> jobs.FineTune:
        """Queue a job that learns an adapter from the pictures (paths or bytes), and return it."""
        return self._upload(jobs.create_call(pictures, **options))

    def get_job(self, name: str) -> jobs.FineTune:
        """Return a job."""
        return self._unary(jobs.get_call(name))

    def list_jobs(self, states: Sequence[JobState] = (), page_size: int = 0) -> Iterator[jobs.FineTune]:
        """Yield the tenant's jobs, newest first, fetching pages as needed."""
        return self._pages(jobs.list_call(states, page_size))

    def cancel_job(self, job: str | jobs.FineTune) -> jobs.FineTune:
        """Ask a job to stop, and return it."""
        return self._unary(jobs.cancel_call(jobs.name_of(job)))

    def retry_job(self, job: str | jobs.FineTune) -> jobs.FineTune:
        """Queue a failed job again, from its last checkpoint, and return it; the server says which can be retried."""
        return self._unary(jobs.retry_call(jobs.name_of(job)))

    def delete_job(self, job: str | jobs.FineTune) -> jobs.DeletedJob:
        """Remove a job that waits or has ended, with its pictures, samples and checkpoints; its adapter stays."""
        return self._unary(jobs.delete_call(jobs.name_of(job)))

    def watch(self, job: str | jobs.FineTune, after_sequence: int = 0) -> Generator[jobs.JobEvent, None, None]:
        """Yield a job's events after a sequence number until it ends, across lost connections and server restarts."""
        cursor = jobs.WatchCursor(jobs.name_of(job), after_sequence)
        reconnects = Reconnects(self._retry)
        while not cursor.ended:
            failure: HueshiftClientError | None = None
            reconnects.opened()
            call = self._stubs.finetune.WatchFineTune(cursor.request(), metadata=self._metadata)
            try:
                for response in call:
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
                time.sleep(delay)

    def wait_for_job(
        self, job: str | jobs.FineTune, on_event: Callable[[jobs.JobEvent], None] | None = None
    ) -> jobs.FineTune:
        """Watch a job to its end and return it. Raises FineTuneFailed unless it succeeded."""
        for event in self.watch(job):
            if on_event is not None:
                on_event(event)
        return jobs.succeeded(self.get_job(jobs.name_of(job)))

    def import_adapter(
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
        return self._upload(
            adapters.import_call(
                read_source(source),
                adapter_id=adapter_id,
                display_name=display_name,
                labels=labels,
                idempotency_key=idempotency_key,
                conversion=conversion,
            )
        )

    def export_adapter(
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

        def attempt(seconds: float | None) -> adapters.ExportedAdapter:
            assembly = adapters.ExportAssembly(form)
            request = adapters.export_request(name, revision, form, partial)
            for message in self._stubs.adapters.ExportAdapter(request, timeout=seconds, metadata=self._metadata):
                assembly.take(message)
            return assembly.finish(revision)

        return self._repeat(attempt, self._times.files)

    def get_adapter(self, name: str) -> adapters.Adapter:
        """Return an adapter's record."""
        return self._unary(adapters.get_call(name))

    def list_adapters(self, labels: Mapping[str, str] | None = None, page_size: int = 0) -> Iterator[adapters.Adapter]:
        """Yield the tenant's adapters that carry the labels, newest first, fetching pages as needed."""
        return self._pages(adapters.list_call(labels, page_size))

    def update_adapter(
        self, name: str, *, display_name: str | None = None, labels: Mapping[str, str] | None = None
    ) -> adapters.Adapter:
        """Change the display name or the labels; None leaves as is."""
        return self._unary(adapters.update_call(name, display_name=display_name, labels=labels))

    def delete_adapter(self, name: str) -> adapters.Deleted:
        """Remove an adapter with all its revisions and files, and its ended jobs."""
        return self._unary(adapters.delete_call(name))

    def storage(self) -> adapters.StorageUse:
        """Return what your adapters and training pictures take, and how much they may."""
        return self._unary(adapters.storage_call())

    def combine_adapters(
        self,
        operation: Operation,
        *,
        adapter_id: str = "",
        display_name: str = "",
        labels: Mapping[str, str] | None = None,
        idempotency_key: str = "",
    ) -> CombinedAdapter:
        """Store a sum, interpolation or block mix of adapters as a new adapter, or a new revision of one."""
        return self._unary(
            combine_call(
                operation,
                adapter_id=adapter_id,
                display_name=display_name,
                labels=labels,
                idempotency_key=idempotency_key,
            )
        )

    def warm_adapter(self, name: str, *, revision: int = 0, pin: bool | None = None) -> adapters.Warmed:
        """Load an adapter before it is needed; True pins it, False unpins it, None leaves the pin."""
        return self._unary(adapters.warm_call(name, revision=revision, pin=pin))

    def model(self, name: str = "") -> models.Model:
        """Return a base model with its defaults and limits; an empty name is the default one."""
        return self._unary(models.get_call(name))

    def list_models(self) -> Iterator[models.Model]:
        """Yield the base models."""
        return self._pages(models.list_call(0))

    def _unary(self, call: Unary[Any, Any, T]) -> T:
        method = call.method(self._stubs)
        answer = self._repeat(
            lambda seconds: method(call.request, timeout=seconds, metadata=self._metadata), self._times.unary
        )
        return call.decode(answer)

    def _upload(self, call: Upload[Any, Any, T]) -> T:
        method = call.method(self._stubs)
        answer = self._repeat(
            lambda seconds: method(call.messages(), timeout=seconds, metadata=self._metadata), self._times.files
        )
        return call.decode(answer)

    def _pages(self, paged: Paged[T]) -> Iterator[T]:
        token = ""
        while True:
            page = self._unary(paged(token))
            yield from page.items
            token = page.next_token
            if not token:
                return

    def _repeat(self, attempt: Callable[[float | None], T], seconds: float) -> T:
        deadline, failed = Deadline(seconds), 0
        while True:
            try:
                return attempt(deadline.remaining())
            except grpc.RpcError as rpc_error:
                failed += 1
                self._wait_or_raise(rpc_error, failed, deadline)

    def _wait_or_raise(self, rpc_error: grpc.RpcError, failed: int, deadline: Deadline) -> None:
        failure = from_rpc_error(rpc_error)
        delay = self._retry.delay(failed, failure, deadline.remaining())
        if delay is None:
            raise failure from rpc_error
        time.sleep(delay)
