"""Updates of several values at once: torch's AdamW to the bit on the CPU, whatever their rates and counts."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from hueshift.adapters.errors import HueshiftError
from hueshift.training.arrivals import MOST_UNDERWAY
from hueshift.training.defaults import complete_spec
from hueshift.training.optimizer import BETAS, Moments, Update, apply_updates
from hueshift.training.spec import Method, SubjectKind
from hueshift.training.state import TrainingState, update_together


def test_values_of_any_rate_and_count_move_as_adamw_moves_them() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes, rates = [(3, 5), (7,), (2, 2)], [1e-2, 1e-3, 1e-2]
    values = [torch.randn(shape, generator=generator) for shape in shapes]
    twins = [value.clone().requires_grad_() for value in values]
    groups = [{"params": [twin], "lr": rate} for twin, rate in zip(twins, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    moments = [Moments(torch.zeros(shape), torch.zeros(shape)) for shape in shapes]
    for step in range(5):
        # The last value has a gradient in every other step alone, so that counts differ.
        chosen = [0, 1, 2] if step % 2 else [0, 1]
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        updates: list[Update] = []
        for index, twin in enumerate(twins):
            twin.grad = gradients[index].clone() if index in chosen else None
            if index in chosen:
                moments[index].steps += 1
                updates.append(Update(values[index], gradients[index], moments[index], rates[index]))
        optimizer.step()
        apply_updates(updates)
        assert all(torch.equal(value, twin) for value, twin in zip(values, twins, strict=True))


class Sent:
    """A loss that is here when it is told so."""

    def __init__(self, loss: float) -> None:
        self.loss, self.is_here, self.waited = loss, False, False

    def here(self) -> bool:
        """As told."""
        return self.is_here

    def value(self) -> float:
        """Note that somebody waited."""
        self.waited = not self.is_here
        return self.loss


def make_state(sent: list[Sent]) -> TrainingState:
    """A state of one value whose losses are sent by hand."""
    spec = complete_spec(
        method=Method.SVDIFF,
        subject_kind=SubjectKind.SUBJECT,
        captions=("a sks dog",),
        identifier="sks",
        class_noun="dog",
        steps=20,
    )

    def send(parts: Sequence[Tensor]) -> Sent:
        sent.append(Sent(sum(part.item() for part in parts) / len(parts)))
        return sent[-1]

    return TrainingState({"x": torch.ones(2)}, {"x": 0.1}, torch.Generator(), spec, send=send)


def take(state: TrainingState, loss: float) -> None:
    """One step."""
    state.take_gradients([torch.ones(2)])
    update_together([state])
    state.count([torch.tensor(loss)])


def test_losses_are_waited_for_only_when_too_many_are_underway() -> None:
    sent: list[Sent] = []
    state = make_state(sent)
    for number in range(MOST_UNDERWAY):
        take(state, float(number))
        assert state.arrived(MOST_UNDERWAY) == []
    assert (state.step, state.losses) == (MOST_UNDERWAY, [])
    take(state, 9.0)
    assert state.arrived(MOST_UNDERWAY) == [0.0]
    assert [loss.waited for loss in sent] == [True, *[False] * MOST_UNDERWAY]
    sent[1].is_here = True
    assert state.arrived(MOST_UNDERWAY) == [1.0]
    assert not sent[1].waited
    assert state.capture().losses == state.losses
    assert len(state.losses) == state.step == MOST_UNDERWAY + 1


def test_a_loss_that_is_no_number_names_its_step_and_leaves_no_checkpoint() -> None:
    state = make_state([])
    for loss in (1.0, math.nan, 2.0):
        take(state, loss)
    with pytest.raises(HueshiftError, match="at step 2"):
        state.capture()
    assert state.losses == [1.0]
    with pytest.raises(HueshiftError, match="at step 2"):
        state.arrived()
