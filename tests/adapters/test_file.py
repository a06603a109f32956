"""Adapter files: exact round trips, equal bytes for equal content, and a clear refusal of everything else."""

import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_adapters import BASE_HASH, LAYOUT, lowrank_adapter, spectral_adapter, tensors_of

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.errors import FailedPrecondition, HueshiftError, InvalidArgument, Reason
from hueshift.adapters.file import peek_header, read_adapter, write_adapter
from hueshift.adapters.validate import FileLimits
from hueshift.engines.base_model import BaseModel

ADAPTERS = [spectral_adapter(), lowrank_adapter(), spectral_adapter(word="")]
FILES = [write_adapter(adapter) for adapter in ADAPTERS]
LIMITS = FileLimits()


def assert_equal(a: Adapter, b: Adapter) -> None:
    assert (a.kind, a.base_hash, a.method, a.identifier) == (b.kind, b.base_hash, b.method, b.identifier)
    first, second = tensors_of(a), tensors_of(b)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name
    assert {k: p.scale for k, p in a.lowrank.items()} == {k: p.scale for k, p in b.lowrank.items()}


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def refusal(data: bytes, limits: FileLimits = LIMITS) -> HueshiftError:
    with pytest.raises(HueshiftError) as caught:
        read_adapter(data, LAYOUT, limits)
    return caught.value


@pytest.mark.parametrize("adapter", ADAPTERS, ids=["spectral", "lowrank", "wordless"])
def test_a_file_gives_back_the_adapter_bit_for_bit(adapter: Adapter, tmp_path: Path) -> None:
    data = write_adapter(adapter)
    assert_equal(read_adapter(data, LAYOUT, LIMITS), adapter)
    file = tmp_path / "adapter"
    file.write_bytes(data)
    assert_equal(read_adapter(file, LAYOUT, LIMITS), adapter)
    assert write_adapter(read_adapter(file, LAYOUT, LIMITS)) == data


def test_equal_adapters_give_equal_bytes_whatever_the_order() -> None:
    adapter = spectral_adapter()
    turned = replace(adapter, spectral=dict(reversed(list(adapter.spectral.items()))))
    assert list(turned.spectral) != list(adapter.spectral)
    assert write_adapter(turned) == write_adapter(adapter)
    assert write_adapter(spectral_adapter(seed=1)) != write_adapter(adapter)


@pytest.mark.parametrize("adapter", ADAPTERS[:2], ids=["spectral", "lowrank"])
def test_the_safetensors_library_reads_our_files_and_we_read_its(adapter: Adapter) -> None:
    data = write_adapter(adapter)
    read = safetensors.torch.load(data)
    assert {name: t.tolist() for name, t in read.items()} == {n: t.tolist() for n, t in tensors_of(adapter).items()}
    header, _ = split(data)
    again = safetensors.torch.save(tensors_of(adapter), metadata={**header["__metadata__"], "format": "pt"})
    assert_equal(read_adapter(again, LAYOUT, LIMITS), adapter)


def test_an_adapter_of_the_embedded_model_passes(base_model: BaseModel) -> None:
    layout = base_model.layout
    adapter = Adapter(
        kind=ADAPTERS[0].kind,
        base_hash=layout.base_hash,
        method="svdiff",
        spectral={layer.name: torch.zeros(layer.rank) for layer in layout.matrices},
        norm={layer.name: torch.zeros(layer.size) for layer in layout.norms},
    )
    data = write_adapter(adapter)
    assert_equal(read_adapter(data, layout, LIMITS), adapter)
    # 43,048 floats and a header: the size that a user's whole adapter has.
    assert len(data) < 4 * layout.spectral_size + 32 * 1024


def test_tensors_own_their_memory_and_are_aligned() -> None:
    header, body = split(FILES[0])
    shifted = join(json.dumps(header).encode() + b" " * 3, body)
    adapter = read_adapter(shifted, LAYOUT, LIMITS)
    pointers = [tensor.data_ptr() for tensor in tensors_of(adapter).values()]
    assert all(pointer % 4 == 0 for pointer in pointers)
    storages = {tensor.untyped_storage().nbytes() for tensor in tensors_of(adapter).values()}
    assert max(storages) < 64


