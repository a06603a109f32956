"""SDXL: everything against diffusers' own pipeline, with and without adapters."""

import copy
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from text_side_adapters import gated, kv_deltas, layer_tokens, mapper, multi_vector, stage_tokens
from tiny_sdxl import POOLED, SCHEDULER, TINY, WIDTHS, save_tiny_sdxl, sdxl_parts
from tiny_unet import TinyParts, merge_row
from torch import Tensor

from hueshift.adapters.adapter import Adapter, AdapterKind, LowRankFactors
from hueshift.adapters.errors import InvalidArgument, Reason
from hueshift.engines.adapted_unet import AdaptedUNet
from hueshift.engines.added_embedding import AddedStage, added_width, make_time_ids
from hueshift.engines.base_model import Architecture, BaseModel, load_base_model
from hueshift.engines.conditioning import Conditioner, Conditioning, make_conditioner
from hueshift.engines.cross_attention import CrossEdits
from hueshift.engines.denoise import advance, start_sample
from hueshift.engines.interface import EngineRow, Plan
from hueshift.engines.rows import RowLayout
from hueshift.engines.samplers import SamplerKind, make_table
from hueshift.engines.text import TextStage
from hueshift.engines.text_side import TextSide, compose_text_side
from hueshift.engines.torch_engine import TorchEngine

pytestmark = pytest.mark.usefixtures("one_thread")

# fp32 through some hundred layers at outputs of order 1; seen: 4e-6.
CLOSE = 3e-5
PROMPT, NEGATIVE = "a sks fox, red.", "low fox"
SIZE = (24, 16)
"""Width and height in pixels of pictures that are not square."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl")


@pytest.fixture(scope="module")
def base(folder: Path) -> BaseModel:
    return load_base_model(folder)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    made = StableDiffusionXLPipeline.from_pretrained(folder, low_cpu_mem_usage=False)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def parts(base: BaseModel) -> TinyParts:
    return sdxl_parts(base)


@pytest.fixture(scope="module")
def conditioner(parts: TinyParts) -> Conditioner:
    return make_conditioner(parts.base, parts.factors)


def encode(pipeline: Any, prompt: str, negative: str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Context, negative context, pooled and negative pooled text, as the pipeline makes them."""
    with torch.no_grad():
        out: tuple[Tensor, Tensor, Tensor, Tensor] = pipeline.encode_prompt(
            prompt, negative_prompt=negative, do_classifier_free_guidance=True, device="cpu"
        )
    return out


def unet_out(
    unet: Any, latents: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor, size: Any = SIZE
) -> Tensor:
    """Diffusers' own forward pass."""
    ids = torch.tensor([[size[1], size[0], 0, 0, size[1], size[0]]] * len(latents), dtype=torch.float32)
    with torch.no_grad():
        out: Tensor = unet(
            latents,
            timesteps,
            encoder_hidden_states=context,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": ids},
            return_dict=False,
        )[0]
    return out


def test_folder_is_read(base: BaseModel) -> None:
    assert base.architecture is Architecture.SDXL
    assert base.layout.token_width == sum(WIDTHS)
    assert added_width(base.layout) == 4 * TINY["block_out_channels"][0]
    assert (base.pixels, base.latent_factor, base.size_multiple) == (16, 2, 8)
    assert (base.schedule.timestep_spacing, base.schedule.steps_offset) == ("leading", 1)


def test_the_hash_depends_on_both_text_encoders(base: BaseModel, folder: Path, tmp_path: Path) -> None:
    for part in ("text_encoder", "text_encoder_2"):
        other = save_tiny_sdxl(tmp_path / part)
        assert load_base_model(other).base_hash == base.base_hash, "the same weights"
        encoder = getattr(StableDiffusionXLPipeline.from_pretrained(other, low_cpu_mem_usage=False), part)
        next(encoder.parameters()).data[0, 0] += 1
        encoder.save_pretrained(other / part)
        assert load_base_model(other).base_hash != base.base_hash


