"""CombineAdapters over gRPC: what is stored, what a repeat gives, and every way of asking for it wrongly."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from adapter_server import Running, serve_adapters
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status
from small_adapters import LAYOUT, lowrank_adapter, spectral_adapter

from hueshift.adapters.adapter import Adapter
from hueshift.adapters.file import write_adapter
from hueshift.adapters.formats.draft import ImportBase
from hueshift.server.rpc.adapter_changes import AdapterChanges
from hueshift.server.rpc.adapter_import import AdapterFormats
from hueshift.server.settings import LimitSettings
from hueshift.v1 import adapters_pb2 as pb
from hueshift.v1 import generation_pb2 as generation_pb

Use = generation_pb.AdapterUse


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """A server on which acme has three adapters: two spectral ones with words of their own, one of low rank."""
    with serve_adapters(tmp_path) as running:
        for name, adapter in (
            ("fox", spectral_adapter(0)),
            ("ink", spectral_adapter(1, "ink")),
            ("low", lowrank_adapter()),
        ):
            running.import_file(write_adapter(adapter), adapter_id=name)
        yield running


def request(**fields: Any) -> pb.CombineAdaptersRequest:
    return pb.CombineAdaptersRequest(**fields)


def summed(*uses: Use, **fields: Any) -> pb.CombineAdaptersRequest:
    return request(sum=pb.AdapterSum(parts=uses), **fields)


def between(first: str, second: str, position: float, **fields: Any) -> pb.CombineAdaptersRequest:
    refs = pb.AdapterRef(adapter=first), pb.AdapterRef(adapter=second)
    return request(interpolation=pb.AdapterInterpolation(first=refs[0], second=refs[1], position=position), **fields)


def mixed(structure: str, appearance: str, *blocks: str, **fields: Any) -> pb.CombineAdaptersRequest:
    refs = pb.AdapterRef(adapter=structure), pb.AdapterRef(adapter=appearance)
    return request(block_mix=pb.AdapterBlockMix(structure=refs[0], appearance=refs[1], blocks=blocks), **fields)


def stored(running: Running, answer: pb.CombineAdaptersResponse) -> Adapter:
    return running.store.adapters.load(answer.adapter.content_hash, LAYOUT)


def wrong_fields(running: Running, given: pb.CombineAdaptersRequest) -> dict[str, str]:
    with pytest.raises(grpc.RpcError) as caught:
        running.call("CombineAdapters", given)
    error: Any = caught.value
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    status, bad = Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"]), BadRequest()
    assert any(detail.Unpack(bad) for detail in status.details)
    return {violation.field: violation.description for violation in bad.field_violations}


def test_a_sum_is_stored_as_an_adapter(running: Running) -> None:
    answer = running.call(
        "CombineAdapters",
        summed(
            Use(adapter="fox", weight=0.5),
            Use(adapter="tenants/acme/adapters/ink", block_weights={"up": -1.0}),
            adapter_id="both",
            display_name="Both",
            labels={"a": "b"},
        ),
    )
    record = answer.adapter
    assert (record.name, record.display_name, record.revision) == ("tenants/acme/adapters/both", "Both", 1)
    assert (record.method, record.kind, record.identifier) == ("combine", pb.ADAPTER_KIND_SPECTRAL, "")
    assert (dict(record.labels), answer.replayed, list(answer.notes)) == ({"a": "b"}, False, [])
    fox, ink, adapter = spectral_adapter(0), spectral_adapter(1, "ink"), stored(running, answer)
    torch.testing.assert_close(adapter.spectral["down.conv"], 0.5 * fox.spectral["down.conv"].float())
    torch.testing.assert_close(adapter.spectral["up.to_q"], 0.5 * fox.spectral["up.to_q"] - ink.spectral["up.to_q"])
    assert adapter.words == ("ink", "sks")
    assert running.call("GetAdapter", pb.GetAdapterRequest(name="both")).adapter == record


@pytest.mark.parametrize(("position", "name", "seed"), [(0.0, "fox", 0), (1.0, "ink", 1)])
def test_the_ends_of_an_interpolation_are_exact(running: Running, position: float, name: str, seed: int) -> None:
    answer = running.call("CombineAdapters", between("fox", "ink", position))
    expected = replace(spectral_adapter(seed, {"fox": "sks"}.get(name, name)), method="combine")
    assert write_adapter(stored(running, answer)) == write_adapter(expected)
    assert answer.adapter.identifier == expected.identifier
    # The server makes an id where none is given.
    assert answer.adapter.name.startswith("tenants/acme/adapters/adapter-")


def test_block_mixes_take_blocks_of_one_and_the_rest_of_the_other(running: Running) -> None:
    adapter = stored(running, running.call("CombineAdapters", mixed("fox", "ink", "down")))
    assert torch.equal(adapter.spectral["down.conv"], spectral_adapter(0).spectral["down.conv"])
    assert torch.equal(adapter.spectral["up.to_q"], spectral_adapter(1).spectral["up.to_q"])
    # This layout has no down blocks, so the preset that is used without blocks is refused by name.
    assert wrong_fields(running, mixed("fox", "ink")).keys() == {"block_mix.blocks['structure']"}


def test_a_repeat_with_its_key_stores_nothing_new(running: Running) -> None:
    given = summed(Use(adapter="fox"), Use(adapter="ink"), adapter_id="both", idempotency_key="k")
    first = running.call("CombineAdapters", given)
    running.store.clock.now += 10
    # Even if what it was made of has changed, or gone.
    running.import_file(write_adapter(spectral_adapter(7)), adapter_id="fox")
    running.call("DeleteAdapter", pb.DeleteAdapterRequest(name="ink"))
    again = running.call("CombineAdapters", given)
    assert (again.replayed, again.adapter) == (True, first.adapter)
    other = summed(Use(adapter="fox"), adapter_id="both", idempotency_key="k")
    code, reason, _ = running.refused("CombineAdapters", other)
    assert (code, reason) == ("ALREADY_EXISTS", "IDEMPOTENCY_CONFLICT")
    # Without a key it is made again, of what there is now.
    assert running.call("CombineAdapters", summed(Use(adapter="fox"), adapter_id="both")).adapter.revision == 2


def test_revisions_can_be_fixed_and_a_pin_moves_on(running: Running) -> None:
    running.call("WarmAdapter", pb.WarmAdapterRequest(name="low", pin=True))
    running.import_file(write_adapter(spectral_adapter(7)), adapter_id="fox")
    answer = running.call("CombineAdapters", summed(Use(adapter="fox", revision=1), adapter_id="low"))
    assert torch.equal(stored(running, answer).spectral["up.to_q"], spectral_adapter(0).spectral["up.to_q"])
    assert (answer.adapter.revision, answer.adapter.pinned) == (2, True)
    assert running.residents.pins == {answer.adapter.content_hash}
    code, reason, _ = running.refused("CombineAdapters", summed(Use(adapter="fox", revision=9)))
    assert (code, reason) == ("NOT_FOUND", "ADAPTER_REVISION_NOT_FOUND")


@pytest.mark.parametrize(
    "given",
    [
        summed(Use(adapter="fox"), Use(adapter="tenants/acme/adapters/ink")),
        between("tenants/acme/adapters/fox", "low", 0.5),
        mixed("low", "tenants/acme/adapters/fox", "down"),
        summed(Use(adapter="fox")),
    ],
)
def test_adapters_of_another_tenant_are_not_found(running: Running, given: pb.CombineAdaptersRequest) -> None:
    code, reason, message = running.refused("CombineAdapters", given, "other")
    assert (code, reason) == ("NOT_FOUND", "ADAPTER_NOT_FOUND")
    assert "there is no adapter" in message
    assert running.call("ListAdapters", pb.ListAdaptersRequest(), "other").adapters == []


def test_what_does_not_go_together_says_why(running: Running) -> None:
    running.import_file(write_adapter(spectral_adapter(2)), adapter_id="sks-too")
    for given, text in (
        (summed(Use(adapter="fox"), Use(adapter="low")), "spectral and lowrank"),
        (between("fox", "low", 0), "spectral and lowrank"),
        (summed(Use(adapter="fox"), Use(adapter="sks-too")), "both teach the word 'sks', differently"),
    ):
        code, reason, message = running.refused("CombineAdapters", given)
        assert (code, reason) == ("INVALID_ARGUMENT", "ADAPTERS_INCOMPATIBLE")
        assert text in message
    for name in ("a", "b"):
        running.import_file(write_adapter(lowrank_adapter(1, rank=100)), adapter_id=name)
    code, reason, message = running.refused("CombineAdapters", summed(Use(adapter="a"), Use(adapter="b")))
    assert (code, reason) == ("INVALID_ARGUMENT", "ADAPTER_RANK_TOO_LARGE")
    assert "rank 200" in message


def test_every_wrong_field_is_named_at_once(running: Running) -> None:
    given = summed(
        Use(adapter="A B", weight=3),
        Use(adapter="fox", revision=-1, block_weights={"up": 9, "down": 1}),
        Use(adapter="ink", block_weights={"sideways": 1}),
        Use(adapter="fox"),
        adapter_id="NO",
        display_name="\n",
        idempotency_key="x" * 65,
    )
    assert wrong_fields(running, given).keys() == {
        "sum.parts[0].adapter",
        "sum.parts[0].weight",
        "sum.parts[1].revision",
        "sum.parts[1].block_weights['up']",
        "sum.parts[2].block_weights['sideways']",
        "sum.parts[3].adapter",
        "adapter_id",
        "display_name",
        "idempotency_key",
    }


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        (request(adapter_id="x"), {"operation"}),
        (summed(), {"sum.parts"}),
        (summed(*(Use(adapter=f"a{n}") for n in range(5))), {"sum.parts"}),
        (summed(Use(adapter="fox", weight=0), Use(adapter="ink", block_weights={"up": 0})), {"sum.parts"}),
        (between("fox", "ink", 1.5), {"interpolation.position"}),
        (between("fox", "ink", float("nan")), {"interpolation.position"}),
        (between("", "a/b", 0), {"interpolation.first.adapter", "interpolation.second.adapter"}),
        (mixed("fox", "ink", "x", "up"), {"block_mix.blocks['x']"}),
        (
            request(block_mix=pb.AdapterBlockMix(blocks=["up"])),
            {"block_mix.structure.adapter", "block_mix.appearance.adapter"},
        ),
    ],
)
def test_wrong_operations(running: Running, given: pb.CombineAdaptersRequest, fields: set[str]) -> None:
    assert wrong_fields(running, given).keys() == fields
    assert len(running.call("ListAdapters", pb.ListAdaptersRequest()).adapters) == 3


def test_notes_tell_what_the_engine_does_not_serve(running: Running) -> None:
    formats = AdapterFormats(ImportBase(LAYOUT), {"down.proj_out": 3, "up.to_q": 16})
    changes = AdapterChanges(running.store.adapters, formats, LAYOUT, LimitSettings())
    given = summed(Use(adapter="low"), Use(adapter="low2"), idempotency_key="k")
    running.import_file(write_adapter(lowrank_adapter(1)), adapter_id="low2")
    for replayed in (False, True):
        combined = changes.combine("acme", given)
        assert combined.replayed is replayed
        assert "higher rank than this server's engine serves" in combined.notes[0]
