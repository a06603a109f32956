"""2,000 random or damaged messages, adapter files and pictures against a live server: nothing may break it.

A call may succeed or be refused. It must not end INTERNAL or UNKNOWN, every refusal carries its details, and afterwards
the server is healthy, draws the same picture as before, and holds nothing.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any

import grpc
import psutil
import pytest
import pytest_asyncio
from google.protobuf.descriptor import MethodDescriptor
from google.rpc.error_details_pb2 import ErrorInfo
from google.rpc.status_pb2 import Status
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from PIL import Image
from random_messages import damage, random_message
from whole_server import LiveServer, RpcStubs, adapter_file, fake_parts, live_server

from hueshift.engines.base_model import BaseModel
from hueshift.v1 import adapters_pb2 as adapters_pb
from hueshift.v1 import finetune_pb2 as finetune_pb
from hueshift.v1 import generation_pb2, model_pb2

MESSAGES, ADAPTER_FILES, PICTURE_JOBS, PICTURES_PER_JOB = 1300, 400, 60, 5
CALLERS = 8
SECONDS = 20
# Streams that a valid request may keep open.
WATCHES = ("hueshift.v1.FineTuneService/WatchFineTune", "grpc.health.v1.Health/Watch")
BAD = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DATA_LOSS)


@pytest_asyncio.fixture
async def live(base_model: BaseModel, tmp_path: Path) -> AsyncIterator[LiveServer]:
    limits = {"max_steps": 3, "default_steps": 1, "max_count": 2, "max_size": 128, "tenant_queued_jobs": 100_000}
    async with live_server(tmp_path, fake_parts(base_model), limits=limits) as server:
        yield server


class Caller:
    """Calls methods by raw bytes with the blocking client, which never hides a server's status, and keeps score."""

    def __init__(self, live: LiveServer, key: str) -> None:
        self._channel = grpc.insecure_channel(live.addresses.grpc)
        self._metadata = (("authorization", f"Bearer {key}"),)
        self.codes: Counter[str] = Counter()
        self.wrong: list[str] = []

    def call(self, method: str, requests: Iterable[bytes], what: str) -> None:
        """Make one call; anything but an answer or a proper refusal is written down."""
        multi: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(f"/{method}")
        call: Any = multi(iter(list(requests)), timeout=0.2 if method in WATCHES else SECONDS, metadata=self._metadata)
        try:
            for _ in call:
                pass
            self.codes["OK"] += 1
        except grpc.RpcError as error:
            refused: Any = error
            code = refused.code()
            self.codes[code.name] += 1
            ours = method.startswith("hueshift.") and not (method in WATCHES and code.name == "DEADLINE_EXCEEDED")
            if code in BAD or (ours and not has_details(refused)):
                self.wrong.append(f"{what}: {code.name} {refused.details()}")

    def close(self) -> None:
        self._channel.close()


def has_details(error: Any) -> bool:
    packed = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin")
    return packed is not None and any(detail.Unpack(ErrorInfo()) for detail in Status.FromString(packed).details)


def contract() -> list[MethodDescriptor]:
    files: tuple[Any, ...] = (
        generation_pb2.DESCRIPTOR,
        adapters_pb.DESCRIPTOR,
        finetune_pb.DESCRIPTOR,
        model_pb2.DESCRIPTOR,
        health_pb2.DESCRIPTOR,
        reflection_pb2.DESCRIPTOR,
    )
    return [m for file in files for service in file.services_by_name.values() for m in service.methods]


def fuzz_messages(caller: Caller, seed: int, count: int) -> None:
    """Random messages, the same damaged, and bare noise, to every method in turn."""
    random = Random(seed)
    methods = contract()
    for number in range(count):
        chosen: Any = methods[number % len(methods)]
        method = f"{chosen.containing_service.full_name}/{chosen.name}"
        requests = []
        for _ in range(random.choice((0, 1, 1, 2, 4)) if chosen.client_streaming else 1):
            data = random_message(random, chosen.input_type).SerializeToString()
            style = random.random()
            requests.append(
                data
                if style < 0.6
                else damage(random, data)
                if style < 0.9
                else random.randbytes(random.randint(0, 200))
            )
        caller.call(method, requests, f"{method} {[request[:200].hex() for request in requests]}")


