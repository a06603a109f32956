"""Files with full deltas: exact round trips, sparse by layer, beside every other part, in pieces, refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dense_adapters import dense_adapter
from foreign_unet import base_of, foreign_unet
from small_adapters import LAYOUT as SMALL
from small_adapters import lowrank_adapter, spectral_adapter, tensors_of
from text_side_adapters import gated, layer_tokens
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind, EncoderChange
from hueshift.adapters.dense_deltas import store_delta
from hueshift.adapters.errors import HueshiftError, Reason
from hueshift.adapters.file import pack_adapter, peek_header, read_adapter, write_adapter
from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.adapters.text_parts import text_side_tensors
from hueshift.adapters.validate import FORMAT_DENSE, FileLimits

LAYOUT = base_of(foreign_unet()).layout
ENCODED = replace(SMALL, encoder_matrices=(MatrixLayer("text_encoder.fc1", (4, 6)),))
SDXL = replace(SMALL, matrices=(*SMALL.matrices, MatrixLayer("add_embedding.linear_1", (4, 3))))
LIMITS = FileLimits()
PLAIN = dense_adapter(SMALL)
KEY = LAYOUT.cross_attentions[0] + ".to_k"


def beside_changes() -> Adapter:
    """Full deltas beside shifts, low-rank parts, norms and a word, in the UNet and in the text encoder."""
    spectral, lowrank = spectral_adapter(), lowrank_adapter()
    return replace(
        PLAIN,
        spectral=spectral.spectral,
        norm=spectral.norm,
        tokens=spectral.tokens,
        lowrank=lowrank.lowrank,
        encoder=EncoderChange({"text_encoder.fc1": torch.ones(4)}),
    )


def beside_words() -> Adapter:
    """Full deltas of two layers beside a gated edit and a word by layers."""
    edit, words = gated(LAYOUT), layer_tokens(LAYOUT)
    sparse = dense_adapter(LAYOUT, layers=["conv_in", KEY])
    grids = {**edit.token_grids, **words.token_grids}
    return replace(sparse, tokens=edit.tokens, gated=edit.gated, token_grids=grids, class_noun="dog")


def all_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Every tensor by its name in a file, those of the text encoder apart."""
    found = {f"dense/{layer}": delta for layer, delta in adapter.dense.items()}
    return {**found, **tensors_of(adapter), **text_side_tensors(adapter)}


