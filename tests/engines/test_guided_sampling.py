"""LAG sampling, StyleAligned and regions on both engines: equal to the papers written plainly, and free to mix."""

from typing import Any

import pytest
import torch
from fake_engine import FakeEngine
from guided_reference import TwoPasses, style_aligned
from tiny_unet import SD1_LIKE, SD2_LIKE, TinyParts, tiny_parts
from torch import Tensor

from hueshift.adapters.adapter import AdapterKind
from hueshift.adapters.errors import FailedPrecondition, Reason
from hueshift.engines.build import AdapterEngine, EngineKind, EngineOptions, build_engine
from hueshift.engines.conditioning import CrossInputs
from hueshift.engines.denoise import Region, Sample, advance, start_sample
from hueshift.engines.interface import BASE_SLOT, EngineRow, Guides, Plan
from hueshift.engines.samplers import SamplerKind, make_table

# fp32 rounding through some eighty layers; outputs are of order 1. Seen on a 2-core x86 CPU (2026-11-20): 1.5e-6.
TOLERANCE = 2e-5
# Over three steps of samples of order 1: 9e-6 seen.
LATENT_TOLERANCE = 1e-4
LOWRANK, BOTH, OTHER = 1, 2, 3
SHAPE = (4, 8, 8)
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "sd1": (SD1_LIKE, ("proj_out",)),
    # Branches before, at and after cross-attention, in transformers of two blocks.
    "sd2": ({**SD2_LIKE, "transformer_layers_per_block": 2}, ("proj_out", "to_q", "to_out.0")),
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=VARIANTS)
def parts(request: pytest.FixtureRequest) -> TinyParts:
    """Each kind of base in turn."""
    variant, targets = VARIANTS[request.param]
    return tiny_parts(variant, targets)


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def engine(request: pytest.FixtureRequest, parts: TinyParts, tmp_path_factory: pytest.TempPathFactory) -> AdapterEngine:
    """An engine with three mixes."""
    kind: EngineKind = request.param
    options = EngineOptions(
        cache_dir=tmp_path_factory.mktemp("cache"),
        kind=kind,
        threads=1,
        slots=6,
        max_batch=16,
        lowrank_rank=4,
        lowrank_targets=tuple(dict.fromkeys(_kind(target.name) for target in parts.rows.targets)),
    )
    engine = build_engine(parts.base, options)
    for slot, row in rows_of(parts).items():
        engine.load_row(slot, row)
    return engine


def _kind(layer: str) -> str:
    return "to_out.0" if layer.endswith("to_out.0") else layer.rpartition(".")[2]


def rows_of(parts: TinyParts) -> dict[int, EngineRow]:
    lowrank = parts.random_adapter(2, AdapterKind.LOWRANK)
    return {
        LOWRANK: parts.row((lowrank, 1.0)),
        BOTH: parts.row((parts.random_adapter(3), 0.4), (lowrank, -1.0)),
        OTHER: parts.row((parts.random_adapter(5, AdapterKind.LOWRANK), 1.0)),
    }


def guides(lag: Tensor, source: list[int], reference: list[int]) -> Guides:
    return Guides(lag, torch.tensor(source), torch.tensor(reference))


@pytest.mark.parametrize("slot", [LOWRANK, BOTH])
def test_lag_equals_two_passes_blended_by_the_masks(engine: AdapterEngine, parts: TinyParts, slot: int) -> None:
    latents, timesteps, cross = parts.inputs(4, seed=7)
    # A guided picture (rows 0 and 2, whose negative row shares the mask), and one with other tokens and its own.
    latents[2], timesteps[2] = latents[0], timesteps[0]
    lag = torch.tensor([[0.0, 1, 1, 0, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0], [1, 0, 0, 1, 0]])
    source = [0, 1, 0, 3]
    out, mask = engine.denoise_guided(
        latents, timesteps, cross, torch.full((4,), slot), guides(lag, source, [0, 1, 2, 3])
    )
    wanted, wanted_mask = TwoPasses(parts, rows_of(parts)[slot], lag, source)(latents, timesteps, cross)
    assert torch.equal(mask, wanted_mask)
    assert torch.equal(mask[2], mask[0])
    assert 0.4 < float(mask.mean()) < 0.6
    assert torch.allclose(out, wanted, atol=TOLERANCE)
    everywhere = engine.denoise(Plan.FACTORED, latents, timesteps, cross, torch.full((4,), slot))
    assert all(float((out[row] - everywhere[row]).abs().max()) > 0.01 for row in range(4))


