"""What a request needs before its first step, made off the step loop: text, adapter rows, sampler coefficients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hueshift.engines.noise_schedule import NoiseSchedule
from hueshift.engines.residency import Mix, PreparedMix, SlotCache
from hueshift.engines.samplers import SamplerTable, make_table
from hueshift.engines.text import TextStage
from hueshift.server.clock import Clock
from hueshift.server.generation import GenerationRequest


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """`context` is [2, tokens, width] with the negative prompt first, or [1, tokens, width] without guidance."""

    mix: PreparedMix
    table: SamplerTable
    context: Tensor
    truncated: int
    text_seconds: float
    adapter_seconds: float


class Preparation:
    """Prepares requests; safe to call from several threads."""

    def __init__(self, text: TextStage, slots: SlotCache, schedule: NoiseSchedule, clock: Clock) -> None:
        self._text, self._slots, self._schedule, self._clock = text, slots, schedule, clock

    def prepare(self, request: GenerationRequest, mix: Mix) -> Prepared:
        """Prepare one request. Raises what loading its adapters, its words or its sampler raise."""
        table = make_table(self._schedule, request.sampler, request.steps, request.eta)
        begin = self._clock.monotonic()
        row = self._slots.prepare(mix)
        loaded = self._clock.monotonic()
        context, truncated = self._encode(request, row)
        return Prepared(row, table, context, truncated, self._clock.monotonic() - loaded, loaded - begin)

    def _encode(self, request: GenerationRequest, row: PreparedMix) -> tuple[Tensor, int]:
        if request.rows == 1:
            result = self._text.encode([request.prompt], row.tokens)
            return result.context, result.truncated[0]
        if not request.negative_prompt:
            result = self._text.encode([request.prompt], row.tokens)
            return torch.stack([self._text.empty, result.context[0]]), result.truncated[0]
        result = self._text.encode([request.negative_prompt, request.prompt], row.tokens)
        return result.context, result.truncated[1]