def test_peek_reads_a_header_of_any_base_model() -> None:
    header = peek_header(write_adapter(replace(lowrank_adapter(), base_hash="cd" * 32)))
    assert header.base_hash == "cd" * 32
    assert header.scales == {"down.proj_out": 0.5, "up.to_q": -1.25}


def test_another_base_model_is_refused_with_both_hashes() -> None:
    error = refusal(write_adapter(replace(spectral_adapter(), base_hash="cd" * 32)))
    assert isinstance(error, FailedPrecondition)
    assert error.reason is Reason.ADAPTER_BASE_MISMATCH
    assert BASE_HASH in error.message
    assert "cd" * 32 in error.message


def _zip() -> bytes:
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return buffer.getvalue()


def _torch() -> bytes:
    buffer = BytesIO()
    torch.save({"a": torch.zeros(3)}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "name"),
    [
        *((pickle.dumps({"a": [1.0] * 99}, protocol), "pickle") for protocol in (0, 2, 3, 4, 5)),
        (_zip(), "zip"),
        (_torch(), "zip"),
        (b"\x1f\x8b\x08" + bytes(99), "gzip"),
        (b"GGUF" + bytes(99), "GGUF"),
        (bytes(257) + b"ustar\x0000" + bytes(300), "tar"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "PNG"),
        (b"<!DOCTYPE html><html></html>", "HTML"),
        (b'{"a": 1}', "JSON"),
        (b"version https://git-lfs.github.com/spec/v1\n", "LFS"),
    ],
)
def test_other_formats_are_named_and_never_opened(data: bytes, name: str) -> None:
    error = refusal(data)
    assert error.reason is Reason.ADAPTER_FILE_UNSAFE
    assert name in error.message


def test_a_header_whose_length_looks_like_a_pickle_is_still_read() -> None:
    header, body = split(FILES[0])
    text = json.dumps(header).encode()
    text += b" " * (0x0480 - len(text))
    data = join(text, body)
    assert data[:2] == b"\x80\x04"
    assert_equal(read_adapter(data, LAYOUT, LIMITS), ADAPTERS[0])


@pytest.mark.parametrize("data", [b"", b"\x00", bytes(8), bytes(100), b"\xff" * 100, FILES[0][:50], FILES[0][:8]])
def test_files_without_a_header_are_refused(data: bytes) -> None:
    assert refusal(data).reason is Reason.ADAPTER_FILE_INVALID


def test_caps_come_before_the_header_is_parsed() -> None:
    data = join(b"{" + b"[" * 2000, b"")
    assert refusal(data, FileLimits(max_bytes=100)).reason is Reason.UPLOAD_TOO_LARGE
    assert "allowed: at most 100" in refusal(data, FileLimits(max_header_bytes=100)).message
    assert "not valid JSON" in refusal(data).message
    assert "allowed: at most 3" in refusal(FILES[0], FileLimits(max_tensors=3)).message


Edit = Callable[[dict[str, Any]], object]


def _tensor(name: str, **values: object) -> Edit:
    return lambda header: header[name].update(values)


def _own(**values: object) -> Edit:
    def edit(header: dict[str, Any]) -> None:
        own = json.loads(header["__metadata__"]["hueshift"])
        header["__metadata__"]["hueshift"] = json.dumps(own | values)

    return edit


def _rename(old: str, new: str) -> Edit:
    return lambda header: header.update({new: header.pop(old)})


INVALID = Reason.ADAPTER_FILE_INVALID


