"""Jobs on an SDXL model: what the UNet is told, what learns, and that the served adapter does what was trained."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny_sdxl import POOLED, WIDTHS, save_tiny_sdxl
from tiny_training import Recorder, make_pictures, make_task
from tiny_unet import TinyParts
from torch import Tensor

from hueshift.adapters.adapter import Adapter, EncoderChange
from hueshift.adapters.errors import Cancelled, InvalidArgument
from hueshift.adapters.file import read_adapter, write_adapter
from hueshift.adapters.validate import FileLimits
from hueshift.engines.added_embedding import AddedStage, make_time_ids
from hueshift.engines.base_model import BaseModel, load_base_model
from hueshift.engines.conditioning import make_conditioner
from hueshift.engines.interface import EngineRow, Plan
from hueshift.engines.picture_start import inversion_error
from hueshift.engines.rows import RowLayout, read_norms
from hueshift.engines.svd_cache import EncoderFactors, SpectralFactors, decompose
from hueshift.engines.text import TextStage
from hueshift.engines.text_side import TextSide, compose_text_side
from hueshift.engines.torch_engine import TorchEngine
from hueshift.engines.vae import VaeStage
from hueshift.server.rpc.finetune_words import make_word_check
from hueshift.training import editing
from hueshift.training.conditions import AddedReader, add_sizes, encode_packed
from hueshift.training.defaults import complete_spec
from hueshift.training.latents import make_picture_set
from hueshift.training.loop import TrainingTask, batch_loss, draw_batch, make_work, train_step
from hueshift.training.methods.encoder_shifts import SIGMA, make_encoder_shifts
from hueshift.training.pictures import crop_boxes, picture_sizes, picture_tensor
from hueshift.training.plateau import fixed_loss
from hueshift.training.run import TrainingResult, run_training
from hueshift.training.sharing.family import family_of
from hueshift.training.sharing.together import Share, step_together
from hueshift.training.spec import Method, SubjectKind, TrainingSpec
from hueshift.training.state import TrainingState
from hueshift.training.stepping import work_loss
from hueshift.training.words import Captions

Tiny = tuple[BaseModel, SpectralFactors]
FEW_LAYERS = ("attn2.to_k", "attn2.to_v", "proj_out")
JOBS: dict[str, tuple[Method, dict[str, Any]]] = {
    "svdiff": (Method.SVDIFF, {"norm_learning_rate": 1e-3}),
    "text-encoder": (Method.SVDIFF, {"train_text_encoder": True}),
    "residuals": (Method.RESIDUALS, {}),
    "lora": (Method.LORA, {"rank": 2}),
    "textual-inversion": (Method.TEXTUAL_INVERSION, {"token_vectors": 2}),
    "custom-diffusion": (Method.CUSTOM_DIFFUSION, {}),
    # Of full rank on these layers, so that nothing is lost on the way to what is served.
    "dreambooth": (Method.DREAMBOOTH, {"targets": FEW_LAYERS, "rank": 32}),
    "whole-dreambooth": (Method.DREAMBOOTH, {"rank": 0}),
}
# Two ways through the same layers, in fp32.
CLOSE = 5e-5


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    base = load_base_model(save_tiny_sdxl(tmp_path_factory.mktemp("models") / "tiny-sdxl"))
    return base, replace(decompose(base), encoder=EncoderFactors(base))


def xl_spec(method: Method = Method.SVDIFF, kind: SubjectKind = SubjectKind.SUBJECT, **given: Any) -> TrainingSpec:
    """A job of three pictures, or of the one that is edited, in fp32."""
    edit = kind is SubjectKind.EDIT
    numbers: dict[str, Any] = {"steps": 4, "batch_size": 2, "checkpoint_interval": 2, "seed": 7, "precision": "fp32"}
    return complete_spec(
        method=method,
        subject_kind=kind,
        captions=["a fox"] if edit else ["a sks fox", "a sks fox, red", "sks"],
        identifier="" if edit else "sks",
        class_noun="" if edit else "fox",
        **{**numbers, **given},
    )


def job_of(name: str, **given: Any) -> TrainingSpec:
    method, settings = JOBS[name]
    return xl_spec(method, **{**settings, **given})


def run(tiny: Tiny, spec: TrainingSpec, folder: Path, hooks: Recorder | None = None) -> TrainingResult:
    folder.mkdir(parents=True, exist_ok=True)
    return run_training(
        spec,
        make_pictures(len(spec.captions)),
        base=tiny[0],
        factors=tiny[1],
        clip=None,
        workdir=folder,
        hooks=hooks or Recorder(),
    )


def tensors_of(adapter: Adapter) -> dict[str, Tensor]:
    encoder = adapter.encoder
    found = {**adapter.spectral, **adapter.norm, **adapter.tokens, **adapter.kv, **encoder.spectral, **encoder.norm}
    for name, factors in adapter.lowrank.items():
        found |= {f"{name}.a": factors.a, f"{name}.b": factors.b}
    return found


@pytest.mark.parametrize(
    ("size", "crop", "mirrored", "expected"),
    [
        # Of 16 pixels: a square needs no crop, and is told as it was.
        ((64, 64), None, False, (64, 64, 0, 0, 16, 16)),
        # 40 x 32 is scaled to 20 x 16, of which two pixels go at either side.
        ((40, 32), None, False, (32, 40, 0, 2, 16, 16)),
        ((32, 40), None, True, (40, 32, 2, 0, 16, 16)),
        # A crop of 24 is scaled by 2/3: its corner (6, 3) lies at (4, 2), its mirror image's (10, 3) at (7, 2).
        ((40, 32), (6, 3, 30, 27), False, (32, 40, 2, 4, 16, 16)),
        ((40, 32), (6, 3, 30, 27), True, (32, 40, 2, 7, 16, 16)),
    ],
)
def test_sizes_of_a_crop(
    size: tuple[int, int], crop: tuple[int, int, int, int] | None, mirrored: bool, expected: tuple[int, ...]
) -> None:
    assert picture_sizes(size, crop, 16, mirrored=mirrored) == expected


def test_every_variant_knows_its_sizes(tiny: Tiny) -> None:
    """Crops of each picture, then their mirror images, then what the base draws, which index -1 finds."""
    base, _ = tiny
    spec = xl_spec(random_crops=2, mirror=True)
    pictures = make_picture_set(VaeStage(base), spec, make_pictures(3), {}, base.pixels)
    assert pictures.sizes is not None
    assert pictures.sizes.shape == (2 * 2 * 3 + 1, 6)
    found = pictures.sizes_of(torch.tensor([0, 6, -1]))
    assert found is not None
    plain, mirrored, native = found.tolist()
    assert plain[:3] == mirrored[:3]
    assert plain[4:] == mirrored[4:]
    assert tuple(native) == make_time_ids(base.pixels, base.pixels)
    assert plain[:2] == [32, 40]
    boxes = crop_boxes((40, 32), 12, torch.Generator().manual_seed(0))
    assert len({picture_sizes((40, 32), box, base.pixels) for box in boxes}) > 1


def test_conditions_are_taken_apart_as_they_were_put_together(tiny: Tiny) -> None:
    base, factors = tiny
    text = TextStage(base)
    rows = [text.tokenize(prompt, {}) for prompt in ("a fox", "")]
    sizes = torch.tensor([[32.0, 40, 0, 2, 16, 16], [16, 16, 0, 0, 16, 16]])
    packed = add_sizes(encode_packed(text, rows, [{}, {}]), sizes)
    context, features = AddedReader(base.unet, sum(WIDTHS)).split(packed)
    expected, pooled = text.encode_pooled(rows, [{}, {}])
    assert pooled is not None
    assert pooled.shape[1] == POOLED
    stage = AddedStage(base, factors)
    told = [stage.features(pooled[i : i + 1], [int(n) for n in sizes[i].tolist()]) for i in range(2)]
    assert torch.equal(context, expected)
    assert torch.equal(features, torch.cat(told))


@pytest.mark.parametrize("name", ["svdiff", "lora"])
def test_the_forward_pass_is_that_of_diffusers(tiny: Tiny, name: str) -> None:
    """Before the first step, with sizes that differ by row, and with the zeros of a dropped caption."""
    base, factors = tiny
    task, state = make_task(base, factors, job_of(name))
    sizes = task.pictures.sizes_of(torch.tensor([1, 0]))
    assert sizes is not None
    noisy, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([700, 20])
    with torch.no_grad():
        context = task.captions.contexts(["a sks fox, red", ""], state.values, sizes)
        found = task.unet(noisy, timesteps, context, task.learnable.rows(state.values))
        text = TextStage(base)
        plain, pooled = text.encode_pooled([text.tokenize(one, {}) for one in ("a sks fox, red", "")], [{}] * 2)
        unet: Any = base.unet
        told = {"text_embeds": pooled, "time_ids": sizes}
        expected = unet(noisy, timesteps, encoder_hidden_states=plain, added_cond_kwargs=told).sample
        untold = {"text_embeds": pooled, "time_ids": torch.zeros(2, 6)}
        other = unet(noisy, timesteps, encoder_hidden_states=plain, added_cond_kwargs=untold).sample
    assert pooled is not None
    assert not bool(pooled[1].any())
    assert not bool(plain[1].any())
    assert torch.allclose(found, expected, atol=CLOSE)
    assert float((other - expected).abs().max()) > 100 * CLOSE, "the sizes must matter"


@pytest.mark.parametrize("name", JOBS)
def test_gradients_reach_what_learns_and_nothing_of_the_base(tiny: Tiny, name: str) -> None:
    base, factors = tiny
    task, state = make_task(base, factors, job_of(name, caption_dropout=0.0))
    torch.autograd.backward([batch_loss(task, state.values, draw_batch(task, state))])
    # B = 0 hides A from the first step; all else has a gradient.
    for value_name, value in state.values.items():
        assert value.grad is not None, value_name
        assert value_name.startswith("a/") or float(value.grad.abs().max()) > 0, value_name
    word = state.values["identifier"].grad
    assert word is not None
    assert all(float(part.abs().max()) > 0 for part in torch.split(word, list(WIDTHS), -1)), "in both encoders"
    if name == "text-encoder":
        shifts = state.values[SIGMA].grad
        assert shifts is not None
        parts = torch.split(shifts, [layer.rank for layer in base.layout.encoder_matrices])
        moved = {
            layer.name.partition(".")[0]
            for layer, part in zip(base.layout.encoder_matrices, parts, strict=True)
            if bool(part.any())
        }
        assert len(moved) == 2, "both encoders"
    assert base.xl is not None
    for part in (base.unet, base.text_encoder, base.xl.text_encoder, base.vae):
        assert all(parameter.grad is None and not parameter.requires_grad for parameter in part.parameters())


def learn(task: TrainingTask, state: TrainingState) -> None:
    before = fixed_loss(task, state)
    for _ in range(task.spec.steps):
        train_step(task, state, lambda _: None)
    assert fixed_loss(task, state) < before


def published(tiny: Tiny, task: TrainingTask, values: Mapping[str, Tensor]) -> Adapter:
    """What a job makes of its values, through its file."""
    base, factors = tiny
    tokens, _ = task.captions.tokens(values)
    encoder = make_encoder_shifts(base, factors, task.spec)
    change = EncoderChange() if encoder is None else encoder.change(values)
    adapter = replace(task.learnable.adapter(values).adapter, tokens=tokens, identifier="sks", encoder=change)
    return read_adapter(write_adapter(adapter), base.layout, FileLimits())


def make_engine(tiny: Tiny) -> tuple[TorchEngine, TinyParts]:
    """An engine that serves what JOBS learn."""
    base, factors = tiny
    norms = read_norms(base.layout, lambda layer: base.unet.get_parameter(f"{layer}.weight"))
    rows = RowLayout(base.layout, ("to_q", "to_k", "to_v", "to_out.0", "proj_out"), 32, False)
    engine = TorchEngine(base, factors, rows, norms, slots=2, max_batch=2, device=torch.device("cpu"))
    return engine, TinyParts(base, factors, rows, norms)


def as_written(values: Mapping[str, Tensor], row: EngineRow) -> dict[str, Tensor]:
    """Values as they are published: whole changes are rounded to fp16, 2e-4 of the output here."""
    return {name: value.half().float() if row.needs_weights else value for name, value in values.items()}


@pytest.mark.parametrize("name", JOBS)
def test_a_job_learns_and_its_adapter_serves_what_it_trained(tiny: Tiny, name: str) -> None:
    base, factors = tiny
    task, state = make_task(base, factors, job_of(name, steps=5, warmup_steps=0, anchor_below=0))
    learn(task, state)
    adapter = published(tiny, task, state.result)
    assert all(tensor.shape[-1] == sum(WIDTHS) for tensor in adapter.tokens.values())
    side = compose_text_side([(adapter, 1.0)], factors)
    prompts, count = ("", "a sks fox"), 2
    made = make_conditioner(base, factors).condition(prompts, side, [500.0]).cross
    engine, parts = make_engine(tiny)
    row = parts.row((adapter, 1.0))
    engine.load_row(1, row)
    noisy = torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    timesteps = torch.tensor([500, 500])
    plan = Plan.FACTORED if row.needs_factored else Plan.DENSE
    served, untaught = (
        engine.denoise(
            Plan.MERGED if slot and row.needs_weights else plan,
            noisy,
            timesteps.float(),
            made.at(0),
            torch.tensor([slot] * count),
            made.added_at(0),
        )
        for slot in (1, 0)
    )
    with torch.no_grad():
        contexts = task.captions.contexts(prompts, state.result)
        trained = task.unet(noisy, timesteps, contexts, task.learnable.rows(as_written(state.result, row)))
        plain = task.unet(noisy, timesteps, task.captions.contexts(prompts, None), task.learnable.base_rows())
    assert torch.allclose(served, trained, atol=CLOSE)
    assert float((trained - plain).abs().max()) > 20 * CLOSE
    in_the_unet = row.lowrank is not None or row.spectral is not None or row.needs_weights
    assert torch.equal(served, untaught) != in_the_unet, "what is not in the row is in keys and values"


@pytest.mark.parametrize("name", ["text-encoder", "lora"])
def test_a_stopped_job_ends_with_the_same_bits(tiny: Tiny, name: str, tmp_path: Path) -> None:
    """With class pictures, whose prompts have sizes of their own, and a sample picture at the end."""
    spec = job_of(name, prior_weight=0.5, prior_images=1)
    hooks = Recorder()
    whole = run(tiny, spec, tmp_path / "whole", hooks)
    assert [prompt for _, prompt, _ in hooks.samples] == ["a sks fox"]
    with pytest.raises(Cancelled):
        run(tiny, spec, tmp_path / "parts", Recorder(stop_at=3))
    resumed = run(tiny, spec, tmp_path / "parts")
    assert resumed.steps_taken == 1
    assert resumed.losses == whole.losses
    first, second = tensors_of(whole.adapter), tensors_of(resumed.adapter)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


@pytest.mark.parametrize("name", ["svdiff", "lora"])
def test_shared_steps_equal_steps_alone(tiny: Tiny, name: str) -> None:
    base, factors = tiny
    tasks: list[TrainingTask] = []
    states: list[TrainingState] = []
    for seed in (7, 8):
        task, state = make_task(base, factors, job_of(name, seed=seed, caption_dropout=0.3))
        with torch.no_grad():
            for value in state.values.values():
                value += 0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        state.draws.generator.manual_seed(seed)
        tasks.append(replace(task, unet=tasks[0].unet) if tasks else task)
        states.append(state)
    assert family_of(tasks[0].spec) == family_of(tasks[1].spec) is not None
    works = [make_work(task, state.values, draw_batch(task, state)) for task, state in zip(tasks, states, strict=True)]
    losses = step_together(
        tasks[0].unet, TextStage(base), [Share(work, state) for work, state in zip(works, states, strict=True)]
    )
    for task, state, work, loss in zip(tasks, states, works, losses, strict=True):
        assert isinstance(loss, Tensor)
        own = work_loss(task.unet, work)
        assert torch.allclose(loss, own.detach(), rtol=1e-5)
        values = list(state.values.values())
        for value, gradient in zip(values, torch.autograd.grad([own], values), strict=True):
            assert value.grad is not None
            # Sums in another order, of gradients that are 1e-6 for some layers: 5e-5 of the largest was seen.
            assert torch.allclose(value.grad, gradient, atol=3e-4 * float(gradient.abs().max()))


def test_an_edit_measures_its_inversion(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base's error is that of the engine that serves. With random weights it is large."""
    base, factors = tiny
    monkeypatch.setattr(editing, "INVERSION_STEPS", 2)
    result = run(tiny, xl_spec(kind=SubjectKind.EDIT, steps=2), tmp_path)
    assert result.inversion is not None
    assert result.inversion.base != result.inversion.tuned
    clean = picture_tensor(make_pictures(1)[0], base.pixels)
    cross = make_conditioner(base, factors).condition(["a fox"], TextSide(), [500.0]).cross
    engine, _ = make_engine(tiny)
    latents = VaeStage(base).moments(clean[None])[0]
    error = inversion_error(engine, [latents[0]], base.schedule, cross=cross, steps=2)
    assert result.inversion.base == pytest.approx(error, rel=1e-3)
    assert not result.adapter.tokens


