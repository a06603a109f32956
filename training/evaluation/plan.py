"""A comparison as data: cases x methods x budgets x seeds, read from TOML or JSON."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hueshift.adapters.errors import FieldViolation, InvalidArgument, Reason
from hueshift.training.defaults import complete_spec
from hueshift.training.evaluation.prompts import CaseKind, case_prompts, prior_prompts
from hueshift.training.evaluation.protocol import Questions, Truth
from hueshift.training.spec import Method, SubjectKind, TrainingSpec


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LearnedPicture(_Part):
    """A picture to learn from, and its caption."""

    file: Path
    caption: str = ""


class TruePicture(_Part):
    """A picture never shown to an adapter, and the prompt, with its place, that should come out like it."""

    file: Path
    prompt: str


class CasePlan(_Part):
    """One thing or style to learn. `prompts` empty: those of its kind."""

    name: str = Field(min_length=1, pattern=r"^[\w-]+$")
    kind: CaseKind
    class_noun: str = Field(min_length=1)
    identifier: str = "sks"
    identifier_init: tuple[str, ...] = ()
    pictures: tuple[LearnedPicture, ...] = Field(min_length=1)
    truths: tuple[TruePicture, ...] = ()
    truth_images: int = Field(1, ge=1, le=16)
    prompts: tuple[str, ...] = ()

    @property
    def subject_kind(self) -> SubjectKind:
        """As jobs have it."""
        return SubjectKind.STYLE if self.kind is CaseKind.STYLE else SubjectKind.SUBJECT


class MethodPlan(_Part):
    """One way to learn: a method and settings over its defaults, under a name of its own."""

    name: str = Field(min_length=1, pattern=r"^[\w+-]+$")
    method: Method
    settings: Mapping[str, Any] = Field(default_factory=dict)


class Budget(_Part):
    """How long each cell trains: a number of steps, or as many steps as fit the seconds."""

    steps: int | None = Field(None, ge=1)
    seconds: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.steps is None) == (self.seconds is None):
            raise ValueError("give either steps or seconds")
        return self

    @property
    def name(self) -> str:
        """Such as `100 steps` or `60 s`."""
        return f"{self.steps} steps" if self.steps is not None else f"{self.seconds:g} s"


class Plan(_Part):
    """The whole comparison. `prompts` is how many of each kind's list are drawn, `images` how often each."""

    cases: tuple[CasePlan, ...] = Field(min_length=1)
    methods: tuple[MethodPlan, ...] = Field(min_length=1)
    budgets: tuple[Budget, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = (0,)
    prompts: int = Field(4, ge=1)
    images: int = Field(2, ge=1, le=16)
    prior: tuple[str, ...] = prior_prompts()
    sampler_steps: int = Field(15, ge=1, le=200)
    guidance: float = Field(3.0, ge=1, le=30)

    @model_validator(mode="after")
    def _different(self) -> Self:
        for what, names in (
            ("cases", [case.name for case in self.cases]),
            ("methods", [method.name for method in self.methods]),
            ("budgets", [budget.name for budget in self.budgets]),
        ):
            if len(set(names)) < len(names):
                raise ValueError(f"two {what} have the same name: {', '.join(names)}")
        return self


def read_plan(path: Path) -> Plan:
    """Read a .toml or .json file. Raises InvalidArgument with every wrong field; OSError as the file does."""
    text = path.read_text(encoding="utf-8")
    try:
        found = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
        return Plan.model_validate(found)
    except ValidationError as error:
        problems = [
            FieldViolation(".".join(map(str, problem["loc"])) or "plan", problem["msg"]) for problem in error.errors()
        ]
        told = "; ".join(f"{problem.field}: {problem.description}" for problem in problems)
        raise InvalidArgument(Reason.INVALID_FIELD, f"{path}: {told}", violations=problems) from error
    except ValueError as error:
        raise InvalidArgument.for_field("plan", f"{path} is neither TOML nor JSON: {error}") from error


def read_questions(plan: Plan, case: CasePlan, root: Path) -> Questions:
    """Read a case's pictures below `root`. Raises InvalidArgument naming the file that cannot be read."""
    return Questions(
        phrase=f"{case.identifier} {case.class_noun}",
        noun=case.class_noun,
        prompts=case.prompts or case_prompts(case.kind, plan.prompts),
        real=tuple(read_picture(root / picture.file) for picture in case.pictures),
        truths=tuple(Truth(truth.prompt, read_picture(root / truth.file)) for truth in case.truths),
        truth_images=case.truth_images,
        prior=plan.prior,
        images=plan.images,
    )


def make_spec(case: CasePlan, method: MethodPlan, steps: int, seed: int) -> TrainingSpec:
    """The job of a cell. Raises InvalidArgument with every wrong setting."""
    return complete_spec(
        method=method.method,
        subject_kind=case.subject_kind,
        captions=[picture.caption for picture in case.pictures],
        identifier=case.identifier,
        class_noun=case.class_noun,
        identifier_init=case.identifier_init,
        **{**method.settings, "steps": steps, "seed": seed},
    )


def read_picture(path: Path) -> Image.Image:
    """Read a picture. Raises InvalidArgument (PICTURE_INVALID) naming the file."""
    try:
        with Image.open(path) as picture:
            picture.load()
            return picture.copy()
    except OSError as error:
        raise InvalidArgument(Reason.PICTURE_INVALID, f"{path}: the picture cannot be read: {error}") from error
