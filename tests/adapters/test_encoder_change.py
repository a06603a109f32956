"""Changes of the text encoder in adapters: through files, sums, interpolations and weights by block."""

from dataclasses import replace

import pytest
import torch
from encoder_adapters import encoder_adapter
from small_adapters import LAYOUT, spectral_adapter
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind, EncoderChange
from hueshift.adapters.algebra import add, interpolate, mix_blocks, scale
from hueshift.adapters.blocks import BlockWeights, block_names, layer_weight, resolve_blocks
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.file import peek_header, read_adapter, write_adapter
from hueshift.adapters.layout import MatrixLayer, NormLayer
from hueshift.adapters.validate import FORMAT, FORMAT_ENCODER, FORMAT_TEXT_SIDE, FileLimits

LINEAR, NARROW = "text_encoder.encoder.layers.0.mlp.fc1", "text_encoder_2.encoder.layers.0.self_attn.q_proj"
NORM = "text_encoder.final_layer_norm"
TUNED = replace(
    LAYOUT,
    encoder_matrices=(MatrixLayer(LINEAR, (8, 4)), MatrixLayer(NARROW, (3, 3))),
    encoder_norms=(NormLayer(NORM, 4),),
)
KINDS = (AdapterKind.SPECTRAL, AdapterKind.LOWRANK)


def shifts(adapter: Adapter) -> dict[str, Tensor]:
    return {**adapter.encoder.spectral, **adapter.encoder.norm}


@pytest.mark.parametrize("kind", KINDS)
def test_files_keep_it(kind: AdapterKind) -> None:
    adapter = replace(encoder_adapter(TUNED, kind=kind), class_noun="fox")
    data = write_adapter(adapter)
    assert peek_header(data).format == FORMAT_ENCODER
    read = read_adapter(data, TUNED, FileLimits())
    assert write_adapter(read) == data
    assert (read.spectral, read.norm, read.lowrank, read.class_noun) == ({}, {}, {}, "fox")
    assert shifts(read).keys() == shifts(adapter).keys()
    assert all(torch.equal(shift, shifts(adapter)[name]) for name, shift in shifts(read).items())
    for name, factors in adapter.encoder.lowrank.items():
        found = read.encoder.lowrank[name]
        assert (torch.equal(found.a, factors.a), torch.equal(found.b, factors.b)) == (True, True)
        assert found.scale == factors.scale
    assert read.nbytes == adapter.nbytes > 0


def test_other_files_are_written_and_read_as_before() -> None:
    plain = spectral_adapter()
    assert peek_header(write_adapter(plain)).format == FORMAT
    assert peek_header(write_adapter(replace(plain, class_noun="fox"))).format == FORMAT_TEXT_SIDE
    assert not read_adapter(write_adapter(plain), TUNED, FileLimits()).encoder


@pytest.mark.parametrize(
    ("change", "reason", "text"),
    [
        (EncoderChange({LINEAR: torch.zeros(8)}), Reason.ADAPTER_SHAPE_MISMATCH, "allowed: [4]"),
        (EncoderChange(norm={NORM: torch.zeros(5)}), Reason.ADAPTER_SHAPE_MISMATCH, "allowed: [4]"),
        (EncoderChange({"text_encoder.fc9": torch.zeros(4)}), Reason.ADAPTER_TENSOR_UNKNOWN, "text_encoder.fc9"),
        (EncoderChange({LINEAR: torch.full((4,), torch.nan)}), Reason.ADAPTER_NOT_FINITE, LINEAR),
    ],
)
def test_what_does_not_fit_is_refused(change: EncoderChange, reason: Reason, text: str) -> None:
    adapter = Adapter(AdapterKind.SPECTRAL, TUNED.base_hash, "svdiff", encoder=change)
    with pytest.raises(InvalidArgument) as caught:
        read_adapter(write_adapter(adapter), TUNED, FileLimits())
    assert caught.value.reason is reason
    assert text in caught.value.message


def test_a_file_of_an_earlier_version_cannot_hold_it() -> None:
    data = write_adapter(encoder_adapter(TUNED))
    with pytest.raises(InvalidArgument, match="no such layer"):
        read_adapter(data.replace(b"hueshift.adapter/3", b"hueshift.adapter/2"), TUNED, FileLimits())


def test_a_base_without_such_layers_refuses_it() -> None:
    with pytest.raises(InvalidArgument, match="no such layer"):
        read_adapter(write_adapter(encoder_adapter(TUNED)), LAYOUT, FileLimits())


def test_sums_and_points_between_are_linear_in_it() -> None:
    first, second = encoder_adapter(TUNED, 0), encoder_adapter(TUNED, 1)
    one, other = shifts(first), shifts(second)
    total, between, half = add([(first, 0.5), (second, -2)]), interpolate(first, second, 0.25), scale(first, 0.5)
    for name, shift in one.items():
        torch.testing.assert_close(shifts(total)[name], 0.5 * shift - 2 * other[name])
        torch.testing.assert_close(shifts(between)[name], 0.75 * shift + 0.25 * other[name])
        torch.testing.assert_close(shifts(half)[name], 0.5 * shift)
    assert interpolate(first, second, 1.0) is second


def test_sums_of_products_join_their_ranks() -> None:
    first, second = (encoder_adapter(TUNED, seed, AdapterKind.LOWRANK) for seed in (0, 1))
    total = add([(first, 0.5), (second, -2)]).encoder.lowrank[LINEAR]
    parts = [adapter.encoder.lowrank[LINEAR] for adapter in (first, second)]
    expected = sum(w * p.scale * p.b @ p.a for w, p in zip((0.5, -2), parts, strict=True))
    assert total.rank == 4
    torch.testing.assert_close(total.scale * total.b @ total.a, expected)
    with pytest.raises(InvalidArgument) as caught:
        add([(first, 1), (second, 1)], max_rank=3)
    assert caught.value.reason is Reason.ADAPTER_RANK_TOO_LARGE


def test_it_is_a_block_of_its_own_and_part_of_the_appearance() -> None:
    assert block_names(TUNED)[-2:] == ("text_encoder", "text_encoder_2")
    named = resolve_blocks({"text_encoder": 0.5}, TUNED)
    assert named == BlockWeights((("text_encoder", 0.5),))
    first, second = encoder_adapter(TUNED, 0), encoder_adapter(TUNED, 1)
    mixed = mix_blocks(first, second, named)
    torch.testing.assert_close(shifts(mixed)[NORM], (shifts(first)[NORM] + shifts(second)[NORM]) / 2)
    assert torch.equal(shifts(mixed)[NARROW], shifts(second)[NARROW])
    whole = dict.fromkeys(block_names(TUNED), 1.0)
    assert resolve_blocks(whole, TUNED) == 1.0
    without = resolve_blocks({name: 1.0 for name in whole if not name.startswith("text_encoder")}, TUNED)
    assert [layer_weight(without, name) for name in ("up.to_q", LINEAR, NARROW)] == [1, 0, 0]
