"""LAG, shared attention and regions through the blocking client."""

from collections.abc import Iterator

import pytest
from fake_service import FakeServer

from hueshift.client.generation import AdapterUse, AppliedAdapter, LagSampling, Region, read_event
from hueshift.client.sync import Client
from hueshift.v1 import generation_pb2 as pb


@pytest.fixture
def client(fake: FakeServer) -> Iterator[Client]:
    with Client(fake.address) as client:
        yield client


def test_what_is_asked_is_sent(fake: FakeServer, client: Client) -> None:
    client.generate_images(
        "a fox",
        lag=LagSampling(["fox", "hat"], return_masks=True),
        shared_attention=True,
        count=2,
        regions=[
            Region("a hat", [AdapterUse("hat", 0.5)], box=(1, 2, 3, 4), feather=8),
            Region(mask=b"png", adapters={"fox": 1.0}),
        ],
    )
    (request,) = fake.service.seen["Generate"]
    assert request.lag == pb.LagSampling(words=["fox", "hat"], return_masks=True)
    assert request.shared_attention
    assert request.regions[0] == pb.Region(
        prompt="a hat",
        adapters=[pb.AdapterUse(adapter="hat", weight=0.5)],
        box=pb.Box(x=1, y=2, width=3, height=4),
        feather=8,
    )
    assert request.regions[1] == pb.Region(mask=b"png", adapters=[pb.AdapterUse(adapter="fox", weight=1)])


def test_nothing_is_sent_unasked(fake: FakeServer, client: Client) -> None:
    client.generate_images("a fox")
    client.generate_images("a fox", lag=False)
    client.generate_images("a fox", lag=True)
    first, off, on = fake.service.seen["Generate"]
    assert not first.HasField("lag")
    assert not off.HasField("lag")
    assert not first.shared_attention
    assert not first.regions
    assert on.HasField("lag")
    assert on.lag == pb.LagSampling()


def test_wrong_words_and_areas_are_refused_at_home(client: Client) -> None:
    with pytest.raises(TypeError, match=r"words=\['fox'\]"):
        client.generate_images("a fox", lag=LagSampling("fox"))
    with pytest.raises(ValueError, match="one of them"):
        client.generate_images("a fox", regions=[Region(box=(0, 0, 1, 1), mask=b"png")])


def test_masks_and_adapters_of_regions_come_back() -> None:
    image = pb.Image(
        mask=b"grey", regions=[pb.AppliedRegion(), pb.AppliedRegion(adapters=[pb.AppliedAdapter(adapter="fox")])]
    )
    picture = read_event(pb.GenerateResponse(image=image))
    assert picture is not None
    assert (picture.mask, picture.regions) == (b"grey", ((), (AppliedAdapter("fox", 0, "", 0.0),)))  # type: ignore[union-attr]
