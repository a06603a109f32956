"""Class pictures are drawn once for all jobs that want the same, and the folder does not grow for ever."""

import os
from pathlib import Path

import torch
from tiny_training import make_spec, make_tiny_unet
from torch import Tensor

from hueshift.engines.base_model import BaseModel
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.engines.vae import VaeStage
from hueshift.training.class_pictures import class_key, class_latents, prune_cache
from hueshift.training.methods.learnable import Rows
from hueshift.training.samples import Sampler
from hueshift.training.spec import Method

Tiny = tuple[BaseModel, SpectralFactors]


class Drawing:
    """A sampler of two steps, counted."""

    def __init__(self, tiny: Tiny, steps: int = 2) -> None:
        self.steps = 0
        base = tiny[0]
        self.text = TextStage(base)
        unet = make_tiny_unet(*tiny, make_spec(Method.TEXTUAL_INVERSION))
        self.sampler = Sampler(base, unet, VaeStage(base), self.text.empty, self.count, steps=steps)

    def count(self) -> None:
        self.steps += 1

    def draw(self, folder: Path, count: int, noun: str = "fox", seed: int = 0) -> Tensor:
        prompt = f"a {noun}"
        context = self.text.encode([prompt], {}).context[0]
        return class_latents(folder, self.sampler, prompt, context, Rows(), count=count, seed=seed)


def test_another_job_finds_them_and_draws_only_what_is_missing(tiny: Tiny, tmp_path: Path) -> None:
    drawing = Drawing(tiny)
    first = drawing.draw(tmp_path, 4)
    assert drawing.steps == 2
    again = Drawing(tiny)
    more = again.draw(tmp_path, 8)
    assert again.steps == 2
    assert torch.equal(more[:4], first)
    assert Drawing(tiny).draw(tmp_path, 4).equal(first)
    assert len({latents.sum().item() for latents in more}) == 8


def test_what_decides_them_decides_where_they_lie(tiny: Tiny) -> None:
    drawing, other = Drawing(tiny), Drawing(tiny, steps=3)
    keys = {
        class_key(drawing.sampler, "a fox", 0),
        class_key(drawing.sampler, "a fox", 1),
        class_key(drawing.sampler, "a dog", 0),
        class_key(other.sampler, "a fox", 0),
    }
    assert len(keys) == 4
    assert class_key(Drawing(tiny).sampler, "a fox", 0) in keys


def test_a_torn_file_is_drawn_again(tiny: Tiny, tmp_path: Path) -> None:
    drawing = Drawing(tiny)
    first = drawing.draw(tmp_path, 2)
    file = next(tmp_path.glob("*/*.safetensors"))
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(drawing.draw(tmp_path, 2), first)


def test_the_class_that_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    for age, name in ((300, "old"), (200, "older-but-used"), (100, "new")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "0000-4.safetensors").write_bytes(b"x" * 100)
        os.utime(folder, (1e9 - age, 1e9 - age))
    assert prune_cache(tmp_path, 300) == 0
    assert prune_cache(tmp_path, 200) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "older-but-used"]
    assert prune_cache(tmp_path / "missing", 1) == 0