def test_rows_that_ask_for_nothing_are_the_factored_plan(engine: AdapterEngine, parts: TinyParts) -> None:
    latents, timesteps, cross = parts.inputs(3, seed=8)
    slots = torch.tensor([LOWRANK, BOTH, BASE_SLOT])
    lag = torch.zeros(3, cross.shape[1])
    lag[0, 2] = 1
    out, mask = engine.denoise_guided(latents, timesteps, cross, slots, guides(lag, [0, 1, 2], [0, 1, 1]))
    plain = engine.denoise(Plan.FACTORED, latents, timesteps, cross, slots)
    assert torch.allclose(out[1], plain[1], atol=TOLERANCE)
    assert torch.equal(mask[1:], torch.ones(2, *SHAPE[1:]))
    assert not torch.allclose(out[0], plain[0], atol=1e-3)
    assert not torch.allclose(out[2], plain[2], atol=1e-3)


@pytest.mark.parametrize("reference", [[0, 0, 0, 3], [2, 1, 2, 1]])
def test_shared_attention_equals_the_paper_row_by_row(
    engine: AdapterEngine, parts: TinyParts, reference: list[int]
) -> None:
    latents, timesteps, cross = parts.inputs(4, seed=9)
    lag = torch.zeros(4, cross.shape[1])
    out, _ = engine.denoise_guided(
        latents, timesteps, cross, torch.full((4,), BOTH), guides(lag, [0, 1, 2, 3], reference)
    )
    wanted = style_aligned(parts, rows_of(parts)[BOTH], latents, timesteps, cross, reference)
    assert torch.allclose(out, wanted, atol=TOLERANCE)
    plain = engine.denoise(Plan.FACTORED, latents, timesteps, cross, torch.full((4,), BOTH))
    for row, other in enumerate(reference):
        assert torch.allclose(out[row], plain[row], atol=1e-3) == (row == other)


def sample(
    parts: TinyParts, seed: int, *, slot: int = BASE_SLOT, cross: int = 0, guidance: float = 3.0, steps: int = 3
) -> Sample:
    """A picture whose keys and values are number `cross` of some."""
    rows = parts.inputs(16, seed=3)[2][2 * cross : 2 * cross + 2]
    return start_sample(
        seed,
        SHAPE,
        cross=CrossInputs((rows if guidance > 1 else rows[1:],)),
        guidance=guidance,
        table=make_table(parts.base.schedule, SamplerKind.DDIM, steps, 0.0),
        slot=slot,
        needs_factored=slot == BOTH,
    )


def region(other: Sample, mask: Tensor) -> Region:
    """What `other` is made of, as a region."""
    return Region(mask, other.cross, other.slot, other.needs_factored)


def run_all(engine: AdapterEngine, samples: list[Sample]) -> list[Tensor]:
    while live := [sample for sample in samples if not sample.done]:
        advance(engine, live)
    return [sample.latents for sample in samples]


@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_a_region_blends_its_own_output_in(engine: AdapterEngine, parts: TinyParts, guidance: float) -> None:
    """One step, in batches of equal rows, so that even bits must agree."""

    def picture(*masks: float) -> Sample:
        made = sample(parts, 1, slot=LOWRANK, guidance=guidance)
        made.regions = tuple(region(other(), torch.full(SHAPE[1:], mask)) for mask in masks)
        return made

    def other() -> Sample:
        return sample(parts, 1, slot=BOTH, cross=1, guidance=guidance)

    alone = [picture(), other()]
    advance(engine, alone)
    none, whole, half, split = picture(0.0), picture(1.0), picture(0.5), picture(0.0)
    left = torch.zeros(SHAPE[1:])
    left[:, :3] = 1
    split.regions = (region(other(), left),)
    for made in (none, whole, half, split):
        advance(engine, [made])
    own, others = (made.latents for made in alone)
    assert not torch.allclose(own, others, atol=1e-3)
    assert torch.equal(none.latents, own)
    assert torch.allclose(whole.latents, others, atol=1e-6)
    # A step is linear in the output, so halves of the outputs are halves of the latents.
    assert torch.allclose(half.latents, (own + others) / 2, atol=1e-6)
    assert torch.allclose(split.latents, torch.where(left > 0, others, own), atol=1e-6)


def test_a_whole_region_is_the_region_alone_to_the_end(engine: AdapterEngine, parts: TinyParts) -> None:
    picture, other = sample(parts, 4), sample(parts, 4, slot=OTHER, cross=2)
    picture.regions = (region(other, torch.ones(SHAPE[1:])),)
    made, wanted = run_all(engine, [picture])[0], run_all(engine, [other])[0]
    assert torch.allclose(made, wanted, atol=LATENT_TOLERANCE)


def test_a_guided_picture_is_confined_in_both_halves_by_its_prompt(engine: AdapterEngine, parts: TinyParts) -> None:
    picture = sample(parts, 6, slot=LOWRANK, cross=2)
    picture.lag = torch.tensor([0.0, 1, 1, 0, 0])
    negative, prompt = picture.cross.at(0)
    latents, timestep = picture.latents, picture.table.timesteps[0]
    two = TwoPasses(parts, rows_of(parts)[LOWRANK], torch.stack([picture.lag, torch.zeros(5)]), [0, 0])
    out, mask = two(torch.stack([latents] * 2), timestep.expand(2), torch.stack([prompt, negative]))
    a, b, _, _, _, _ = picture.table.coefficients[0]
    advance(engine, [picture])
    wanted = a * latents + b * (out[1] + picture.guidance * (out[0] - out[1]))
    assert torch.allclose(picture.latents, wanted, atol=LATENT_TOLERANCE)
    assert picture.lag_mask is not None
    assert torch.equal(picture.lag_mask, mask[0])


