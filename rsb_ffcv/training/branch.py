"""A run that continues another one under a changed recipe.

It takes over weights, optimizer, scaler, averages, log and epoch. Epochs keep counting; steps are
counted again, because a batch or the data may have another size.
"""

from pathlib import Path

from rsb_ffcv import InputError, counted, first_line
from rsb_ffcv.config.train import TrainConfig
from rsb_ffcv.training import checkpoint, compute, facts
from rsb_ffcv.training.copies import everywhere
from rsb_ffcv.training.plan import Plan
from rsb_ffcv.training.progress import NO_BEST
from rsb_ffcv.training.resume import State

# Options that define the order, the images and the batches of an epoch
EPOCH_OPTIONS = (
    "data.train_images",
    "data.train_fingerprint",
    "data.order",
    "training.batch_size",
    "training.global_batch",
    "training.seed",
    "augment.repeats",
)
# Options of an optimizer's parameter groups that a recipe sets; all others are its state
GROUP_OPTIONS = ("lr", "lr_scale", "weight_decay", "momentum")


def find(branch: str) -> tuple[Path, dict]:
    """The path and the content of the checkpoint that checkpoint.branch=`branch` names on process
    0: a file, or the newest one of a folder. Raises InputError if there is none."""
    path, fix = Path(branch), "give a run's folder or one of its checkpoints"
    state: dict | None = None

    def look() -> str:
        nonlocal path, state
        if path.is_dir():
            found = checkpoint.Store(path, keep=1).newest()
            if found is None:
                raise InputError(f"{path}: has no checkpoint; {fix}")
            path, state = found
        else:
            state = checkpoint.read(path, fix)
            if not isinstance(state, dict) or not state.keys() >= checkpoint.KEYS:
                raise InputError(f"{path}: not a checkpoint of this program; {fix}")
        return str(path)

    try:
        path = Path(compute.on_first_process(look))
    except InputError as error:
        raise InputError(f"checkpoint.branch={error}") from error.__cause__
    return path, everywhere(0, path, path, own=state)


def take_over(c: TrainConfig, state: State, plan: Plan, *, path: Path, saved: dict) -> list[str]:
    """Loads the checkpoint `saved` of another run into a new run.

    Returns lines for the console: each changed setting, and what follows from them.

    c: the new run's recipe.
    state: of the new run, built and not trained.
    plan: of the new run.
    path: of the checkpoint.

    Raises InputError if the checkpoint does not fit the recipe.
    """
    changed = {
        name: values
        for name, values in facts.changes(saved["recipe"], state.recipe).items()
        if not name.startswith("checkpoint.")
    }
    done = len(saved["rows"])
    at_end = done > 0 and saved["step"] == done * saved["rows"][-1]["steps"]
    moved = [name for name in EPOCH_OPTIONS if name in changed]
    if not at_end and moved:
        raise InputError(
            f"checkpoint.branch={path}: is in the middle of epoch {done + 1}, whose order, images "
            f"and batches cannot change ({', '.join(moved)}); give a checkpoint of an epoch's end"
        )
    if done >= plan.epochs:
        raise InputError(
            f"training.epochs={plan.epochs}: checkpoint.branch={path} has "
            f"{counted(done, 'epoch')} already; raise it"
        )
    averaging = plan[done].averaging
    swa = saved["swa"]
    goes_on = {
        "ema": saved["ema"] is not None,
        "swa": swa is not None and swa["models"] > 0 and not swa["finished"] and averaging,
    }
    try:
        _load(c, state, saved, goes_on=goes_on)
    except (RuntimeError, ValueError, KeyError) as error:
        raise InputError(
            f"checkpoint.branch={path}: does not fit the recipe ({first_line(error)}); use its "
            f"model.arch, number of classes and training.optimizer, or "
            f"checkpoint.branch_optimizer=new"
        ) from error
    progress, health = state.progress, state.health
    if at_end:
        progress.step = done * plan.steps_per_epoch
    progress.best = dict(NO_BEST)  # its checkpoint is in the other folder
    if changed:
        health.reset_history()
    if moved:
        health.skipped_steps = []
    progress.lineage = [
        *progress.lineage,
        {
            "checkpoint": compute.on_first_process(lambda: str(path.resolve())),
            "epochs": done,
            "step": saved["step"],
            "changed": {name: list(values) for name, values in changed.items()},
        },
    ]
    settings = [
        f"{name}: {facts.shown(old)} -> {facts.shown(new)}" for name, (old, new) in changed.items()
    ]
    progress.note(f"branched from {path} ({'; '.join(settings) or 'nothing changed'})")
    return [
        f"branch of {path}, after {counted(done, 'epoch')}"
        + ("" if at_end else " and a part of the next one"),
        *(f"  {line}" for line in settings or ["no setting is changed"]),
        *(f"  {line}" for line in _follows(c, state, plan, goes_on=goes_on)),
    ]


def _load(c: TrainConfig, state: State, saved: dict, *, goes_on: dict[str, bool]) -> None:
    state.model.load_state_dict(saved["model"])
    if c.checkpoint.branch_optimizer == "keep":
        old = saved["recipe"]["training"]["optimizer"]
        if old != c.training.optimizer:
            raise InputError(
                f"checkpoint.branch_optimizer=keep: the checkpoint's optimizer is {old}, and "
                f"training.optimizer={c.training.optimizer}; use new"
            )
        own = [dict(group) for group in state.optimizer.param_groups]
        state.optimizer.load_state_dict(saved["optimizer"])
        for group, options in zip(state.optimizer.param_groups, own):
            group.update({name: options[name] for name in GROUP_OPTIONS if name in options})
    if saved["scaler"]:
        state.scaler.load_state_dict(saved["scaler"])
    for average, name in ((state.ema, "ema"), (state.swa, "swa")):
        if average is not None and goes_on[name]:
            average.load_state_dict(saved[name])
    state.health.load_state_dict(saved["health"])
    state.progress.load_state_dict(saved)


def _follows(c: TrainConfig, state: State, plan: Plan, *, goes_on: dict[str, bool]) -> list[str]:
    """What the new recipe means for the run from here on."""
    done, factor = len(state.progress.rows), state.health.lr_factor
    steps = plan.steps_per_epoch
    milestones = {
        "next step": state.progress.step,
        "end of the warm-up": round((c.lr.from_epoch + c.lr.warmup_epochs) * steps),
        "start of SWA": (plan.epochs - c.swa.epochs) * steps if c.swa.epochs else 0,
        "last step": plan.total_steps - 1,
    }
    rates = [
        f"{plan.lr(step) * factor:.3g} ({name}, epoch {step // steps + 1})"
        for name, step in milestones.items()
        if step >= state.progress.step
    ]
    averages = [
        f"{name}: {how}"
        for name, average in (("EMA", state.ema), ("SWA", state.swa))
        for how in [
            "none"
            if average is None
            else "goes on"
            if goes_on[name.lower()]
            else "starts with the first step"
            if name == "EMA"
            else f"starts after epoch {max(done, plan.epochs - c.swa.epochs) + 1}"
        ]
    ]
    return [
        f"learning rate: {', '.join(rates)}",
        f"optimizer state: {'kept' if c.checkpoint.branch_optimizer == 'keep' else 'new'}",
        "; ".join(averages),
        f"epochs left: {plan.epochs - done} of {plan.epochs}, of {counted(steps, 'step')}",
        *([f"a health check has set the learning rate x {factor:g}"] if factor != 1 else []),
    ]
