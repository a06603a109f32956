"""Generate: its options, its events, and the request built from them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypedDict, Unpack

from hueshift.client.choices import ImageFormat, Priority, Sampler
from hueshift.client.wire import to_enum, to_seconds
from hueshift.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True)
class AdapterUse:
    """An adapter to apply: its name or bare id, its strength (-2 to 2), a fixed revision or 0 for the newest.

    `block_weights` are multiplied by `weight`: blocks such as `down_blocks.2` or `mid_block`, or the presets
    `structure` and `appearance`; what is not named gets 0, and none at all means the whole UNet.
    """

    adapter: str
    weight: float = 1.0
    revision: int = 0
    block_weights: Mapping[str, float] = field(default_factory=dict)


Adapters: TypeAlias = Sequence[str | AdapterUse] | Mapping[str, float]
"""Names, uses, or names with weights."""


@dataclass(frozen=True, slots=True)
class LagSampling:
    """Confines the adapters' low-rank branches to where the picture shows what they taught.

    `words` of the prompt say where that is; none means the adapters' own identifiers and class nouns. With
    `return_masks` every Picture brings its `mask`.
    """

    words: Sequence[str] = ()
    return_masks: bool = False


@dataclass(frozen=True, slots=True)
class Region:
    """A part of the picture with a prompt (empty: the picture's) and adapters of its own.

    It is where `box` (x, y, width, height in pixels) or `mask` (a picture file, white where the region is) says; give
    one of them. `feather` is the width in pixels over which its edges fade.
    """

    prompt: str = ""
    adapters: Adapters = ()
    box: tuple[int, int, int, int] | None = None
    mask: bytes | None = None
    feather: float = 0.0


@dataclass(frozen=True, slots=True)
class Inversion:
    """Keeps the picture's own noise instead of drawing some: DDIM inversion with the request's adapters and prompt.

    `steps` 0 is the server's default. `noise_share` turns the noise towards the seed's, 0 keeps it and 1 is img2img.
    `report_error` has Finished tell how close the way back comes, for as many steps again.
    """

    steps: int = 0
    noise_share: float = 0.0
    report_error: bool = False


@dataclass(frozen=True, slots=True)
class StartPicture:
    """A PNG, JPEG or WebP to start from, and the share of the steps that run: how much may change, 0 to 1.

    `strength` None is the server's default. Without `inversion` this is img2img.
    """

    data: bytes
    strength: float | None = None
    inversion: Inversion | None = None


class GenerateOptions(TypedDict, total=False):
    """Options of a Generate call; what is absent takes the server's default.

    `seeds`: one per picture, or one to count up from. `timeout`: seconds for the whole call. `preview_interval`: steps
    between early looks, 0 for none. `lag`: True for the adapters' own words. `shared_attention`: all pictures take the
    style of the first one. The model's record tells which of the last three the server offers. `picture`: start from
    it, as bytes or with more to say.
    """

    adapters: Adapters
    negative_prompt: str
    count: int
    seeds: Sequence[int]
    steps: int
    guidance_scale: float
    sampler: Sampler
    eta: float
    width: int
    height: int
    format: ImageFormat
    preview_interval: int
    priority: Priority
    timeout: float
    lag: bool | LagSampling
    shared_attention: bool
    regions: Sequence[Region]
    picture: bytes | StartPicture


@dataclass(frozen=True, slots=True)
class Queued:
    """The request was accepted; `position` pictures are ahead of it."""

    position: int
    request_id: str


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` of `of` denoising steps are done, summed over the pictures."""

    step: int
    of: int


@dataclass(frozen=True, slots=True)
class Preview:
    """An early look at picture `index`, as a file."""

    index: int
    step: int
    data: bytes
    media_type: str


@dataclass(frozen=True, slots=True)
class AppliedAdapter:
    """An adapter a picture was made with. `block_weights` are empty where every layer had the same weight."""

    adapter: str
    revision: int
    content_hash: str
    weight: float
    block_weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds one picture spent in each stage."""

    queue: float
    adapter_load: float
    text: float
    denoise: float
    decode: float
    picture: float = 0.0
    inversion: float = 0.0


@dataclass(frozen=True, slots=True)
class Picture:
    """A finished picture, as a file, with what it was made with; `regions` has the adapters of each region.

    `mask` is a grey PNG of where LAG sampling let the adapters act, if it was asked for.
    """

    index: int
    data: bytes
    media_type: str
    seed: int
    width: int
    height: int
    adapters: tuple[AppliedAdapter, ...]
    plans: tuple[str, ...]
    engine: str
    base_hash: str
    timings: Timings
    mask: bytes = b""
    regions: tuple[tuple[AppliedAdapter, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """All pictures were sent. `truncated_tokens` of the prompt had no effect.

    `inversion_error` is the relative error of an inversion and the way back, if it was asked for.
    """

    images: int
    seconds: float
    truncated_tokens: int
    request_id: str
    inversion_error: float | None = None


GenerateEvent: TypeAlias = Queued | Progress | Preview | Picture | Finished


def generate_request(prompt: str, **options: Unpack[GenerateOptions]) -> pb.GenerateRequest:
    """Build the request. The server checks the values; only words of ours are checked here.

    Raises ValueError on what the contract's fields cannot hold, and TypeError on what they never can.
    """
    for seed in options.get("seeds", ()):
        if not 0 <= seed < 2**64:
            raise ValueError(f"seeds: {seed} given; allowed: 0 to {2**64 - 1}")
    request = pb.GenerateRequest(
        prompt=prompt,
        negative_prompt=options.get("negative_prompt", ""),
        adapters=to_uses(options.get("adapters", ())),
        count=options.get("count", 0),
        seeds=options.get("seeds", ()),
        steps=options.get("steps", 0),
        eta=options.get("eta", 0.0),
        width=options.get("width", 0),
        height=options.get("height", 0),
        preview_interval=options.get("preview_interval", 0),
        lag=_to_lag(options.get("lag", False)),
        shared_attention=options.get("shared_attention", False),
        regions=[_to_region(region) for region in options.get("regions", ())],
    )
    if "guidance_scale" in options:
        request.guidance_scale = options["guidance_scale"]
    if "sampler" in options:
        request.sampler = to_enum(pb.Sampler, "SAMPLER", options["sampler"])
    if "format" in options:
        request.format = to_enum(pb.ImageFormat, "IMAGE_FORMAT", options["format"])
    if "priority" in options:
        request.priority = to_enum(pb.Priority, "PRIORITY", options["priority"])
    if "picture" in options:
        request.picture.CopyFrom(_to_start(options["picture"]))
    return request


def read_event(response: pb.GenerateResponse) -> GenerateEvent | None:
    """Return the event; None for kinds newer than this client."""
    match response.WhichOneof("event"):
        case "queued":
            return Queued(response.queued.position, response.queued.request_id)
        case "progress":
            return Progress(response.progress.step, response.progress.of)
        case "preview":
            preview = response.preview
            return Preview(preview.index, preview.step, preview.data, preview.media_type)
        case "image":
            return _picture(response.image)
        case "finished":
            done = response.finished
            error = done.inversion_error if done.HasField("inversion_error") else None
            return Finished(done.images, to_seconds(done.total), done.truncated_tokens, done.request_id, error)
    return None


def to_uses(adapters: Adapters) -> list[pb.AdapterUse]:
    """Return the messages of adapters in any of the accepted forms."""
    return [
        pb.AdapterUse(
            adapter=use.adapter, weight=use.weight, revision=use.revision, block_weights=dict(use.block_weights)
        )
        for use in _uses(adapters)
    ]


def _uses(adapters: Adapters) -> list[AdapterUse]:
    if isinstance(adapters, str):
        # A lone string is a sequence of letters, hence a valid argument to the type checker.
        raise TypeError(f"adapters={adapters!r}: give a list, for example adapters=[{adapters!r}]")
    if isinstance(adapters, Mapping):
        return [AdapterUse(name, weight) for name, weight in adapters.items()]
    return [AdapterUse(use) if isinstance(use, str) else use for use in adapters]


def _to_lag(lag: bool | LagSampling) -> pb.LagSampling | None:
    if isinstance(lag, bool):
        return pb.LagSampling() if lag else None
    if isinstance(lag.words, str):
        raise TypeError(f"words={lag.words!r}: give a list, for example words=[{lag.words!r}]")
    return pb.LagSampling(words=lag.words, return_masks=lag.return_masks)


def _to_region(region: Region) -> pb.Region:
    message = pb.Region(prompt=region.prompt, adapters=to_uses(region.adapters), feather=region.feather)
    if region.box is not None and region.mask is not None:
        raise ValueError("a region has both a box and a mask; give one of them")
    if region.box is not None:
        x, y, width, height = region.box
        message.box.CopyFrom(pb.Box(x=x, y=y, width=width, height=height))
    elif region.mask is not None:
        message.mask = region.mask
    return message


def _to_start(picture: bytes | StartPicture) -> pb.StartPicture:
    start = StartPicture(picture) if isinstance(picture, bytes) else picture
    message = pb.StartPicture(data=start.data)
    if start.strength is not None:
        message.strength = start.strength
    if start.inversion is not None:
        message.inversion.CopyFrom(
            pb.Inversion(
                steps=start.inversion.steps,
                noise_share=start.inversion.noise_share,
                report_error=start.inversion.report_error,
            )
        )
    return message


def _to_applied(adapters: Iterable[pb.AppliedAdapter]) -> tuple[AppliedAdapter, ...]:
    return tuple(
        AppliedAdapter(a.adapter, a.revision, a.content_hash, a.weight, dict(a.block_weights)) for a in adapters
    )


def _picture(image: pb.Image) -> Picture:
    times = image.timings
    return Picture(
        index=image.index,
        data=image.data,
        media_type=image.media_type,
        seed=image.seed,
        width=image.width,
        height=image.height,
        adapters=_to_applied(image.adapters),
        plans=tuple(image.plans),
        engine=image.engine,
        base_hash=image.base_hash,
        timings=Timings(
            queue=to_seconds(times.queue),
            adapter_load=to_seconds(times.adapter_load),
            text=to_seconds(times.text),
            denoise=to_seconds(times.denoise),
            decode=to_seconds(times.decode),
            picture=to_seconds(times.picture),
            inversion=to_seconds(times.inversion),
        ),
        mask=image.mask,
        regions=tuple(_to_applied(region.adapters) for region in image.regions),
    )
