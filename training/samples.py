"""Pictures from the UNet in training, by the same step loop that serves requests."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from hueshift.adapters.errors import FailedPrecondition, Reason
from hueshift.engines.base_model import BaseModel
from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.denoise import Sample, advance, start_sample
from hueshift.engines.fused_update import UpdateForm
from hueshift.engines.interface import BASE_SLOT, EngineRow, Guides, Plan
from hueshift.engines.samplers import SamplerKind, make_table
from hueshift.engines.vae import VaeStage
from hueshift.training.methods.learnable import Rows
from hueshift.training.unet import TrainingUNet

# Few steps do for DPM-Solver++ 2M. Guidance 3 suits learned styles better than 5 (docs/training.md).
SAMPLE_STEPS = 15
SAMPLE_GUIDANCE = 3.0


@dataclass(frozen=True, slots=True, eq=False)
class RowsEngine:
    """A UNetEngine (engines.interface) of one slot, which holds `rows`: what the step loop needs, and no more."""

    unet: TrainingUNet
    rows: Rows
    max_batch: int = 16
    slots: int = 1
    name: str = "torch"

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The UNet's own."""
        return (self.unet.plan,)

    def load_row(self, slot: int, row: EngineRow) -> None:
        """Do nothing: the one slot's rows are given when the engine is made."""

    def denoise(
        self,
        plan: Plan,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        added: Tensor | None = None,
    ) -> Tensor:
        """Run the UNet with the rows, whatever the index. `cross` is a context: this UNet projects it itself."""
        return self.unet(latents, timesteps, cross, self.rows).float()

    def denoise_guided(
        self,
        latents: Tensor,
        timesteps: Tensor,
        cross: Tensor,
        adapter_index: Tensor,
        guides: Guides,
        added: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Refuse: sample pictures ask for no guides. Raises FailedPrecondition (PLAN_UNAVAILABLE)."""
        raise FailedPrecondition(Reason.PLAN_UNAVAILABLE, "pictures drawn while training have no full plan")

    def warm(self) -> None:
        """Do nothing: training has warmed it."""


@dataclass(frozen=True, slots=True, eq=False)
class Sampler:
    """Draws pictures at the base's native size. `check` is called before every step and may raise to stop."""

    base: BaseModel
    unet: TrainingUNet
    vae: VaeStage
    empty: Tensor
    check: Callable[[], None]
    steps: int = SAMPLE_STEPS
    guidance: float = SAMPLE_GUIDANCE

    def latents(self, contexts: Tensor, seeds: Sequence[int], rows: Rows) -> Tensor:
        """Latents [n, 4, h, w] of contexts [n, tokens, width], one seed each, in batches the UNet is given anyway."""
        engine = RowsEngine(self.unet, rows)
        # Contexts may have one part for each layer; the empty prompt is the same for all.
        empty = self.empty.repeat(1, contexts.shape[-1] // self.empty.shape[-1])
        table = make_table(self.base.schedule, SamplerKind.DPMPP_2M, self.steps)
        shape = (self.base.latent_channels, self.base.sample_size, self.base.sample_size)
        samples: list[Sample] = [
            start_sample(
                seed,
                shape,
                cross=CrossInputs((torch.stack([empty, context]),)),
                guidance=self.guidance,
                table=table,
                slot=BASE_SLOT,
                needs_factored=self.unet.plan is Plan.FACTORED,
            )
            for context, seed in zip(contexts, seeds, strict=True)
        ]
        width, form = engine.max_batch // 2, UpdateForm()
        for begin in range(0, len(samples), width):
            for _ in range(self.steps):
                self.check()
                advance(engine, samples[begin : begin + width], self.unet.plan, form)
        return torch.stack([sample.latents for sample in samples])

    def pictures(self, contexts: Tensor, seeds: Sequence[int], rows: Rows) -> list[Image.Image]:
        """Draw the pictures of contexts [n, tokens, width]."""
        pixels = self.vae.decode(self.latents(contexts, seeds, rows))
        return [Image.fromarray(picture, "RGB") for picture in pixels]
