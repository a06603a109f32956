"""Samplers as rows of coefficients, so that one vectorised update serves a batch that mixes them.

Every sampler here is a linear update of the latents x by the model's output, the previous step's data estimate and
fresh noise:

    x'    = a x + b out + c prev + d noise
    prev' = e x + f out                        (the data estimate x0 of this step)

x is kept in the variance-preserving form x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps throughout, so the UNet's
input is x itself for every sampler; samplers that diffusers runs in the scaled form x / sqrt(alpha_bar) (Euler) are
converted by the coefficients. Coefficients are computed in float64 and stored as fp32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.engines.noise_schedule import NoiseSchedule

Floats = npt.NDArray[np.float64]

# Latent consistency models are distilled on this many evenly spaced timesteps, and scale time by 10 in their boundary
# condition with sigma_data 0.5 (Luo et al. 2023, section 4; the defaults of diffusers' LCMScheduler).
LCM_ORIGIN_STEPS = 50
_LCM_TIME_SCALE = 10.0
_LCM_SIGMA_DATA = 0.5


class SamplerKind(StrEnum):
    """How the denoising differential equation is solved."""

    DDIM = "ddim"
    EULER = "euler"
    DPMPP_2M = "dpmpp_2m"
    LCM = "lcm"


@dataclass(frozen=True, slots=True, eq=False)
class SamplerTable:
    """One sampler run of S steps. `timesteps` [S] fp32, `coefficients` [S, 6] fp32 as a, b, c, d, e, f.

    The first latents are `init_scale` times unit noise. `noisy[i]` is True where step i adds fresh noise (d != 0).
    """

    kind: SamplerKind
    timesteps: Tensor
    coefficients: Tensor
    init_scale: float
    noisy: tuple[bool, ...]

    @property
    def steps(self) -> int:
        """Number of UNet calls."""
        return len(self.noisy)


def make_table(
    schedule: NoiseSchedule, kind: SamplerKind, steps: int, eta: float = 0.0, begin: int = 0
) -> SamplerTable:
    """Compute the coefficients of `steps` steps without the first `begin`; `eta` (0 to 1) counts for DDIM only.

    A run that begins later starts from a picture noised to the level of its first timestep (`noise_levels`).
    Raises InvalidArgument if the schedule has too few timesteps for `steps`, or on a wrong eta or begin.
    """
    if steps < 1:
        raise InvalidArgument.for_field("steps", f"{steps} given; at least 1 is needed")
    if not 0 <= eta <= 1:
        raise InvalidArgument.for_field("eta", f"{eta} given; allowed: 0 to 1")
    if not 0 <= begin < steps:
        raise InvalidArgument.for_field("begin", f"{begin} given; allowed: 0 to {steps - 1}")
    timesteps = _TIMESTEPS[kind](schedule, steps)
    if np.any(np.diff(timesteps) >= 0):
        raise InvalidArgument.for_field(
            "steps",
            f"{steps} given, but {kind} with {schedule.timestep_spacing!r} spacing of {schedule.train_steps} timesteps "
            "would visit one twice; ask for fewer steps",
        )
    rows, init_scale = _ROWS[kind](schedule, timesteps, eta)
    rows = rows[begin:]
    # The first step has no estimate before it: its own takes that one's place, which makes it of first order.
    rows[0, :2] += rows[0, 2] * rows[0, 4:]
    rows[0, 2] = 0.0
    return SamplerTable(
        kind=kind,
        timesteps=torch.from_numpy(timesteps[begin:].copy()).float(),
        coefficients=torch.from_numpy(rows).float(),
        init_scale=init_scale,
        noisy=tuple(bool(d != 0) for d in rows[:, 3]),
    )


def make_inverse_table(schedule: NoiseSchedule, steps: int, begin: int = 0) -> SamplerTable:
    """Coefficients that run DDIM of `steps` steps backwards, from a clean picture to the noise level of step `begin`.

    A DDIM step without fresh noise is x' = a x + b out with out at (x, t); solved for x it is x = (x' - b out) / a,
    where out is taken at (x', t) instead, since x is not known yet (Song et al. 2020, section 4.3; Mokady et al. 2023).
    The step's data estimate is the same x0. Raises what make_table raises.
    """
    forward = make_table(schedule, SamplerKind.DDIM, steps, begin=begin)
    a, b, _, _, e, f = forward.coefficients.double().flip(0).unbind(1)
    zero = torch.zeros_like(a)
    rows = torch.stack([1 / a, -b / a, zero, zero, e / a, f - e * b / a], dim=1)
    count = forward.steps
    return SamplerTable(SamplerKind.DDIM, forward.timesteps.flip(0), rows.float(), 1.0, (False,) * count)


def make_path_tables(schedule: NoiseSchedule, steps: int, timestep: float) -> tuple[SamplerTable, SamplerTable]:
    """Coefficients of a way from a clean picture up to the noise level of `timestep`, and of the same way back.

    The levels between are those of a DDIM run of `steps` steps, so at most `steps` are taken, and fewer to a lower
    level; a sampler that begins at `timestep`, whichever it is, finds what it expects. Up, a step takes the output at
    its own latents and the level it goes to, as in make_inverse_table, which is the special case of DDIM's own first
    timestep. Raises what make_table raises.
    """
    levels = _levels_below(schedule, steps, timestep)
    alpha_bar = _alpha_bar(schedule)
    clean = 1.0 if schedule.set_alpha_to_one else float(alpha_bar[0])
    alphas = np.concatenate([[np.sqrt(clean)], 1 / np.sqrt(1 + _sigmas_at(schedule, levels)[:-1] ** 2)])
    up, down = np.zeros((len(levels), 6)), np.zeros((len(levels), 6))
    for i in range(len(levels)):
        low, high = alphas[i], alphas[i + 1]
        data, noise = _data_row(schedule, high), _noise_row(schedule, high)
        a, b = low * data + np.sqrt(1 - low**2) * noise
        down[-1 - i, :2], down[-1 - i, 4:] = (a, b), data
        up[i, :2], up[i, 4:] = (1 / a, -b / a), (data[0] / a, data[1] - data[0] * b / a)
    still = (False,) * len(levels)

    def table(timesteps: Floats, rows: Floats) -> SamplerTable:
        return SamplerTable(
            SamplerKind.DDIM, torch.from_numpy(timesteps).float(), torch.from_numpy(rows).float(), 1.0, still
        )

    return table(levels, up), table(levels[::-1].copy(), down)


def _levels_below(schedule: NoiseSchedule, steps: int, timestep: float) -> Floats:
    """Timesteps, rising, of a DDIM run of `steps` steps below `timestep`, then `timestep` itself."""
    run = make_table(schedule, SamplerKind.DDIM, steps).timesteps.double().numpy()[::-1]
    # One that is nearly there would be a step for nothing.
    below = run[run < timestep - schedule.train_steps / steps / 2][: steps - 1]
    return np.append(below, timestep)


def noise_levels(schedule: NoiseSchedule, table: SamplerTable) -> tuple[float, float]:
    """Shares of a clean picture and of unit noise in the latents that the table's first step expects."""
    sigma = float(_sigmas_at(schedule, table.timesteps[:1].double().numpy())[0])
    alpha = float(1 / np.sqrt(1 + sigma**2))
    return alpha, sigma * alpha


def _ddim(schedule: NoiseSchedule, timesteps: Floats, eta: float) -> tuple[Floats, float]:
    """DDIM (Song et al. 2020, equations 12 and 16)."""
    alpha_bar = _alpha_bar(schedule)
    steps = len(timesteps)
    final = 1.0 if schedule.set_alpha_to_one else alpha_bar[0]
    rows = np.zeros((steps, 6))
    for i, timestep in enumerate(timesteps.astype(int)):
        # diffusers steps back by the training stride, whatever the spacing.
        previous = timestep - schedule.train_steps // steps
        now, then = alpha_bar[timestep], alpha_bar[previous] if previous >= 0 else final
        deviation = eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
        data, noise = _data_row(schedule, np.sqrt(now)), _noise_row(schedule, np.sqrt(now))
        rows[i, :2] = np.sqrt(then) * data + np.sqrt(max(1 - then - deviation**2, 0.0)) * noise
        rows[i, 3] = deviation
        rows[i, 4:] = data
    return rows, 1.0


def _euler(schedule: NoiseSchedule, timesteps: Floats, _eta: float) -> tuple[Floats, float]:
    """Euler's method on the probability-flow equation (Karras et al. 2022, algorithm 1 without the correction)."""
    steps = len(timesteps)
    sigmas = _sigmas_at(schedule, timesteps)
    alphas = 1 / np.sqrt(1 + sigmas**2)
    rows = np.zeros((steps, 6))
    for i in range(steps):
        # In the scaled form y = x / alpha: y' = y + (sigma' - sigma) eps.
        data, noise = _data_row(schedule, alphas[i]), _noise_row(schedule, alphas[i])
        rows[i, :2] = alphas[i + 1] * ((sigmas[i + 1] - sigmas[i]) * noise + np.array([1 / alphas[i], 0.0]))
        rows[i, 4:] = data
    unit_start = schedule.timestep_spacing == "leading"
    return rows, 1.0 if unit_start else float(sigmas[0] * alphas[0])


def _dpmpp_2m(schedule: NoiseSchedule, timesteps: Floats, _eta: float) -> tuple[Floats, float]:
    """DPM-Solver++(2M), midpoint, ending at sigma 0 with a first-order step (Lu et al. 2022, algorithm 2)."""
    steps = len(timesteps)
    sigmas = _sigmas_at(schedule, timesteps)
    alphas = 1 / np.sqrt(1 + sigmas**2)
    rows = np.zeros((steps, 6))
    for i in range(steps):
        data = _data_row(schedule, alphas[i])
        # exp(-h) with h = lambda' - lambda and lambda = -log(sigma).
        decay = sigmas[i + 1] / sigmas[i]
        gain = alphas[i + 1] * (1 - decay)
        rows[i, 0] = sigmas[i + 1] * alphas[i + 1] / (sigmas[i] * alphas[i])
        slope = 0.0
        if 0 < i < steps - 1:
            # D1 = (m0 - m1) / r0 with r0 = h0 / h; the midpoint rule takes half of it.
            slope = 0.5 * gain * np.log(sigmas[i] / sigmas[i + 1]) / np.log(sigmas[i - 1] / sigmas[i])
        rows[i, :2] += (gain + slope) * data
        rows[i, 2] = -slope
        rows[i, 4:] = data
    return rows, 1.0


def _lcm(schedule: NoiseSchedule, timesteps: Floats, _eta: float) -> tuple[Floats, float]:
    """Multistep latent consistency sampling (Luo et al. 2023, algorithm 3)."""
    steps = len(timesteps)
    alpha_bar = _alpha_bar(schedule)
    rows = np.zeros((steps, 6))
    for i, timestep in enumerate(timesteps.astype(int)):
        data = _data_row(schedule, np.sqrt(alpha_bar[timestep]))
        scaled = timestep * _LCM_TIME_SCALE
        skip = _LCM_SIGMA_DATA**2 / (scaled**2 + _LCM_SIGMA_DATA**2)
        out = scaled / np.sqrt(scaled**2 + _LCM_SIGMA_DATA**2)
        clean = out * data + np.array([skip, 0.0])
        then = alpha_bar[int(timesteps[i + 1])] if i + 1 < steps else 1.0
        rows[i, :2] = np.sqrt(then) * clean
        rows[i, 3] = np.sqrt(1 - then)
        rows[i, 4:] = data
    return rows, 1.0


def _alpha_bar(schedule: NoiseSchedule) -> Floats:
    return np.asarray(schedule.alphas_cumprod.cpu().double().numpy(), dtype=np.float64)


def _data_row(schedule: NoiseSchedule, alpha: float) -> Floats:
    """x0 as (coefficient of x, coefficient of out), with alpha = sqrt(alpha_bar)."""
    sigma = np.sqrt(1 - alpha**2)
    if schedule.prediction_type == "epsilon":
        return np.array([1 / alpha, -sigma / alpha])
    return np.array([alpha, -sigma])


def _noise_row(schedule: NoiseSchedule, alpha: float) -> Floats:
    """eps as (coefficient of x, coefficient of out)."""
    if schedule.prediction_type == "epsilon":
        return np.array([0.0, 1.0])
    return np.array([np.sqrt(1 - alpha**2), alpha])


def _sigmas_at(schedule: NoiseSchedule, timesteps: Floats) -> Floats:
    """Noise-to-signal ratios at `timesteps` (fractions interpolate), then 0."""
    alpha_bar = _alpha_bar(schedule)
    sigmas = np.sqrt((1 - alpha_bar) / alpha_bar)
    return np.append(np.interp(timesteps, np.arange(len(sigmas)), sigmas), 0.0)


def _spaced(schedule: NoiseSchedule, steps: int) -> Floats:
    """Timesteps, falling, by diffusers' spacing of that name (Lin et al. 2023, table 2)."""
    count, spacing = schedule.train_steps, schedule.timestep_spacing
    if spacing == "linspace":
        return np.linspace(0, count - 1, steps)[::-1].copy()
    if spacing == "leading":
        return (np.arange(steps)[::-1] * (count // steps)).astype(np.float64) + schedule.steps_offset
    if spacing == "trailing":
        return np.round(count - np.arange(steps) * (count / steps)) - 1
    raise _unknown_spacing(spacing)


def _dpm_timesteps(schedule: NoiseSchedule, steps: int) -> Floats:
    """The solver's own spacing: it counts the end of the last step as a timestep, except when trailing."""
    count, spacing = schedule.train_steps, schedule.timestep_spacing
    if spacing == "linspace":
        return np.linspace(0, count - 1, steps + 1).round()[::-1][:-1].copy()
    if spacing == "leading":
        ticks = np.arange(1, steps + 1)[::-1] * (count // (steps + 1))
        return ticks.astype(np.float64) + schedule.steps_offset
    return _spaced(schedule, steps)


def _lcm_timesteps(schedule: NoiseSchedule, steps: int) -> Floats:
    """Evenly spread picks from the timesteps of the distillation, whatever the model's own spacing."""
    if steps > LCM_ORIGIN_STEPS:
        raise InvalidArgument.for_field("steps", f"{steps} given; the lcm sampler allows 1 to {LCM_ORIGIN_STEPS}")
    stride = schedule.train_steps // LCM_ORIGIN_STEPS
    origin = np.arange(1, LCM_ORIGIN_STEPS + 1, dtype=np.float64)[::-1] * stride - 1
    picks = np.floor(np.linspace(0, LCM_ORIGIN_STEPS, num=steps, endpoint=False)).astype(int)
    return np.asarray(origin[picks], dtype=np.float64)


def _unknown_spacing(spacing: str) -> InvalidArgument:
    return InvalidArgument(
        Reason.MODEL_UNSUPPORTED, f"timestep_spacing {spacing!r} (supported: 'leading', 'linspace', 'trailing')"
    )


_TIMESTEPS: dict[SamplerKind, Callable[[NoiseSchedule, int], Floats]] = {
    SamplerKind.DDIM: lambda schedule, steps: _spaced(schedule, steps).round(),
    SamplerKind.EULER: _spaced,
    SamplerKind.DPMPP_2M: _dpm_timesteps,
    SamplerKind.LCM: _lcm_timesteps,
}
_ROWS: dict[SamplerKind, Callable[[NoiseSchedule, Floats, float], tuple[Floats, float]]] = {
    SamplerKind.DDIM: _ddim,
    SamplerKind.EULER: _euler,
    SamplerKind.DPMPP_2M: _dpmpp_2m,
    SamplerKind.LCM: _lcm,
}
