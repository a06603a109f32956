"""Panels of sampling: LAG, shared attention, regions, and beginning from a picture."""

import torch
from torch import Tensor

from hueshift.engines.conditioning import Conditioning
from hueshift.engines.denoise import Region, Sample
from hueshift.engines.picture_start import first_step, inversion_error, mix_noise, noise_picture, start_inversion
from hueshift.engines.region_masks import Box, make_masks
from hueshift.engines.samplers import SamplerKind, make_table
from hueshift.examples.gallery_lessons import FOX_NOUN, FOX_WORD, STYLE_NOUN, STYLE_WORD
from hueshift.examples.gallery_panels import FOX
from hueshift.examples.gallery_studio import Panel, Studio, mask_picture
from hueshift.training.evaluation.drawing import Drawing, LoadedMix
from hueshift.training.evaluation.grids import GridRow

# DDIM's way back is as exact as its steps are small (docs/gallery.md tells the error).
_INVERSION_FACTOR = 2
NOISE_SHARES = (0.0, 0.3, 0.6)
STRENGTHS = (0.3, 0.5, 0.7, 0.9)


def show_lag(studio: Studio) -> Panel:
    """Residuals everywhere, and only where the fox is."""
    painter = studio.painter
    loaded = painter.load(studio.of("residuals"))
    lag = studio.marks(FOX, loaded, (FOX_WORD, FOX_NOUN))
    drawings = [Drawing(FOX, seed) for seed in range(5)]
    confined = [painter.start(drawing, loaded, lag=lag) for drawing in drawings]
    pictures = painter.finish(confined)
    return Panel(
        "LAG sampling",
        f"`{FOX}` with Personalized Residuals: everywhere, and confined to where the attention to the words is "
        "above its median (Ham et al. 2024). The masks are means over steps and layers; white is where the residuals "
        "always acted: the ground stays the base model's. A median lets half of the picture pass however large the "
        "thing is, so one that fills it, as here, loses likeness.",
        [f"seed {drawing.seed}" for drawing in drawings],
        [
            studio.draw_row("residuals", drawings, studio.of("residuals")),
            GridRow("residuals with LAG", pictures),
            GridRow("where they acted", [mask_picture(sample) for sample in confined]),
        ],
    )


def show_shared(studio: Studio) -> Panel:
    """Pictures of one request that share the first one's style."""
    painter = studio.painter
    prompt = "an emoji of a fish"
    drawings = [Drawing(prompt, seed) for seed in range(4)]
    loaded = painter.load(())
    first = painter.start(drawings[0], loaded)
    shared = [first, *(painter.start(drawing, loaded, reference=first) for drawing in drawings[1:])]
    return Panel(
        "Shared attention",
        f"`{prompt}` says nothing of style, so each seed has its own. With shared attention (StyleAligned, Hertz et "
        "al. 2023) the others come closer to the first one's, which stays as it was.",
        [f"seed {drawing.seed}" for drawing in drawings],
        [studio.draw_row("each alone", drawings), GridRow("shared attention", painter.finish(shared))],
    )


def show_regions(studio: Studio) -> Panel:
    """Two adapters in two halves of one picture."""
    painter = studio.painter
    side, factor = painter.base.pixels, painter.base.latent_factor
    half = side // 2
    areas = [(Box(0, 0, half, side), 16.0), (Box(half, 0, half, side), 16.0)]
    masks = make_masks(areas, side, side, factor)
    left = painter.load(studio.of("svdiff"), 1)
    right = painter.load(studio.of("style"), 2)
    style = f"a {STYLE_WORD} {STYLE_NOUN} of a lemon"
    prompts = (FOX, style)
    drawings = [Drawing("a fluent 3d emoji of a dog face", seed) for seed in range(5)]
    samples: list[Sample] = []
    for drawing in drawings:
        parts = zip(prompts, (left, right), masks, strict=True)
        regions = tuple(_region(studio, prompt, loaded, mask) for prompt, loaded, mask in parts)
        samples.append(painter.start(drawing, painter.load(()), regions=regions))
    # Drawn before the others, which put their own mixes into slots.
    both = painter.finish(samples)
    return Panel(
        "Regions",
        f"Left half: `{FOX}` with the fox's adapter. Right half: `{style}` with the style's. Edges fade over 16 "
        "pixels. Each region is denoised beside the picture and blended in at every step (OMG, Kong et al. 2024).",
        [f"seed {drawing.seed}" for drawing in drawings],
        [
            studio.draw_row("left alone", [Drawing(FOX, one.seed) for one in drawings], studio.of("svdiff")),
            studio.draw_row("right alone", [Drawing(style, one.seed) for one in drawings], studio.of("style")),
            GridRow("both, by region", both),
        ],
    )