def fuzz_adapters(caller: Caller, seed: int, count: int, good: bytes) -> None:
    """Adapter files that are damaged anywhere, most of all in the header, or have another header altogether."""
    random = Random(seed)
    length = int.from_bytes(good[:8], "little")
    header, body = good[8 : 8 + length], good[8 + length :]
    for number in range(count):
        style = number % 4
        if style == 0:
            data = damage(random, good)
        elif style == 1:
            wrong = damage(random, header)
            data = len(wrong).to_bytes(8, "little") + wrong + body
        elif style == 2:
            wrong = json.dumps(edited(random, json.loads(header))).encode()
            data = len(wrong).to_bytes(8, "little") + wrong + body
        else:
            claimed = random.choice((0, 1, 8, 2**31, 2**63, 2**64 - 1, len(good)))
            data = claimed.to_bytes(8, "little") + random.choice((good[8:], b"[" * 5000, b"{}", b"null", b"\x80\x04."))
        spec = adapters_pb.ImportAdapterSpec(adapter_id=f"fuzz-{number % 7}", size_bytes=len(data))
        requests = [adapters_pb.ImportAdapterRequest(spec=spec), adapters_pb.ImportAdapterRequest(chunk=data)]
        caller.call(
            "hueshift.v1.AdapterService/ImportAdapter",
            [request.SerializeToString() for request in requests],
            f"adapter file {data[:400]!r}",
        )


def edited(random: Random, header: dict[str, Any]) -> dict[str, Any]:
    """A safetensors header with one of its values replaced."""
    odd: tuple[Any, ...] = (
        None,
        [],
        {},
        -1,
        2**70,
        "x",
        [2**62, 2**62],
        [-1],
        [[]],
        "F64",
        True,
        1e308,
        [1.5],
        "\ud800",
    )
    key = random.choice([*header])
    if random.random() < 0.2:
        header[random.choice(("", "spectral/none", "__metadata__", "a" * 3000))] = random.choice(odd)
    elif isinstance(header[key], dict) and header[key]:
        header[key][random.choice([*header[key], "more"])] = random.choice(odd)
    else:
        header[key] = random.choice(odd)
    return header


def fuzz_pictures(caller: Caller, seed: int, count: int) -> None:
    """Jobs of five damaged pictures each."""
    random = Random(seed)
    good = [picture(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")]
    for _ in range(count):
        files = [damage(random, random.choice(good)) for _ in range(PICTURES_PER_JOB)]
        spec = finetune_pb.FineTuneSpec(
            class_noun="animal",
            settings=finetune_pb.FineTuneSettings(steps=1),
            pictures=[finetune_pb.PictureSpec(size_bytes=len(file)) for file in files],
        )
        requests = [finetune_pb.CreateFineTuneRequest(spec=spec)]
        for index, file in enumerate(files):
            chunk = finetune_pb.PictureChunk(index=index, data=file)
            requests.append(finetune_pb.CreateFineTuneRequest(chunk=chunk))
        caller.call(
            "hueshift.v1.FineTuneService/CreateFineTune",
            [request.SerializeToString() for request in requests],
            f"pictures {[file[:60].hex() for file in files]}",
        )


def picture(kind: str) -> bytes:
    file = BytesIO()
    Image.effect_noise((24, 24), 90).convert("RGB").save(file, kind)
    return file.getvalue()


@pytest.mark.slow
async def test_two_thousand_wrong_messages_do_no_harm(live: LiveServer, base_model: BaseModel) -> None:
    good = adapter_file(base_model, 0.5)
    owner: RpcStubs = await live.caller("acme")
    await owner.import_adapter("fox", good)
    before = await owner.images(seeds=[5])
    key = owner.metadata[0][1].removeprefix("Bearer ")
    caller = Caller(live, key)
    process = psutil.Process(os.getpid())
    memory = process.memory_info().rss
    with ThreadPoolExecutor(CALLERS) as pool:
        loop = asyncio.get_running_loop()
        work = [
            loop.run_in_executor(pool, fuzz_messages, caller, seed, MESSAGES // (CALLERS - 2))
            for seed in range(CALLERS - 2)
        ]
        work.append(loop.run_in_executor(pool, fuzz_adapters, caller, 101, ADAPTER_FILES, good))
        work.append(loop.run_in_executor(pool, fuzz_pictures, caller, 102, PICTURE_JOBS))
        await asyncio.gather(*work)
    caller.close()
    assert not caller.wrong, "\n".join(caller.wrong[:10])
    assert caller.codes.total() >= MESSAGES + ADAPTER_FILES + PICTURE_JOBS - CALLERS
    # The fuzz reached past the first check, and was refused in more than one way.
    assert {"OK", "INVALID_ARGUMENT", "NOT_FOUND"} <= set(caller.codes)
    assert live.frame.metrics.registry.get_sample_value("hueshift_internal_errors_total") == 0
    async with grpc.aio.insecure_channel(live.addresses.grpc) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest())
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    assert await owner.images(seeds=[5]) == before
    # The loop lets go of a request a moment after its last picture is sent.
    async with asyncio.timeout(5):
        while live.services.scheduler.snapshot().live:  # noqa: ASYNC110 (the loop has a thread of its own)
            await asyncio.sleep(0.01)
    snapshot = live.services.scheduler.snapshot()
    assert (snapshot.live, snapshot.waiting, snapshot.active, snapshot.slot_uses) == (0, 0, 0, 0)
    assert live.frame.gate.inside == 0
    grown = (process.memory_info().rss - memory) / 2**20
    assert grown < 500, f"memory grew by {grown:.0f} MiB"
