"""What the jobs of one process share on one device: UNets by family, and the steps taken on them."""

import copy
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

from torch import Tensor

from hueshift.engines.base_model import BaseModel
from hueshift.engines.cuda_lane import GraphLane
from hueshift.engines.svd_cache import SpectralFactors
from hueshift.engines.text import TextStage
from hueshift.training.divergence import check_finite
from hueshift.training.held_factors import HeldFactors
from hueshift.training.methods.learnable import Learnable
from hueshift.training.sharing.captured import CapturedSteps
from hueshift.training.sharing.compiled import Compiler
from hueshift.training.sharing.exchange import Exchange
from hueshift.training.sharing.family import Family, family_of
from hueshift.training.sharing.together import Share, SharedStep
from hueshift.training.spec import TrainingSpec
from hueshift.training.state import TrainingState
from hueshift.training.stepping import StepAlone, Stepper, StepWork, Turn
from hueshift.training.unet import TrainingUNet, make_unet

# A member that is this late is drawing pictures, or stuck: what it would save is less than what the others lose.
PATIENCE_SECONDS = 2.0


class SharedTraining:
    """Given to every `run_training` whose steps are to be taken together, each in a thread of its own.

    `max_rows` is the most UNet rows of one forward pass, 0 for no limit; `patience` how long, in seconds, one job may
    keep the others of its family waiting at a step. `rounds` counts the shared steps by how many jobs were in them.

    With `lane` steps run as CUDA graphs where they can, also those of a job alone. The UNet of the last family then
    stays, with its graphs: the next job is most likely of the same, and its graphs are there. With `compiler` besides,
    they are graphs of what it makes of each shape. With `held` all UNets have one copy of the factors.
    """

    def __init__(
        self,
        base: BaseModel,
        factors: SpectralFactors,
        *,
        max_rows: int = 0,
        patience: float = PATIENCE_SECONDS,
        lane: GraphLane | None = None,
        compiler: Compiler | None = None,
        held: HeldFactors | None = None,
    ) -> None:
        self.rounds: Counter[int] = Counter()
        self._base, self._factors = base, factors
        self._max_rows, self._patience = max_rows, patience
        # Not a job's own: it encodes what several have made of their captions.
        self._text = TextStage(base)
        self._lane, self._compiler, self._held = lane, compiler, held
        self._kept: _Company | None = None
        self._lock = threading.Lock()
        # A UNet lives as long as a job that uses it: families come and go, and each takes as much memory as the base.
        self._companies: WeakValueDictionary[Family, _Company] = WeakValueDictionary()

    def join(self, spec: TrainingSpec, learnable: Learnable) -> tuple[TrainingUNet, Stepper]:
        """Return the UNet and the stepper of a job; both its own if its method does not share."""
        family = family_of(spec)
        if family is None:
            return self._new_unet(spec, learnable), StepAlone()
        with self._lock:
            company = self._companies.get(family)
            if company is None:
                # The last family's goes before another comes.
                self._kept = None
                unet = self._new_unet(spec, learnable)
                captured = None if self._lane is None else CapturedSteps(self._lane.beside(), self._compiler)
                company = self._companies[family] = _Company(
                    SharedStep(unet, self._text, self._max_rows, captured, self.release),
                    unet,
                    self._patience,
                    self.rounds,
                )
            if self._lane is not None:
                self._kept = company
        return company.unet, SharedStepper(company)

    def release(self) -> bool:
        """Give back the memory of what is kept for later jobs and used by none; True if there was any."""
        with self._lock:
            kept = None if self._kept is None else weakref.ref(self._kept)
            self._kept = None
            gc.collect()
            # Still there: a job has it.
            self._kept = None if kept is None else kept()
            freed = kept is not None and self._kept is None
        return (self._held is not None and self._held.release()) or freed

    def _new_unet(self, spec: TrainingSpec, learnable: Learnable) -> TrainingUNet:
        # A UNet's hooks know it, so one that nobody uses goes only when cycles are looked for: do it before the next.
        gc.collect()
        return make_unet(self._base, self._factors, learnable, spec, self._held)

    def own_words(self, base: BaseModel) -> BaseModel:
        """The same base with a tokenizer for one thread: tokenizers do not stand two callers at once."""
        return replace(base, tokenizer=copy.deepcopy(base.tokenizer))


class _Company:
    """The jobs of one family."""

    def __init__(self, step: SharedStep, unet: TrainingUNet, patience: float, rounds: Counter[int]) -> None:
        self.unet = unet
        self._rounds = rounds
        self._step = step
        self.exchange: Exchange[Share, Tensor] = Exchange(self._run, patience)

    def _run(self, shares: Sequence[Share]) -> list[Tensor | Exception]:
        self._rounds[len(shares)] += 1
        return self._step(shares)


class SharedStepper:
    """One job's place in a company (a `Stepper`)."""

    def __init__(self, company: _Company) -> None:
        self._company = company

    def step(self, unet: TrainingUNet, work: StepWork, state: TrainingState, turn: Turn) -> Tensor:
        """Wait for the others, and take the batch with them; see Stepper."""
        if turn.last:
            turn.before_update()
        loss = self._company.exchange.hand_in(self, Share(work, state, turn.count, turn.first, turn.last))
        if loss.device.type == "cpu":
            check_finite(loss, state.step + 1, "loss")
        return loss

    def come(self) -> None:
        """Let the others wait for this job's next step, as if it had been there at their last one."""
        self._company.exchange.come(self)

    def leave(self) -> None:
        """Let the others go on without this job."""
        self._company.exchange.leave(self)
