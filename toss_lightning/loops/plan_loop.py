"""PlanLoop: one ``Trainer.fit`` that walks a plan of stages, with actions between them.

The epochs of the fit are grouped into stages; what is done between stages is done between epochs. What is taken from
inside Lightning 2.6 (the project pins ``lightning<2.7``, and tests/loops/test_lightning_contract.py fails when one of
these changes):

- ``_FitLoop``: loops are not public since 2.0, yet only a loop can train several adapters in one fit with one set of
  checkpoints; the methods overridden here have kept their names since 1.5.
- ``_combined_loader``: set to None, it makes ``setup_data`` ask the datamodule for the next stage's loader.
- ``_combined_loader_states_to_load`` and ``epoch_loop.batch_progress``: see ``_fit_to_ranks``.
- ``_Loop.restarting``: see ``_forget_restart``.
- ``restarted_mid_epoch``, ``reset_restart_stage`` and ``epoch_loop.reset``: see ``_close_restored_epoch``.
- ``epoch_loop.batch_progress.is_last_batch``: see ``end_stage_early``. It ends an epoch, and checkpoints hold it, so
  that a restored epoch is closed as one is that a checkpoint was written on the last batch of.
- ``epoch_loop.val_loop.run()`` and its ``restarting``: evaluate between stages, and between the epochs of one, as
  Lightning does between epochs.
"""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loops.loop import _Loop

from toss_lightning.errors import StoreError
from toss_lightning.identity import check_identity
from toss_lightning.loops.plan import Stage
from toss_lightning.loops.plan_state import PlanState
from toss_lightning.progress import say
from toss_lightning.ranks import share_directory


