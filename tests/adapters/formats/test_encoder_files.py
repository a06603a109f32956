"""Files that change the text encoder: read, encoded with, and written as the programs that made them do."""

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from encoder_adapters import encoder_adapter
from foreign_unet import randomize
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.adapters.formats.draft import ImportBase, ImportOptions
from hueshift.adapters.formats.exporting import ExportForm, export_adapter
from hueshift.adapters.formats.importing import import_adapter
from hueshift.adapters.formats.inspect import inspect
from hueshift.adapters.formats.report import ImportReport
from hueshift.adapters.formats.spelling import EncoderNames
from hueshift.adapters.layout import BaseLayout, MatrixLayer
from hueshift.engines.base_model import BaseModel
from hueshift.engines.encoder_layers import encoder_parameters, read_encoder_layout
from hueshift.engines.encoder_weights import EncoderAssembly, compose_encoder
from hueshift.engines.text import TextStage

# PEFT asks transformers for a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

TARGETS = ["q_proj", "v_proj", "out_proj", "fc1"]
IDS = torch.tensor([[4094, 7, 300, 21, *[4095] * 28]])
Q = "text_encoder.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def base(base_model: BaseModel) -> ImportBase:
    return ImportBase(base_model.layout, encoder_parameters(base_model))


def imported(tensors: Mapping[str, Tensor], base: ImportBase, metadata: dict[str, str] | None = None) -> Adapter:
    adapter, report = import_adapter(safetensors.torch.save(dict(tensors), metadata), base)
    assert isinstance(report, ImportReport)
    assert report.left_out == ()
    return adapter


def context(base_model: BaseModel, adapter: Adapter) -> Tensor:
    """The prompt of IDS, encoded with an adapter."""
    edits = compose_encoder([(adapter, 1.0)])
    made = EncoderAssembly(base_model, None).put_together(edits.deltas, edits.norms, edits.branches)
    with torch.no_grad():
        found: Tensor = torch.func.functional_call(base_model.text_encoder, dict(made[0]), (IDS,))[0]
    return found


def tuned_by_peft(base_model: BaseModel, **config: Any) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors of a LoRA by the encoder's own names, and the context of IDS that PEFT makes with it."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "init_lora_weights": True, **config}
    tuned = get_peft_model(copy.deepcopy(base_model.text_encoder), LoraConfig(**options))
    randomize((p for name, p in tuned.named_parameters() if "lora_A" in name or "lora_B" in name), size=0.1)
    with torch.no_grad():
        out: Tensor = tuned(IDS)[0]
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix).replace(".default", ""): parameter.detach().clone()
        for name, parameter in tuned.named_parameters()
        if "lora_" in name
    }, out


def with_root(name: str) -> str:
    """Names as all but the newest transformers have them."""
    return f"text_model.{name.removeprefix('text_model.')}"


@pytest.mark.parametrize("dora", [False, True])
def test_a_file_of_diffusers_encodes_as_peft_does(base_model: BaseModel, base: ImportBase, dora: bool) -> None:
    tensors, expected = tuned_by_peft(base_model, use_dora=dora)
    config = {"text_encoder.r": 4, "text_encoder.lora_alpha": 6, "text_encoder.target_modules": TARGETS}
    named = {f"text_encoder.{with_root(name)}": tensor for name, tensor in tensors.items()}
    data = safetensors.torch.save(named, {"lora_adapter_metadata": json.dumps({**config, "unet.r": 99})})
    # DoRA is a change of full rank.
    adapter, report = import_adapter(data, base, ImportOptions(rank=128 if dora else 0))
    assert report is not None
    assert (adapter.kind, len(adapter.encoder.lowrank), report.left_out) == (AdapterKind.LOWRANK, 16, ())
    found, plain = context(base_model, adapter), context(base_model, Adapter(AdapterKind.LOWRANK, "", "x"))
    off = float((found - expected).abs().max())
    assert off < (0.2 if dora else 1e-4) * float((plain - expected).abs().max())


def test_a_file_of_kohya_is_read_and_written_as_it_was(base_model: BaseModel, base: ImportBase) -> None:
    tensors, expected = tuned_by_peft(base_model)
    named: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, ending = name.partition(".lora_")
        flat = "lora_te_" + with_root(module).replace(".", "_")
        named[f"{flat}.lora_{'down' if ending.startswith('A') else 'up'}.weight"] = tensor
        named[f"{flat}.alpha"] = torch.tensor(6.0)
    adapter = imported(named, base)
    assert torch.allclose(context(base_model, adapter), expected, atol=1e-4)
    written = safetensors.torch.load(export_adapter(adapter, ExportForm.KOHYA, base).data)
    assert written.keys() == named.keys()
    assert all(torch.equal(tensor, named[name]) for name, tensor in written.items())