@pytest.mark.parametrize("negative", [NEGATIVE, None])
def test_text_equals_the_pipeline(base: BaseModel, pipeline: Any, negative: str | None) -> None:
    stage = TextStage(base)
    rows = [stage.tokenize(prompt, {}) for prompt in (PROMPT, negative or "", "fox " * 40)]
    context, pooled = stage.encode_pooled(rows, [{}] * 3)
    assert pooled is not None
    assert (context.shape[2], pooled.shape[1]) == (sum(WIDTHS), POOLED)
    expected = encode(pipeline, PROMPT, negative)
    for found, wanted in zip((context[0], context[1], pooled[0], pooled[1]), expected, strict=True):
        assert torch.allclose(found, wanted[0], atol=1e-6)
    assert torch.allclose(context[2], encode(pipeline, "fox " * 40, None)[0][0], atol=1e-6)
    assert bool(context[1].any()) == (negative is not None), "an empty prompt is zeros in SDXL"


def test_learned_words_stand_in_both_encoders(base: BaseModel, pipeline: Any) -> None:
    """Vectors of both encoders side by side, as entries of their vocabularies for diffusers."""
    vectors = 0.05 * torch.randn(2, sum(WIDTHS), generator=torch.Generator().manual_seed(1))
    taught = copy.deepcopy(pipeline)
    for encoder, tokenizer, own in zip(
        (taught.text_encoder, taught.text_encoder_2),
        (taught.tokenizer, taught.tokenizer_2),
        torch.split(vectors, list(WIDTHS), 1),
        strict=True,
    ):
        tokenizer.add_tokens(["qqq", "zzz"])
        encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        encoder.get_input_embeddings().weight.data[-2:] = own
    stage = TextStage(base)
    row = stage.tokenize("a <art>, red", {"<art>": 2})
    context, pooled = stage.encode_pooled([row], [{"<art>": vectors}])
    expected = encode(taught, "a qqq zzz, red", None)
    assert pooled is not None
    assert torch.allclose(context, expected[0], atol=1e-6)
    assert torch.allclose(pooled, expected[2], atol=1e-6)


def test_added_embedding_equals_diffusers(base: BaseModel, parts: TinyParts) -> None:
    pooled = torch.randn(2, POOLED, generator=torch.Generator().manual_seed(2))
    stage = AddedStage(base, parts.factors)
    added = stage.embed(pooled, make_time_ids(*SIZE), CrossEdits())
    unet: Any = base.unet
    ids = torch.tensor([[16.0, 24, 0, 0, 16, 24]] * 2)
    with torch.no_grad():
        expected = unet.get_aug_embed(torch.zeros(1), torch.zeros(1), {"text_embeds": pooled, "time_ids": ids})
    assert torch.equal(added, expected)


def inputs(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 4, 8, 12, generator=generator), torch.tensor([981.0, 3.0, 500.0])[:count]


def conditioned(
    conditioner: Conditioner, parts: TinyParts, prompts: Sequence[str], *mix: tuple[Adapter, float]
) -> Conditioning:
    side = compose_text_side(mix, parts.factors)
    return conditioner.condition(prompts, side, (500.0,), size=SIZE)


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("plan", [Plan.DENSE, Plan.FACTORED, Plan.FULL])
def test_unet_equals_diffusers(
    pipeline: Any, parts: TinyParts, conditioner: Conditioner, plan: Plan, channels_last: bool
) -> None:
    latents, timesteps = inputs(2)
    made = conditioned(conditioner, parts, [NEGATIVE, PROMPT]).cross
    context, negative, pooled, negative_pooled = encode(pipeline, PROMPT, NEGATIVE)
    expected = unet_out(
        pipeline.unet, latents, timesteps, torch.cat([negative, context]), torch.cat([negative_pooled, pooled])
    )
    spectral = parts.rows.base_spectral(parts.factors, parts.norms)[None]
    unet = AdaptedUNet(parts.base, parts.factors, parts.rows, plan, channels_last=channels_last)
    slab = None if plan is Plan.DENSE else spectral
    with torch.no_grad():
        lowrank = torch.zeros(1, parts.rows.lowrank_size)
        index = torch.zeros(2, dtype=torch.int64)
        found = unet(latents, timesteps, made.at(0), index, slab, lowrank, made.added_at(0))
    assert torch.allclose(found, expected, atol=CLOSE)


def every_layer(parts: TinyParts, seed: int) -> Adapter:
    """A low-rank adapter of all linear layers that have a branch, and of all of the text side."""
    generator = torch.Generator().manual_seed(seed)
    rows = RowLayout(parts.base.layout, ("proj_out", "to_q", "to_k", "to_v", "linear_1", "linear_2"), 2)
    targets = [t for t in rows.targets if not t.name.startswith("time_embedding") and ".attn1.to_k" not in t.name]
    lowrank = {
        t.name: LowRankFactors(
            torch.randn(2, t.cols, generator=generator), 0.1 * torch.randn(t.rows, 2, generator=generator), 0.5
        )
        for t in targets
        if ".attn1.to_v" not in t.name
    }
    return Adapter(AdapterKind.LOWRANK, parts.base.base_hash, "lora", lowrank=lowrank)