def show_picture_start(studio: Studio) -> Panel:
    """Beginning from a picture instead of from noise."""
    painter = studio.painter
    picture = studio.open("openmoji/eval/pear.png")
    clean = studio.encode(picture)
    rows: list[GridRow] = []
    for prompt in ("a fluent 3d emoji of a pear", "a fluent 3d emoji of a red apple"):
        samples: list[Sample] = []
        for strength in STRENGTHS:
            table = make_table(
                painter.base.schedule, painter.table.kind, painter.steps, begin=first_step(painter.steps, strength)
            )
            sample = painter.start(Drawing(prompt, 0), painter.load(()), table=table)
            sample.latents = noise_picture(clean, 0, painter.base.schedule, table)
            samples.append(sample)
        rows.append(GridRow(prompt, [picture, *painter.finish(samples)]))
    return Panel(
        "From a picture",
        "An OpenMoji pear, noised to a part of the way and denoised with a prompt (SDEdit, Meng et al. 2022).",
        ["the picture", *(f"strength {strength:g}" for strength in STRENGTHS)],
        rows,
    )


def show_inversion(studio: Studio) -> Panel:
    """A picture run back to its noise, and drawn again with another prompt."""
    painter, schedule = studio.painter, studio.painter.base.schedule
    picture = studio.open("fox/train/noto.png")
    clean = studio.encode(picture)
    loaded = painter.load(studio.of("svdiff"))
    source = f"a noto emoji of a {FOX_WORD} {FOX_NOUN}"
    targets = (source, f"a noto emoji of a black {FOX_WORD} {FOX_NOUN}", "a noto emoji of a tiger face")
    steps = _INVERSION_FACTOR * painter.steps
    table = make_table(schedule, SamplerKind.DDIM, steps, eta=0.5)
    rows: list[GridRow] = []
    for target in targets:
        inverted = _invert(studio, clean, target, loaded, steps)
        samples = [painter.start(Drawing(target, 0), loaded, table=table) for _ in NOISE_SHARES]
        for sample, share in zip(samples, NOISE_SHARES, strict=True):
            sample.latents = mix_noise(inverted, 0, share)
        rows.append(GridRow(target, [picture, *painter.finish(samples)]))
    error = inversion_error(
        painter.engine,
        [clean],
        schedule,
        cross=_conditioning(studio, source, loaded).cross,
        steps=steps,
        slot=loaded.slot,
        needs_factored=loaded.needs_factored,
    )
    return Panel(
        "Editing by inversion",
        "One of the fox's own pictures, run back to noise with the fox's adapter and the target prompt (DDIM, guidance "
        "1), then drawn with that prompt (guidance 3, eta 0.5), the noise kept or mixed with fresh noise on the great "
        f"circle (as in SVDiff). Without any edit, {steps} steps there and back leave an error of "
        f"{error:.0%} of the latents' root mean square.",
        ["the picture", *(f"fresh noise {share:g}" for share in NOISE_SHARES)],
        rows,
    )


def _region(studio: Studio, prompt: str, loaded: LoadedMix, mask: Tensor) -> Region:
    table = studio.painter.table
    cross = studio.painter.conditioner.condition(("", prompt), loaded.text, table.timesteps.tolist()).cross
    return Region(mask.to(cross.device), cross, loaded.slot, loaded.needs_factored)


@torch.no_grad()
def _invert(studio: Studio, clean: Tensor, prompt: str, loaded: LoadedMix, steps: int) -> Tensor:
    sample = start_inversion(
        clean,
        studio.painter.base.schedule,
        cross=_conditioning(studio, prompt, loaded).cross,
        steps=steps,
        slot=loaded.slot,
        needs_factored=loaded.needs_factored,
    )
    studio.painter.run([sample])
    return sample.latents


def _conditioning(studio: Studio, prompt: str, loaded: LoadedMix) -> Conditioning:
    """Of one row, for inversion; words of the adapter do not change with the timestep."""
    return studio.painter.conditioner.condition((prompt,), loaded.text, studio.painter.table.timesteps.tolist())