def test_shifts_of_mkshings_program(base_model: BaseModel, base: ImportBase) -> None:
    shifts = encoder_adapter(base_model.layout).encoder
    named = {f"{with_root(name.partition('.')[2])}.delta": shift for name, shift in shifts.spectral.items()}
    norm = base.parameter("text_encoder.final_layer_norm.weight")
    named["text_model.final_layer_norm.delta"] = torch.tensor([0.5])
    adapter, report = import_adapter(
        safetensors.torch.save({**named, "text_model.embeddings.token_embedding.delta": torch.ones(256)}), base
    )
    assert report is not None
    assert [(left.count, left.keys) for left in report.left_out] == [
        (1, ("text_model.embeddings.token_embedding.delta",))
    ]
    assert adapter.kind is AdapterKind.SPECTRAL
    assert all(torch.equal(adapter.encoder.spectral[name], shift) for name, shift in shifts.spectral.items())
    expected = norm * (0.5 / float(torch.linalg.norm(norm)))
    torch.testing.assert_close(adapter.encoder.norm["text_encoder.final_layer_norm"], expected)
    found = inspect(export_adapter(adapter, ExportForm.HUESHIFT, base).data)
    assert found.networks == {"UNet": 0, "text encoder": len(named)}


def test_numbered_layers_are_keys_values_queries_output(base: ImportBase) -> None:
    factors = {n: (torch.full((1, 256), float(n + 1)), torch.ones(256, 1)) for n in range(8)}
    tensors = {f"text_encoder:{n}:down": down for n, (down, _) in factors.items()}
    tensors |= {f"text_encoder:{n}:up": up for n, (_, up) in factors.items()}
    lowrank = imported(tensors, base).encoder.lowrank
    block = "text_encoder.encoder.layers.{}.self_attn.{}_proj"
    order = [block.format(layer, side) for layer in (0, 1) for side in ("k", "v", "q", "out")]
    assert {name: int(part.a[0, 0]) for name, part in lowrank.items()} == {n: i for i, n in enumerate(order, 1)}


def test_layers_counted_in_other_classes_are_left_out(base: ImportBase) -> None:
    tensors = {"text_encoder:0:down": torch.ones(1, 256), "text_encoder:0:up": torch.ones(1024, 1)}
    with pytest.raises(InvalidArgument, match="nothing of it has an effect"):
        import_adapter(safetensors.torch.save(tensors, {"text_encoder": '["CLIPMLP"]'}), base)


def test_real_files_have_all_layers_of_the_encoder(shared_dir: Path) -> None:
    with torch.device("meta"):
        encoder = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
    matrices, norms = read_encoder_layout([encoder])
    assert (len(matrices), len(norms)) == (72, 25)
    layout = BaseLayout("5d" * 32, (MatrixLayer("x", (1, 1)),), (), 768, (), matrices, norms)
    tensors = safetensors.torch.load((shared_dir / "data/loras/analog_svd_rank4.safetensors").read_bytes())
    text = {name: tensor for name, tensor in tensors.items() if name.startswith("text_encoder:")}
    assert len(imported(text, ImportBase(layout)).encoder.lowrank) == 48


@pytest.mark.parametrize("form", [form for form in ExportForm if form is not ExportForm.HUESHIFT])
def test_forms_that_cannot_hold_it_say_so(base_model: BaseModel, base: ImportBase, form: ExportForm) -> None:
    adapter = encoder_adapter(base_model.layout)
    with pytest.raises(InvalidArgument, match=r"text encoder|spectral shifts") as caught:
        export_adapter(adapter, form, base)
    assert caught.value.reason is Reason.ADAPTER_TARGET_UNSUPPORTED


def test_spellings() -> None:
    matrices = [f"{encoder}.encoder.layers.0.self_attn.q_proj" for encoder in ("text_encoder", "text_encoder_2")]
    layout = BaseLayout("0" * 64, (), (), 4, (), tuple(MatrixLayer(name, (4, 4)) for name in matrices))
    names = EncoderNames(layout)
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    flat = path.replace(".", "_")
    first = [f"lora_te_{flat}", f"lora_te1_{flat}", f"text_encoder.{path}", f"base_model.model.{path}", path]
    first += [f"text_encoder.{path.removesuffix('q_proj')}to_q", f"lycoris_{flat}"]
    second = (f"lora_te2_{flat}", f"text_encoder_2.{path}", f"te2.{path}")
    assert {names.find(name) for name in first} == {matrices[0]}
    assert {names.find(name) for name in second} == {matrices[1]}
    unknown = (f"unet.{path}", "text_encoder.text_model.embeddings.token_embedding", f"lora_te3_{flat}", "x")
    assert {names.find(name) for name in unknown} == {None}


def test_an_imported_words_encoder_is_not_needed(base_model: BaseModel, base: ImportBase) -> None:
    """A change beside learned words stays beside them, and both are served."""
    factors = {f"text_encoder.{with_root(Q.partition('.')[2])}.lora_A.weight": torch.ones(2, 256)}
    factors |= {f"text_encoder.{with_root(Q.partition('.')[2])}.lora_B.weight": torch.ones(256, 2)}
    word = torch.ones(1, base_model.layout.token_width)
    adapter = imported({**factors, "bundle_emb.sks.string_to_param.*": word}, base)
    assert (list(adapter.tokens), list(adapter.encoder.lowrank)) == (["sks"], [Q])
    rows = [TextStage(base_model).tokenize("a sks fox", {"sks": 1})]
    assert rows[0].places
