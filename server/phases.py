"""What a picture in the batch does, one after the other: inversion, the way back where its error is wanted, sampling.

Most pictures sample from the beginning. An edit's first picture inverts the picture that the request starts from; the
others wait for that, and sample from the same latents. The sample stays the same object in the same place of the batch:
from one phase to the next it changes its coefficients, its guidance and what its cross-attention reads.
"""

from collections.abc import Sequence

import torch

from hueshift.engines.base_model import BaseModel
from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.denoise import Region, Sample, start_sample
from hueshift.engines.picture_start import mix_start, noise_at, relative_error
from hueshift.engines.samplers import SamplerTable
from hueshift.server.preparation import Prepared, PreparedInversion, PreparedStart
from hueshift.server.ticket import Phase, Running, Ticket


def begin_picture(
    base: BaseModel,
    ticket: Ticket,
    prepared: Prepared,
    index: int,
    slots: Sequence[int],
    reference: Sample | None,
    now: float,
) -> Running:
    """Make picture `index` of a request, in its first phase; `slots` are those of the request's mixes."""
    parts = zip(prepared.regions, prepared.mixes[1:], slots[1:], strict=True)
    sample = start_sample(
        ticket.request.seeds[index],
        (base.latent_channels, *ticket.size),
        cross=prepared.cross,
        guidance=ticket.request.guidance_scale,
        table=prepared.table,
        slot=slots[0],
        needs_factored=prepared.mixes[0].needs_factored,
        lag=prepared.lag,
        reference=reference,
        regions=tuple(Region(part.mask, part.cross, slot, mix.needs_factored) for part, mix, slot in parts),
    )
    running = Running(ticket, index, sample, prepared, started=now, sampling=now)
    start = prepared.start
    if start is None:
        return running
    if start.inversion is None:
        sample.latents = noise_at(start.clean, ticket.request.seeds[index], start.levels)
    elif ticket.inverted is None:
        ticket.inverting = True
        running.phase = Phase.INVERSION
        sample.latents = start.clean.clone()
        _set_phase(sample, start.inversion.up, start.inversion.up_cross, 1.0)
    else:
        _sample_from(running, start, start.inversion)
    return running


def end_phase(running: Running, now: float) -> bool:
    """Let a picture that has done its phase's steps go on to the next one; return True if there is none."""
    start, sample = running.prepared.start, running.sample
    if running.phase is Phase.SAMPLING or start is None or start.inversion is None:
        return True
    inversion = start.inversion
    if running.phase is Phase.INVERSION:
        running.ticket.inverted = sample.latents
        if inversion.down is not None and inversion.down_cross is not None:
            running.phase = Phase.RETURN
            _set_phase(sample, inversion.down, inversion.down_cross, 1.0)
            return False
    else:
        running.ticket.inversion_error = relative_error(sample.latents, start.clean)
    running.phase, running.sampling = Phase.SAMPLING, now
    _set_phase(sample, running.prepared.table, running.prepared.cross, running.ticket.request.guidance_scale)
    _sample_from(running, start, inversion)
    return False


def row_steps_left(running: Running) -> int:
    """UNet rows of all the steps that a picture has not taken yet."""
    sample, request = running.sample, running.ticket.request
    left = (sample.table.steps - sample.step) * sample.rows
    start = running.prepared.start
    if running.phase is Phase.SAMPLING or start is None or start.inversion is None:
        return left
    if running.phase is Phase.INVERSION and start.inversion.down is not None:
        left += start.inversion.down.steps
    return left + running.prepared.table.steps * request.rows


def steps_ahead(ticket: Ticket, prepared: Prepared) -> int:
    """Steps, one after the other, of the next picture of a request."""
    return prepared.table.steps + (prepared.inversion_steps if ticket.inverted is None else 0)


def waits_for_inversion(ticket: Ticket) -> bool:
    """True while another picture of the request is still inverting what the next one starts from."""
    return ticket.inverting and ticket.inverted is None


def _set_phase(sample: Sample, table: SamplerTable, cross: CrossInputs, guidance: float) -> None:
    sample.table, sample.cross, sample.guidance, sample.step = table, cross, guidance, 0
    sample.prev = torch.zeros_like(sample.latents)
    # The masks that a caller gets are those of sampling.
    sample.lag_mask = None


def _sample_from(running: Running, start: PreparedStart, inversion: PreparedInversion) -> None:
    inverted, seed = running.ticket.inverted, running.ticket.request.seeds[running.index]
    if inverted is not None:
        running.sample.latents = mix_start(inverted, start.clean, seed, inversion.noise_share, start.levels)
