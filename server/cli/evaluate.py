"""`hueshift evaluate`: how good an adapter is, or which of several ways to learn one is best."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hueshift.server.cli.options import gather
from hueshift.server.cli.output import Output, rows_table
from hueshift.server.cli.serve import stage_bars
from hueshift.server.cli.session import Session, connected

if TYPE_CHECKING:
    from PIL import Image

    from hueshift.server.settings import Settings
    from hueshift.training.evaluation.drawing import Draw, Drawing
    from hueshift.training.evaluation.protocol import Judges, Questions
    from hueshift.training.evaluation.rows import Row

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Measure adapters by DreamBooth's protocol: CLIP-I, CLIP-T, DINO, what the base keeps, diversity; with grids.",
)

_ASKED = "What is asked"
_JUDGED = "Models and sampling"
# The server draws several requests in one batch; more at a time would only wait there.
_CALLS = 4
_IMAGES_A_CALL = 4

_Pictures = Annotated[
    list[Path], typer.Argument(exists=True, dir_okay=False, help="Real pictures, as the adapter was learned from.")
]
_Out = Annotated[Path, typer.Option(file_okay=False, help="Folder of report.md, report.json and grid.png.")]
_Json = Annotated[bool, typer.Option("--json", help="Write JSON to stdout; progress stays on stderr.")]
_Dino = Annotated[
    Path | None,
    typer.Option(
        envvar="HUESHIFT_DINO",
        file_okay=False,
        exists=True,
        help="Folder of DINO's ViT-S/16 as transformers loads it, with safetensors; without it DINO is not measured.",
        rich_help_panel=_JUDGED,
    ),
]
_Clip = Annotated[
    Path | None,
    typer.Option(file_okay=False, exists=True, help="CLIP's folder; default: the setting.", rich_help_panel=_JUDGED),
]
_Model = Annotated[
    Path | None,
    typer.Option(file_okay=False, exists=True, help="Base model; default: the setting.", rich_help_panel=_JUDGED),
]


def _questions(
    class_noun: Annotated[
        str, typer.Option(help="What it is, such as `animal`; default: the file's.", rich_help_panel=_ASKED)
    ] = "",
    identifier: Annotated[
        str, typer.Option(help="The learned word; default: the file's.", rich_help_panel=_ASKED)
    ] = "",
    kind: Annotated[
        str, typer.Option(metavar="object|live|style", help="Which list of prompts.", rich_help_panel=_ASKED)
    ] = "object",
    prompts: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON list of prompts, with {} for the learned thing, in the place of the list.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    prior: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="JSON list of prompts of other things that the base knows; default: for the embedded model.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    truth: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PROMPT=FILE",
            help="A true picture, never shown to the adapter, of a prompt with {}; repeatable.",
            rich_help_panel=_ASKED,
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, max=16, help="Pictures of a prompt.", rich_help_panel=_ASKED)] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.", rich_help_panel=_JUDGED)] = 15,
    guidance: Annotated[float, typer.Option(min=1, help="Guidance scale.", rich_help_panel=_JUDGED)] = 3.0,
) -> None:
    """Declare what is asked of an adapter."""


@app.command("file")
@gather(_questions, into="asked")
def evaluate_file(
    adapter: Annotated[Path, typer.Argument(exists=True, help="Adapter file of any readable format.")],
    pictures: _Pictures,
    asked: dict[str, Any],
    out: _Out = Path("evaluation"),
    weight: Annotated[float, typer.Option(help="Strength of the adapter.")] = 1.0,
    model: _Model = None,
    clip: _Clip = None,
    dino: _Dino = None,
    as_json: _Json = False,
) -> None:
    """Measure an adapter file on this machine, beside the base model and the real pictures."""
    from hueshift.adapters.formats.draft import ImportBase, ImportOptions
    from hueshift.adapters.formats.importing import import_adapter
    from hueshift.adapters.validate import FileLimits
    from hueshift.engines.base_model import load_base_model
    from hueshift.training.evaluation.drawing import make_painter

    output, settings = Output(as_json), _settings()
    base = load_base_model(model or settings.model.path)
    limits = FileLimits(max_bytes=max(1, adapter.stat().st_size))
    loaded = import_adapter(adapter, ImportBase(base.layout), ImportOptions(), limits)[0]
    asked["identifier"] = asked["identifier"] or loaded.identifier or next(iter(loaded.words), "")
    asked["class_noun"] = asked["class_noun"] or loaded.class_noun
    questions = _read_questions(asked, pictures)
    judges = _judges(output, clip or settings.model.clip_path, dino)
    painter = make_painter(
        base, settings.store.cache_path.expanduser(), steps=asked["steps"], guidance=asked["guidance"]
    )
    with stage_bars(output) as bars:

        def drawing(what: str, mix: Sequence[Any]) -> "Draw":
            return lambda drawings: painter.draw(drawings, mix, lambda done, of: bars.update(what, done, of))

        _report(
            output,
            questions,
            judges,
            (drawing(adapter.stem, [(loaded, weight)]), drawing("base model", [])),
            (adapter.stem, asked["kind"], out),
        )


@app.command("served")
@connected
@gather(_questions, into="asked")
def evaluate_served(
    session: Session,
    adapter: Annotated[str, typer.Argument(metavar="NAME[@REVISION][:WEIGHT]", help="Adapter of the server.")],
    pictures: _Pictures,
    asked: dict[str, Any],
    out: _Out = Path("evaluation"),
    clip: _Clip = None,
    dino: _Dino = None,
) -> None:
    """Measure an adapter of a server, which draws all pictures."""
    from hueshift.client.generation import AdapterUse
    from hueshift.server.cli.parse import parse_use

    if not asked["identifier"]:
        raise typer.BadParameter("a served adapter does not tell its word; give it", param_hint="--identifier")
    use = AdapterUse(*parse_use(adapter, "ADAPTER"))
    questions = _read_questions(asked, pictures)
    judges = _judges(session.output, clip or _settings().model.clip_path, dino)
    with stage_bars(session.output) as bars:

        def drawing(what: str, uses: list[AdapterUse]) -> "Draw":
            return lambda drawings: _draw_served(session, drawings, uses, asked, lambda n, of: bars.update(what, n, of))

        _report(
            session.output,
            questions,
            judges,
            (drawing(use.adapter, [use]), drawing("base model", [])),
            (use.adapter.rsplit("/", 1)[-1], asked["kind"], out),
        )


@app.command("matrix")
def evaluate_matrix(
    plan: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Plan, as TOML or JSON.")],
    data: Annotated[
        Path | None, typer.Option(file_okay=False, exists=True, help="Folder of its pictures; default: the plan's own.")
    ] = None,
    out: Annotated[Path, typer.Option(file_okay=False, help="Folder of rows, adapters, report and grids.")] = Path(
        "evaluation"
    ),
    max_minutes: Annotated[float | None, typer.Option(min=0, help="Begin no cell that would end later.")] = None,
    model: _Model = None,
    clip: _Clip = None,
    dino: _Dino = None,
    as_json: _Json = False,
) -> None:
    """Train, draw and measure methods x cases x seeds at equal steps or equal time; call it again to go on."""
    from hueshift.engines.base_model import load_base_model
    from hueshift.training.evaluation.drawing import make_painter
    from hueshift.training.evaluation.matrix import Matrix, list_cells
    from hueshift.training.evaluation.matrix_report import write_matrix_report
    from hueshift.training.evaluation.plan import read_plan

    output, settings = Output(as_json), _settings()
    wanted = read_plan(plan)
    judges = _judges(output, clip or settings.model.clip_path, dino)
    base = load_base_model(model or settings.model.path)
    painter = make_painter(
        base, settings.store.cache_path.expanduser(), steps=wanted.sampler_steps, guidance=wanted.guidance
    )
    with stage_bars(output) as bars:
        matrix = Matrix(wanted, data or plan.parent, out, painter=painter, judges=judges, progress=bars.update)
        output.note(f"{len(matrix.missing())} of {len(list_cells(wanted))} cells to do")
        for row in matrix.run(None if max_minutes is None else 60 * max_minutes):
            output.note(f"{row['cell']}: {_figures(row)}")
    paths = write_matrix_report(matrix, f"Comparison: {plan.stem}")
    left = len(matrix.missing())
    rows = matrix.results()
    shown = rows_table(("cell", "figures"), [(row["cell"], _figures(row)) for row in rows])
    output.result({"rows": rows, "left": left, "files": [str(path) for path in paths]}, shown)
    output.note(f"{paths[0]}" + (f"; {left} cells are left: call it again" if left else ""))


def _read_questions(asked: dict[str, Any], pictures: Sequence[Path]) -> "Questions":
    from hueshift.training.evaluation.plan import read_picture
    from hueshift.training.evaluation.prompts import CaseKind, case_prompts, prior_prompts, read_prompts
    from hueshift.training.evaluation.protocol import Questions, Truth

    if asked["kind"] not in list(CaseKind):
        raise typer.BadParameter(f"{asked['kind']!r}; give {', '.join(CaseKind)}", param_hint="--kind")
    if not asked["class_noun"]:
        raise typer.BadParameter("give the noun of what it is, such as `animal`", param_hint="--class-noun")
    truths = []
    for text in asked["truth"] or ():
        prompt, sign, file = text.partition("=")
        if not sign:
            raise typer.BadParameter(f"{text!r} is no truth; write PROMPT=FILE", param_hint="--truth")
        truths.append(Truth(prompt, read_picture(Path(file))))
    listed = case_prompts(CaseKind(asked["kind"])) if asked["prompts"] is None else read_prompts(asked["prompts"])
    return Questions(
        phrase=f"{asked['identifier']} {asked['class_noun']}".strip(),
        noun=asked["class_noun"],
        prompts=listed,
        real=tuple(read_picture(picture) for picture in pictures),
        truths=tuple(truths),
        prior=prior_prompts() if asked["prior"] is None else read_prompts(asked["prior"]),
        images=asked["images"],
    )


def _settings() -> "Settings":
    """The settings, with what libraries say and what is no warning kept from the terminal."""
    from diffusers.utils.logging import disable_progress_bar as disable_diffusers_progress_bar
    from transformers.utils.logging import disable_progress_bar

    from hueshift.server.logs import configure_logs
    from hueshift.server.settings import load_settings

    disable_progress_bar()
    disable_diffusers_progress_bar()
    settings = load_settings(None)
    configure_logs(settings.log.model_copy(update={"level": "warning", "json_lines": False}))
    return settings


def _judges(output: Output, clip: Path | None, dino: Path | None) -> "Judges":
    from hueshift.training.evaluation.encoders import load_dino
    from hueshift.training.evaluation.protocol import Judges
    from hueshift.training.scores import ClipScorer

    if clip is None:
        raise typer.BadParameter("the settings name no CLIP; give its folder", param_hint="--clip")
    encoder, words = load_dino(dino)
    if words:
        output.note(f"{words} (--dino).")
    return Judges(ClipScorer(clip), encoder)


def _report(
    output: Output, questions: "Questions", judges: "Judges", draws: tuple["Draw", "Draw"], named: tuple[str, str, Path]
) -> None:
    from hueshift.training.evaluation.comparison import compare, write_comparison

    (draw, draw_base), (name, kind, out) = draws, named
    found = compare(questions, judges, draw, draw_base, name=name, kind=kind)
    paths = write_comparison(found, out, f"Evaluation of {name}")
    table = rows_table(("", "figures"), [(row["method"], _figures(row)) for row in found.rows])
    output.result({**found.to_json(), "files": [str(path) for path in paths]}, table)
    output.note(f"{paths[0]}, {paths[-1]}")


def _figures(row: "Row") -> str:
    if "error" in row:
        return str(row["error"])
    return ", ".join(f"{name} {value:.3f}" for name, value in row["measures"].items())


def _draw_served(
    session: Session, drawings: Sequence["Drawing"], uses: Sequence[Any], asked: dict[str, Any], report: Any
) -> list["Image.Image"]:
    import io

    from PIL import Image

    from hueshift.client.choices import Sampler

    seeds: dict[str, list[int]] = {}
    for drawing in drawings:
        seeds.setdefault(drawing.prompt, []).append(drawing.seed)
    calls = [
        (prompt, some[at : at + _IMAGES_A_CALL])
        for prompt, some in seeds.items()
        for at in range(0, len(some), _IMAGES_A_CALL)
    ]

    def call(prompt: str, some: list[int]) -> dict[tuple[str, int], Image.Image]:
        pictures = session.client.generate_images(
            prompt,
            adapters=uses,
            count=len(some),
            seeds=some,
            steps=asked["steps"],
            guidance_scale=asked["guidance"],
            sampler=Sampler.DPMPP_2M,
        )
        decoded = [Image.open(io.BytesIO(picture.data)).convert("RGB") for picture in pictures]
        return {(prompt, seed): picture for seed, picture in zip(some, decoded, strict=True)}

    found: dict[tuple[str, int], Image.Image] = {}
    with ThreadPoolExecutor(_CALLS) as pool:
        for done in pool.map(lambda one: call(*one), calls):
            found |= done
            report(len(found), len(drawings))
    return [found[drawing.prompt, drawing.seed] for drawing in drawings]
