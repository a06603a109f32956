"""What a request needs before its first step, made off the step loop: text, rows, coefficients, a picture's latents."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hueshift.adapters.errors import FailedPrecondition, Reason
from hueshift.engines.conditioning import Conditioner, CrossInputs
from hueshift.engines.mixes import Mix
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.picture_start import encode_start, first_step
from hueshift.engines.region_masks import make_masks
from hueshift.engines.residency import PreparedMix, SlotCache
from hueshift.engines.samplers import SamplerTable, make_path_tables, make_table, noise_levels
from hueshift.engines.transfer import to_device
from hueshift.engines.vae import VaeStage
from hueshift.server.clock import Clock
from hueshift.server.generation import GenerationRequest, InversionRequest
from hueshift.server.lag_words import choose_words, mark_tokens

# Requests whose texts and pictures are encoded at a time; more may be loading meanwhile. Each takes memory of a device.
_ENCODING = 2


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRegion:
    """A region's mask [h, w] at the latents' size, and keys and values as in Prepared."""

    mask: Tensor
    cross: CrossInputs


@dataclass(frozen=True, slots=True, eq=False)
class PreparedInversion:
    """Coefficients of the way up to the noise and, where its error is wanted, of the way back; `*_cross` are keys and
    values of the prompt alone at their steps.
    """

    up: SamplerTable
    up_cross: CrossInputs
    down: SamplerTable | None
    down_cross: CrossInputs | None
    noise_share: float

    @property
    def steps(self) -> int:
        """Steps of both."""
        return self.up.steps + (self.down.steps if self.down is not None else 0)


@dataclass(frozen=True, slots=True, eq=False)
class PreparedStart:
    """The latents [C, h, w] to start from, and the shares of them and of noise where sampling begins."""

    clean: Tensor
    levels: tuple[float, float]
    inversion: PreparedInversion | None


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """`cross` has the negative prompt's row first, or one row without guidance.

    `mixes` has the picture's own, then one for each of `regions`. `lag` [tokens] is 1 at the tokens that confine.
    With a `start`, `table` begins where its noise is.
    """

    mixes: tuple[PreparedMix, ...]
    table: SamplerTable
    cross: CrossInputs
    truncated: int
    text_seconds: float
    adapter_seconds: float
    lag: Tensor | None = None
    regions: tuple[PreparedRegion, ...] = ()
    start: PreparedStart | None = None
    picture_seconds: float = 0.0

    @property
    def inversion_steps(self) -> int:
        """Steps that the first picture takes before it samples."""
        return 0 if self.start is None or self.start.inversion is None else self.start.inversion.steps


class Preparation:
    """Prepares requests; safe to call from several threads."""

    def __init__(
        self,
        conditioner: Conditioner,
        vae: VaeStage,
        slots: SlotCache,
        schedule: NoiseSchedule,
        clock: Clock,
        latent_factor: int,
    ) -> None:
        self._conditioner, self._slots, self._schedule, self._clock = conditioner, slots, schedule, clock
        self._vae, self._factor = vae, latent_factor
        self._turns = threading.Semaphore(_ENCODING)

    def prepare(self, request: GenerationRequest, mixes: Sequence[Mix]) -> Prepared:
        """Prepare one request, whose own mix comes first in `mixes`, then those of its regions.

        Raises what loading its adapters, its words or its sampler raise, InvalidArgument on words that LAG sampling
        needs and the prompt lacks, and FailedPrecondition (PLAN_UNAVAILABLE) where an adapter with dense deltas meets
        what runs under another plan.
        """
        skipped = 0 if request.start is None else first_step(request.steps, request.start.strength)
        table = make_table(self._schedule, request.sampler, request.steps, request.eta, skipped)
        timesteps = table.timesteps.tolist()
        begin = self._clock.monotonic()
        rows = tuple(self._slots.prepare(mix) for mix in mixes)
        _check_whole(request, rows)
        words = self._lag_words(request, mixes[0])
        loaded = self._clock.monotonic()
        with self._turns:
            begun = self._clock.monotonic()
            size = (request.width, request.height)
            own = self._conditioner.condition(_prompts(request, request.prompt), rows[0].text, timesteps, words, size)
            # On the stream that the steps are on: a copy that is waited for would wait for those that are queued.
            device = own.cross.device
            lag = None if request.lag is None else to_device(mark_tokens(request, words, own.prompts[-1]), device)
            regions = self._regions(request, rows[1:], timesteps)
            start, picture_seconds = self._start(request, rows[0], table, device)
            seconds = self._clock.monotonic() - begun - picture_seconds
        return Prepared(
            mixes=rows,
            table=table,
            cross=own.cross,
            truncated=own.truncated[-1],
            text_seconds=seconds,
            adapter_seconds=loaded - begin,
            lag=lag,
            regions=regions,
            start=start,
            picture_seconds=picture_seconds,
        )

    def _start(
        self, request: GenerationRequest, row: PreparedMix, table: SamplerTable, device: torch.device
    ) -> tuple[PreparedStart | None, float]:
        """The picture's latents and its inversion, and the seconds that encoding took."""
        if request.start is None:
            return None, 0.0
        begin = self._clock.monotonic()
        clean = to_device(encode_start(self._vae, request.start.picture, request.width, request.height), device)
        seconds = self._clock.monotonic() - begin
        inversion = request.start.inversion
        made = None if inversion is None else self._inversion(request, inversion, row, table)
        return PreparedStart(clean, noise_levels(self._schedule, table), made), seconds

    def _inversion(
        self, request: GenerationRequest, inversion: InversionRequest, row: PreparedMix, table: SamplerTable
    ) -> PreparedInversion:
        up, down = make_path_tables(self._schedule, inversion.steps, float(table.timesteps[0]))

        def cross(steps: SamplerTable) -> CrossInputs:
            # Words that change with the timestep are other ones at these steps, hence keys and values of their own.
            size = (request.width, request.height)
            return self._conditioner.condition((request.prompt,), row.text, steps.timesteps.tolist(), size=size).cross

        back = inversion.report_error
        return PreparedInversion(
            up, cross(up), down if back else None, cross(down) if back else None, inversion.noise_share
        )

    def _lag_words(self, request: GenerationRequest, mix: Mix) -> tuple[str, ...]:
        if request.lag is None:
            return ()
        names = {adapter.content_hash: adapter.name for adapter in request.adapters}
        taught = [(names[content_hash], self._slots.host.get(content_hash)) for content_hash, _ in mix]
        return choose_words(request.lag, taught)

    def _regions(
        self, request: GenerationRequest, rows: Sequence[PreparedMix], timesteps: Sequence[float]
    ) -> tuple[PreparedRegion, ...]:
        areas = [(region.area, region.feather) for region in request.regions]
        masks = make_masks(areas, request.width, request.height, self._factor)
        size = (request.width, request.height)
        crosses = [
            self._conditioner.condition(_prompts(request, region.prompt), row.text, timesteps, size=size).cross
            for region, row in zip(request.regions, rows, strict=True)
        ]
        return tuple(
            PreparedRegion(to_device(mask, cross.device), cross) for mask, cross in zip(masks, crosses, strict=True)
        )


def _prompts(request: GenerationRequest, prompt: str) -> tuple[str, ...]:
    return (request.negative_prompt, prompt) if request.guided else (prompt,)


def _check_whole(request: GenerationRequest, mixes: Sequence[PreparedMix]) -> None:
    asked = {
        "lag": request.lag is not None,
        "shared_attention": request.shared_attention,
        "regions": bool(request.regions),
    }
    names = [name for name, given in asked.items() if given]
    if names and any(mix.needs_weights for mix in mixes):
        raise FailedPrecondition(
            Reason.PLAN_UNAVAILABLE,
            f"{' and '.join(names)}: not together with an adapter that changes whole weights (dense deltas), which "
            "runs in calls of its own; leave it out, or use an adapter of low rank",
        )