@pytest.mark.parametrize(
    ("adapter", "layout"),
    [
        (dense_adapter(LAYOUT), LAYOUT),
        (dense_adapter(LAYOUT, dtype=torch.bfloat16), LAYOUT),
        (dense_adapter(LAYOUT, dtype=torch.float32), LAYOUT),
        (dense_adapter(LAYOUT, layers=["conv_in", "conv_out"]), LAYOUT),
        (dense_adapter(SDXL), SDXL),
        (beside_changes(), ENCODED),
        (beside_words(), LAYOUT),
    ],
    ids=["fp16", "bf16", "fp32", "sparse", "sdxl", "beside changes", "beside words"],
)
def test_a_file_gives_back_the_adapter_bit_for_bit(adapter: Adapter, layout: BaseLayout, tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(write_adapter(adapter))
    assert (peek_header(file).format, peek_header(file).kind) == (FORMAT_DENSE, AdapterKind.DENSE)
    theirs = all_tensors(adapter)
    with file.open("rb") as opened:
        opened.read(5)
        for source in (file, file.read_bytes(), opened):
            read = read_adapter(source, layout, LIMITS)
            ours = all_tensors(read)
            assert ours.keys() == theirs.keys()
            assert all(t.dtype == ours[n].dtype and torch.equal(t, ours[n]) for n, t in theirs.items())
            assert (read.kind, read.class_noun, read.nbytes) == (AdapterKind.DENSE, adapter.class_noun, adapter.nbytes)
            assert read.encoder.spectral.keys() == adapter.encoder.spectral.keys()
        # Left open for its owner, whose it is.
        assert not opened.closed


def test_deltas_of_the_text_side_stand_with_keys_and_values() -> None:
    read = read_adapter(write_adapter(dense_adapter(LAYOUT)), LAYOUT, LIMITS)
    assert {name.rsplit(".", 2)[1] for name in read.kv} == {"attn2"}
    assert len(read.dense) + len(read.kv) == len(LAYOUT.matrices)
    assert list(dense_adapter(SDXL).kv) == ["add_embedding.linear_1"]


def test_pieces_are_the_tensors_own_memory() -> None:
    adapter = dense_adapter(LAYOUT)
    packed = pack_adapter(adapter)
    pieces = list(packed)
    assert b"".join(pieces) == write_adapter(adapter)
    assert packed.size_bytes == len(write_adapter(adapter))
    held = {tensor.data_ptr() for tensor in adapter.tensors()}
    assert {np.frombuffer(piece, np.uint8).ctypes.data for piece in pieces[1:]} == held


Edit = Callable[[dict[str, Any], dict[str, Any]], object]


def _rename(old: str, new: str) -> Edit:
    return lambda header, own: header.update({new: header.pop(old)})


def _shape(name: str, *shape: int) -> Edit:
    return lambda header, own: header[name].update(shape=list(shape))


@pytest.mark.parametrize(
    ("edit", "reason", "text"),
    [
        (_rename("dense/up.to_q", "dense/up.to_x"), Reason.ADAPTER_TENSOR_UNKNOWN, "no such layer 'up.to_x'"),
        (_rename("dense/up.to_q", "dense/up.norm"), Reason.ADAPTER_TENSOR_UNKNOWN, "no such layer 'up.norm'"),
        (_rename("dense/up.to_q", "dense/text_encoder.fc1"), Reason.ADAPTER_TENSOR_UNKNOWN, "text encoders have"),
        (_rename("dense/up.to_q", "dense/add_embedding.linear_1"), Reason.ADAPTER_TENSOR_UNKNOWN, "kept as 'kv/add_"),
        (_rename("dense/up.to_q", "full/up.to_q"), Reason.ADAPTER_TENSOR_UNKNOWN, "a dense adapter of"),
        (_shape("dense/up.to_q", 6, 4), Reason.ADAPTER_SHAPE_MISMATCH, "[6, 4]; allowed: [4, 6]"),
        # The layer's own shape is not the matrix's.
        (_shape("dense/down.conv", 5, 3, 3, 3), Reason.ADAPTER_SHAPE_MISMATCH, "allowed: [5, 27]"),
        (lambda header, own: own.update(kind="lowrank"), Reason.ADAPTER_FILE_INVALID, "allowed: ['dense']"),
        (
            lambda header, own: own.update(format="hueshift.adapter/3"),
            Reason.ADAPTER_FILE_INVALID,
            "'dense' given; allowed: ['spectral', 'lowrank', 'tokens', 'kv']",
        ),
    ],
)
def test_wrong_files_are_refused_by_name(edit: Edit, reason: Reason, text: str) -> None:
    layout = replace(ENCODED, matrices=SDXL.matrices)
    data = write_adapter(PLAIN)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    own = json.loads(header["__metadata__"]["hueshift"])
    edit(header, own)
    header["__metadata__"]["hueshift"] = json.dumps(own)
    changed = json.dumps(header).encode()
    with pytest.raises(HueshiftError) as caught:
        read_adapter(len(changed).to_bytes(8, "little") + changed + data[8 + length :], layout, LIMITS)
    assert caught.value.reason is reason, caught.value.message
    assert text in caught.value.message


def test_keys_of_cross_attention_and_values_that_are_not_finite_are_refused() -> None:
    delta = dense_adapter(LAYOUT).kv[KEY]
    adapter = Adapter(AdapterKind.DENSE, LAYOUT.base_hash, "dreambooth", dense={KEY: delta})
    with pytest.raises(HueshiftError, match=f"kept as 'kv/{KEY}'"):
        read_adapter(write_adapter(adapter), LAYOUT, LIMITS)
    broken = replace(PLAIN, dense={"up.to_q": torch.full((4, 6), torch.nan)})
    with pytest.raises(HueshiftError, match=r"'dense/up\.to_q' is nan") as caught:
        read_adapter(write_adapter(broken), SMALL, LIMITS)
    assert caught.value.reason is Reason.ADAPTER_NOT_FINITE


def test_what_is_too_large_says_its_size_and_the_setting() -> None:
    data = write_adapter(PLAIN)
    with pytest.raises(HueshiftError) as caught:
        read_adapter(data, SMALL, FileLimits(max_bytes=len(data) - 1))
    assert caught.value.reason is Reason.UPLOAD_TOO_LARGE
    assert f"has {len(data)} bytes; allowed: at most {len(data) - 1} (setting limits.max_adapter_bytes)" in str(
        caught.value.message
    )


def test_deltas_are_stored_in_half_precision_where_that_holds_them() -> None:
    delta = torch.tensor([[1e-5, 0.3], [-2.0, 65504.0]])
    stored = store_delta(delta)
    assert stored.dtype is torch.float16
    assert float((stored.float() - delta).abs()[0].max()) < 0.3 * 2.0**-11
    assert store_delta(stored).data_ptr() == stored.data_ptr()
    assert torch.equal(store_delta(delta.double() * 2), delta * 2)
