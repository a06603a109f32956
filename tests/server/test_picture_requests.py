"""Requests that start from a picture, on their way through the step loop, turn by turn, by hand."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from generation_bench import IDLE, Bench, FakeConditioner, FakeVae, collect, counts, error_of, images, tiny_base
from PIL import Image
from torch import Tensor

from hueshift.adapters.errors import Cancelled, DeadlineExceeded, Internal, NotFound, Reason
from hueshift.engines.denoise import Sample, advance, start_sample
from hueshift.engines.interface import Plan
from hueshift.engines.picture_start import (
    encode_start,
    first_step,
    inversion_error,
    mix_noise,
    mix_start,
    noise_picture,
    start_inversion,
)
from hueshift.engines.samplers import SamplerKind, make_path_tables, make_table, noise_levels
from hueshift.engines.text_side import TextSide
from hueshift.server.generation import (
    FinishedEvent,
    GenerationHandle,
    ImageEvent,
    InversionRequest,
    LagRequest,
    PreviewEvent,
    ProgressEvent,
    StartRequest,
)

SCHEDULE = tiny_base().schedule


def picture_file(size: tuple[int, int] = (64, 64)) -> bytes:
    """A PNG of colours that tell up from down and left from right."""
    width, height = size
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    pixels = np.stack([x, y, 255 - (x + y) / 2], axis=-1).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels, "RGB").save(file, "PNG")
    return file.getvalue()


PICTURE = picture_file()
CLEAN = encode_start(FakeVae(), PICTURE, 64, 64)  # type: ignore[arg-type]


def from_picture(strength: float = 1.0, **inversion: Any) -> StartRequest:
    return StartRequest(PICTURE, strength, InversionRequest(**inversion) if inversion else None)


def by_hand(bench: Bench, latents: Tensor | None, *, begin: int = 0, eta: float = 0.0, guidance: float = 3.0) -> Sample:
    """A sample of seed 1 and 4 DDIM steps of the fake engine, from `latents` on."""
    sample = start_sample(
        1,
        (4, 8, 8),
        cross=FakeConditioner().condition(["", "a fox"] if guidance > 1 else ["a fox"], TextSide(), []).cross,
        guidance=guidance,
        table=make_table(SCHEDULE, SamplerKind.DDIM, 4, eta, begin),
    )
    if latents is not None:
        sample.latents = latents
    finish(bench, sample)
    return sample


def finish(bench: Bench, sample: Sample) -> None:
    for _ in range(sample.table.steps):
        advance(bench.engine, [sample])


def same_picture(data: bytes, sample: Sample) -> bool:
    expected = FakeVae().decode(sample.latents[None])[0]
    return bool((np.asarray(Image.open(io.BytesIO(data))) == expected).all())


@pytest.mark.parametrize("strength", [0.5, 1.0])
async def test_img2img_is_noise_and_the_last_steps(strength: float) -> None:
    bench = Bench()
    handle = bench.submit(start=from_picture(strength), guidance_scale=3.0)
    plain = bench.submit(guidance_scale=3.0)
    bench.run()
    (found,) = await images(handle)
    begin = first_step(4, strength)
    table = make_table(SCHEDULE, SamplerKind.DDIM, 4, begin=begin)
    assert same_picture(found.data, by_hand(bench, noise_picture(CLEAN, 1, SCHEDULE, table), begin=begin))
    # Even at strength 1 a trace of the picture is left at the schedule's highest level.
    assert found.data != (await images(plain))[0].data


async def test_strength_one_is_the_plain_noise_and_the_pictures_last_share() -> None:
    table = make_table(SCHEDULE, SamplerKind.DDIM, 4)
    signal, level = noise_levels(SCHEDULE, table)
    plain = start_sample(
        1, (4, 8, 8), cross=FakeConditioner().condition([""], TextSide(), []).cross, guidance=1.0, table=table
    )
    assert torch.equal(noise_picture(CLEAN, 1, SCHEDULE, table), signal * CLEAN + level * plain.latents)
    # The fewer the steps, the lower the first level; with Stable Diffusion's schedule, at 4 and at 50 of them:
    assert signal == pytest.approx(0.236, abs=0.001)
    assert noise_levels(SCHEDULE, make_table(SCHEDULE, SamplerKind.DDIM, 50))[0] == pytest.approx(0.076, abs=0.001)


@pytest.mark.parametrize(("share", "eta"), [(0.0, 0.0), (0.3, 0.5), (1.0, 0.0)])
async def test_an_edit_is_its_two_phases_by_hand(share: float, eta: float) -> None:
    bench = Bench()
    handle = bench.submit(
        start=from_picture(0.5, steps=6, noise_share=share, report_error=True), eta=eta, guidance_scale=3.0
    )
    bench.run()
    events = await collect(handle)
    begin = first_step(4, 0.5)
    table = make_table(SCHEDULE, SamplerKind.DDIM, 4, eta, begin)
    cross = FakeConditioner().condition(["a fox"], TextSide(), []).cross
    levels = noise_levels(SCHEDULE, table)
    inverted = start_inversion(CLEAN, SCHEDULE, cross=cross, steps=6, begin=3)
    up, down = make_path_tables(SCHEDULE, 6, float(table.timesteps[0]))
    inverted.table = up
    finish(bench, inverted)
    mixed = mix_start(inverted.latents, CLEAN, 1, share, levels)
    image, finished = events[-2], events[-1]
    assert same_picture(image.data, by_hand(bench, mixed, begin=begin, eta=eta))  # type: ignore[union-attr]
    if share == 1:
        assert torch.allclose(mixed, noise_picture(CLEAN, 1, SCHEDULE, table), atol=1e-6)
    inverted.table, inverted.step = down, 0
    finish(bench, inverted)
    error = float((inverted.latents - CLEAN).norm() / CLEAN.norm())
    assert isinstance(finished, FinishedEvent)
    assert finished.inversion_error == pytest.approx(error, rel=1e-4)
    progress = [event for event in events if isinstance(event, ProgressEvent)]
    assert progress[-1] == ProgressEvent(2 * up.steps + 2, 2 * up.steps + 2)


async def test_the_error_of_a_whole_inversion_is_that_of_the_engines() -> None:
    bench = Bench()
    handle = bench.submit(start=from_picture(steps=4, report_error=True))
    bench.run()
    finished = (await collect(handle))[-1]
    cross = FakeConditioner().condition(["a fox"], TextSide(), []).cross
    assert isinstance(finished, FinishedEvent)
    expected = inversion_error(bench.engine, [CLEAN], SCHEDULE, cross=cross, steps=4)
    assert finished.inversion_error == pytest.approx(expected, rel=1e-4)


def test_full_noise_is_mixed_as_in_the_paper() -> None:
    """At the highest level, where little of the picture is left, turning its noise is turning the latents."""
    levels = noise_levels(SCHEDULE, make_table(SCHEDULE, SamplerKind.DDIM, 50))
    inverted = noise_picture(CLEAN, 5, SCHEDULE, make_table(SCHEDULE, SamplerKind.DDIM, 50))
    ours, papers = mix_start(inverted, CLEAN, 1, 0.4, levels), mix_noise(inverted, 1, 0.4)
    assert float((ours - papers).norm() / papers.norm()) < 0.1
    assert torch.equal(mix_start(inverted, CLEAN, 1, 0, levels), inverted)


def submit(bench: Bench, number: int) -> GenerationHandle:
    wanted: list[dict[str, Any]] = [
        {"start": from_picture(0.6), "seeds": (1, 2), "steps": 5, "guidance_scale": 3.0},
        {"start": from_picture(steps=5, noise_share=0.2), "seeds": (3, 4), "adapters": {"spec-0.3": 1.0}, "eta": 0.4},
        {"start": from_picture(0.7, steps=7, report_error=True), "guidance_scale": 2.0, "adapters": {"low-0.2": 1.0}},
        {"steps": 6, "seeds": (7, 8)},
        {"start": from_picture(0.9), "regions": (bench.region({"low-0.1": 1.0}),), "sampler": SamplerKind.EULER},
        {"start": from_picture(0.9), "seeds": (1, 2), "shared_attention": True, "sampler": SamplerKind.DPMPP_2M},
        {
            "start": from_picture(0.9, steps=3),
            "adapters": {"fox-0.3": 1.0},
            "prompt": "fox animal",
            "lag": LagRequest(return_masks=True),
        },
    ]
    return bench.submit(**wanted[number])


async def test_a_mixed_batch_equals_each_alone() -> None:
    together = Bench(max_batch=32)
    handles = [submit(together, number) for number in range(7)]
    together.run()
    assert counts(together) == IDLE
    for number, handle in enumerate(handles):
        bench = Bench(max_batch=32)
        alone = submit(bench, number)
        bench.run()
        for mine, theirs in zip(await images(handle), await images(alone), strict=True):
            assert (mine.data, mine.mask) == (theirs.data, theirs.mask), number


async def test_one_inversion_serves_all_pictures_and_keeps_the_rows_of_guidance() -> None:
    bench = Bench(max_batch=8)
    handle = bench.submit(start=from_picture(steps=5), seeds=(1, 2, 3), eta=0.5, guidance_scale=3.0, preview_interval=2)
    bench.turn(2)
    assert (counts(bench)["active"], counts(bench)["rows"], counts(bench)["waiting"]) == (1, 2, 2)
    bench.run()
    assert [rows for _, rows in bench.engine.calls] == [1] * 5 + [6] * 4
    events = await collect(handle)
    assert not any(isinstance(event, PreviewEvent) and event.step > 4 for event in events)
    found = {event.index: event for event in events if isinstance(event, ImageEvent)}
    assert len({event.data for event in found.values()}) == 3
    assert bench.vae.encoded == [(1, 3, 64, 64)]
    assert [event for event in events if isinstance(event, ProgressEvent)][-1] == ProgressEvent(17, 17)


async def test_others_pass_by_while_a_request_waits_for_its_inversion() -> None:
    bench = Bench(max_batch=4)
    edit = bench.submit("a", start=from_picture(steps=9), seeds=(1, 2))
    bench.turn(2)
    other = bench.submit("a", steps=2)
    bench.turn(3)
    bench.decode()
    assert other.stream.closed
    assert not edit.stream.closed
    bench.run()
    assert len(await images(edit)) == 2


async def test_the_inversion_runs_in_its_adapters_plan() -> None:
    bench = Bench()
    handle = bench.submit(start=from_picture(steps=3), adapters={"spec-0.3": 1.0}, steps=2)
    bench.run()
    assert [plan for plan, _ in bench.engine.calls] == [Plan.FACTORED] * 5
    assert (await images(handle))[0].plans == (Plan.FACTORED,)


@pytest.mark.parametrize(
    ("how", "turns"),
    # In the inversion, on the way back, while both pictures are being sampled; logging a failure takes seconds.
    [*((how, turns) for how in ("cancel", "deadline", "deletion") for turns in (2, 6, 10)), ("failure", 6)],
)
async def test_whatever_ends_a_request_in_any_phase_releases_everything(how: str, turns: int) -> None:
    bench = Bench(max_batch=4)
    start = from_picture(steps=4, report_error=True)
    handle = bench.submit(
        start=start,
        seeds=(1, 2),
        steps=6,
        adapters={"low-0.1": 1.0},
        guidance_scale=2.0,
        deadline=bench.clock.monotonic() + 5,
    )
    bench.turn(turns)
    assert counts(bench)["slot_uses"] >= 1
    if how == "cancel":
        handle.cancel()
    elif how == "deadline":
        bench.clock.advance(6)  # type: ignore[attr-defined]
    elif how == "deletion":
        bench.scheduler.drop_adapter("tenants/a/adapters/low-0.1", ["low-0.1"])
    else:
        bench.engine.on_call = _fail
    bench.turn(2)
    error = await error_of(handle)
    expected = {"cancel": Cancelled, "deadline": DeadlineExceeded, "deletion": NotFound, "failure": Internal}[how]
    assert isinstance(error, expected)
    assert counts(bench) == IDLE


def _fail(_plan: Plan, _slots: Tensor) -> None:
    raise RuntimeError("no")


@pytest.mark.parametrize("turns", [2, 4, 7, 11])
async def test_a_tenant_is_charged_for_the_steps_it_got(turns: int) -> None:
    bench = Bench(max_batch=4)
    queue = bench.scheduler._loop._queue
    bench.submit("b", steps=60)
    bench.turn(1)
    handle = bench.submit(
        "a", start=from_picture(steps=4, report_error=True), seeds=(1, 2), steps=6, guidance_scale=2.0
    )
    bench.turn(1)
    before = len(bench.engine.calls)
    bench.turn(turns)
    rows = sum(rows - 1 for _, rows in bench.engine.calls[before - 1 :])
    handle.cancel()
    bench.turn(1)
    assert queue._idle["a"].virtual == pytest.approx(rows)


async def test_a_deadline_counts_the_inversion() -> None:
    bench = Bench()

    def tick(_plan: Plan, _slots: Tensor) -> None:
        bench.clock.advance(1)  # type: ignore[attr-defined]

    bench.engine.on_call = tick
    bench.submit(steps=20)
    bench.run()
    start, now = from_picture(steps=40), bench.clock.monotonic()
    with pytest.raises(DeadlineExceeded, match="34 steps") as caught:
        bench.submit(start=start, steps=4, deadline=now + 15)
    assert caught.value.reason is Reason.DEADLINE_TOO_SHORT
    handle = bench.submit(start=start, steps=4, seeds=(1, 2), deadline=now + 100)
    bench.run()
    first, second = await images(handle)
    # Four steps begin at timestep 751, which is 31 of the 40 steps up.
    assert (first.timings.inversion, first.timings.denoise) == (31, 4)
    assert second.timings.inversion == 0
    assert bench.value("hueshift_stage_seconds_count", stage="inversion") == 1
    assert bench.value("hueshift_stage_seconds_count", stage="picture") == 2


async def test_a_picture_that_waited_too_long_for_its_inversion_is_not_begun() -> None:
    bench = Bench()
    bench.engine.on_call = lambda _plan, _slots: bench.clock.advance(1)  # type: ignore[attr-defined]
    bench.submit(steps=20)
    bench.run()
    # 35 steps at twice the speed seen take 17.5 s; admission, which has no schedule, counts 34.
    handle = bench.submit(start=from_picture(steps=40), steps=4, deadline=bench.clock.monotonic() + 17.2)
    calls = len(bench.engine.calls)
    bench.run()
    assert "too little time" in (await error_of(handle)).message
    assert len(bench.engine.calls) == calls


async def test_masks_are_those_of_sampling() -> None:
    bench = Bench()
    handle = bench.submit(
        start=from_picture(steps=9),
        steps=2,
        adapters={"fox-0.3": 1.0},
        prompt="fox animal",
        lag=LagRequest(return_masks=True),
    )
    bench.run()
    mask = Image.open(io.BytesIO((await images(handle))[0].mask))
    # The fake engine's branches act on half of the blocks, at every step of both phases.
    assert mask.getextrema() == (128, 128)
    assert {plan for plan, _ in bench.engine.calls} == {Plan.FULL}


def test_a_picture_is_covered_and_cut_evenly() -> None:
    vae: Any = FakeVae()
    wide = encode_start(vae, picture_file((128, 64)), 64, 64)
    assert wide.shape == (4, 8, 8)
    # The middle half of a ramp from -1 to 1, evenly about 0.
    assert float(wide[0].mean()) == pytest.approx(0, abs=0.01)
    assert float(wide[0, 0, -1]) == pytest.approx(0.44, abs=0.02)
    tall = encode_start(vae, picture_file((16, 64)), 96, 64)
    assert tall.shape == (4, 8, 12)
    assert float(tall[1].max()) < 0.2
