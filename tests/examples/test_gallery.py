"""The gallery's panels, drawn by a tiny model with small random adapters, and its page."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_painter import make_tiny_painter
from tiny_training import make_tiny_base

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.engines.base_model import BaseModel
from hueshift.examples.gallery import INTRODUCTION, PANELS, read_sections, write_panel
from hueshift.examples.gallery_lessons import FOX_WORD, LESSONS, PICTURES, STYLE_WORD, GalleryLesson
from hueshift.examples.gallery_sampling import show_lag
from hueshift.examples.gallery_studio import Panel, Studio
from hueshift.training.defaults import check_identifier
from hueshift.training.evaluation.drawing import Drawing
from hueshift.training.evaluation.grids import GridRow
from hueshift.training.spec import Method


def make_adapter(base: BaseModel, method: Method, word: str, seed: int) -> Adapter:
    """What the method makes, with random values."""
    generator = torch.Generator().manual_seed(seed)
    layout = base.layout

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    kinds = {Method.SVDIFF: AdapterKind.SPECTRAL, Method.CUSTOM_DIFFUSION: AdapterKind.KV}
    words = {word: normal(1, layout.token_width)}
    kind = kinds.get(method, AdapterKind.TOKENS if method is Method.TEXTUAL_INVERSION else AdapterKind.LOWRANK)
    targets = [layer for layer in layout.matrices if layer.name.endswith("proj_out")]
    return Adapter(
        kind,
        base.base_hash,
        method,
        tokens=words,
        identifier=word,
        spectral={layer.name: normal(layer.rank) for layer in layout.matrices} if kind is AdapterKind.SPECTRAL else {},
        lowrank={layer.name: LowRankFactors(normal(2, layer.cols), normal(layer.rows, 2)) for layer in targets}
        if kind is AdapterKind.LOWRANK
        else {},
    )


@pytest.fixture(scope="module")
def studio(base_model: BaseModel) -> Studio:
    base, factors = make_tiny_base(base_model)
    adapters = {
        lesson.key: make_adapter(base, lesson.method, STYLE_WORD if lesson.folder == "openmoji" else FOX_WORD, number)
        for number, lesson in enumerate(LESSONS)
    }
    return Studio(make_tiny_painter(base, factors), adapters, PICTURES)


@pytest.mark.parametrize("name", PANELS)
def test_every_panel_fills_its_rows(studio: Studio, name: str) -> None:
    panel = PANELS[name](studio)
    lengths = {row.label: len(row.pictures) for row in panel.rows if row.label != "learned from"}
    assert set(lengths.values()) == {len(panel.headings)}
    drawn = [picture.tobytes() for row in panel.rows[1:] for picture in row.pictures if picture is not None]
    assert len(set(drawn)) > len(drawn) // 2
    assert not panel.text.endswith(" ")


def test_mixes_in_one_batch_are_as_alone(studio: Studio) -> None:
    wanted = [(Drawing("a sks animal", seed), studio.of("svdiff", weight)) for seed, weight in enumerate((0.5, 1.0))]
    wanted += [(Drawing("a sks animal", 2), studio.of("lora")), (Drawing("a lemon", 3), [])]
    together = studio.draw_each(wanted)
    alone = [studio.painter.draw([drawing], mix)[0] for drawing, mix in wanted]
    for one, other in zip(together, alone, strict=True):
        assert np.abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)).max() <= 2


def test_lag_leaves_pictures_that_differ_and_masks_of_both_kinds(studio: Studio) -> None:
    everywhere, confined, masks = show_lag(studio).rows
    assert everywhere.pictures[0] is not None
    assert confined.pictures[0] is not None
    assert everywhere.pictures[0].tobytes() != confined.pictures[0].tobytes()
    assert masks.pictures[0] is not None
    values = np.asarray(masks.pictures[0])
    assert 0.3 < values.mean() / 255 < 0.9
    assert len(np.unique(values)) > 1


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.key)
def test_lessons_are_jobs_with_words_that_can_be_learned(base_model: BaseModel, lesson: GalleryLesson) -> None:
    spec = lesson.spec()
    assert check_identifier(spec.identifier, base_model.tokenizer) > 0
    assert all(spec.identifier in caption for caption in spec.captions)
    assert len(lesson.pictures()) == len(spec.captions)
    assert (spec.steps, lesson.spec(3).steps) == (lesson.steps, 3)


def test_a_panel_drawn_again_leaves_the_others(tmp_path: Path) -> None:
    page = tmp_path / "gallery.md"
    rows = [GridRow("row", [Image.new("RGB", (8, 8), "red")])]
    for name, text in (("lag", "first"), ("kinds", "kinds"), ("lag", "second")):
        write_panel(page, name, Panel(name.title(), text, ["heading"], rows))
    assert list(read_sections(page)) == ["kinds", "lag"]
    text = page.read_text(encoding="utf-8")
    assert text.startswith(INTRODUCTION)
    assert "second" in text
    assert "first" not in text
    assert text.count("![Kinds](gallery/kinds.png)") == 1
    assert sorted(path.name for path in (tmp_path / "gallery").iterdir()) == ["kinds.png", "lag.png"]
