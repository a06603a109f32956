"""The painter draws what serving draws, alone or in company, with rows or with merged weights."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.adapters.errors import InvalidArgument
from hueshift.engines.torch_engine import TorchEngine
from hueshift.training.evaluation.drawing import Drawing, Painter, merge_matrices

DRAWINGS = [Drawing("a noto emoji of a lemon", 0), Drawing("a noto emoji of a lemon", 1), Drawing("a sks animal", 0)]


def lowrank(painter: Painter, endings: tuple[str, ...], rank: int = 4) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    layout = painter.base.layout
    layers = [layer for layer in layout.matrices if layer.name.endswith(endings)]
    assert layers
    factors = {
        layer.name: LowRankFactors(
            torch.randn(rank, layer.cols, generator=generator) * 0.4,
            torch.randn(layer.rows, rank, generator=generator) * 0.4,
            0.5,
        )
        for layer in layers
    }
    return Adapter(AdapterKind.LOWRANK, layout.base_hash, "lora", lowrank=factors)


def pixels(
    painter: Painter, drawings: list[Drawing], adapter: Adapter | None = None, weight: float = 1.0
) -> np.ndarray:
    mix = [] if adapter is None else [(adapter, weight)]
    return np.stack([np.asarray(picture, dtype=np.int16) for picture in painter.draw(drawings, mix)])


def test_pictures_do_not_depend_on_their_company(painter: Painter) -> None:
    together = pixels(painter, DRAWINGS * 2)
    alone = np.concatenate([pixels(painter, [drawing]) for drawing in DRAWINGS])
    assert np.abs(together[:3] - alone).max() <= 1
    assert np.abs(together[3:] - together[:3]).max() <= 1
    assert np.abs(alone[0] - alone[1]).max() > 10


def test_the_bar_reaches_its_end(painter: Painter) -> None:
    heard: list[tuple[int, int]] = []
    painter.draw(DRAWINGS * 2, report=lambda done, total: heard.append((done, total)))
    assert heard[-1] == (6, 6)


def test_merged_weights_draw_what_rows_draw(painter: Painter) -> None:
    """The same low-rank change once by branches and once, beside a layer without a branch, by merging."""
    served = lowrank(painter, ("to_q", "attn2.to_k"))
    assert painter.serves(served)
    convolution = next(layer for layer in painter.base.layout.matrices if not layer.is_pointwise)
    nothing = LowRankFactors(torch.zeros(1, convolution.cols), torch.zeros(convolution.rows, 1))
    unserved = replace(served, lowrank={**served.lowrank, convolution.name: nothing})
    assert not painter.serves(unserved)
    by_rows, merged = pixels(painter, DRAWINGS, served, 0.8), pixels(painter, DRAWINGS, unserved, 0.8)
    assert np.abs(by_rows - merged).max() <= 2
    assert np.abs(by_rows - pixels(painter, DRAWINGS)).max() > 5


def test_whole_changes_are_drawn_by_engines_with_and_without_weights_for_them(
    painter: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same change as products, which are merged, as whole matrices in the engine's own weights, and merged too."""
    factors = lowrank(painter, ("conv1", "to_out.0"))
    deltas = {name: parts.scale * parts.b @ parts.a for name, parts in factors.lowrank.items()}
    whole = replace(factors, kind=AdapterKind.DENSE, lowrank={}, dense=deltas)
    products, served = pixels(painter, DRAWINGS, factors, 0.8), pixels(painter, DRAWINGS, whole, 0.8)
    assert painter.serves(whole)
    assert not painter.serves(factors)
    assert np.abs(products - served).max() <= 2
    assert np.abs(served - pixels(painter, DRAWINGS)).max() > 5
    monkeypatch.setattr(TorchEngine, "dense_slots", 0)
    assert not painter.serves(whole)
    assert np.abs(pixels(painter, DRAWINGS, whole, 0.8) - products).max() <= 2


def test_whole_changes_share_a_run_with_other_mixes(painter: Painter) -> None:
    layer = painter.base.layout.matrices[0]
    whole = Adapter(
        AdapterKind.DENSE,
        painter.base.base_hash,
        "dreambooth",
        dense={layer.name: torch.full((layer.rows, layer.cols), 0.05)},
    )
    loaded = [
        painter.load([(whole, 1.0)], 1),
        painter.load([], 0),
        painter.load([(lowrank(painter, ("to_q",)), 1.0)], 2),
    ]
    samples = [painter.start(DRAWINGS[0], one) for one in (*loaded, loaded[0])]
    drawn = [np.asarray(picture, dtype=np.int16) for picture in painter.finish(samples)]
    assert np.abs(drawn[0] - pixels(painter, DRAWINGS[:1], whole)[0]).max() <= 1
    assert np.abs(drawn[1] - pixels(painter, DRAWINGS[:1])[0]).max() <= 1
    assert np.array_equal(drawn[0], drawn[3])
    assert np.abs(drawn[0] - drawn[1]).max() > 5


def test_merging_leaves_the_base_alone(painter: Painter) -> None:
    adapter = lowrank(painter, ("conv1",))
    name, parts = next(iter(adapter.lowrank.items()))
    before = painter.base.unet.get_parameter(f"{name}.weight").clone()
    merged = merge_matrices(painter.base, adapter, 2.0).get_parameter(f"{name}.weight")
    assert torch.equal(painter.base.unet.get_parameter(f"{name}.weight"), before)
    expected = before.flatten(1) + 2.0 * 0.5 * parts.b @ parts.a
    assert torch.allclose(merged.flatten(1), expected, atol=1e-5)


def test_shifts_beside_merged_parts_are_refused(painter: Painter) -> None:
    norm = painter.base.layout.norms[0]
    adapter = replace(lowrank(painter, ("conv1",)), norm={norm.name: torch.ones(norm.size)})
    with pytest.raises(InvalidArgument, match="lowrank_targets"):
        painter.draw(DRAWINGS[:1], [(adapter, 1.0)])
