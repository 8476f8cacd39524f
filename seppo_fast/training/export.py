"""The end of a run: the trained model as a diffusers directory, or as a LoRA that diffusers loads."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from seppo_fast.config import Seppo
from seppo_fast.configfile import Batch, Config
from seppo_fast.errors import UserError
from seppo_fast.models import Model
from seppo_fast.models.export import save_pipeline
from seppo_fast.signals import Stop
from seppo_fast.training import checkpoint
from seppo_fast.training.adapter import KEY as ADAPTER
from seppo_fast.training.card import model_card
from seppo_fast.training.engine import policy_weights
from seppo_fast.training.trainer import Trainer


def export(model: Model, config: Config, batch: Batch, trainer: Trainer, rows: int) -> Path:
    """Write `final/`, and `best/` with keep_best. The last checkpoint stays for continuing."""
    ours, state, final = config.seppo, trainer.state, trainer.folder / "final"
    weights = policy_weights(trainer.engine)
    with stops_at_once(trainer):
        if trainer.ranks.rank == 0:
            card = card_of(model, config, batch, trainer, rows, state.update)
            save_pipeline(model, weights, final, ours.model.lora, card)
            say_how_it_ended(ours, trainer)
            if ours.evaluation.keep_best:
                export_best(model, config, batch, trainer, rows)
    trainer.ranks.barrier()
    return final


def card_of(model: Model, config: Config, batch: Batch, trainer: Trainer, rows: int, updates: int) -> str:
    """The model card of the policy after so many updates."""
    state = trainer.state
    return model_card(config, batch, rows, updates, state.skipped, model, state.started_from, state.models.get(ADAPTER))


def say_how_it_ended(ours: Seppo, trainer: Trainer) -> None:
    """Print what one has to know about `final/`: that the run diverged, or ended early."""
    state = trainer.state
    if state.diverged:
        good = checkpoint.last_sound(trainer.folder / "checkpoints", state)
        print(f"{trainer.folder / 'final'} may be of a policy that training destroyed: in the last update the error on the winners"
              f" was out of its range. The newest checkpoint from before: {good or 'none'}"
              + (f"; {checkpoint.anew(good)}" if good else ""), flush=True)
    if trainer.gets_no_better() and state.update < ours.updates:
        print(f"stopped early: the last {state.not_better} evaluations brought no better {ours.evaluation.watched} than"
              f" {state.best} after {state.best_update} updates (seppo.evaluation.patience)", flush=True)


def first_whole(checkpoints: list[Path]) -> dict[str, Tensor] | None:
    """The weights of the first checkpoint whose weights are undamaged; a line is printed for each damaged one."""
    for path in checkpoints:
        try:
            return checkpoint.policy_of(path)
        except UserError as error:
            print(f"seppo.evaluation.keep_best: {error}", flush=True)
    return None


def export_best(model: Model, config: Config, batch: Batch, trainer: Trainer, rows: int) -> None:
    """`best/` of the best policy's checkpoint; or a line that says why there is none."""
    ours, state, best = config.seppo, trainer.state, trainer.folder / "best"
    kept = checkpoint.of_update(trainer.folder / "checkpoints", state.best_update)
    value = f"{ours.evaluation.watched} {state.best}, of the policy after {state.best_update} updates"
    weights = first_whole(kept) if state.best_update else None
    if weights is None or state.best_update is None:
        shutil.rmtree(best, ignore_errors=True)  # of an earlier end of this run
        why = ("no evaluation gave a value" if state.best_update is None else
               f"none is better than the model that training began with ({value})" if state.best_update == 0 else
               f"the checkpoint of the best one is not there, or is damaged ({value})")
        print(f"{best} is not written: {why}", flush=True)
        return
    card = card_of(model, config, batch, trainer, rows, state.best_update)
    save_pipeline(model, weights, best, ours.model.lora, card)
    print(f"{best}: the best {value}", flush=True)


@contextmanager
def stops_at_once(trainer: Trainer) -> Iterator[None]:
    """A block in which rank 0 works alone and a signal stops it at once: the last checkpoint has all of the training."""
    trainer.signals.deferred = trainer.ranks.rank != 0
    try:
        trainer.check_signals()
        yield
    except Stop as stop:
        stop.checkpoint = checkpoint.complete(trainer.folder / "checkpoints")[-1]
        stop.while_doing = " while final/ was written"
        raise
    finally:
        trainer.signals.deferred = True
