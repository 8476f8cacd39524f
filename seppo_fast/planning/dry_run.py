"""--dry-run: everything that can be checked without training, and the plan."""

from pathlib import Path

import torch

from seppo_fast.config import METHODS
from seppo_fast.configfile import Config, batch_plan
from seppo_fast.data.sources import SOURCE_NOT_SET, is_hub_dataset, open_source
from seppo_fast.models import is_hub_id, open_model
from seppo_fast.models.published import published_model
from seppo_fast.planning.cost import estimate
from seppo_fast.planning.plan import plan
from seppo_fast.planning.time_plan import load_rates, time_plan
from seppo_fast.reference.solver import solver_table
from seppo_fast.training import start
from seppo_fast.training.engine import check_engine_config, unsupported
from seppo_fast.training.validation import what_is_wanted


def dry_run(config: Config, world: int, rates: str | None = None) -> str:
    """The plan, and what is still to be provided; raises `UserError` for what is there and wrong.

    `rates` is a file of a device's measured speed, beside the shipped ones.
    """
    ours = config.seppo
    batch = batch_plan(config.deepspeed, world)
    check_engine_config(config, batch)
    known_rates = load_rates(rates)
    cost, source, times = None, None, []
    missing = [lacking] if (lacking := unsupported(config)) else []  # a plan may be for another machine than this one
    named = {"path": ours.model.path, "motion_adapter": ours.model.motion_adapter}
    on_hub = {key: name for key, name in named.items() if name is not None and is_hub_id(name)}
    if on_hub:  # a dry run fetches nothing
        model = published_model(ours.model.path, ours.model.motion_adapter)
        missing += [f"seppo.model.{key} {name} is no directory here: it will be looked up on the hub, and "
                    + ("compute, memory and time are those of the model published under this name" if model else
                       "compute, memory and time cannot be estimated before") for key, name in on_hub.items()]
    else:
        model = open_model(ours.model.path, revision=ours.model.revision, variant=ours.model.variant,
                           motion_adapter=ours.model.motion_adapter)
    if model is not None:
        if model.video:
            model.check_frames(ours.data.video.frames)
        if ours.evaluation.every:
            what_is_wanted(config, model, lambda line: None)
        if ours.model.start_from:
            start.read(ours.model.start_from, model, ours.model, ours.seed)
        table = solver_table(model.scheduler_config, ours.sampler.solver, ours.sampler.steps)
        cost = estimate(model, config, batch, len(table.timesteps))
        here = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        times = [time_plan(config, batch, cost, model, known_rates, here)]
    if ours.data.source is None:
        missing.append(SOURCE_NOT_SET)
    elif is_hub_dataset(ours.data):
        missing.append(f"seppo.data.source {ours.data.source} is no file or folder here: it will be downloaded from the hub")
    else:
        source = open_source(ours.data, needs_loser=METHODS[ours.method].losers == "data", seed=ours.seed,
                             video=None if model is None else model.video)
    if (Path(ours.output_dir) / "run.json").exists():
        missing.append(f"{ours.output_dir} already holds a run: go on with it by --resume auto, or choose another seppo.output_dir")
    lines = [plan(config, batch, cost, model, source), *times, *(f"before you train: {line}" for line in missing)]
    return "\n".join([*lines, "dry run: nothing was trained or written"])