@pytest.mark.parametrize(
    ("number", "edit", "reason", "text"),
    [
        (0, _tensor("norm/up.norm", dtype="F64"), Reason.ADAPTER_DTYPE_UNSUPPORTED, "'F64'; allowed: F16, BF16, F32"),
        (0, _tensor("norm/up.norm", dtype=["F32"]), Reason.ADAPTER_DTYPE_UNSUPPORTED, "norm/up.norm"),
        (0, _tensor("norm/up.norm", shape=[True]), INVALID, "norm/up.norm"),
        (0, _tensor("norm/up.norm", shape=[0]), INVALID, "norm/up.norm"),
        (0, _tensor("norm/up.norm", shape=[2**62, 2**62]), INVALID, "norm/up.norm"),
        (0, _tensor("norm/up.norm", shape=[1] * 9), INVALID, "norm/up.norm"),
        (0, _tensor("norm/up.norm", data_offsets=[0, 7.0]), INVALID, "norm/up.norm"),
        (0, _tensor("norm/up.norm", data_offsets=[-14, 0]), INVALID, "norm/up.norm"),
        (0, _tensor("norm/up.norm", data_offsets=[0, 14]), INVALID, "without gaps or overlaps"),
        (0, _tensor("norm/up.norm", data_offsets=[10**6, 10**6 + 14]), INVALID, "without gaps or overlaps"),
        (0, _tensor("norm/up.norm", extra=1), INVALID, "exactly dtype, shape and data_offsets"),
        (0, _tensor("norm/up.norm", shape=[7, 1]), Reason.ADAPTER_SHAPE_MISMATCH, "[7, 1]; allowed: [7]"),
        (0, _rename("spectral/up.to_q", "spectral/up.to_z"), Reason.ADAPTER_TENSOR_UNKNOWN, "'up.to_z'"),
        (0, _rename("spectral/up.to_q", "spectral/up.norm"), Reason.ADAPTER_TENSOR_UNKNOWN, "'up.norm'"),
        (0, _rename("spectral/up.to_q", "spectral/down.proj_out"), Reason.ADAPTER_SHAPE_MISMATCH, "allowed: [5]"),
        (0, _rename("spectral/up.to_q", "lowrank/up.to_q/a"), Reason.ADAPTER_TENSOR_UNKNOWN, "a spectral adapter"),
        (0, _rename("spectral/up.to_q", "weights"), Reason.ADAPTER_TENSOR_UNKNOWN, "'weights'"),
        (0, _rename("spectral/up.to_q", "x" * 300), INVALID, "300 characters; allowed: 1 to 256"),
        (0, _rename("tokens/sks", "tokens/two words"), INVALID, "holds a space"),
        (0, _rename("tokens/sks", "tokens/\ud800"), INVALID, "holds '\\ud800', half of a surrogate pair"),
        (0, lambda h: h["__metadata__"].update(note="\udfff"), INVALID, "half of a surrogate pair"),
        (0, _rename("tokens/sks", "tokens/"), INVALID, "0 characters; allowed: 1 to 64"),
        (0, _tensor("tokens/sks", shape=[2, 3]), Reason.ADAPTER_SHAPE_MISMATCH, "[vectors, 6]"),
        (0, _tensor("tokens/sks", shape=[1, 2, 3]), Reason.ADAPTER_SHAPE_MISMATCH, "tokens/sks"),
        (0, lambda h: h.pop("__metadata__"), INVALID, "no 'hueshift' metadata"),
        (0, lambda h: h.update(__metadata__={"hueshift": 1}), INVALID, "text to text"),
        (0, lambda h: h.update(__metadata__=[]), INVALID, "text to text"),
        (0, lambda h: h["__metadata__"].update(note="x"), INVALID, "unknown metadata 'note'"),
        (0, lambda h: h["__metadata__"].update(hueshift="{}"), INVALID, "format None given"),
        (0, lambda h: h["__metadata__"].update(hueshift='{"format": NaN}'), INVALID, "NaN"),
        (0, lambda h: h["__metadata__"].update(hueshift="[" * 5000), INVALID, "nested too deep"),
        (0, _own(format="hueshift.adapter/5"), INVALID, "'hueshift.adapter/3' or 'hueshift.adapter/4'"),
        (0, _own(format="hueshift.adapter/2"), INVALID, "['class_noun', 'gated', 'mappers']"),
        (0, _own(kind="dense"), INVALID, "'dense' given; allowed: ['spectral', 'lowrank', 'tokens']"),
        (0, _own(kind=["spectral"]), INVALID, "kind"),
        (0, _own(base_hash="AB" * 32), INVALID, "64 hexadecimal digits"),
        (0, _own(method="Rm -rf /"), INVALID, "method"),
        (0, _own(identifier="a\nb"), INVALID, "identifier"),
        (0, _own(identifier=7), INVALID, "identifier"),
        (0, _own(scales={"up.to_q": 1.0}), INVALID, "'up.to_q' does not fit"),
        (0, _own(extra=1), INVALID, "['extra']"),
        (1, _own(scales={"up.to_q": 1.0}), INVALID, "'down.proj_out' does not fit"),
        (1, _own(scales={"up.to_q": True, "down.proj_out": 1}), INVALID, "is True; allowed: a finite number"),
        (1, _own(scales={"up.to_q": 10**400, "down.proj_out": 1}), INVALID, "a finite number"),
        (1, _own(scales=[]), INVALID, "map layers to numbers"),
        (1, _rename("lowrank/up.to_q/a", "lowrank/up.to_q/c"), Reason.ADAPTER_TENSOR_UNKNOWN, "'/a' or '/b'"),
        (1, _tensor("lowrank/up.to_q/a", shape=[6, 1]), Reason.ADAPTER_SHAPE_MISMATCH, "allowed: [6, 6]"),
        (1, _tensor("lowrank/up.to_q/b", shape=[2, 2]), Reason.ADAPTER_SHAPE_MISMATCH, "allowed: [4, 1]"),
    ],
)
def test_wrong_headers_are_refused_by_name(number: int, edit: Edit, reason: Reason, text: str) -> None:
    header, body = split(FILES[number])
    edit(header)
    error = refusal(join(header, body))
    assert error.reason is reason, error.message
    assert text in error.message


