"""A scheduler over small fakes: an engine, a text stage and a VAE whose pictures tell prompt and adapters apart."""

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from fake_clock import FakeClock
from fake_engine import FakeEngine
from prometheus_client import CollectorRegistry
from tiny_layout import BASE_HASH, dense_adapter, lowrank_adapter, spectral_adapter, tiny_rows
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.errors import HueshiftError, NotFound, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.conditioning import Conditioner, Conditioning, CrossInputs
from hueshift.engines.cost_model import CostTable
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.pictures import PictureFormat
from hueshift.engines.planner import Planner
from hueshift.engines.region_masks import Box
from hueshift.engines.residency import SlotCache
from hueshift.engines.residency_host import HostCache, RowCache
from hueshift.engines.samplers import SamplerKind
from hueshift.engines.text import TokenizedPrompt
from hueshift.engines.text_side import TextSide
from hueshift.engines.vae import Pixels, VaeStage
from hueshift.server.clock import Clock, SystemClock
from hueshift.server.generation import (
    AppliedAdapter,
    FinishedEvent,
    GenerationEvent,
    GenerationHandle,
    GenerationRequest,
    ImageEvent,
    RegionRequest,
)
from hueshift.server.metrics import Metrics
from hueshift.server.residency_metrics import ResidencyMetrics
from hueshift.server.scheduler import Scheduler

T = TypeVar("T")
WIDTH, TOKENS = 4, 3


class FakeConditioner:
    """Keys and values that depend on the prompt and the learned words."""

    def condition(
        self,
        prompts: Sequence[str],
        side: TextSide,
        timesteps: Sequence[float],
        find: Sequence[str] = (),
        size: tuple[int, int] | None = None,
    ) -> Conditioning:
        """Draw them from the prompts' hashes; a token is a word, as far as there are tokens."""
        learned = sum(float(word.sum()) for _, word in sorted(side.words.items()) if isinstance(word, Tensor))
        cross = torch.stack([_cross(prompt) + learned for prompt in prompts])
        rows = tuple(_tokenize(prompt, find) for prompt in prompts)
        return Conditioning(CrossInputs((cross,)), tuple(len(prompt) // 50 for prompt in prompts), rows)


def _tokenize(prompt: str, find: Sequence[str]) -> TokenizedPrompt:
    words = prompt.split()[:TOKENS]
    found = {word: tuple((at,) for at, other in enumerate(words) if other == word) for word in find}
    return TokenizedPrompt((0,) * TOKENS, {}, 0, found)


def _cross(prompt: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:7], "big")
    drawn = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))
    return drawn if prompt else torch.zeros(TOKENS, WIDTH)


