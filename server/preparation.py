"""What a request needs before its first step, made off the step loop: text, adapter rows, sampler coefficients."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from hueshift.engines.conditioning import Conditioner, CrossInputs
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.region_masks import make_masks
from hueshift.engines.residency import Mix, PreparedMix, SlotCache
from hueshift.engines.samplers import SamplerTable, make_table
from hueshift.server.clock import Clock
from hueshift.server.generation import GenerationRequest
from hueshift.server.lag_words import choose_words, mark_tokens


@dataclass(frozen=True, slots=True, eq=False)
class PreparedRegion:
    """A region's mask [h, w] at the latents' size, and keys and values as in Prepared."""

    mask: Tensor
    cross: CrossInputs


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """`cross` has the negative prompt's row first, or one row without guidance.

    `mixes` has the picture's own, then one for each of `regions`. `lag` [tokens] is 1 at the tokens that confine.
    """

    mixes: tuple[PreparedMix, ...]
    table: SamplerTable
    cross: CrossInputs
    truncated: int
    text_seconds: float
    adapter_seconds: float
    lag: Tensor | None = None
    regions: tuple[PreparedRegion, ...] = ()


class Preparation:
    """Prepares requests; safe to call from several threads."""

    def __init__(
        self, conditioner: Conditioner, slots: SlotCache, schedule: NoiseSchedule, clock: Clock, latent_factor: int
    ) -> None:
        self._conditioner, self._slots, self._schedule, self._clock = conditioner, slots, schedule, clock
        self._factor = latent_factor

    def prepare(self, request: GenerationRequest, mixes: Sequence[Mix]) -> Prepared:
        """Prepare one request, whose own mix comes first in `mixes`, then those of its regions.

        Raises what loading its adapters, its words or its sampler raise, and InvalidArgument on words that LAG sampling
        needs and the prompt lacks.
        """
        table = make_table(self._schedule, request.sampler, request.steps, request.eta)
        timesteps = table.timesteps.tolist()
        begin = self._clock.monotonic()
        rows = tuple(self._slots.prepare(mix) for mix in mixes)
        words = self._lag_words(request, mixes[0])
        loaded = self._clock.monotonic()
        size = (request.width, request.height)
        own = self._conditioner.condition(_prompts(request, request.prompt), rows[0].text, timesteps, words, size)
        lag = mark_tokens(request, words, own.prompts[-1]).to(own.cross.device) if request.lag is not None else None
        regions = self._regions(request, rows[1:], timesteps)
        seconds = self._clock.monotonic() - loaded
        return Prepared(rows, table, own.cross, own.truncated[-1], seconds, loaded - begin, lag, regions)

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
        return tuple(PreparedRegion(mask.to(cross.device), cross) for mask, cross in zip(masks, crosses, strict=True))


def _prompts(request: GenerationRequest, prompt: str) -> tuple[str, ...]:
    return (request.negative_prompt, prompt) if request.guided else (prompt,)
