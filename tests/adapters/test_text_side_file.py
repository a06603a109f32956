"""Text-side parts in adapter files: exact round trips of every kind, and hostile files refused by name."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from foreign_unet import base_of, foreign_unet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from text_side_adapters import gated, kv_deltas, layer_tokens, mapper, multi_vector, stage_tokens

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.adapters.errors import HueshiftError, InvalidArgument, Reason
from hueshift.adapters.file import peek_header, read_adapter, write_adapter
from hueshift.adapters.text_parts import text_side_tensors
from hueshift.adapters.validate import FORMAT, FORMAT_TEXT_SIDE, FileLimits

LAYOUT = base_of(foreign_unet()).layout
LIMITS = FileLimits()
ATTENTION = LAYOUT.cross_attentions[1]
KINDS: dict[str, Adapter] = {
    "multi-vector": multi_vector(LAYOUT),
    "layers": layer_tokens(LAYOUT, vectors=2),
    "stages": stage_tokens(LAYOUT),
    "both": stage_tokens(LAYOUT, layers=True),
    "mapper": mapper(LAYOUT),
    "mapper-plain": mapper(LAYOUT, bypass=False, hidden=(5,), norm=0.0),
    "kv": kv_deltas(LAYOUT),
    "kv-wordless": kv_deltas(LAYOUT, word=""),
    "gated": gated(LAYOUT),
    "slashes": gated(LAYOUT, word="a/outputs/b"),
}
NEW = [name for name in KINDS if name != "multi-vector"]


def whole() -> Adapter:
    """Every text-side part beside a low-rank one."""
    layer = LAYOUT.matrices[0]
    return replace(
        kv_deltas(LAYOUT),
        kind=AdapterKind.LOWRANK,
        token_grids=KINDS["layers"].token_grids,
        mappers=KINDS["mapper"].mappers,
        gated=KINDS["gated"].gated,
        tokens={**KINDS["kv"].tokens, **KINDS["gated"].tokens},
        lowrank={layer.name: LowRankFactors(torch.ones(1, layer.cols), torch.ones(layer.rows, 1), 0.5)},
        class_noun="teddy bear",
    )


def assert_same(first: Adapter, second: Adapter) -> None:
    for field in ("kind", "base_hash", "method", "identifier", "class_noun"):
        assert getattr(first, field) == getattr(second, field)
    assert set(first.words) == set(second.words)
    a = text_side_tensors(first) | {f"tokens/{word}": tensor for word, tensor in first.tokens.items()}
    b = text_side_tensors(second) | {f"tokens/{word}": tensor for word, tensor in second.tokens.items()}
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert (tensor.dtype, torch.equal(tensor, b[name])) == (b[name].dtype, True), name
    assert {w: (m.norm, m.bypass, len(m.layers)) for w, m in first.mappers.items()} == {
        w: (m.norm, m.bypass, len(m.layers)) for w, m in second.mappers.items()
    }
    assert {w: (e.beta, e.tau) for w, e in first.gated.items()} == {w: (e.beta, e.tau) for w, e in second.gated.items()}


def refusal(data: bytes, limits: FileLimits = LIMITS) -> HueshiftError:
    with pytest.raises(HueshiftError) as caught:
        read_adapter(data, LAYOUT, limits)
    return caught.value


@pytest.mark.parametrize("adapter", [*KINDS.values(), whole()], ids=[*KINDS, "whole"])
def test_a_file_gives_back_the_adapter_bit_for_bit(adapter: Adapter) -> None:
    data = write_adapter(adapter)
    again = read_adapter(data, LAYOUT, LIMITS)
    assert_same(again, adapter)
    assert write_adapter(again) == data


def test_only_files_with_new_parts_have_the_new_version() -> None:
    assert peek_header(write_adapter(KINDS["multi-vector"])).format == FORMAT
    assert all(peek_header(write_adapter(KINDS[name])).format == FORMAT_TEXT_SIDE for name in NEW)
    named = replace(KINDS["multi-vector"], class_noun="dog")
    assert peek_header(write_adapter(named)).format == FORMAT_TEXT_SIDE
    assert read_adapter(write_adapter(named), LAYOUT, LIMITS).class_noun == "dog"


def split(data: bytes) -> tuple[dict[str, Any], dict[str, Any], bytes]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return header, json.loads(header["__metadata__"]["hueshift"]), data[8 + length :]


def join(header: dict[str, Any], own: Any, body: bytes) -> bytes:
    header["__metadata__"]["hueshift"] = json.dumps(own)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


Edit = Callable[[dict[str, Any], dict[str, Any]], object]


def renamed(old: str, new: str) -> Edit:
    return lambda header, own: header.update({new: header.pop(old)})


def shaped(name: str, *shape: int) -> Edit:
    return lambda header, own: header[name].update(shape=list(shape))


def stated(**values: Any) -> Edit:
    return lambda header, own: own.update(values)


K = f"{ATTENTION}.to_k"
Q = f"{ATTENTION}.to_q"
INVALID, SHAPE, UNKNOWN = Reason.ADAPTER_FILE_INVALID, Reason.ADAPTER_SHAPE_MISMATCH, Reason.ADAPTER_TENSOR_UNKNOWN
LOCKED = "gated/<locked>"
MAPPED = "mapper/<mapped>"


@pytest.mark.parametrize(
    ("kind", "edit", "reason", "text"),
    [
        ("layers", shaped("grid/<layers>", 2, 2, 2, 24), SHAPE, "1 or 4 layers"),
        ("layers", shaped("grid/<layers>", 4, 2, 24), SHAPE, "[stages, layers, vectors, 24]"),
        ("layers", renamed("grid/<layers>", "grid/two words"), INVALID, "holds a space"),
        ("layers", renamed("grid/<layers>", "grid/"), INVALID, "0 characters"),
        ("layers", stated(kind="spectra"), INVALID, "'kv'"),
        ("layers", stated(format="hueshift.adapter/1"), INVALID, "class_noun"),
        ("layers", stated(class_noun=" dog"), INVALID, "class_noun"),
        ("layers", stated(class_noun=["dog"]), INVALID, "class_noun"),
        ("layers", stated(class_noun="d" * 65), INVALID, "at most 64"),
        ("layers", stated(mappers={"<x>": {"norm": 1, "bypass": 0}}), INVALID, "'<x>' lacks"),
        ("layers", stated(gated=[]), INVALID, "gated must map words"),
        ("mapper", stated(mappers={}), INVALID, "'<mapped>' lacks"),
        ("mapper", stated(mappers={"<mapped>": {"norm": -1, "bypass": 0}}), INVALID, "0 or above"),
        ("mapper", stated(mappers={"<mapped>": {"norm": True, "bypass": 0}}), INVALID, "a finite number"),
        ("mapper", stated(mappers={"<mapped>": {"norm": 10**400, "bypass": 0}}), INVALID, "a finite number"),
        ("mapper", stated(mappers={"<mapped>": {"norm": 1}}), INVALID, "exactly norm, bypass"),
        ("mapper", stated(mappers={"a b": {"norm": 1, "bypass": 0}}), INVALID, "holds a space"),
        ("mapper", stated(mappers={"<mapped>": {"norm": 1, "bypass": 0}}), INVALID, "48 values and has bypass 0"),
        ("mapper-plain", stated(mappers={"<mapped>": {"norm": 1, "bypass": 0.2}}), INVALID, "24 values and has bypass"),
        ("mapper", shaped(f"{MAPPED}/frequencies", 2, 4), SHAPE, "[features, 2]"),
        ("mapper", shaped(f"{MAPPED}/layers/0/weight", 4, 16), SHAPE, "[size, 8]"),
        ("mapper", shaped(f"{MAPPED}/layers/1/norm_bias", 2, 4), SHAPE, "allowed: [8]"),
        ("mapper", shaped(f"{MAPPED}/output_weight", 24, 16), SHAPE, "[24, 8], or with a bypass [48, 8]"),
        ("mapper", shaped(f"{MAPPED}/output_bias", 1, 48), SHAPE, "allowed: [48]"),
        ("mapper", renamed(f"{MAPPED}/output_bias", f"{MAPPED}/other"), UNKNOWN, "output_bias, layers/<n>/weight"),
        ("mapper", renamed(f"{MAPPED}/layers/0/bias", f"{MAPPED}/layers/99/bias"), INVALID, "100 hidden layers"),
        ("mapper", renamed(f"{MAPPED}/layers/1/bias", f"{MAPPED}/layers/2/bias"), INVALID, "is missing"),
        ("kv", shaped(f"kv/{K}", 24, 32), SHAPE, "allowed: [32, 24]"),
        ("kv", renamed(f"kv/{K}", f"kv/{Q}"), UNKNOWN, "no projection of keys or values"),
        ("kv", renamed(f"kv/{K}", "kv/nothing"), UNKNOWN, "'nothing'"),
        ("kv", stated(kind="tokens"), UNKNOWN, "a tokens adapter of hueshift.adapter/2 holds tokens, grid, mapper"),
        ("gated", stated(gated={"<locked>": {"beta": 0.5, "tau": 0}}), INVALID, "above 0"),
        ("gated", stated(gated={"<locked>": {"beta": "0.5", "tau": 1}}), INVALID, "a finite number"),
        ("gated", shaped(f"{LOCKED}/dual", 1, 24), SHAPE, "allowed: [24]"),
        ("gated", shaped(f"{LOCKED}/outputs/{K}", 1, 32), SHAPE, "allowed: [32]"),
        ("gated", renamed(f"{LOCKED}/outputs/{K}", f"{LOCKED}/outputs/{Q}"), UNKNOWN, "no projection"),
        ("gated", renamed(f"{LOCKED}/outputs/{K}", f"{LOCKED}/results/{K}"), UNKNOWN, "target, dual, outputs/<layer>"),
        ("gated", renamed("tokens/<locked>", "tokens/<other>"), INVALID, "'<locked>' has no embedding"),
    ],
)
def test_wrong_parts_are_refused_by_name(kind: str, edit: Edit, reason: Reason, text: str) -> None:
    header, own, body = split(write_adapter(KINDS[kind]))
    edit(header, own)
    error = refusal(join(header, own, body))
    assert (error.reason, text in error.message) == (reason, True), error.message


def test_a_word_is_taught_once() -> None:
    grid, network = KINDS["layers"].token_grids["<layers>"], KINDS["mapper"].mappers["<mapped>"]
    for twice in (
        replace(KINDS["layers"], tokens={"<layers>": torch.ones(1, 24)}),
        replace(KINDS["layers"], mappers={"<layers>": network}),
        replace(KINDS["mapper"], token_grids={"<mapped>": grid}, tokens={}),
    ):
        assert "is taught twice" in refusal(write_adapter(twice)).message
    many = replace(KINDS["layers"], token_grids={f"<{n}>": grid for n in range(17)})
    assert "17 words; allowed: at most 16" in refusal(write_adapter(many)).message


def test_sizes_are_capped() -> None:
    long = stage_tokens(LAYOUT, stages=1000)
    read_adapter(write_adapter(long), LAYOUT, LIMITS)
    assert "1 to 999 stages" in refusal(write_adapter(long), FileLimits(max_stages=999)).message
    assert "1 to 1 vectors" in refusal(write_adapter(KINDS["layers"]), FileLimits(max_word_vectors=1)).message
    wide = refusal(write_adapter(KINDS["mapper"]), FileLimits(max_mapper_width=3))
    assert (wide.reason, "1 to 3 features" in wide.message) == (SHAPE, True)
    assert "1 to 7" in refusal(write_adapter(mapper(LAYOUT, hidden=(8,))), FileLimits(max_mapper_width=7)).message
    assert "allowed: 1 to 1" in refusal(write_adapter(KINDS["mapper"]), FileLimits(max_mapper_layers=1)).message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", NEW)
def test_values_that_are_not_finite_are_refused_by_name(kind: str, value: float) -> None:
    for name, tensor in text_side_tensors(KINDS[kind]).items():
        before = tensor.flatten()[0].clone()
        tensor.flatten()[0] = value
        try:
            error = refusal(write_adapter(KINDS[kind]))
        finally:
            tensor.flatten()[0] = before
        assert (error.reason, name in error.message) == (Reason.ADAPTER_NOT_FINITE, True)


def test_a_gate_that_would_divide_by_zero_is_neither_written_nor_read() -> None:
    adapter = KINDS["gated"]
    edit = adapter.gated["<locked>"]
    dual = edit.dual - (edit.dual @ edit.target) / (edit.target @ edit.target) * edit.target
    for wrong in (replace(edit, dual=dual), replace(edit, target=torch.zeros(24)), replace(edit, tau=0.0)):
        with pytest.raises(InvalidArgument, match="divides by it"):
            write_adapter(replace(adapter, gated={"<locked>": wrong}))
    header, own, body = split(write_adapter(adapter))
    begin, end = header[f"{LOCKED}/dual"]["data_offsets"]
    orthogonal = body[:begin] + dual.numpy().tobytes() + body[end:]
    assert "divides by it" in refusal(join(header, own, orthogonal)).message
    with pytest.raises(InvalidArgument, match="beta of the word"):
        write_adapter(replace(adapter, gated={"<locked>": replace(edit, beta=float("nan"))}))
    network = KINDS["mapper"].mappers["<mapped>"]
    with pytest.raises(InvalidArgument, match="0 or above"):
        write_adapter(replace(KINDS["mapper"], mappers={"<mapped>": replace(network, norm=-1.0)}))


FUZZ = settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
FILES = [write_adapter(adapter) for adapter in KINDS.values()]


def read_or_refuse(data: bytes) -> None:
    try:
        adapter = read_adapter(data, LAYOUT, LIMITS)
    except HueshiftError as error:
        message = error.message
    else:
        message = ""
        assert_same(read_adapter(write_adapter(adapter), LAYOUT, LIMITS), adapter)
    assert len(message.encode()) < 2000


@FUZZ
@given(st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 10**4), st.binary(max_size=9)), max_size=5), st.data())
def test_mutated_files_never_crash(file: bytes, edits: list[tuple[int, bytes]], data: st.DataObject) -> None:
    mutated = bytearray(file)
    for place, value in edits:
        begin = place % len(mutated)
        mutated[begin : begin + data.draw(st.integers(0, 9))] = value
    read_or_refuse(bytes(mutated[: data.draw(st.integers(len(mutated) - 40, len(mutated)))]))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["<mapped>", "tau"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@FUZZ
@given(st.sampled_from(FILES), st.randoms(use_true_random=False), VALUES)
def test_headers_with_any_value_anywhere_never_crash(file: bytes, chance: Any, value: object) -> None:
    header, own, body = split(file)
    numbers = [part for name in ("mappers", "gated") for part in (own.get(name) or {}).values()]
    target = chance.choice([own, own, *numbers, *(entry for entry in header.values() if "shape" in entry)])
    target[chance.choice([*target, "gated", "mappers", "class_noun"])] = value
    read_or_refuse(join(header, own, body))


@FUZZ
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=("Z", "C")), min_size=1, max_size=20),
        st.tuples(st.integers(1, 4), st.booleans(), st.integers(1, 3)),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.integers(0, 99),
)
def test_any_grids_come_back(words: dict[str, tuple[int, bool, int]], dtype: torch.dtype, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    grids = {
        word: torch.randn(stages, len(LAYOUT.cross_attentions) if layers else 1, vectors, 24, generator=draw).to(dtype)
        for word, (stages, layers, vectors) in words.items()
    }
    adapter = Adapter(AdapterKind.TOKENS, LAYOUT.base_hash, "grids", token_grids=grids)
    assert_same(
        read_adapter(write_adapter(adapter), LAYOUT, LIMITS), replace(adapter, token_grids=dict(sorted(grids.items())))
    )


NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


@FUZZ
@given(
    st.integers(0, 99),
    st.integers(1, 9),
    st.lists(st.integers(1, 9), min_size=1, max_size=8),
    st.booleans(),
    st.floats(0, 1e6),
    NUMBERS,
    st.floats(1e-9, 1e6),
)
def test_any_network_and_edit_comes_back(
    seed: int, features: int, hidden: list[int], bypass: bool, norm: float, beta: float, tau: float
) -> None:
    for adapter in (
        mapper(LAYOUT, seed=seed, features=features, hidden=tuple(hidden), bypass=bypass, norm=norm),
        gated(LAYOUT, seed=seed, beta=beta, tau=tau),
        kv_deltas(LAYOUT, seed=seed),
        multi_vector(LAYOUT, vectors=features, seed=seed),
    ):
        assert_same(read_adapter(write_adapter(adapter), LAYOUT, LIMITS), adapter)
