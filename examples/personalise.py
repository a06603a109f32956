"""The calls of the demo: two tenants teach and draw through the public RPCs."""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from urllib.request import urlopen

from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from hueshift.client.aio import AsyncClient
from hueshift.client.choices import Sampler
from hueshift.client.generation import GenerateOptions, Picture
from hueshift.client.jobs import FineTune, StateChanged, TrainingProgress
from hueshift.examples.bars import Bars, Stage
from hueshift.examples.lessons import Lesson
from hueshift.examples.live_server import LiveServer

# Learned styles come out best at guidance 3; more DPM-Solver++ steps than 15 change nothing to see. The time is the
# server's longest: on a machine that is busy with other things, the default two minutes may not do for 24 pictures.
DRAWING: GenerateOptions = {"sampler": Sampler.DPMPP_2M, "steps": 15, "guidance_scale": 3.0, "timeout": 600.0}
CHECK_PROMPT = "a fluent 3d emoji of a dog face"
CHECK_SEEDS = (0, 1, 2, 3)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The mixed batch: per lesson its pictures by the adapter and by the base model, in the order of its drawings."""

    personalised: Mapping[str, Sequence[Picture]]
    base: Mapping[str, Sequence[Picture]]
    seconds: float

    @property
    def pictures(self) -> list[Picture]:
        """All of them."""
        return [picture for part in (self.personalised, self.base) for some in part.values() for picture in some]


class Tenants:
    """One client per tenant, each with its own key."""

    def __init__(self, server: LiveServer, clients: Mapping[str, AsyncClient], bars: Bars) -> None:
        self._server, self._clients, self._bars = server, clients, bars

    async def draw_base(self) -> list[bytes]:
        """Return the pixels of the base model's pictures of one request, without any adapter."""
        client = next(iter(self._clients.values()))
        with self._bars.stage("Draw with the base model alone"):
            options: GenerateOptions = {**DRAWING, "count": len(CHECK_SEEDS), "seeds": CHECK_SEEDS}
            pictures = await client.generate_images(CHECK_PROMPT, **options)
        return [decode(picture).tobytes() for picture in pictures]

    async def teach(self, lessons: Sequence[Lesson]) -> dict[str, FineTune]:
        """Queue all lessons at once, follow them to their ends, and return the jobs. Raises FineTuneFailed."""
        async with asyncio.TaskGroup() as group:
            tasks = {lesson.key: group.create_task(self._teach(lesson)) for lesson in lessons}
        return {key: task.result() for key, task in tasks.items()}

    async def _teach(self, lesson: Lesson) -> FineTune:
        client = self._clients[lesson.tenant]
        with self._bars.stage(f"{lesson.tenant} learns {lesson.title}") as stage:
            job = await client.fine_tune(
                lesson.pictures,
                captions=lesson.captions,
                subject=lesson.subject,
                identifier_init=lesson.identifier_init,
                settings=lesson.settings,
                adapter_id=lesson.key,
                sample_prompts=[lesson.drawings[0].prompt],
            )
            stage.tell("queued")
            async for event in client.watch(job):
                if isinstance(event, TrainingProgress):
                    stage.move(event.step, event.steps, f"step {event.step} of {event.steps}, loss {event.loss:.3f}")
                elif isinstance(event, StateChanged):
                    stage.tell(event.job.state.value)
            return await client.wait_for_job(job)

    async def draw_mixed(self, lessons: Sequence[Lesson]) -> Drawn:
        """Draw everything at once: both adapters and the base model share the running batch.

        The adapters are used for the first time here, so this includes swapping them in.
        """
        count = sum(2 * len(lesson.drawings) for lesson in lessons)
        begin = time.monotonic()
        with self._bars.stage("Draw one batch that mixes base, style and fox") as stage:
            counter = _Counter(stage, count)
            async with asyncio.TaskGroup() as group:
                tasks = {
                    (lesson.key, number, own): group.create_task(self._draw(lesson, number, own, counter))
                    for lesson in lessons
                    for number in range(len(lesson.drawings))
                    for own in (True, False)
                }
        seconds = time.monotonic() - begin

        def of(lesson: Lesson, own: bool) -> list[Picture]:
            return [tasks[lesson.key, number, own].result() for number in range(len(lesson.drawings))]

        return Drawn(
            personalised={lesson.key: of(lesson, True) for lesson in lessons},
            base={lesson.key: of(lesson, False) for lesson in lessons},
            seconds=seconds,
        )

    async def _draw(self, lesson: Lesson, number: int, own: bool, counter: "_Counter") -> Picture:
        drawing = lesson.drawings[number]
        adapters = [lesson.key] if own else []
        options: GenerateOptions = {**DRAWING, "adapters": adapters, "seeds": [drawing.seed]}
        (picture,) = await self._clients[lesson.tenant].generate_images(
            drawing.prompt if own else drawing.base_prompt, **options
        )
        counter.count()
        return picture

    async def swap_seconds(self) -> float:
        """Return the mean time to bring an adapter's row into the engine, from the server's metrics."""
        text = await asyncio.to_thread(_read, self._server.metrics)
        total = count = 0.0
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.labels.get("tier") == "slot":
                    total += sample.value if sample.name == "hueshift_swap_seconds_sum" else 0.0
                    count += sample.value if sample.name == "hueshift_swap_seconds_count" else 0.0
        return total / count if count else 0.0


@asynccontextmanager
async def open_tenants(server: LiveServer, bars: Bars) -> AsyncIterator[Tenants]:
    """Open one client per key of the server, and wait until it is ready."""
    async with AsyncExitStack() as stack:
        clients = {
            tenant: await stack.enter_async_context(AsyncClient(server.grpc, api_key=key))
            for tenant, key in server.keys.items()
        }
        for client in clients.values():
            await client.wait_until_ready()
        yield Tenants(server, clients, bars)


def decode(picture: Picture) -> Image.Image:
    """Return a picture's pixels."""
    with Image.open(io.BytesIO(picture.data)) as image:
        return image.convert("RGB")


class _Counter:
    def __init__(self, stage: Stage, of: int) -> None:
        self._stage, self._of, self._done = stage, of, 0

    def count(self) -> None:
        self._done += 1
        self._stage.move(self._done, self._of, f"{self._done} of {self._of} pictures")


def _read(url: str) -> str:
    with urlopen(url, timeout=10) as answer:
        text: str = answer.read().decode()
    return text
