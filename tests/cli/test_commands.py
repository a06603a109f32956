"""The commands that call a server: what they send, write and print."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_service import FakeServer, State, job_events, job_message, png

from hueshift.v1.generation_pb2 import PRIORITY_LOW

Run = Callable[..., Any]


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in ("one", "two")]
    for path in paths:
        path.write_bytes(png())
    return paths


def test_generate_writes_pictures_and_tells_their_seeds(fake: FakeServer, run: Run, tmp_path: Path) -> None:
    words = ["generate", "A fox, sleeping!", "-n", 2, "--seed", 7, "--adapter", "fox@3:0.5", "--adapter", "style"]
    ran = run(*words, "--size", "64x96", "--out", tmp_path / "new", "--json")
    assert ran.code == 0
    paths = [Path(picture["path"]) for picture in ran.json["pictures"]]
    assert sorted(path.name for path in paths) == ["a-fox-sleeping-7.png", "a-fox-sleeping-8.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert "data" not in ran.json["pictures"][0]
    (request,) = fake.service.seen["Generate"]
    assert (request.width, request.height) == (64, 96)
    assert [(use.adapter, use.weight, use.revision) for use in request.adapters] == [("fox", 0.5, 3), ("style", 1, 0)]
    assert not list((tmp_path / "new").glob("*.tmp"))


def test_generate_overwrites_nothing(run: Run, tmp_path: Path) -> None:
    for _ in range(3):
        assert run("generate", "x", "--seed", 1, "--out", tmp_path).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x-1-2.png", "x-1-3.png", "x-1.png"]


def test_generate_for_people(run: Run, tmp_path: Path) -> None:
    ran = run("generate", "word " * 50, "--seed", 1, "--out", tmp_path)
    assert "1.50 s" in ran.out
    assert "had no effect" in ran.err


def test_generate_leaves_defaults_to_the_server(fake: FakeServer, run: Run, tmp_path: Path) -> None:
    run("generate", "x", "--out", tmp_path)
    (request,) = fake.service.seen["Generate"]
    assert not request.HasField("guidance_scale")
    assert (request.steps, request.sampler, request.width, list(request.seeds)) == (0, 0, 0, [])


def test_finetune_reads_captions_and_waits(fake: FakeServer, run: Run, pictures: list[Path], tmp_path: Path) -> None:
    captions = tmp_path / "captions.json"
    captions.write_text(json.dumps([{"file": p.name, "caption": f"a sks {p.stem}", "license": "-"} for p in pictures]))
    fake.service.events = job_events()
    fake.service.job = job_message(State.FINE_TUNE_STATE_SUCCEEDED, step=4)
    ran = run(
        *("finetune", pictures[1], pictures[0], "--captions-file", captions, "--style", "--name", "style-1"),
        *("--steps", 4, "--label", "a=b", "--watch", "--out", tmp_path / "samples", "--json"),
    )
    assert ran.code == 0
    assert (ran.json["id"], ran.json["state"], ran.json["scores"]["clip_i"]) == ("job-1", "succeeded", 0.75)
    spec = fake.service.seen["CreateFineTune"][0][0].spec
    assert [picture.caption for picture in spec.pictures] == ["a sks two", "a sks one"]
    assert (spec.subject, spec.settings.steps, spec.adapter_id, dict(spec.labels)) == (2, 4, "style-1", {"a": "b"})
    assert not spec.settings.HasField("seed")
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-00004-a-sks-emoji-4.png"]


def test_finetune_without_watch_tells_how_to_follow(run: Run, pictures: list[Path]) -> None:
    ran = run("finetune", *pictures, "--class-noun", "fox")
    assert ran.code == 0
    assert "queued" in ran.out
    assert "hueshift jobs watch job-1" in ran.err


def test_finetune_sends_settings_subjects_and_masks(fake: FakeServer, run: Run, pictures: list[Path]) -> None:
    ran = run(
        *("finetune", *pictures, "--class-noun", "cat", "--method", "lora", "--also", "idk:dog:two.png"),
        *("--mask", f"two.png={pictures[0]}", "--rank", 4, "--targets", "proj_out", "--targets", "attn2.to_k"),
        *("--rate-schedule", "cosine", "--mirror", "--no-per-layer", "--priority", "low"),
    )
    assert ran.code == 0, ran.err
    spec, *chunks = (message for message in fake.service.seen["CreateFineTune"][0])
    settings = spec.spec.settings
    assert spec.spec.priority == PRIORITY_LOW
    assert (settings.rank, list(settings.targets), settings.rate_schedule) == (4, ["proj_out", "attn2.to_k"], 3)
    assert (settings.mirror, settings.per_layer, settings.HasField("per_layer")) == (True, False, True)
    assert [(s.identifier, s.class_noun) for s in spec.spec.more_subjects] == [("idk", "dog")]
    assert [(p.subject, p.mask_size_bytes) for p in spec.spec.pictures] == [(0, 0), (1, len(png()))]
    assert [(c.chunk.index, c.chunk.mask) for c in chunks] == [(0, False), (1, False), (1, True)]


def test_a_dry_run_tells_the_cost(fake: FakeServer, run: Run, pictures: list[Path]) -> None:
    ran = run("finetune", *pictures, "--class-noun", "cat", "--dry-run")
    assert ran.code == 0
    assert "not known" in ran.out
    fake.service.job.cost.gpu_seconds = 90.0
    fake.service.job.cost.seconds_per_step = 0.75
    fake.service.job.cost.measured_steps = 30
    ran = run("finetune", *pictures, "--class-noun", "cat", "--dry-run")
    assert "90 s (0.75 s a step, mean of 30)" in ran.out
    for messages in fake.service.seen["CreateFineTune"]:
        assert [message.WhichOneof("part") for message in messages] == ["spec"]
        assert messages[0].spec.validate_only


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--caption", "one"], "1 captions for 2 pictures"),
        (["--caption", "one", "--captions-file", "{captions}"], "not both"),
        (["--captions-file", "{captions}"], "no caption for two.png"),
        (["--captions-file", "{broken}"], "not readable JSON"),
        (["--method", "magic"], "svdiff, residuals"),
        (["--dry-run", "--watch"], "nothing to watch"),
        (["--also", "idk:ball"], "WORD:NOUN:PICTURE"),
        (["--also", "idk:ball:three.png"], "'three.png' is 0 of the pictures"),
        (["--mask", "one.png=missing.png"], "PICTURE=MASK"),
        (["--out", "."], "--watch"),
    ],
)
def test_finetune_refuses_before_sending(
    words: list[str], told: str, fake: FakeServer, run: Run, pictures: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "captions.json").write_text('{"one.png": "a sks"}')
    (tmp_path / "broken.json").write_text("{")
    files = {"{captions}": tmp_path / "captions.json", "{broken}": tmp_path / "broken.json"}
    ran = run("finetune", *pictures, *(files.get(word, word) for word in words))
    assert ran.code == 2
    assert told in " ".join(ran.err.replace("\u2502", " ").split())
    assert not fake.service.seen["CreateFineTune"]


def test_a_failed_job_ends_with_1(fake: FakeServer, run: Run, pictures: list[Path]) -> None:
    fake.service.events = job_events(State.FINE_TUNE_STATE_FAILED)
    fake.service.job = job_message(State.FINE_TUNE_STATE_FAILED)
    ran = run("finetune", *pictures, "--class-noun", "fox", "--watch")
    assert ran.code == 1
    assert "TRAINING_DIVERGED" in ran.err


def test_watching_as_json_lines(fake: FakeServer, run: Run, tmp_path: Path) -> None:
    fake.service.events = job_events()
    fake.service.job = job_message(State.FINE_TUNE_STATE_SUCCEEDED)
    ran = run("jobs", "watch", "job-1", "--after", 1, "--out", tmp_path, "--json")
    assert ran.code == 0
    lines = [json.loads(line) for line in ran.out.splitlines()]
    assert [line["event"] for line in lines] == ["TrainingProgress"] * 2 + ["TrainingSample", "StateChanged"]
    assert Path(lines[2]["path"]).read_bytes() == png()
    assert lines[2]["data"] == {"bytes": len(png())}


def test_an_interrupted_watch_tells_how_to_go_on(fake: FakeServer, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.service.events = job_events()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hueshift.server.cli.watching.JobView.show", interrupted)
    ran = run("jobs", "watch", "job-1")
    assert ran.code == 130
    assert "hueshift jobs watch job-1 --after 0" in ran.err


def test_jobs(run: Run) -> None:
    assert [job["id"] for job in run("jobs", "list", "--state", "queued", "--json").json] == ["job-1"]
    assert "svdiff, style" in run("jobs", "list").out
    assert "style-1" in run("jobs", "show", "job-1").out
    assert run("jobs", "cancel", "job-1", "--json").json["state"] == "cancelled"
    assert run("jobs", "retry", "job-1", "--json").json["state"] == "queued"
    assert "hueshift jobs watch job-1 --after" in run("jobs", "retry", "job-1").err
    assert run("jobs", "delete", "job-1", "-y", "--json").json == {"job-1": {"events": 5, "picture_bytes": 2048}}
    assert run("jobs", "list", "--state", "failed").err.startswith("No jobs")


def test_adapters(fake: FakeServer, run: Run, tmp_path: Path) -> None:
    assert "No adapters yet" in run("adapters", "list").err
    file = tmp_path / "fox.safetensors"
    file.write_bytes(b"f" * 2500)
    assert run("adapters", "import", file, "--name", "fox", "--label", "a=1", "--json").json["labels"] == {"a": "1"}
    assert [adapter["id"] for adapter in run("adapters", "list", "--json").json] == ["fox"]
    assert "2.5 kB" in run("adapters", "list").out
    assert "2023-11-1" in run("adapters", "show", "fox").out
    assert run("adapters", "warm", "fox", "--pin", "--json").json["adapter"]["pinned"] is True
    assert "already" in run("adapters", "warm", "fox").out
    assert run("adapters", "storage", "--json").json == {"adapters": 2500, "pictures": 7, "limit": 1024 * 1024}
    assert "1.0 MB in all" in run("adapters", "storage").out
    target = tmp_path / "deep" / "out.safetensors"
    assert run("adapters", "export", "fox", "--out", target, "--json").json["bytes"] == 2500
    assert target.read_bytes() == file.read_bytes()
    assert run("adapters", "delete", "fox", "--yes", "--json").json == {
        "fox": {"revisions": 1, "bytes": 2500, "jobs": 0}
    }
    assert run("adapters", "delete", "fox", "--yes").code == 1


def test_delete_asks_first(fake: FakeServer, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "fox.safetensors"
    file.write_bytes(b"f")
    run("adapters", "import", file, "--name", "fox")
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert run("adapters", "delete", "fox").code == 1
    assert not fake.service.seen["DeleteAdapter"]
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert run("adapters", "delete", "fox").code == 0
    assert fake.service.seen["DeleteAdapter"]


def test_the_model(run: Run) -> None:
    assert run("model", "--json").json["methods"][0]["subject_defaults"] == {"steps": 150, "learning_rate": 0.5}
    shown = run("model").out
    assert "steps=150" in shown
    assert "at most 16 a call, filled up to 8, 16" in shown
    assert "12 at 768x512" in shown
    assert "63 mixes, 2 merged into weights" in shown


def test_a_job_that_stopped_early_says_so(fake: FakeServer, run: Run) -> None:
    fake.service.job = job_message(State.FINE_TUNE_STATE_SUCCEEDED, step=3)
    assert "3 of 4, stopped early" in run("jobs", "show", "job-1").out
    fake.service.job = job_message(State.FINE_TUNE_STATE_SUCCEEDED, step=4)
    assert "early" not in run("jobs", "show", "job-1").out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("generate", "x", "--seed", "-1"), "seeds: -1 given"),
        (("generate", "x", "--steps", "3000000000"), "3000000000"),
        (("jobs", "watch", "ft-1", "--after", "99999999999999999999"), "99999999999999999999"),
        (("finetune", "one.png", "--seed", "-1"), "setting seed: -1 given"),
        (("finetune", "one.png", "--rate-schedule", "steep"), "allowed are linear"),
    ],
)
def test_what_cannot_be_sent_is_wrong_usage(
    run: Run, pictures: list[Path], words: tuple[str, ...], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(pictures[0].parent)
    ran = run(*words)
    assert ran.code == 2
    assert told in " ".join(ran.err.replace("│", " ").split())