def merged(parts: TinyParts, *mix: tuple[Adapter, float]) -> Any:
    """Diffusers' UNet with all weights rebuilt in fp64."""
    whole = replace(
        parts, rows=RowLayout(parts.base.layout, ("to_q", "proj_out", "to_k", "to_v", "linear_1", "linear_2"), 8)
    )
    unet = copy.deepcopy(parts.base.unet)
    merge_row(unet, whole, whole.row(*mix))
    return unet


@pytest.mark.parametrize("kind", ["spectral", "lowrank", "both"])
def test_adapters_equal_merged_weights(pipeline: Any, parts: TinyParts, conditioner: Conditioner, kind: str) -> None:
    """Every layer is shifted, those of the text side and `add_embedding` too."""
    spectral, lowrank = (parts.random_adapter(1), 0.4), (every_layer(parts, 2), 0.7)
    mix = {"spectral": [spectral], "lowrank": [lowrank], "both": [spectral, lowrank]}[kind]
    latents, timesteps = inputs(1)
    context, _, pooled, _ = encode(pipeline, PROMPT, None)
    expected = unet_out(merged(parts, *mix), latents, timesteps, context, pooled)
    plain = unet_out(parts.base.unet, latents, timesteps, context, pooled)
    assert float((expected - plain).abs().max()) > 0.05, "the adapter must matter"
    engine = TorchEngine(
        parts.base, parts.factors, parts.rows, parts.norms, slots=2, max_batch=4, device=torch.device("cpu")
    )
    row = parts.row(*mix)
    engine.load_row(1, row)
    made = conditioned(conditioner, parts, [PROMPT], *mix).cross
    plan = Plan.FACTORED if row.needs_factored else Plan.DENSE
    found = engine.denoise(plan, latents, timesteps, made.at(0), torch.tensor([1]), made.added_at(0))
    assert torch.allclose(found, expected, atol=CLOSE)


def test_training_rows_of_the_text_side_run_in_the_unet(pipeline: Any, base: BaseModel) -> None:
    """With the text side in its rows the UNet takes context and features, and its own `add_embedding` is adapted."""
    parts = sdxl_parts(base, ("to_q",), text_side=True)
    adapter = parts.random_adapter(3)
    latents, timesteps = inputs(1)
    context, _, pooled, _ = encode(pipeline, PROMPT, None)
    features = AddedStage(base, parts.factors).features(pooled, make_time_ids(*SIZE))
    unet = AdaptedUNet(base, parts.factors, parts.rows, Plan.FACTORED)
    row = parts.row((adapter, 1.0))
    assert row.spectral is not None
    with torch.no_grad():
        found = unet.forward_rows(latents, timesteps, context, row.spectral[None], None, features)
    assert torch.allclose(
        found, unet_out(merged(parts, (adapter, 1.0)), latents, timesteps, context, pooled), atol=CLOSE
    )
    with pytest.raises(InvalidArgument, match="added: absent"):
        unet.forward_rows(latents, timesteps, context, row.spectral[None], None)


# Diffusers' Euler scheduler reads torch tensors as numpy 2 likes it no more.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("negative", [NEGATIVE, ""])
@pytest.mark.parametrize("sampler", [SamplerKind.EULER, SamplerKind.DDIM])
def test_a_picture_equals_the_pipelines(
    pipeline: Any, parts: TinyParts, conditioner: Conditioner, sampler: SamplerKind, negative: str
) -> None:
    schedule = replace(parts.base.schedule, set_alpha_to_one=False)
    if sampler is SamplerKind.DDIM:
        ddim = DDIMScheduler(**SCHEDULER, clip_sample=False, set_alpha_to_one=False)
        pipeline = StableDiffusionXLPipeline(**{**pipeline.components, "scheduler": ddim})
        pipeline.set_progress_bar_config(disable=True)
    table = make_table(schedule, sampler, 4)
    noise = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(9))
    expected = pipeline(
        PROMPT,
        negative_prompt=negative or None,
        width=SIZE[0],
        height=SIZE[1],
        num_inference_steps=4,
        guidance_scale=5.0,
        latents=noise.clone(),
        output_type="latent",
    ).images
    side = TextSide()
    made = conditioner.condition([negative, PROMPT], side, table.timesteps.tolist(), size=SIZE)
    engine = TorchEngine(
        parts.base, parts.factors, parts.rows, parts.norms, slots=2, max_batch=4, device=torch.device("cpu")
    )
    sample = start_sample(9, (4, 8, 12), cross=made.cross, guidance=5.0, table=table)
    while not sample.done:
        advance(engine, [sample])
    assert torch.allclose(sample.latents, expected[0], atol=5e-4 * float(expected.abs().max()))


