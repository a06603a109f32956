"""The noise schedule a base model was trained with: alpha-bar per training timestep and what its output means."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor

from hueshift.adapters.errors import InvalidArgument, Reason

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class NoiseSchedule:
    """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, with `alphas_cumprod` [T] in float64 (Ho et al. 2020).

    `prediction_type` says whether the model gives eps or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans
    and Ho 2022). `timestep_spacing`, `steps_offset` and `set_alpha_to_one` are diffusers' conventions for choosing the
    timesteps of a sampler.
    """

    alphas_cumprod: Tensor
    prediction_type: PredictionType
    timestep_spacing: str
    steps_offset: int
    set_alpha_to_one: bool

    @property
    def train_steps(self) -> int:
        """Number of training timesteps."""
        return self.alphas_cumprod.shape[0]

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Read a diffusers scheduler_config.json.

        Raises InvalidArgument (MODEL_UNSUPPORTED) on a schedule or prediction type that is not supported.
        """
        steps = int(config.get("num_train_timesteps", 1000))
        begin, end = float(config.get("beta_start", 0.00085)), float(config.get("beta_end", 0.012))
        kind = config.get("beta_schedule", "scaled_linear")
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(begin**0.5, end**0.5, steps, dtype=torch.float64) ** 2
        elif kind == "linear":
            betas = torch.linspace(begin, end, steps, dtype=torch.float64)
        else:
            raise InvalidArgument(
                Reason.MODEL_UNSUPPORTED,
                f"beta_schedule {kind!r} (supported: 'scaled_linear', 'linear', trained_betas)",
            )
        prediction = config.get("prediction_type", "epsilon")
        if prediction not in ("epsilon", "v_prediction"):
            raise InvalidArgument(
                Reason.MODEL_UNSUPPORTED, f"prediction_type {prediction!r} (supported: 'epsilon', 'v_prediction')"
            )
        if config.get("rescale_betas_zero_snr"):
            raise InvalidArgument(Reason.MODEL_UNSUPPORTED, "rescale_betas_zero_snr is not supported; set it to false")
        return cls(
            alphas_cumprod=torch.cumprod(1 - betas, 0),
            prediction_type=prediction,
            timestep_spacing=str(config.get("timestep_spacing", "leading")),
            steps_offset=int(config.get("steps_offset", 0)),
            set_alpha_to_one=bool(config.get("set_alpha_to_one", True)),
        )

    def add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise `clean` [N, ...] to `timesteps` [N]."""
        alpha_bar = self.alphas_cumprod.to(clean.device, torch.float32)[timesteps].view(-1, *[1] * (clean.dim() - 1))
        return alpha_bar.sqrt() * clean + (1 - alpha_bar).sqrt() * noise

    def target(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What the model should output for `clean` [N, ...] noised to `timesteps` [N]."""
        if self.prediction_type == "epsilon":
            return noise
        alpha_bar = self.alphas_cumprod.to(clean.device, torch.float32)[timesteps].view(-1, *[1] * (clean.dim() - 1))
        return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean
