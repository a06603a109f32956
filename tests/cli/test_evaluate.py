"""`hueshift evaluate`: what it asks a server and a painter for, and what it writes."""

import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import structlog
from fake_service import FakeServer, png
from PIL import Image
from tiny_painter import make_tiny_painter
from tiny_training import make_tiny_base

from hueshift.adapters.adapter import Adapter, AdapterKind
from hueshift.adapters.file import write_adapter
from hueshift.engines.base_model import BaseModel
from hueshift.training.evaluation import drawing

Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def restored_logs() -> Iterator[None]:
    """The command configures logging; other tests must not see that."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


@pytest.fixture
def asked(tmp_path: Path) -> list[object]:
    """A picture, and the questions about it."""
    (tmp_path / "prompts.json").write_text('["a noto emoji of a {}", "a red {}"]')
    (tmp_path / "prior.json").write_text('["a lemon"]')
    for name in ("one", "two", "true"):
        (tmp_path / f"{name}.png").write_bytes(png())
    return [
        *(tmp_path / "one.png", tmp_path / "two.png", "--class-noun", "animal", "--images", 2),
        *("--prompts", tmp_path / "prompts.json", "--prior", tmp_path / "prior.json"),
        *("--truth", f"a flat emoji of a {{}}={tmp_path / 'true.png'}", "--out", tmp_path / "out"),
    ]


def test_a_served_adapter_is_drawn_by_the_server(
    fake: FakeServer, run: Run, asked: list[object], tmp_path: Path
) -> None:
    ran = run("evaluate", "served", "fox@3:0.5", *asked, "--identifier", "sks", "--json")
    assert ran.code == 0, ran.err
    requests = fake.service.seen["Generate"]
    own = [request for request in requests if request.adapters]
    prompts = Counter(request.prompt for request in own)
    assert set(prompts) == {
        "a noto emoji of a sks animal",
        "a red sks animal",
        "a flat emoji of a sks animal",
        "a lemon",
    }
    # Calls run beside each other, so they come in any order.
    first = next(request for request in own if request.prompt == "a noto emoji of a sks animal")
    assert (first.adapters[0].adapter, first.adapters[0].revision, first.adapters[0].weight) == ("fox", 3, 0.5)
    assert (list(first.seeds), first.count, first.steps, first.guidance_scale) == ([0, 1], 2, 15, 3.0)
    base = {request.prompt for request in requests if not request.adapters}
    assert base == {"a noto emoji of an animal", "a red animal", "a flat emoji of an animal", "a lemon"}
    assert [row["method"] for row in ran.json["rows"]] == ["real", "base", "fox"]
    assert set(ran.json["rows"][2]["measures"]) == {"clip_i", "truth", "clip_t", "prior", "diversity"}
    assert "DINO was not measured" in ran.json["missing"]
    assert "| fox |" in (tmp_path / "out" / "report.md").read_text()
    with Image.open(tmp_path / "out" / "grid.png") as grid:
        assert grid.width > 4 * 96


def test_a_file_is_drawn_here_with_its_own_word(
    run: Run, asked: list[object], tmp_path: Path, base_model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    word = torch.zeros(1, base_model.layout.token_width)
    adapter = Adapter(
        AdapterKind.TOKENS, base_model.base_hash, "textual_inversion", tokens={"sks": word}, identifier="sks"
    )
    (tmp_path / "fox.safetensors").write_bytes(write_adapter(adapter))
    drawn: list[tuple[str, int]] = []

    class FakePainter:
        def draw(self, drawings: Sequence[drawing.Drawing], mix: Any, report: Any) -> list[Image.Image]:
            drawn.extend((one.prompt, len(mix)) for one in drawings)
            return [Image.new("RGB", (16, 16), "red") for _ in drawings]

    monkeypatch.setattr(drawing, "make_painter", lambda *_, **__: FakePainter())
    ran = run("evaluate", "file", tmp_path / "fox.safetensors", *asked)
    assert ran.code == 0, ran.err
    assert ("a noto emoji of a sks animal", 1) in drawn
    assert ("a noto emoji of an animal", 0) in drawn
    assert "prior 1.000" in ran.out
    assert "DINO was not measured" in ran.err


def test_wrong_words_are_told_before_anything_is_drawn(
    fake: FakeServer, run: Run, asked: list[object], tmp_path: Path
) -> None:
    assert "--identifier" in run("evaluate", "served", "fox", *asked).err
    kind = run("evaluate", "served", "fox", *asked, "--identifier", "sks", "--kind", "car")
    assert (kind.code, "object, live, style" in kind.err) == (2, True)
    truth = run("evaluate", "served", "fox", *asked, "--identifier", "sks", "--truth", "nothing")
    assert "PROMPT=FILE" in truth.err
    assert not fake.service.seen


def test_a_matrix_is_run_once_and_told_again(
    run: Run, tmp_path: Path, base_model: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    painter = make_tiny_painter(*make_tiny_base(base_model))
    monkeypatch.setattr(drawing, "make_painter", lambda *_, **__: painter)
    (tmp_path / "one.png").write_bytes(png())
    plan = {
        "cases": [{"name": "blob", "kind": "object", "class_noun": "ball", "pictures": [{"file": "one.png"}]}],
        "methods": [{"name": "words", "method": "textual_inversion", "settings": {"batch_size": 1}}],
        "budgets": [{"steps": 1}],
        "prompts": 1,
        "prior": ["a lemon"],
    }
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    words = ("evaluate", "matrix", tmp_path / "plan.json", "--out", tmp_path / "out", "--json")
    none = run(*words, "--max-minutes", 0)
    assert (none.code, none.json["rows"], none.json["left"]) == (0, [], 3)
    done = run(*words)
    assert done.code == 0, done.err
    assert [row["cell"] for row in done.json["rows"]] == ["blob, real", "blob, base", "blob, words, 1 steps, seed 0"]
    assert done.json["left"] == 0
    assert run(*words).json == done.json
    assert all(Path(file).is_file() for file in done.json["files"])


def test_a_wrong_plan_is_named(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"cases": [], "methods": [], "budgets": [{"steps": 1}]}))
    ran = run("evaluate", "matrix", tmp_path / "plan.json", "--out", tmp_path / "out")
    assert ran.code == 1
    assert "cases" in ran.err
    assert not (tmp_path / "out").exists()