def test_a_factor_without_its_partner_is_refused() -> None:
    adapter = lowrank_adapter()
    header, body = split(write_adapter(adapter))
    entry = header.pop("lowrank/down.proj_out/b")
    begin, end = entry["data_offsets"]
    for other in header.values():
        if "data_offsets" in other and other["data_offsets"][0] >= end:
            other["data_offsets"] = [place - (end - begin) for place in other["data_offsets"]]
    error = refusal(join(header, body[:begin] + body[end:]))
    assert "'lowrank/down.proj_out/a' has no partner 'lowrank/down.proj_out/b'" in error.message


def test_ranks_and_word_counts_are_capped() -> None:
    assert refusal(FILES[1], FileLimits(max_rank=1)).reason is Reason.ADAPTER_RANK_TOO_LARGE
    read_adapter(write_adapter(lowrank_adapter(rank=128)), LAYOUT, LIMITS)
    error = refusal(write_adapter(lowrank_adapter(rank=129)))
    assert "rank 129; allowed: 1 to 128" in error.message
    words = {f"w{n}": torch.zeros(1, 6) for n in range(17)}
    assert "17 words; allowed: at most 16" in refusal(write_adapter(replace(ADAPTERS[0], tokens=words))).message
    many = replace(ADAPTERS[0], tokens={"sks": torch.zeros(75, 6)})
    assert read_adapter(write_adapter(many), LAYOUT, LIMITS).tokens["sks"].shape == (75, 6)
    more = replace(ADAPTERS[0], tokens={"sks": torch.zeros(76, 6)})
    assert refusal(write_adapter(more)).reason is Reason.ADAPTER_SHAPE_MISMATCH
    assert "no tensors" in refusal(write_adapter(Adapter(ADAPTERS[0].kind, BASE_HASH, "svdiff"))).message


def test_parts_mix_where_the_engine_can_serve_them() -> None:
    mixed = replace(lowrank_adapter(), norm={"up.norm": torch.ones(7)}, tokens={"sks": torch.ones(2, 6)})
    assert_equal(read_adapter(write_adapter(mixed), LAYOUT, LIMITS), mixed)
    words = replace(mixed, kind=AdapterKind.TOKENS, norm={}, lowrank={})
    assert_equal(read_adapter(write_adapter(words), LAYOUT, LIMITS), words)
    wrong = refusal(write_adapter(replace(words, norm=mixed.norm)))
    assert (wrong.reason, "a tokens adapter of hueshift.adapter/1 holds tokens" in wrong.message) == (
        Reason.ADAPTER_TENSOR_UNKNOWN,
        True,
    )


