"""Starting from a picture through the blocking client."""

from collections.abc import Iterator

import pytest
from fake_service import FakeServer
from google.protobuf.duration_pb2 import Duration

from hueshift.client.generation import Finished, Inversion, Picture, StartPicture, read_event
from hueshift.client.sync import Client
from hueshift.v1 import generation_pb2 as pb


@pytest.fixture
def client(fake: FakeServer) -> Iterator[Client]:
    with Client(fake.address) as client:
        yield client


def test_what_is_asked_is_sent(fake: FakeServer, client: Client) -> None:
    client.generate_images("a fox")
    client.generate_images("a fox", picture=b"png")
    client.generate_images("a fox", picture=StartPicture(b"png", 0.5))
    client.generate_images("a fox", picture=StartPicture(b"png", inversion=Inversion(9, 0.25, True)))
    without, plain, changed, edit = fake.service.seen["Generate"]
    assert not without.HasField("picture")
    assert plain.picture == pb.StartPicture(data=b"png")
    assert changed.picture == pb.StartPicture(data=b"png", strength=0.5)
    assert edit.picture == pb.StartPicture(
        data=b"png", inversion=pb.Inversion(steps=9, noise_share=0.25, report_error=True)
    )


def test_what_comes_back_is_read() -> None:
    finished = read_event(pb.GenerateResponse(finished=pb.Finished(images=1, inversion_error=0.25)))
    assert isinstance(finished, Finished)
    assert finished.inversion_error == 0.25
    unasked = read_event(pb.GenerateResponse(finished=pb.Finished(images=1)))
    assert isinstance(unasked, Finished)
    assert unasked.inversion_error is None
    timings = pb.Timings(picture=Duration(seconds=1), inversion=Duration(seconds=2))
    picture = read_event(pb.GenerateResponse(image=pb.Image(timings=timings)))
    assert isinstance(picture, Picture)
    assert (picture.timings.picture, picture.timings.inversion) == (1.0, 2.0)