class FakeVae:
    """Pixels are the latents, scaled. `on_decode` runs before each batch and may raise."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.encoded: list[tuple[int, ...]] = []
        self.on_decode: Callable[[], None] = lambda: None

    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Latents [n, 4, H/8, W/8] of pixels [n, 3, H, W], and deviations that nobody should use."""
        self.encoded.append(tuple(pixels.shape))
        small = torch.nn.functional.avg_pool2d(pixels, 8)
        mean = torch.cat([small, small.mean(1, keepdim=True)], dim=1)
        return mean, torch.full_like(mean, torch.nan)

    def decode(self, latents: Tensor) -> Pixels:
        """Decode [n, 4, h, w] to [n, 8h, 8w, 3]."""
        self.on_decode()
        self.batches.append(latents.shape[0])
        levels = (latents[:, :3].double() * 40 + 128).clamp(0, 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return np.ascontiguousarray(levels.repeat_interleave(8, 1).repeat_interleave(8, 2).numpy())


class InlineExecutor(Executor):
    """Runs what it is given at once."""

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> "Future[T]":
        """Run `fn` now."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@dataclass(frozen=True)
class Limits:
    """Queue limits."""

    queue_size: int = 1000
    tenant_queue_size: int = 1000


class AdapterFolder:
    """Loads adapters by a hash that says what they are: `low-0.3`, `spec-0.3` or `dense-0.3` is one of that mark,
    `fox-0.3` a low-rank one that taught "fox", which is a kind of "animal"."""

    def __init__(self) -> None:
        self.deleted: set[str] = set()
        self.loads: list[str] = []

    def load(self, content_hash: str) -> Adapter:
        """Make the adapter; a deleted one is not found."""
        self.loads.append(content_hash)
        if content_hash in self.deleted:
            raise NotFound(Reason.ADAPTER_DELETED, "the adapter has been deleted")
        kind, _, mark = content_hash.partition("-")
        if kind == "dense":
            return dense_adapter(float(mark))
        if kind == "fox":
            return replace(lowrank_adapter(float(mark)), identifier="fox", class_noun="animal")
        tokens = {"sks": torch.full((1, WIDTH), float(mark))}
        return lowrank_adapter(float(mark)) if kind == "low" else spectral_adapter(float(mark), tokens)


def tiny_base() -> BaseModel:
    """A base model of which the scheduler needs numbers only: native 64 x 64 pixels, 8 x 8 latents."""
    rows, _, _ = tiny_rows(WIDTH)
    schedule = NoiseSchedule.from_config({"steps_offset": 1, "set_alpha_to_one": False})
    nothing = cast(Any, None)
    return BaseModel(
        name="tiny",
        path=Path(),
        base_hash=BASE_HASH,
        unet=nothing,
        vae=nothing,
        text_encoder=nothing,
        tokenizer=nothing,
        schedule=schedule,
        layout=rows.layout,
        latent_channels=4,
        latent_factor=8,
        sample_size=8,
        size_multiple=8,
    )


class Bench:
    """A scheduler with everything around it. Without `start` nothing runs by itself: `turn` and `decode` do."""

    def __init__(
        self,
        *,
        slots: int = 8,
        max_batch: int = 8,
        limits: Limits | None = None,
        clock: Clock | None = None,
        weights: Mapping[str, float] | None = None,
        threads: bool = False,
        engine: FakeEngine | None = None,
        table: CostTable | None = None,
    ) -> None:
        self.clock = clock or (SystemClock() if threads else FakeClock())
        self.metrics = Metrics(CollectorRegistry())
        self.engine = engine or FakeEngine(slots=slots, max_batch=max_batch)
        self.folder = AdapterFolder()
        observer = ResidencyMetrics(self.metrics)
        host = HostCache(self.folder.load, 10**6, observer)
        self.slots = SlotCache(self.engine, RowCache(host, *tiny_rows(WIDTH), 10**6, observer), observer)
        self.vae = FakeVae()
        self.scheduler = Scheduler(
            self.engine,
            tiny_base(),
            cast(Conditioner, FakeConditioner()),
            cast(VaeStage, self.vae),
            self.slots,
            self.metrics,
            self.clock,
            limits or Limits(),
            weights=weights,
            preparers=None if threads else InlineExecutor(),
            planner=None if table is None else Planner(self.engine, table),
        )
        self._ids = itertools.count()

    def request(
        self, tenant: str = "a", adapters: Mapping[str, float] | None = None, **given: Any
    ) -> GenerationRequest:
        """A request with small defaults; `adapters` maps content hashes to weights."""
        applied = tuple(
            AppliedAdapter(f"tenants/{tenant}/adapters/{content_hash}", 1, content_hash, weight)
            for content_hash, weight in (adapters or {}).items()
        )
        fields: dict[str, Any] = {
            "request_id": f"r{next(self._ids)}",
            "prompt": "a fox",
            "negative_prompt": "",
            "seeds": (1,),
            "steps": 4,
            "guidance_scale": 1.0,
            "sampler": SamplerKind.DDIM,
            "eta": 0.0,
            "width": 64,
            "height": 64,
            "format": PictureFormat.PNG,
            "preview_interval": 0,
            "priority": 0,
            "deadline": self.clock.monotonic() + 1000,
        }
        return GenerationRequest(tenant=tenant, adapters=applied, **(fields | given))

    def region(self, adapters: Mapping[str, float] | None = None, **given: Any) -> RegionRequest:
        """A region of tenant a's request: the left half of the picture, by default."""
        fields: dict[str, Any] = {"prompt": "a hat", "area": Box(0, 0, 32, 64), "feather": 0.0}
        return RegionRequest(adapters=self.request("a", adapters).adapters, **(fields | given))

    def submit(self, tenant: str = "a", adapters: Mapping[str, float] | None = None, **given: Any) -> GenerationHandle:
        """Submit such a request."""
        return self.scheduler.submit(self.request(tenant, adapters, **given))

    def turn(self, times: int = 1) -> None:
        """Run the step loop by hand. What the inline preparation hands back counts in the same turn."""
        for _ in range(times):
            self.scheduler.turn()

    def decode(self) -> None:
        """Decode what is finished."""
        while self.scheduler._decoder.run_once():
            pass

    def run(self) -> None:
        """Run until nothing is left."""
        for _ in range(10_000):
            self.turn()
            self.decode()
            if self.scheduler.snapshot().live == 0 and not self.scheduler._inbox:
                return
        raise AssertionError(self.scheduler.snapshot())

    def value(self, name: str, **labels: str) -> float:
        """Value of a metric sample."""
        value = self.metrics.registry.get_sample_value(name, labels)
        assert value is not None, name
        return value


async def collect(handle: GenerationHandle) -> list[GenerationEvent]:
    """All events of a request."""
    return [event async for event in handle.events()]


async def images(handle: GenerationHandle) -> list[ImageEvent]:
    """The pictures of a request, by index, after checking that Finished came last."""
    events = await collect(handle)
    found = sorted((event for event in events if isinstance(event, ImageEvent)), key=lambda event: event.index)
    last = events[-1]
    assert isinstance(last, FinishedEvent)
    assert last.images == len(found)
    return found


IDLE = {"live": 0, "preparing": 0, "waiting": 0, "active": 0, "rows": 0, "decoding": 0, "slot_uses": 0}


def counts(bench: Bench) -> dict[str, int]:
    """What is alive, without the slots that merely hold a row."""
    snapshot = bench.scheduler.snapshot()
    return {name: getattr(snapshot, name) for name in IDLE}


async def error_of(handle: GenerationHandle) -> HueshiftError:
    """The error that ended a request."""
    try:
        await collect(handle)
    except HueshiftError as error:
        return error
    raise AssertionError(f"{handle.request_id} did not end with an error")
