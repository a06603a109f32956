"""Where the gallery's panels draw: a painter, the adapters by their keys, and one batch for mixes that differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hueshift.adapters.adapter import Adapter
from hueshift.engines.denoise import Sample
from hueshift.training.evaluation.drawing import Drawing, LoadedMix, Mix, Painter
from hueshift.training.evaluation.grids import GridRow
from hueshift.training.pictures import picture_tensor


@dataclass(frozen=True, slots=True)
class Panel:
    """One picture of the gallery: rows under headings, a title, and what is to be seen."""

    title: str
    text: str
    headings: Sequence[str]
    rows: Sequence[GridRow]


@dataclass(frozen=True, slots=True, eq=False)
class Studio:
    """`adapters` has one for each lesson; `pictures` the folder of the examples' pictures."""

    painter: Painter
    adapters: Mapping[str, Adapter]
    pictures: Path

    def of(self, key: str, weight: float = 1.0) -> Mix:
        """An adapter alone; as in requests, one of weight 0 counts as absent, its words too."""
        return [(self.adapters[key], weight)] if weight else []

    def draw_each(self, wanted: Sequence[tuple[Drawing, Mix]]) -> list[Image.Image]:
        """Draw pictures of different mixes, as many mixes together as the engine has slots."""
        pictures: list[Image.Image] = []
        slots = self.painter.engine.slots - 1
        for begin in range(0, len(wanted), slots):
            some = wanted[begin : begin + slots]
            samples = [
                self.painter.start(drawing, self.painter.load(mix, slot)) for slot, (drawing, mix) in enumerate(some, 1)
            ]
            pictures += self.painter.finish(samples)
        return pictures

    def draw_row(self, label: str, drawings: Sequence[Drawing], mix: Mix = (), note: str = "") -> GridRow:
        """A row of pictures of one mix."""
        return GridRow(label, self.painter.draw(drawings, mix), note)

    def marks(self, prompt: str, loaded: LoadedMix, words: Sequence[str]) -> Tensor:
        """[tokens] with 1 where these words stand in the prompt, for LAG sampling."""
        condition = self.painter.conditioner.condition
        found = condition((prompt,), loaded.text, self.painter.table.timesteps.tolist(), words).prompts[-1]
        marks = torch.zeros(len(found.ids))
        for word in words:
            for group in found.found[word]:
                marks[list(group)] = 1
        return marks

    def open(self, name: str) -> Image.Image:
        """One of the examples' pictures."""
        return Image.open(self.pictures / name).convert("RGB")

    def encode(self, picture: Image.Image) -> Tensor:
        """Latents [C, h, w] of a picture, the mean of the autoencoder's."""
        return self.painter.vae.moments(picture_tensor(picture, self.painter.base.pixels)[None])[0][0]


def mask_picture(sample: Sample) -> Image.Image:
    """Where the low-rank branches of a finished LAG sample acted, averaged over steps and layers: white is always."""
    if sample.lag_mask is None:
        raise ValueError("the sample ran without LAG sampling")
    share = (sample.lag_mask / sample.table.steps).clamp(0, 1).cpu().numpy()
    return Image.fromarray(np.rint(share * 255).astype(np.uint8), "L").resize((128, 128), Image.Resampling.NEAREST)
