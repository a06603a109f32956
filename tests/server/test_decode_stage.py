"""Latents to files: in batches, off the loop, newest previews only, with provenance and without prompts."""

import torch
from generation_bench import Bench, collect, error_of, images

from hueshift.adapters.errors import Internal, InvalidArgument, Reason
from hueshift.server.generation import ImageEvent, PreviewEvent
from hueshift.server.provenance import provenance


async def test_a_decoder_failure_ends_its_pictures_requests() -> None:
    bench = Bench()

    def fail() -> None:
        bench.vae.on_decode = lambda: None
        raise RuntimeError("no")

    bench.vae.on_decode = fail
    hit = bench.submit(steps=1)
    bench.run()
    assert isinstance(await error_of(hit), Internal)
    spared = bench.submit(steps=1)
    bench.run()
    assert len(await images(spared)) == 1


async def test_a_picture_that_is_not_finite_is_an_error_and_its_neighbours_are_not() -> None:
    bench = Bench()
    bad = bench.submit(seeds=(1,), steps=3, adapters={"low-nan": 1.0})
    good = bench.submit(seeds=(1,), steps=3)
    bench.run()
    # The caller's own doing, whom it is told; an operator would look for a defect behind INTERNAL.
    error = await error_of(bad)
    assert isinstance(error, InvalidArgument)
    assert error.reason is Reason.ADAPTER_NOT_FINITE
    assert "low-nan" in error.message
    assert len(await images(good)) == 1


async def test_a_picture_that_is_not_finite_without_adapters_is_our_fault() -> None:
    bench = Bench()
    bench.engine.marks[0] = float("nan")
    handle = bench.submit(seeds=(1,), steps=1, adapters={"low-0.5": 0.0})
    bench.run()
    assert isinstance(await error_of(handle), Internal)


async def test_a_picture_names_the_engine_that_serves_now() -> None:
    bench = Bench()
    named = []
    for name in ("fake", "another"):
        bench.engine.name = name
        handle = bench.submit(steps=1)
        bench.run()
        named += [image.engine for image in await images(handle)]
    assert named == ["fake", "another"]


async def test_previews_come_at_their_interval_and_only_the_newest_waits() -> None:
    bench = Bench()
    handle = bench.submit(steps=7, preview_interval=2)
    for _ in range(20):
        bench.turn()
        bench.decode()
    seen = [event for event in await collect(handle) if isinstance(event, PreviewEvent | ImageEvent)]
    # Unread previews of a picture give way to newer ones.
    assert [type(event) for event in seen] == [PreviewEvent, ImageEvent]
    assert isinstance(seen[0], PreviewEvent)
    assert seen[0].step == 6
    assert seen[0].media_type == "image/png"


async def test_decoding_is_batched_and_holds_up_joining_when_it_lags() -> None:
    bench = Bench(max_batch=2)
    handles = [bench.submit("a", seeds=(i,), steps=1) for i in range(12)]
    bench.turn(12)
    assert bench.scheduler.snapshot().decoding <= 4 + 2
    bench.run()
    assert max(bench.vae.batches) > 1
    for handle in handles:
        assert len(await images(handle)) == 1


async def test_the_data_estimate_of_a_preview_is_not_the_noisy_latents() -> None:
    bench = Bench()
    handle = bench.submit(steps=10, preview_interval=1)
    bench.turn(2)
    batch = bench.scheduler._loop._batch.choose()
    sample = batch[0].sample
    assert sample.step == 1
    assert not torch.allclose(sample.prev, sample.latents)
    handle.cancel()
    bench.run()


async def test_pictures_carry_their_making_but_not_the_prompt() -> None:
    bench = Bench()
    request = bench.request(
        adapters={"low-0.5": 0.25, "spec-0.1": 0.0}, seeds=(3, 4), prompt="secret prompt", negative_prompt="dull"
    )
    handle = bench.scheduler.submit(request)
    bench.run()
    for picture in await images(handle):
        assert b"trainedAlgorithmicMedia" in picture.data
        assert b"low-0.5*0.25" in picture.data
        assert b"spec-0.1" not in picture.data
        assert f">{picture.seed}<".encode() in picture.data
        assert b"secret" not in picture.data
        assert b"dull" not in picture.data
    assert provenance(request, 1, "ab" * 32) == {"seed": "4", "base": "ab" * 32, "adapters": "low-0.5*0.25"}
