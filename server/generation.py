"""What the services and the scheduler say to each other about one Generate call: the request and its events."""

from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

from hueshift.adapters.blocks import BlockWeights, Weight, scale_weight
from hueshift.engines.interface import Plan
from hueshift.engines.picture_start import first_step
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
class InversionRequest:
    """Inversion of the picture a request starts from, in `steps` steps to pure noise; see the contract's Inversion."""

    steps: int
    noise_share: float = 0.0
    report_error: bool = False


@dataclass(frozen=True, slots=True)
class StartRequest:
    """The picture a request starts from: a plain PNG of ours, which `strength` (0 to 1) lets change.

    `content_hash` is the SHA-256 of the caller's own file, by which provenance names it.
    """

    picture: bytes
    strength: float
    inversion: InversionRequest | None = None
    content_hash: str = ""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A checked request. One picture per seed; `width` and `height` in pixels, multiples of the base's size_multiple.

    `guidance_scale` above 1 turns guidance on, which makes a picture two UNet rows; each region makes as many more.
    `priority` orders the requests of one tenant, larger first. `deadline` is in the clock's monotonic seconds.
    `preview_interval` 0 means no previews. With `shared_attention` the pictures are in every batch together. With a
    `start` a picture takes its last steps only, and the first picture inverts it before if that is asked for.
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
    start: StartRequest | None = None

    @property
    def guided(self) -> bool:
        """True if its pictures run with classifier-free guidance."""
        return self.guidance_scale > 1

    @property
    def rows(self) -> int:
        """UNet rows of one picture."""
        return (2 if self.guided else 1) * (1 + len(self.regions))

    @property
    def sampling_steps(self) -> int:
        """Steps of one picture, an inversion not counted."""
        return self.steps if self.start is None else self.steps - first_step(self.steps, self.start.strength)

    @property
    def inversion_steps(self) -> int:
        """Steps that the first picture takes before it samples, at least: the schedule may ask for a few more."""
        inversion = None if self.start is None else self.start.inversion
        if inversion is None:
            return 0
        # Sampling begins at this share of the training timesteps, or above (with "leading" spacing exactly here).
        once = max(1, inversion.steps * (self.sampling_steps - 1) // self.steps)
        return once * (2 if inversion.report_error else 1)

    @property
    def row_steps(self) -> float:
        """UNet rows of all steps of one picture, the inversion's shared out among all of them."""
        return self.rows * self.sampling_steps + self.inversion_steps / len(self.seeds)

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
    """Where the time of one picture went, in seconds: waiting, loading rows, encoding text, denoising, decoding.

    `picture` is the encoding of the picture it starts from, `inversion` what the inversion took before denoising.
    """

    queue: float
    adapter_load: float
    text: float
    denoise: float
    decode: float
    picture: float = 0.0
    inversion: float = 0.0


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
    """All pictures were sent: how many, seconds since acceptance, prompt tokens that had no effect.

    `inversion_error` is that of the way there and back, if it was asked for.
    """

    images: int
    total_seconds: float
    truncated_tokens: int
    inversion_error: float | None = None


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