class PlanLoop(PlanState):
    """Walks a plan; what its steps do is for the class that derives from it.

    Callbacks that have a method ``on_plan_start(trainer)`` are called before the first step, behind any refusal.
    """

    def __init__(self, trainer: Trainer) -> None:
        super().__init__(trainer)
        self._saved_accumulate: int | None = None

    # --- walking ----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Runs what is left of the plan."""
        self.plan = self.make_plan()
        self._check_ranks()
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if start := getattr(callback, "on_plan_start", None):
                start(self.trainer)
        self.begin()
        if self.stage is None:
            self._forget_restart()
            self._go_on()
        if self.stage is not None:
            self._fit_to_ranks()
            super().run()
            # where a stage is left, or the epoch was cut, the Trainer's own limits ended the loop
            whole = self.batch_idx + 1 >= self.trainer.num_training_batches
            if self.stage_is_over and (whole or self.ends_after is not None):
                if not whole:
                    self._close_restored_epoch()
                self._leave()
                if not self.stages_left:
                    self._go_on()
        self.end(complete=self.cursor == len(self.plan.steps))

    def _check_ranks(self) -> None:
        """Refuses processes that resumed differently or share no run directory: each may see a disk of its own.

        Raises:
            StoreError: they found different ones, or do not share the run directory.
        """
        strategy, ours = self.trainer.strategy, (self.trainer.global_step, self.cursor, self.entered_at)
        if not share_directory(self.trainer, self.run_dir):
            raise StoreError(
                f"--run_dir: {self.run_dir.resolve()} is not one directory that all processes see: name one on a disk"
                " that all nodes share"
            )
        if strategy.reduce_boolean_decision(ours != strategy.broadcast(ours), all=False):
            raise StoreError(
                f"the processes resumed from different checkpoints (this one at step {ours[0]}): give all of them the"
                " same file with --ckpt_path, and see that they share the run directory"
            )

    def _go_on(self) -> None:
        """Does what comes next until a stage is entered, or nothing is left."""
        while self.cursor < len(self.plan.steps):
            step = self.plan.steps[self.cursor]
            if self.is_left_out(step):
                self.cursor += 1
                continue
            if isinstance(step, Stage):
                self._enter(step)
                break
            self.act(step)
            self._pass_boundary()
        self._limit_epochs()

    def _enter(self, stage: Stage) -> None:
        self.entered_at = self.epochs_done
        self.arm(stage)
        self._combined_loader = None
        self.setup_data()
        batches = stage.epochs * self.trainer.num_training_batches
        self.module.stage_steps = batches // self.trainer.accumulate_grad_batches
        self.begin_stage(stage)
        self.trainer.strategy.setup_optimizers(self.trainer)

    def _leave(self) -> None:
        assert self.stage is not None
        self.end_stage(self.stage)
        self.entered_at = self.ends_after = None
        self._pass_boundary()

    def _pass_boundary(self) -> None:
        """Moves on to the next step of the plan, with a checkpoint: what was done up to here is never done again."""
        self.cursor += 1
        if self.saver:
            self.saver.save(self.trainer)
        if self.stopper:
            self.stopper.stop_if_told(self.trainer, saved=True)

    def end_stage_early(self) -> None:
        """Ends the running stage with the optimizer step that was just taken; the plan goes on behind it.

        To be called on all ranks, from the ``on_train_batch_end`` of a callback: Lightning calls callbacks that write
        checkpoints last, so that the one of this step knows of it.
        """
        assert self.entered_at is not None
        self.ends_after = self.epochs_done - self.entered_at + 1
        self.epoch_loop.batch_progress.is_last_batch = True
        self._limit_epochs()

    def _limit_epochs(self) -> None:
        """Tells Lightning how many epochs there are by now, all stages together."""
        self.max_epochs = self.epochs_in_all

    def evaluate(self, name: str) -> None:
        """Takes the held-out losses of the adapter in use, as Lightning does between epochs."""
        self.module.stage_name = name
        self.trainer.validating = True
        self.epoch_loop.val_loop.restarting = False  # it would go on with a validation that a checkpoint fell into
        self.epoch_loop.val_loop.run()
        self.trainer.training = True

    # --- the hooks of Lightning's loop ------------------------------------------------------------------------------

    def setup_data(self) -> None:
        """Asks for the current stage's loader; its plan says how many micro-batches make an optimizer step."""
        super().setup_data()
        self.trainer.accumulate_grad_batches = self.datamodule.plan.accumulate

    def on_advance_start(self) -> None:
        """Goes on to the next stage where this epoch belongs to it.

        Raises:
            StopIteration: no stage is left, and Lightning's loop ends.
        """
        self._close_restored_epoch()
        if self.stage_is_over:
            self._leave()
            self._go_on()
            if self.stage is None:
                raise StopIteration
        assert self._combined_loader is not None
        assert self.stage is not None
        assert self.entered_at is not None
        if epochs := self.epochs_done - self.entered_at:
            self.between_epochs(self.stage, epochs)
        for loader in self._combined_loader.flattened:
            loader.set_epoch(self.epochs_done - self.entered_at)
        self.module.stage_epoch = self.epochs_done - self.entered_at
        super().on_advance_start()

    def _close_restored_epoch(self) -> None:
        """Ends the epoch that a checkpoint was written on the last batch of.

        Lightning would close it by the length of the *next* loader, which in another stage is another length.
        """
        if self.restarted_mid_epoch and self.epochs_done == self.epoch_progress.current.ready:
            self.epoch_loop.reset()
            self.epoch_loop.restarting = False
            self.epoch_loop.reset_restart_stage()
            self.reset_restart_stage()

    def _forget_restart(self) -> None:
        """Clears Lightning's marks of a restart where a checkpoint left off between two stages.

        A new one begins there, and nothing of the last one is to be finished.
        """
        for loop in (self, self.epoch_loop):
            # the fit loop's own setter would keep it where the Trainer has max_steps
            _Loop.restarting.fset(loop, False)  # type: ignore[attr-defined]

    def _fit_to_ranks(self) -> None:
        """Counts a restored epoch in the micro-batches of today's ranks and ``max_tokens``: its steps are the same."""
        old = self._saved_accumulate
        if old is None or not self.restarting:
            return
        if self.epoch_loop.batch_progress.current.ready % old:
            raise StoreError(
                "--ckpt_path: this checkpoint was written in the middle of an optimizer step, and what its first"
                " micro-batches brought is lost: give one of the run's own checkpoints, or last"
            )
        new = self.datamodule.plan_stage().accumulate
        if old == new:
            return
        say(f"resumed with {new} micro-batches per step and process, not {old}: losses differ by rounding")
        counter: Any = self.epoch_loop.batch_progress.current
        steps, unfinished = counter.ready // old, counter.ready - counter.completed
        counter.ready = counter.started = counter.processed = steps * new
        counter.completed = steps * new - unfinished
        for state in self._combined_loader_states_to_load:
            state["served"] = state["served"] // old * new

    def on_save_checkpoint(self) -> dict[str, Any]:
        """Adds the place in the plan to Lightning's own counters."""
        return super().on_save_checkpoint() | {
            "identity": self.identity(),
            "plan": list(self.plan.names),
            "epochs": self.plan.epochs,
            "cursor": self.cursor,
            "entered_at": self.entered_at,
            "ends_after": self.ends_after,
            "last_round": self.last_round,
            "stage_steps": self.module.stage_steps,
            "accumulate": self.trainer.accumulate_grad_batches,
            **self.state(),
        }

    def on_load_checkpoint(self, state_dict: dict[str, Any]) -> None:
        """Takes the plan up where the checkpoint left it; runs before the optimizer's state is restored."""
        super().on_load_checkpoint(state_dict)
        self.plan = self.make_plan()
        # a plan that goes on behind the end of the checkpoint's may take it up
        count = len(state_dict["plan"])
        theirs = {"loop.plan": ", ".join(state_dict["plan"]), "number of epochs": str(state_dict["epochs"])}
        ours = {"loop.plan": ", ".join(self.plan.names[:count]), "number of epochs": str(self.plan.epochs[:count])}
        check_identity(theirs | state_dict["identity"], ours | self.identity())
        self.cursor, self.entered_at = state_dict["cursor"], state_dict["entered_at"]
        self.ends_after, self.last_round = state_dict["ends_after"], state_dict["last_round"]
        self._saved_accumulate = state_dict["accumulate"]
        self.load_state(state_dict)
        if self.stage is not None:
            self.arm(self.stage)
        self._limit_epochs()
        self.module.stage_steps = state_dict["stage_steps"]
        self._rebuild_optimizers()

    def _rebuild_optimizers(self) -> None:
        """Gives the stage its schedule, a closure that no checkpoint holds; Lightning restores the rest behind this."""
        strategy = self.trainer.strategy
        states = [optimizer.state_dict() for optimizer in strategy.optimizers]
        strategy.setup_optimizers(self.trainer)
        if not strategy.lightning_restore_optimizer:  # a sharding strategy has restored the optimizer before this
            for optimizer, state in zip(strategy.optimizers, states, strict=True):
                optimizer.load_state_dict(state)
