"""What a request needs before its first step, made off the step loop: text, adapter rows, sampler coefficients."""

from dataclasses import dataclass

from hueshift.engines.conditioning import Conditioner, CrossInputs
from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.residency import Mix, PreparedMix, SlotCache
from hueshift.engines.samplers import SamplerTable, make_table
from hueshift.server.clock import Clock
from hueshift.server.generation import GenerationRequest


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """`cross` has the negative prompt's row first, or one row without guidance."""

    mix: PreparedMix
    table: SamplerTable
    cross: CrossInputs
    truncated: int
    text_seconds: float
    adapter_seconds: float


class Preparation:
    """Prepares requests; safe to call from several threads."""

    def __init__(self, conditioner: Conditioner, slots: SlotCache, schedule: NoiseSchedule, clock: Clock) -> None:
        self._conditioner, self._slots, self._schedule, self._clock = conditioner, slots, schedule, clock

    def prepare(self, request: GenerationRequest, mix: Mix) -> Prepared:
        """Prepare one request. Raises what loading its adapters, its words or its sampler raise."""
        table = make_table(self._schedule, request.sampler, request.steps, request.eta)
        begin = self._clock.monotonic()
        row = self._slots.prepare(mix)
        loaded = self._clock.monotonic()
        prompts = (request.prompt,) if request.rows == 1 else (request.negative_prompt, request.prompt)
        made = self._conditioner.condition(prompts, row.text, table.timesteps.tolist())
        seconds = self._clock.monotonic() - loaded
        return Prepared(row, table, made.cross, made.truncated[-1], seconds, loaded - begin)
