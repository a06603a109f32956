"""What the services and the scheduler say to each other about one Generate call: the request and its events."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from hueshift.adapters.blocks import BlockWeights, Weight, scale_weight
from hueshift.engines.interface import Plan
from hueshift.engines.pictures import PictureFormat
from hueshift.engines.region_masks import Area
from hueshift.engines.samplers import SamplerKind
from hueshift.server.event_stream import EventStream


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """One adapter of a request, resolved: its resource name, revision, SHA-256 of its file, and its weight.

    `blocks` are weights by block, to be multiplied by `weight`; None where every layer has the same.
    """

    name: str
    revision: int
    content_hash: str
    weight: float
    blocks: BlockWeights | None = None

    @property
    def strength(self) -> Weight:
        """The weight of every layer."""
        return self.weight if self.blocks is None else scale_weight(self.blocks, self.weight)


@dataclass(frozen=True, slots=True)
class LagRequest:
    """LAG sampling of a request: `words` of its prompt, or none for those of its adapters."""

    words: tuple[str, ...] = ()
    return_masks: bool = False


@dataclass(frozen=True, slots=True)
class RegionRequest:
    """A part of every picture with a prompt and adapters of its own; `feather` in pixels."""

    prompt: str
    adapters: tuple[AppliedAdapter, ...]
    area: Area
    feather: float = 0.0

    @property
    def mix(self) -> tuple[tuple[str, Weight], ...]:
        """Its adapters as (content hash, weight), less those of weight 0."""
        return _mix(self.adapters)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A checked request. One picture per seed; `width` and `height` in pixels, multiples of the base's size_multiple.

    `guidance_scale` above 1 turns guidance on, which makes a picture two UNet rows; each region makes as many more.
    `priority` orders the requests of one tenant, larger first. `deadline` is in the clock's monotonic seconds.
    `preview_interval` 0 means no previews. With `shared_attention` the pictures are in every batch together.
    """

    request_id: str
    tenant: str
    prompt: str
    negative_prompt: str
    adapters: tuple[AppliedAdapter, ...]
    seeds: tuple[int, ...]
    steps: int
    guidance_scale: float
    sampler: SamplerKind
    eta: float
    width: int
    height: int
    format: PictureFormat
    preview_interval: int
    priority: int
    deadline: float
    lag: LagRequest | None = None
    shared_attention: bool = False
    regions: tuple[RegionRequest, ...] = ()

    @property
    def guided(self) -> bool:
        """True if its pictures run with classifier-free guidance."""
        return self.guidance_scale > 1

    @property
    def rows(self) -> int:
        """UNet rows of one picture."""
        return (2 if self.guided else 1) * (1 + len(self.regions))

    @property
    def together(self) -> int:
        """Pictures that join the batch at once."""
        return len(self.seeds) if self.shared_attention else 1

    @property
    def mix(self) -> tuple[tuple[str, Weight], ...]:
        """The adapters as (content hash, weight); those of weight 0 change nothing and are left out."""
        return _mix(self.adapters)

    @property
    def mixes(self) -> tuple[tuple[tuple[str, Weight], ...], ...]:
        """`mix`, then that of each region."""
        return (self.mix, *(region.mix for region in self.regions))

    @property
    def every_adapter(self) -> tuple[AppliedAdapter, ...]:
        """The adapters of the picture and of its regions."""
        return (*self.adapters, *(adapter for region in self.regions for adapter in region.adapters))


def _mix(adapters: tuple[AppliedAdapter, ...]) -> tuple[tuple[str, Weight], ...]:
    return tuple((adapter.content_hash, adapter.strength) for adapter in adapters if adapter.weight != 0)


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of one picture went, in seconds: waiting, loading rows, encoding text, denoising, decoding."""

    queue: float
    adapter_load: float
    text: float
    denoise: float
    decode: float


@dataclass(frozen=True, slots=True)
class QueuedEvent:
    """Accepted; `position` pictures were waiting before it."""

    position: int


@dataclass(frozen=True, slots=True)
class ProgressEvent:
    """Steps done and steps in all, summed over the request's pictures."""

    step: int
    of: int


@dataclass(frozen=True, slots=True)
class PreviewEvent:
    """The current estimate of picture `index` after `step` steps, as a file."""

    index: int
    step: int
    data: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class ImageEvent:
    """One finished picture. `plans` in order of first use; `regions` has the adapters of each.

    `mask` is a grey PNG of the LAG masks, if they were asked for.
    """

    index: int
    data: bytes
    media_type: str
    seed: int
    width: int
    height: int
    adapters: tuple[AppliedAdapter, ...]
    plans: tuple[Plan, ...]
    engine: str
    base_hash: str
    timings: Timings
    mask: bytes = b""
    regions: tuple[tuple[AppliedAdapter, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class FinishedEvent:
    """All pictures were sent: how many, seconds since acceptance, prompt tokens that had no effect."""

    images: int
    total_seconds: float
    truncated_tokens: int


GenerationEvent = QueuedEvent | ProgressEvent | PreviewEvent | ImageEvent | FinishedEvent


@dataclass(frozen=True, slots=True)
class GenerationHandle:
    """The caller's end of an accepted request."""

    request_id: str
    stream: EventStream[GenerationEvent]
    cancel: Callable[[], None]
    """Gives the request up; its rows are free before the next step. Safe to call at any time, from any thread."""

    async def events(self) -> AsyncGenerator[GenerationEvent, None]:
        """Yield the events in order, FinishedEvent last. To be iterated once, in the event loop that submitted.

        Leaving early, by a break or because the task is cancelled, cancels the request. Raises the HueshiftError that
        ended it: DeadlineExceeded, Cancelled, FailedPrecondition (ADAPTER_DELETED), Internal, and what loading the
        adapters raised.
        """
        try:
            async for event in self.stream:
                yield event
        finally:
            self.cancel()
