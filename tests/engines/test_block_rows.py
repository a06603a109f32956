"""Rows of adapters with weights by block: exact ends, the truth layer by layer, and slots that equal mixes share."""

import pytest
import torch
from fake_engine import FakeEngine
from residency_log import ResidencyLog
from tiny_layout import LAYER, NORM, TARGET, lowrank_adapter, spectral_adapter, tiny_rows
from tiny_unet import TinyParts
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.algebra import mix_blocks
from hueshift.adapters.blocks import BlockWeights, Weight, complement, resolve_blocks
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.engines.interface import EngineRow
from hueshift.engines.mixes import make_mix
from hueshift.engines.residency import SlotCache
from hueshift.engines.residency_host import HostCache, RowCache

KINDS = (AdapterKind.SPECTRAL, AdapterKind.LOWRANK)


def row_of(tiny: TinyParts, *mix: tuple[Adapter, Weight]) -> EngineRow:
    return tiny.rows.compose(mix, tiny.factors, tiny.norms)


def assert_same(one: EngineRow, other: EngineRow) -> None:
    for a, b in ((one.spectral, other.spectral), (one.lowrank, other.lowrank)):
        assert (a is None) == (b is None)
        assert a is None or b is None or torch.equal(a, b)


def first_block(tiny: TinyParts) -> BlockWeights:
    weight = resolve_blocks({"down_blocks.0": 1.0}, tiny.base.layout)
    assert isinstance(weight, BlockWeights)
    return weight


def product(tiny: TinyParts, row: Tensor, name: str) -> Tensor:
    target = next(target for target in tiny.rows.targets if target.name == name)
    middle = target.begin + target.sizes[0]
    return row[middle : target.end].view(target.rows, -1) @ row[target.begin : middle].view(-1, target.cols)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_one_in_every_block_is_the_plain_adapter_to_the_bit(tiny: TinyParts, kind: AdapterKind) -> None:
    adapter = tiny.random_adapter(1, kind)
    blocks = {name.partition(".")[0]: 1.0 for name, _, _ in tiny.base.layout.spans()}
    assert resolve_blocks(blocks, tiny.base.layout) == 1.0
    # In the long form too, which nothing has made canonical.
    assert_same(row_of(tiny, (adapter, BlockWeights(tuple(sorted(blocks.items()))))), row_of(tiny, (adapter, 1.0)))


def test_weight_zero_in_every_block_is_the_base(tiny: TinyParts) -> None:
    row = row_of(tiny, (tiny.random_adapter(1), BlockWeights((("down_blocks", 0.0),))))
    assert row.spectral is not None
    assert torch.equal(row.spectral, tiny.rows.base_spectral(tiny.factors, tiny.norms))
    assert make_mix([("a", resolve_blocks({"down_blocks": 0.0}, tiny.base.layout))]) == ()


def test_each_layer_has_its_own_weight(tiny: TinyParts) -> None:
    one, two = tiny.random_adapter(1), tiny.random_adapter(2)
    row = row_of(tiny, (one, resolve_blocks({"mid_block": 0.5, "up_blocks": -1}, tiny.base.layout)), (two, 0.25))
    assert row.spectral is not None
    offsets = {**tiny.base.layout.matrix_offsets, **tiny.base.layout.norm_offsets}
    for name, shift in {**one.spectral, **one.norm}.items():
        weight = 0.5 if name.startswith("mid_block.") else -1.0 if name.startswith("up_blocks.") else 0.0
        base = tiny.factors.sigma.get(name, tiny.norms.get(name))
        assert base is not None
        other = {**two.spectral, **two.norm}[name]
        expected = base + weight * shift + 0.25 * other
        expected = expected.clamp(min=0) if name in one.spectral else expected
        torch.testing.assert_close(row.spectral[offsets[name] : offsets[name] + len(shift)], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mix_in_a_request_is_the_saved_mix(tiny: TinyParts, kind: AdapterKind) -> None:
    one, two = tiny.random_adapter(1, kind), tiny.random_adapter(2, kind)
    weight = first_block(tiny)
    composed = row_of(tiny, (one, weight), (two, complement(weight)))
    # Every layer has a single owner, so not even a rounding comes between.
    assert_same(composed, row_of(tiny, (mix_blocks(one, two, weight), 1.0)))


def test_layers_of_weight_zero_take_no_rank(tiny: TinyParts) -> None:
    full = [tiny.random_adapter(seed, AdapterKind.LOWRANK) for seed in range(5)]
    with pytest.raises(InvalidArgument) as caught:
        row_of(tiny, *((adapter, 1.0) for adapter in full))
    assert caught.value.reason is Reason.ADAPTER_RANK_TOO_LARGE
    rest = BlockWeights((("no_such_block", 1.0),))
    row = row_of(tiny, (full[0], 1.0), *((adapter, rest) for adapter in full[1:]))
    assert_same(row, row_of(tiny, (full[0], 1.0)))
    assert row.lowrank is not None
    name = tiny.rows.targets[0].name
    factors = full[0].lowrank[name]
    torch.testing.assert_close(product(tiny, row.lowrank, name), factors.scale * factors.b @ factors.a)


def test_weights_that_are_not_finite_are_refused(tiny: TinyParts) -> None:
    with pytest.raises(InvalidArgument, match="not finite"):
        row_of(tiny, (tiny.random_adapter(1), BlockWeights((("mid_block", float("nan")),))))


def test_mixes_that_mean_the_same_are_equal(tiny: TinyParts) -> None:
    layout = tiny.base.layout
    layers = [name for name, _, _ in layout.spans()]
    down = resolve_blocks({name: 0.5 for name in layers if name.startswith("down_blocks.")}, layout)
    assert make_mix([("b", 1.0), ("a", down)]) == make_mix(
        [("a", resolve_blocks({"down_blocks": 0.5}, layout)), ("b", 1.0)]
    )
    assert make_mix([("a", resolve_blocks({"structure": 2, "appearance": 2}, layout))]) == (("a", 2.0),)
    # One file under two names: the weights add up.
    rest = complement(down)
    assert make_mix([("a", down), ("a", rest)]) == (("a", 1.0),)
    assert make_mix([("a", down), ("b", -1.0), ("b", 1.0)]) == (("a", down),)


def test_equal_mixes_share_a_slot_and_others_do_not() -> None:
    store = {"s": spectral_adapter(2.0), "l": lowrank_adapter(3.0)}
    log = ResidencyLog()
    engine = FakeEngine(slots=4)
    rows, factors, norms = tiny_rows()
    slots = SlotCache(engine, RowCache(HostCache(store.__getitem__, 10**6, log), rows, factors, norms, 10**6, log), log)
    layout = rows.layout
    ways = (
        {"block": 1.0, TARGET: 0.0},
        {LAYER: 1.0, NORM: 1.0},
        {NORM: 1.0, "block": 1.0, TARGET: 0.0},
    )
    mixes = [make_mix([("s", 1.0), ("l", resolve_blocks(way, layout))]) for way in ways]
    held = {slots.acquire(slots.prepare(mix)) for mix in mixes}
    assert len(held) == 1
    assert len(engine.loads) == 1
    # The low-rank adapter only acts on the target, which has weight 0.
    assert engine.marks[engine.loads[0]] == pytest.approx(2.0)
    other = slots.acquire(slots.prepare(make_mix([("s", 1.0), ("l", resolve_blocks({TARGET: 0.5}, layout))])))
    assert other not in held
    assert engine.marks[engine.loads[1]] == pytest.approx(2.0 + 0.5 * 3.0)