def test_who_shares_and_who_confines_in_a_batch(tiny: TinyParts) -> None:
    fake = FakeEngine(max_batch=16)
    style, follower, plain = sample(tiny, 1), sample(tiny, 2), sample(tiny, 3, guidance=1.0)
    follower.reference, plain.lag = style, torch.tensor([0.0, 0, 1, 0, 0])
    for one in (style, follower):
        one.regions = (region(sample(tiny, 0, cross=1), torch.ones(SHAPE[1:])),)
    advance(fake, [plain, follower, style])
    (guides,) = fake.guides
    # Rows: follower, its region, style, its region, plain; then the negative rows of the first four.
    assert guides.reference.tolist() == [2, 3, 2, 3, 4, 7, 8, 7, 8]
    assert guides.lag_source.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert guides.lag.sum(1).tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def mixed(parts: TinyParts) -> list[list[Sample]]:
    """Groups that only have to be in a batch together: LAG, a shared pair with a region, regions, plain pictures."""
    confined = sample(parts, 10, slot=LOWRANK, cross=3)
    confined.lag = torch.tensor([0.0, 1, 0, 1, 0])
    unguided = sample(parts, 11, slot=BOTH, cross=4, guidance=1.0)
    unguided.lag = torch.tensor([0.0, 0, 1, 0, 0])
    style, follower = sample(parts, 12, slot=OTHER, cross=5), sample(parts, 13, slot=OTHER, cross=5)
    follower.reference = style
    mask = torch.linspace(0, 1, 64).view(SHAPE[1:])
    for one in (style, follower):
        one.regions = (region(sample(parts, 0, slot=LOWRANK, cross=6), mask),)
    pieced = sample(parts, 14, cross=1, guidance=1.0)
    pieced.lag = None
    pieced.regions = (
        region(sample(parts, 0, slot=LOWRANK, cross=2, guidance=1.0), mask / 2),
        region(sample(parts, 0, slot=BOTH, cross=0, guidance=1.0), 1 - mask),
    )
    return [
        [confined],
        [unguided],
        [style, follower],
        [pieced],
        [
            sample(parts, 15, slot=BOTH),
        ],
    ]


def test_a_mixed_batch_equals_each_alone(engine: AdapterEngine, parts: TinyParts) -> None:
    groups, again = mixed(parts), mixed(parts)
    # Guided and unguided pictures and references come in any order.
    order = [one for group in reversed(groups) for one in reversed(group)]
    assert advance(engine, order) is Plan.FULL
    run_all(engine, order)
    for group, alone in zip(groups, again, strict=True):
        run_all(engine, alone)
        for together, lonely in zip(group, alone, strict=True):
            assert torch.allclose(together.latents, lonely.latents, atol=LATENT_TOLERANCE)
            assert (together.lag_mask is None) == (lonely.lag is None)
            if together.lag_mask is not None and lonely.lag_mask is not None:
                assert torch.allclose(together.lag_mask, lonely.lag_mask)
                assert 0.4 < float((together.lag_mask / together.step).mean()) < 0.6


def test_lag_confines_the_picture_and_not_its_regions(engine: AdapterEngine, parts: TinyParts) -> None:
    def made(lag: Tensor | None) -> tuple[Sample, Sample]:
        one, other = sample(parts, 20, slot=LOWRANK), sample(parts, 20, slot=LOWRANK)
        one.lag, one.regions = lag, (region(other, torch.ones(SHAPE[1:])),)
        return one, other

    confined, other = made(torch.tensor([0.0, 1, 0, 0, 0]))
    # The region covers everything, so what LAG does to the picture's own part must not be seen.
    assert torch.allclose(run_all(engine, [confined])[0], run_all(engine, [other])[0], atol=LATENT_TOLERANCE)
    assert confined.lag_mask is not None


def test_an_engine_without_the_plan_says_so(engine: AdapterEngine, parts: TinyParts) -> None:
    class Slim:
        name, plans = "slim", (Plan.DENSE, Plan.FACTORED)

    for change in ("lag", "reference"):
        asking = sample(parts, 1)
        setattr(asking, change, torch.ones(5) if change == "lag" else sample(parts, 2))
        with pytest.raises(FailedPrecondition) as caught:
            advance(Slim(), [asking])  # type: ignore[arg-type]
        assert caught.value.reason is Reason.PLAN_UNAVAILABLE
