"""SVDiff and residuals written out as one loop over diffusers-free formulas, to compare the trainer's bits with.

This is how training was first done here: no objectives, no methods, no settings. What it computes must never change for
a job that asks for nothing new.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.base_model import BaseModel
from hueshift.engines.interface import Plan
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.engines.vae import VaeStage
from hueshift.training.pictures import picture_tensor
from hueshift.training.precision import has_fast_bfloat16
from hueshift.training.spec import Method, TrainingSpec


class PlainTraining:
    """One job without class pictures or mirror images; `losses` and `values` after `run`."""

    def __init__(
        self, base: BaseModel, factors: SpectralFactors, spec: TrainingSpec, pictures: Sequence[Image.Image]
    ) -> None:
        self.base, self.spec, self.text = base, spec, TextStage(base)
        self.generator = torch.Generator().manual_seed(spec.seed)
        self.svdiff = spec.method is Method.SVDIFF
        self.rows = RowLayout(base.layout, () if self.svdiff else ("proj_out",), 1 if self.svdiff else 3)
        norms = read_norms(base.layout, lambda name: base.unet.get_parameter(f"{name}.weight"))
        self.base_row = self.rows.base_spectral(factors, norms)
        self.unet = AdaptedUNet(base, factors, self.rows, Plan.FACTORED if self.svdiff else Plan.DENSE)
        pixels = torch.stack([picture_tensor(picture, base.pixels) for picture in pictures])
        parts = [VaeStage(base).moments(part) for part in torch.split(pixels, 4)]
        self.mean, self.std = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        self.values = self._start()
        self.order = torch.zeros(0, dtype=torch.int64)
        self.losses: list[float] = []

    def run(self) -> dict[str, Tensor]:
        """Take all steps; return what is published."""
        spec = self.spec
        rates = dict.fromkeys(self.values, spec.learning_rate)
        rates |= {"norm": spec.norm_learning_rate, "identifier": spec.identifier_learning_rate}
        groups = [{"params": [value], "lr": rates[name]} for name, value in self.values.items()]
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99), weight_decay=0.0)
        average = {name: value.detach().clone() for name, value in self.values.items()}
        for step in range(spec.steps):
            loss = self._loss()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            rise = min(1.0, (step + 1) / spec.warmup_steps)
            for name, group in zip(self.values, optimizer.param_groups, strict=True):
                group["lr"] = rates[name] * (rise * (1 - step / spec.steps))
            optimizer.step()
            decay = min(spec.ema_decay, (step + 1) / (step + 10))
            for name, mean in average.items():
                mean.lerp_(self.values[name].detach(), 1 - decay)
            self.losses.append(loss.item())
        return average if spec.ema_decay else {name: value.detach() for name, value in self.values.items()}

    def _start(self) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        if self.svdiff:
            sigmas = self.rows.layout.sigma_size
            values = {"sigma": torch.zeros(sigmas), "norm": torch.zeros(self.rows.spectral_size - sigmas)}
        for target in self.rows.targets:
            rank = max(1, min(math.floor(0.05 * target.rows), target.cols))
            noise = torch.randn(rank, target.cols, generator=self.generator)
            values[f"a/{target.name}"] = noise / math.sqrt(target.cols)
            values[f"b/{target.name}"] = torch.zeros(target.rows, rank)
        table = self.base.text_encoder.get_input_embeddings().weight.detach()
        values["identifier"] = table[self.text.token_id(self.spec.identifier)].clone()
        return {name: value.requires_grad_() for name, value in values.items()}

    def _loss(self) -> Tensor:
        spec, generator, count = self.spec, self.generator, self.spec.batch_size
        while len(self.order) < count:
            self.order = torch.cat([self.order, torch.randperm(len(self.mean), generator=generator)])
        chosen, self.order = self.order[:count], self.order[count:]
        clean = self.mean[chosen] + self.std[chosen] * torch.randn(self.mean[chosen].shape, generator=generator)
        kept = torch.rand(count, generator=generator) >= spec.caption_dropout
        captions = [spec.captions[i] if keep else "" for i, keep in zip(chosen.tolist(), kept.tolist(), strict=True)]
        timesteps = self._timesteps(count)
        noise = torch.randn(clean.shape, generator=generator)
        schedule = self.base.schedule
        noisy, target = schedule.add_noise(clean, noise, timesteps), schedule.target(clean, noise, timesteps)
        context = self._context(captions)
        anchored = timesteps < spec.anchor_below
        with torch.autocast("cpu", torch.bfloat16, enabled=has_fast_bfloat16(torch.device("cpu"))):
            output = self.unet.forward_rows(noisy, timesteps, context, *self._rows())
            if bool(anchored.any()):
                with torch.no_grad():
                    row = self.base_row[None] if self.svdiff else None
                    part = noisy[anchored], timesteps[anchored], context[anchored]
                    target[anchored] = self.unet.forward_rows(*part, row, None).float()
        weights = torch.full((count,), 1 / count)
        return ((output.float() - target).square().mean(dim=(1, 2, 3)) * weights).sum()

    def _timesteps(self, count: int) -> Tensor:
        below, steps = self.spec.anchor_below, self.base.schedule.train_steps
        strata = (torch.arange(count) + torch.rand(count, generator=self.generator)) / count
        share = 0.125 if below else 0.0
        high = (below**2 + (strata - share) / (1 - share) * (steps**2 - below**2)).clamp(min=0).sqrt()
        timesteps = torch.where(strata < share, below * strata / 0.125, high).long().clamp(max=steps - 1)
        return timesteps[torch.randperm(count, generator=self.generator)]

    def _context(self, captions: list[str]) -> Tensor:
        unique = [caption for caption in dict.fromkeys(captions) if caption]
        found = {"": self.text.empty}
        if unique:
            words = {self.spec.identifier: self.values["identifier"]}
            found |= dict(zip(unique, self.text.encode_differentiably(unique, words).context, strict=True))
        return torch.stack([found[caption] for caption in captions])

    def _rows(self) -> tuple[Tensor | None, Tensor | None]:
        if self.svdiff:
            row = self.base_row + torch.cat([self.values["sigma"], self.values["norm"]])
            sigmas = self.rows.layout.sigma_size
            return torch.cat([row[:sigmas].relu(), row[sigmas:]])[None], None
        factors = {t.name: (self.values[f"a/{t.name}"], self.values[f"b/{t.name}"]) for t in self.rows.targets}
        return None, self.rows.pack_lowrank(factors)[None]