def test_words_by_layer_are_refused_before_anything_is_queued(tiny: Tiny) -> None:
    base, _ = tiny
    spec = xl_spec(Method.TEXTUAL_INVERSION, per_layer=True)
    check = make_word_check(base)
    for refused in (lambda: check(spec), lambda: Captions(base, TextStage(base), spec)):
        with pytest.raises(InvalidArgument, match=r"settings\.per_layer: .* SDXL") as caught:
            refused()
        assert [violation.field for violation in caught.value.violations] == ["settings.per_layer"]
    check(xl_spec(Method.TEXTUAL_INVERSION))


def test_pictures_of_any_shape_are_told_as_they_are(tiny: Tiny) -> None:
    """Two pictures of one content and other sizes give other losses: the numbers reach the UNet in training."""
    base, factors = tiny
    spec = xl_spec(caption_dropout=0.0)
    task, state = make_task(base, factors, spec)
    batch = draw_batch(task, state)
    large = [Image.new("RGB", (400, 200))] * 3
    sizes = make_picture_set(VaeStage(base), spec, large, {}, base.pixels).sizes
    other = replace(task, pictures=replace(task.pictures, sizes=sizes))
    with torch.no_grad():
        assert not torch.equal(batch_loss(task, state.values, batch), batch_loss(other, state.values, batch))
