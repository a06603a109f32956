"""Panels of adapters: every kind, weights, and two adapters combined."""

from hueshift.adapters.algebra import interpolate, mix_blocks
from hueshift.adapters.blocks import STRUCTURE, resolve_blocks
from hueshift.examples.gallery_lessons import FOX_NOUN, FOX_WORD, LESSONS, STYLE_NOUN, STYLE_WORD
from hueshift.examples.gallery_studio import Panel, Studio
from hueshift.training.evaluation.drawing import Drawing
from hueshift.training.evaluation.grids import GridRow

FOX = f"a fluent 3d emoji of a {FOX_WORD} {FOX_NOUN}"
FOX_IN_STYLE = f"a {STYLE_WORD} {STYLE_NOUN} of a {FOX_WORD} {FOX_NOUN}"
OTHERS = ("a fluent 3d emoji of a dog face", "a noto emoji of a red apple")
WEIGHTS = (0.0, 0.5, 0.75, 1.0, 1.25, 1.5)
POSITIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


def show_kinds(studio: Studio) -> Panel:
    """A fox by every kind of adapter, and what the adapter does to other things."""
    drawings = [Drawing(FOX, seed) for seed in range(4)] + [Drawing(prompt, 0) for prompt in OTHERS]
    rows = [GridRow("learned from", [studio.open(f"fox/train/{name}.png") for name in _STYLES])]
    rows.append(studio.draw_row("base model", drawings))
    for lesson in LESSONS:
        if lesson.folder == "fox":
            size = studio.adapters[lesson.key].nbytes / 1000
            note = f"{lesson.steps} steps, {size:,.0f} kB"
            rows.append(studio.draw_row(lesson.title, drawings, studio.of(lesson.key), note))
    return Panel(
        "Every kind of adapter",
        "One fox, learned from four pictures by each method, drawn in a style that none of them shows. The last two "
        "columns are other things with the same adapter in place: what changes there was not meant to change.",
        [drawing.prompt for drawing in drawings],
        rows,
    )


def show_weights(studio: Studio) -> Panel:
    """One adapter from off to too strong."""
    rows = [
        GridRow(f"seed {seed}", studio.draw_each([(Drawing(FOX, seed), studio.of("svdiff", w)) for w in WEIGHTS]))
        for seed in range(3)
    ]
    return Panel(
        "Weights",
        f"`{FOX}` with the SVDiff adapter at weights from 0, the base model, to 1.5, all in one batch. The learned "
        "word stays what it is at every weight above 0; only the shifts scale.",
        [f"weight {weight:g}" for weight in WEIGHTS],
        rows,
    )


def show_style(studio: Studio) -> Panel:
    """Things in a style learned from others."""
    names = ("bell", "camera", "cookie", "honeybee", "laptop", "pear")
    prompts = [f"a {STYLE_WORD} {STYLE_NOUN} of a {name}" for name in names]
    return Panel(
        "A style",
        "OpenMoji's way of drawing, learned from eight pictures of other things.",
        list(names),
        [
            GridRow("true pictures", [studio.open(f"openmoji/eval/{name}.png") for name in names]),
            studio.draw_row("base model", [Drawing(f"an emoji of a {name}", 0) for name in names]),
            studio.draw_row("with the adapter", [Drawing(prompt, 0) for prompt in prompts], studio.of("style")),
        ],
    )


def show_interpolation(studio: Studio) -> Panel:
    """From one adapter to another."""
    fox, style = studio.adapters["svdiff"], studio.adapters["style"]
    between = [interpolate(fox, style, position) for position in POSITIONS]
    rows = [
        GridRow(f"seed {seed}", studio.draw_each([(Drawing(FOX_IN_STYLE, seed), [(one, 1.0)]) for one in between]))
        for seed in range(3)
    ]
    return Panel(
        "Between two adapters",
        f"`{FOX_IN_STYLE}` from the fox's adapter (0) to the style's (1): `hueshift adapters combine interpolate`. At "
        "the ends only one of the words is known; in between both are.",
        [f"position {position:g}" for position in POSITIONS],
        rows,
    )


def show_blocks(studio: Studio) -> Panel:
    """Structure of one adapter, appearance of another."""
    fox, style = studio.adapters["svdiff"], studio.adapters["style"]
    structure = resolve_blocks({STRUCTURE: 1.0}, studio.painter.base.layout)
    mixes = {
        "both, added": [(fox, 1.0), (style, 1.0)],
        "structure: fox, rest: style": [(mix_blocks(fox, style, structure), 1.0)],
        "structure: style, rest: fox": [(mix_blocks(style, fox, structure), 1.0)],
        "fox alone": [(fox, 1.0)],
        "style alone": [(style, 1.0)],
    }
    rows = [
        GridRow(f"seed {seed}", studio.draw_each([(Drawing(FOX_IN_STYLE, seed), mix) for mix in mixes.values()]))
        for seed in range(3)
    ]
    return Panel(
        "Mixing by block",
        f"`{FOX_IN_STYLE}`: the last two down blocks (`structure`) of one adapter and the rest of the other "
        "(`hueshift adapters combine mix-blocks`), as in SVDiff.",
        list(mixes),
        rows,
    )


_STYLES = ("noto", "twemoji", "fluent-flat", "fluent-modern")