def test_repeated_keys_are_refused() -> None:
    text = json.dumps(split(FILES[0])[0]).encode()
    doubled = text[:-1] + b', "norm/up.norm": {}}'
    assert "'norm/up.norm' is given twice" in refusal(join(doubled, split(FILES[0])[1])).message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_that_are_not_finite_are_refused_with_their_place(value: float, dtype: torch.dtype) -> None:
    shift = torch.zeros(4, dtype=dtype)
    shift[2] = value
    error = refusal(write_adapter(replace(ADAPTERS[0], spectral={"up.to_q": shift})))
    assert error.reason is Reason.ADAPTER_NOT_FINITE
    assert "'spectral/up.to_q'" in error.message
    assert "[2]" in error.message


def test_what_could_not_be_read_again_is_not_written() -> None:
    with pytest.raises(InvalidArgument) as caught:
        write_adapter(replace(ADAPTERS[0], norm={"up.norm": torch.zeros(7, dtype=torch.float64)}))
    assert caught.value.reason is Reason.ADAPTER_DTYPE_UNSUPPORTED
    part = replace(ADAPTERS[1].lowrank["up.to_q"], scale=float("nan"))
    with pytest.raises(InvalidArgument) as caught:
        write_adapter(replace(ADAPTERS[1], lowrank={"up.to_q": part}))
    assert caught.value.reason is Reason.ADAPTER_NOT_FINITE


def read_or_refuse(data: bytes) -> None:
    """Nothing but an error of ours may come out, and an accepted file must survive being written again."""
    try:
        adapter = read_adapter(data, LAYOUT, LIMITS)
    except HueshiftError as error:
        message = error.message
    else:
        message = ""
        assert_equal(read_adapter(write_adapter(adapter), LAYOUT, LIMITS), adapter)
    assert len(message.encode()) < 2000


FUZZ = settings(max_examples=400, deadline=None, database=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(st.binary(max_size=600))
def test_random_bytes_never_crash(data: bytes) -> None:
    read_or_refuse(data)
    read_or_refuse(struct.pack("<Q", len(data) // 2) + b"{" + data)


@FUZZ
@given(st.integers(0, 2), st.lists(st.tuples(st.integers(0, 10**4), st.binary(max_size=9)), max_size=5), st.data())
def test_mutated_files_never_crash(number: int, edits: list[tuple[int, bytes]], data: st.DataObject) -> None:
    mutated = bytearray(FILES[number])
    for place, value in edits:
        begin = place % len(mutated)
        mutated[begin : begin + data.draw(st.integers(0, 9))] = value
    read_or_refuse(bytes(mutated))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=8,
)


@FUZZ
@given(st.integers(0, 2), st.randoms(use_true_random=False), JSON)
def test_headers_with_any_value_anywhere_never_crash(number: int, chance: random.Random, value: object) -> None:
    header, body = split(FILES[number])
    own = json.loads(header["__metadata__"]["hueshift"])
    target = chance.choice([header, own, *(entry for entry in header.values() if "shape" in entry)])
    key = chance.choice([*target, "tokens/new", "__metadata__"])
    target[key] = value
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["hueshift"] = json.dumps(own)
    read_or_refuse(join(header, body))


@pytest.mark.parametrize("depth", range(850, 1001, 10))
def test_nesting_near_the_interpreters_limit_never_crashes(depth: int) -> None:
    header, body = split(FILES[0])
    text = json.dumps(header).encode()
    nested = b"[" * depth + b"]" * depth
    read_or_refuse(
        join(text[:-1] + b', "tokens/x": {"dtype": ' + nested + b', "shape": [1], "data_offsets": [0, 4]}}', body)
    )
    own = b'{"format": ' + nested + b"}"
    read_or_refuse(join(json.dumps({"__metadata__": {"hueshift": own.decode()}}).encode(), b""))
