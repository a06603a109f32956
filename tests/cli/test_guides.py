"""`hueshift generate` with LAG, shared attention and regions."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fake_service
import pytest
import typer
from fake_service import FakeServer

from hueshift.client.generation import AdapterUse, Region
from hueshift.server.cli.guides import parse_region
from hueshift.v1 import generation_pb2 as pb

Run = Callable[..., Any]


def test_regions_are_written_as_pairs(tmp_path: Path) -> None:
    mask = tmp_path / "mask.png"
    mask.write_bytes(b"png")
    assert parse_region("box=0,1,2,3") == Region(adapters=[], box=(0, 1, 2, 3))
    assert parse_region(
        " box=0,1,2,3; prompt=a hat, with = signs ;adapter=fox:0.5;feather=2.5;adapter=hat@3:structure=1"
    ) == Region(
        "a hat, with = signs",
        [AdapterUse("fox", 0.5), AdapterUse("hat", 1.0, 3, {"structure": 1.0})],
        box=(0, 1, 2, 3),
        feather=2.5,
    )
    assert parse_region(f"mask={mask}") == Region(adapters=[], mask=b"png")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "prompt=x",
        "box=1,2,3",
        "box=a,b,c,d",
        "box=1,2,3,4;box=1,2,3,4",
        "box=1,2,3,4;mask=x",
        "box=1,2,3,4;colour=red",
        "box=1,2,3,4;adapter=",
        "box=1,2,3,4;adapter=:",
        "box=1,2,3,4;feather=wide",
        "mask=/nowhere/at/all.png",
        "left",
    ],
)
def test_wrong_regions_are_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter):
        parse_region(text)


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake server sends masks where they are asked for."""
    plain = fake_service._generation

    def generation(request: pb.GenerateRequest, count: int) -> Iterator[pb.GenerateResponse]:
        for answer in plain(request, count):
            if answer.HasField("image") and request.lag.return_masks:
                answer.image.mask = b"grey"
            yield answer

    monkeypatch.setattr(fake_service, "_generation", generation)


@pytest.mark.usefixtures("masked")
def test_masks_are_written_beside_the_pictures(fake: FakeServer, run: Run, tmp_path: Path) -> None:
    (tmp_path / "fox-1-mask.png").write_bytes(b"old")
    words = ["generate", "fox", "--seed", 1, "--lag-word", "fox", "--save-masks", "--out", tmp_path, "--json"]
    ran = run(*words)
    assert ran.code == 0
    assert fake.service.seen["Generate"][0].lag == pb.LagSampling(words=["fox"], return_masks=True)
    record: Any = ran.json["pictures"][0]
    assert record["mask_path"] == str(tmp_path / "fox-1-mask-2.png")
    assert Path(record["mask_path"]).read_bytes() == b"grey"
    assert (tmp_path / "fox-1-mask.png").read_bytes() == b"old"
    assert "mask" not in record


def test_flags_reach_the_server(fake: FakeServer, run: Run, tmp_path: Path) -> None:
    words = ["generate", "fox", "-n", 2, "--lag", "--shared-attention", "--region", "box=0,0,8,8;prompt=hat"]
    assert run(*words, "--region", "box=8,0,8,8", "--out", tmp_path).code == 0
    (request,) = fake.service.seen["Generate"]
    assert (request.lag, request.shared_attention) == (pb.LagSampling(), True)
    assert [(region.prompt, region.box.x) for region in request.regions] == [("hat", 0), ("", 8)]
    assert run("generate", "fox", "--region", "nonsense", "--out", tmp_path).code == 2
