"""Looking at files without a base model: inspect, diff, and folders as one file."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from foreign_unet import base_of, foreign_unet
from small_adapters import lowrank_adapter, spectral_adapter
from text_side_adapters import gated, kv_deltas, mapper, stage_tokens

from hueshift.adapters.adapter import LowRankFactors
from hueshift.adapters.errors import HueshiftError, InvalidArgument, Reason
from hueshift.adapters.file import write_adapter
from hueshift.adapters.formats.difference import compare
from hueshift.adapters.formats.folder import bundle
from hueshift.adapters.formats.inspect import inspect, read_header


def test_inspect_tells_what_our_file_holds() -> None:
    adapter = replace(lowrank_adapter(), norm={"up.norm": torch.ones(7)}, tokens={"sks": torch.ones(3, 6)})
    data = write_adapter(adapter)
    facts = inspect(data)
    assert (facts.format, facts.kind, facts.method) == ("hueshift", "lowrank", "residuals")
    assert (facts.base_hash, facts.identifier) == (adapter.base_hash, "")
    assert facts.parts == {"low-rank": 2, "norm shifts": 1, "learned words": 1}
    assert (facts.ranks, facts.words) == ({1: 1, 2: 1}, {"sks": 3})
    assert (facts.size_bytes, facts.tensors, facts.values) == (len(data), 6, 10 + 14 + 6 + 4 + 7 + 18)
    assert facts.dtypes == {"F16": 2, "F32": 4}


def test_inspect_tells_what_another_programs_file_holds() -> None:
    tensors = {
        "lora_unet_a.lora_down.weight": torch.ones(4, 2),
        "lora_unet_a.lora_up.weight": torch.ones(2, 4),
        "lora_unet_a.alpha": torch.tensor(1.0),
        "lora_unet_b.hada_w1_a": torch.ones(2, 3),
        "lora_unet_b.hada_w1_b": torch.ones(3, 2).half(),
        "lora_unet_n.w_norm": torch.ones(2),
        "lora_te_x.lora_down.weight": torch.ones(8, 2),
        "bundle_emb.cat.string_to_param.*": torch.ones(2, 5),
    }
    facts = inspect(safetensors.torch.save(tensors, {"ss_network_dim": "4", "ss_tag_frequency": "x" * 999}))
    assert (facts.format, facts.kind, facts.base_hash) == ("kohya", "", "")
    assert facts.parts == {"low-rank": 2, "LoHa": 1, "norm shifts": 1, "learned words": 1}
    assert facts.ranks == {3: 1, 4: 1, 8: 1}
    assert facts.words == {"cat": 2}
    assert facts.networks == {"UNet": 7, "text encoder": 1}
    assert facts.metadata == {"ss_network_dim": "4"}
    assert facts.dtypes == {"F16": 1, "F32": 7}


def test_inspect_tells_words_gates_and_norms() -> None:
    layout = base_of(foreign_unet()).layout
    count = len(layout.cross_attentions)
    grid = inspect(write_adapter(stage_tokens(layout, word="<s>", stages=3, vectors=2, layers=True)))
    assert (grid.words, grid.word_forms) == ({"<s>": 2}, {"<s>": f"2 vectors x {count} layers x 3 stages"})
    network = inspect(write_adapter(mapper(layout)))
    assert network.word_forms == {"<mapped>": "mapper of 2 hidden layers, norm 0.4, bypass 0.25"}
    assert network.parts == {"mappers": 1}
    deltas = kv_deltas(layout)
    facts = inspect(write_adapter(replace(deltas, class_noun="cat")))
    assert (facts.kind, facts.class_noun, facts.parts["key and value deltas"]) == ("kv", "cat", 2 * count)
    for name, delta in deltas.kv.items():
        assert facts.norms[f"kv/{name}"] == pytest.approx(float(delta.double().norm()))
    locked = inspect(write_adapter(gated(layout)))
    assert locked.gated == {"<locked>": f"{2 * count} layers, beta 0.75, tau 0.1"}
    assert locked.words == {"<locked>": 1}


def test_inspect_tells_the_norms_of_every_part() -> None:
    adapter = replace(lowrank_adapter(), norm={"up.norm": torch.arange(7.0).bfloat16()})
    norms = inspect(write_adapter(adapter)).norms
    assert norms["norm/up.norm"] == pytest.approx(91.0**0.5)
    for layer, part in adapter.lowrank.items():
        product = part.scale * (part.b.double() @ part.a.double())
        assert norms[f"lowrank/{layer}"] == pytest.approx(float(product.norm()))
    broken = write_adapter(replace(adapter, norm={"up.norm": torch.full((7,), float("inf"))}))
    with pytest.raises(InvalidArgument, match=r"norm/up\.norm"):
        inspect(broken)


def test_inspect_tells_the_words_of_other_text_side_files() -> None:
    layered = inspect(safetensors.torch.save({f"<c>-{n}": torch.ones(6) for n in range(16)}))
    assert (layered.format, layered.words, layered.word_forms) == ("p-plus", {"<c>": 1}, {"<c>": "16 layers"})
    staged = inspect(safetensors.torch.save({"prospect.<c>": torch.ones(10, 6)}))
    assert (staged.format, staged.words, staged.word_forms) == ("prospect", {"<c>": 1}, {"<c>": "10 stages"})


def test_differences_of_numbers_are_told() -> None:
    layout = base_of(foreign_unet()).layout
    first, second = gated(layout), gated(layout, tau=0.2)
    found = compare(write_adapter(first), write_adapter(replace(second, class_noun="cat")))
    assert found.fields == {"class_noun": ("", "cat"), "gated <locked> tau": ("0.1", "0.2")}
    assert all(part.difference == 0 for part in found.compared)
    found = compare(write_adapter(mapper(layout)), write_adapter(mapper(layout, norm=0.5)))
    assert found.fields == {"mapper <mapped> norm": ("0.4", "0.5")}
    deltas = kv_deltas(layout), kv_deltas(layout, seed=2)
    found = compare(write_adapter(deltas[0]), write_adapter(deltas[1]))
    assert {part.name for part in found.compared if part.difference} == {f"kv/{name}" for name in deltas[0].kv} | {
        "tokens/<new1>"
    }


def test_inspect_needs_no_torch(tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(write_adapter(spectral_adapter()))
    code = (
        "import sys, pathlib\n"
        "from hueshift.adapters.formats.folder import bundle\n"
        "from hueshift.adapters.formats.inspect import inspect\n"
        f"print(inspect(bundle(pathlib.Path({str(file)!r})).data).kind, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["spectral", "False"]


def test_equal_files_do_not_differ() -> None:
    data = write_adapter(lowrank_adapter())
    assert compare(data, data).equal
    turned = lowrank_adapter()
    part = turned.lowrank["down.proj_out"]
    swapped = LowRankFactors(2 * part.a.flip(0), part.b.flip(1), part.scale / 2)
    found = compare(data, write_adapter(replace(turned, lowrank={**turned.lowrank, "down.proj_out": swapped})))
    # Other factors, the same product.
    assert (found.fields, found.only_first, found.only_second) == ({}, (), ())
    assert max(part.difference for part in found.compared) < 1e-7


def test_differences_are_told_by_layer() -> None:
    first = replace(spectral_adapter(), norm={})
    second = replace(spectral_adapter(seed=1), method="mix", tokens={"sks": torch.ones(2, 6)})
    found = compare(write_adapter(first), write_adapter(second))
    assert found.fields == {"method": ("svdiff", "mix")}
    assert found.only_first == ("tokens/sks [1, 6]",)
    assert found.only_second == ("norm/up.norm", "tokens/sks [2, 6]")
    a, b = first.spectral["up.to_q"], second.spectral["up.to_q"]
    stated = {part.name: part for part in found.compared}["spectral/up.to_q"]
    assert stated.first == pytest.approx(float(a.norm()))
    assert stated.difference == pytest.approx(float((a - b).norm() / max(a.norm(), b.norm())))
    assert not found.equal
    assert compare(write_adapter(first), safetensors.torch.save({"<cat>": torch.ones(2, 6)})).fields["format"] == (
        "hueshift",
        "textual-inversion",
    )


def folder_of(tmp_path: Path, **files: dict[str, torch.Tensor]) -> Path:
    for name, tensors in files.items():
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors", {"from": name})
    return tmp_path


def test_a_folder_becomes_one_file(tmp_path: Path) -> None:
    parts = {"one": {"a": torch.arange(6.0).half(), "b": torch.ones(2, 2)}, "two": {"c": torch.tensor(3.0)}}
    folder = folder_of(tmp_path, **parts)
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2}))
    data = bundle(folder).data
    assert {name: t.tolist() for name, t in safetensors.torch.load(data).items()} == {
        name: t.tolist() for tensors in parts.values() for name, t in tensors.items()
    }
    assert json.loads(read_header(data).metadata["adapter_config"]) == {"r": 2}


def test_a_text_encoders_file_keeps_its_network(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, spectral_shifts={"x.delta": torch.ones(1)}, spectral_shifts_te={"x.delta": torch.ones(2)}
    )
    assert set(read_header(bundle(folder).data).tensors) == {"x.delta", "text_encoder.x.delta"}


def test_folders_that_cannot_be_one_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="no safetensors file"):
        bundle(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"x")
    with pytest.raises(InvalidArgument, match="pickle"):
        bundle(tmp_path)
    with pytest.raises(InvalidArgument, match="two files of the folder hold a tensor 'a'"):
        bundle(folder_of(tmp_path, one={"a": torch.ones(1)}, two={"a": torch.ones(1)}))
    (tmp_path / "two.safetensors").write_bytes(b"\x80\x04.")
    with pytest.raises(HueshiftError) as caught:
        bundle(tmp_path)
    assert caught.value.reason is Reason.ADAPTER_FILE_UNSAFE