def test_a_mixed_batch_equals_each_alone(parts: TinyParts, conditioner: Conditioner) -> None:
    layout = parts.base.layout
    engine = TorchEngine(
        parts.base, parts.factors, parts.rows, parts.norms, slots=8, max_batch=16, device=torch.device("cpu")
    )
    table = make_table(parts.base.schedule, SamplerKind.EULER, 2)
    adapters = [multi_vector(layout), stage_tokens(layout), kv_deltas(layout), gated(layout), parts.random_adapter(1)]
    pairs = []
    for number, adapter in enumerate(adapters):
        row = parts.row((adapter, 1.0))
        engine.load_row(number + 1, row)
        side = compose_text_side([(adapter, 1.0)], parts.factors)
        made = conditioner.condition(["", f"a {adapter.identifier}"], side, table.timesteps.tolist())
        pairs.append(
            [
                start_sample(
                    number,
                    (4, 8, 8),
                    cross=made.cross,
                    guidance=3.0,
                    table=table,
                    slot=number + 1,
                    needs_factored=row.needs_factored,
                )
                for _ in range(2)
            ]
        )
    for _ in range(2):
        advance(engine, [pair[0] for pair in pairs])
    for one, alone in pairs:
        for _ in range(2):
            advance(engine, [alone])
        assert torch.allclose(one.latents, alone.latents, atol=1e-4)


@pytest.mark.parametrize("make", [layer_tokens, mapper])
def test_words_that_change_with_the_layer_are_refused(parts: TinyParts, conditioner: Conditioner, make: Any) -> None:
    adapter = make(parts.base.layout)
    with pytest.raises(InvalidArgument, match="for each layer") as caught:
        conditioned(conditioner, parts, [f"a {adapter.identifier}"], (adapter, 1.0))
    assert caught.value.reason is Reason.ADAPTER_TARGET_UNSUPPORTED
    conditioned(conditioner, parts, ["a prompt without it"], (adapter, 1.0))


def test_a_row_of_text_side_edits_alone_runs_dense(parts: TinyParts) -> None:
    adapter = parts.random_adapter(1)
    names = [name for name in adapter.spectral if name.startswith("add_embedding.")]
    only = replace(adapter, norm={}, spectral={name: adapter.spectral[name] for name in names})
    assert len(names) == 2
    assert parts.row((only, 1.0)) == EngineRow()


def test_unsupported_variants_are_named(folder: Path, tmp_path: Path) -> None:
    def broken(name: str, change: Any) -> Path:
        copy_ = tmp_path / name
        shutil.copytree(folder, copy_)
        change(copy_)
        return copy_

    def set_unet(**values: Any) -> Any:
        def change(path: Path) -> None:
            file = path / "unet" / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

        return change

    def refiner(path: Path) -> None:
        index = json.loads((path / "model_index.json").read_text())
        index["text_encoder"] = index["tokenizer"] = [None, None]
        (path / "model_index.json").write_text(json.dumps(index))

    def vocabulary(path: Path) -> None:
        tokenizer = StableDiffusionXLPipeline.from_pretrained(path, low_cpu_mem_usage=False).tokenizer_2
        tokenizer.add_tokens(["other"])
        tokenizer.save_pretrained(path / "tokenizer_2")

    def one_encoder(path: Path) -> None:
        shutil.rmtree(path / "text_encoder_2")

    for name, change, message in (
        ("refiner", refiner, "refiner"),
        ("inpainting", set_unet(in_channels=9), "inpainting"),
        ("embedding", set_unet(addition_embed_type="image"), "addition_embed_type image"),
        ("one-encoder", one_encoder, "text_encoder_2/ is missing"),
        ("vocabulary", vocabulary, "different vocabularies"),
    ):
        with pytest.raises(InvalidArgument, match=message):
            load_base_model(broken(name, change))
