"""How a step is made: the ranks agree on it, bind what has changed, and run the matrices and the rest."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from distmuon.binding import Binding, bind, check_stages
from distmuon.comm.agree import NonfiniteError, across_stages
from distmuon.comm.group import Mesh, ProcessGroup, as_group, broadcast, mesh_ranks
from distmuon.local import local_blocks
from distmuon.options import Options
from distmuon.participation import Turn, agree_on_turns
from distmuon.periods import in_blocks, refuse_owner_gradients
from distmuon.rest import create_state, follow_parameters, step_adamw
from distmuon.stats import StepClock
from distmuon.unit_steps import step_units

logger = logging.getLogger("distmuon")


class Stepping(Optimizer):
    """The step of :class:`distmuon.Muon`, apart from what users set and save.

    Attributes:
        skipped_steps: Steps that ``on_nonfinite="skip"`` left out since this object was made.
    """

    _options: Options
    _clock: StepClock
    _mesh: Mesh | None
    _stages: ProcessGroup | None
    _binding: Binding | None
    _momentum_is_split: bool
    _lost_mesh: bool
    _warned_of_no_gradients: bool
    skipped_steps: int

    def _begin(self, clock: StepClock) -> None:
        """Before the first step."""
        self._clock = clock
        self._binding = None
        self._momentum_is_split = self._lost_mesh = self._warned_of_no_gradients = False
        self.skipped_steps = 0

    def _advance(self, beside: Sequence[dict[str, Any]] = ()) -> bool:
        self._clock.start()
        try:
            turns = self._turns(beside)
        except NonfiniteError as error:
            if self._options.on_nonfinite != "skip":
                raise
            self.skipped_steps += 1
            logger.warning("a step is left out: NaN or an infinity in the gradient of %s", error.found)
            return False
        self._warn_of_no_gradients(turns)
        cut = in_blocks(self.param_groups)
        for turn in turns:
            create_state(turn, self.param_groups, self.state, self._options)
            if not turn.idle:
                self._step_matrices(turn, cut)
                with self._clock.phase("adamw", turn.part.pipeline.device):
                    step_adamw(turn, self.param_groups, self.state, self._options)
                    step_units(turn, self.param_groups, self.state)
        if self._binding is not None and not all(turn.idle for turn in turns):
            self._binding.advance(self.param_groups)
        return True

    @property
    def replica_mesh(self) -> Mesh | None:
        """The mesh or process group over which plain parameters are replicated; None where that is not known."""
        return self._mesh

    def owners(self) -> dict[Tensor, int]:
        """The global rank that orthogonalizes each replicated matrix, by parameter.

        Parameters of which several ranks own a part (stacks of experts) and sharded ones are left out. Known
        after the first step; empty on a single process.
        """
        found: dict[Tensor, int] = {}
        for part in self._binding.parts if self._binding is not None else ():
            for place, owner in part.pipeline.plan.sole_owners.items():
                number = part.whole.planned[place]
                if number in part.entries:
                    found[part.entries[number].param] = owner
        return found

    def start_owner_gradients(self) -> tuple[dict[Tensor, int], ProcessGroup]:
        """Prepare for gradients that only owners have, as :func:`distmuon.ddp_hook` leaves them.

        All ranks call this together the first time.

        Returns:
            The owners, and the process group that shares the work.

        Raises:
            ValueError: if plain parameters are not shared over a process group, or are cut into blocks.
        """
        refuse_owner_gradients(self.param_groups)
        if self._binding is None or not self._binding.fits(self.param_groups):
            self._rebind()
        assert self._binding is not None
        part = self._binding.parts[0]
        if part.group is None and self._mesh is not None and len(mesh_ranks(self._mesh)) == 1:
            return {}, as_group(self._mesh)
        if part.group is None:
            raise ValueError(
                "ddp_hook needs an optimizer that shares its work: pass the DistributedDataParallel module itself to "
                "distmuon.Muon, or mesh=ddp_model.process_group."
            )
        part.pipeline.owner_gradients = True
        return self.owners(), part.group

    def consolidate_state_dict(self) -> None:
        """Bring momentum that only owners keep to all ranks; needed with :func:`distmuon.ddp_hook` alone.

        All ranks call this together, before :meth:`state_dict`.
        """
        for part in self._binding.parts if self._binding is not None else ():
            if part.group is not None and self._momentum_is_split:
                for param, owner in self.owners().items():
                    if self.state.get(param):
                        broadcast(self.state[param]["momentum_buffer"], owner, part.group)
        self._momentum_is_split = False

    def _turns(self, beside: Sequence[dict[str, Any]]) -> list[Turn]:
        """What each part does in this step, agreed by all ranks."""
        with self._clock.phase("agree"), across_stages(self._stages):
            while True:
                if self._binding is None:
                    self._rebind()
                assert self._binding is not None
                turns = agree_on_turns(self._binding, self.param_groups, self._options, self.state, beside)
                if turns is not None:
                    return turns
                if any(part.pipeline.owner_gradients for part in self._binding.parts):
                    raise ValueError(
                        "parameter groups changed between the backward pass and the step, and with distmuon.ddp_hook "
                        "gradients went to the owners of before: change them before the backward pass."
                    )
                self._rebind()

    def _rebind(self) -> None:
        """Read layouts and plan, again when parameters were added or swapped (accelerate swaps them all)."""
        self.consolidate_state_dict()
        follow_parameters(self.param_groups, self.state, self._options)
        if self._lost_mesh and self._mesh is None:
            logger.warning(
                "this optimizer was pickled, and mesh and stages are not kept then: each rank updates its plain "
                "parameters by itself. Build the optimizer anew and load the state dict of the pickled one."
            )
            self._lost_mesh = False
        check_stages(self.param_groups, self._mesh, self._stages)
        self._binding = bind(self.param_groups, self._options, self._mesh, self._clock)

    def _step_matrices(self, turn: Turn, cut: frozenset[int]) -> None:
        course, active = turn.part.course(cut), turn.active
        local = local_blocks(course, active, self.state)
        course.pipeline.run(self.param_groups, local, [active[number] for number in course.planned])
        self._momentum_is_split |= course.pipeline.owner_gradients

    def _warn_of_no_gradients(self, turns: Sequence[Turn]) -> None:
        """Tell once of a step in which nothing takes part, as when the model has other parameters by now."""
        if not self._warned_of_no_gradients and not any(any(turn.active) for turn in turns):
            self._warned_of_no_gradients = True
            logger.warning(
                "no parameter has a gradient in this step. If the model had a backward pass, its parameters are not "
                "those of the optimizer: make the optimizer after fully_shard, and after what replaces parameters."
            )

    def _check_consolidated(self) -> None:
        if self._momentum_is_split:
            raise RuntimeError(
                "with distmuon.ddp_hook each rank keeps momentum of its own matrices only: call "
                "optimizer.consolidate_state_dict() on all ranks before state_dict()."
            )
