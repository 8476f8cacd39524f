"""Train: `deepspeed seppo_fast/train.py --config ds_a100.json [--set seppo.data.source=PATH] [--resume auto] [--dry-run]`.

The same by the module's name: `deepspeed --module seppo_fast.train --config ds_a100.json`. From Python, in one process:
`from seppo_fast import train; train("quickstart.json", set={"seppo.model.path": PATH, "seppo.data.source": PATH})`.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from seppo_fast.signals import Stop, StopSignals

# When this file is run by its path, its folder comes first, and `data` and `models` would be found as top-level packages.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def train(config: Mapping[str, Any] | str | Path, *, set: Mapping[str, Any] | None = None, resume: str | Path | None = None
          ) -> Path:
    """Train in this process, for notebooks and scripts, and return the folder of the trained model (`final/`).

    `config` is a dictionary with the keys of a configuration file, or such a file, or the name of one in seppo_fast/configs.
    `set` replaces keys by their path: `{"seppo.iterations": 3}`. `resume` is "auto" or a checkpoint, as on the command line.
    The run is the same as the command's: same checks, same files in `seppo.output_dir`, same output.

    Wrong input raises `seppo_fast.errors.UserError`. After Ctrl-C or SIGTERM a checkpoint is written and its path printed; then
    the signal acts as usual (Ctrl-C: KeyboardInterrupt). Afterwards signal handlers, environment and process group are as
    before, and another run may follow. This is one process on one device; several GPUs need `deepspeed seppo_fast/train.py`.
    """
    from seppo_fast.configfile import given_config
    from seppo_fast.ranks import only_rank, quiet_libraries
    from seppo_fast.signals import Stop, handled

    parsed = given_config(config, set or {})
    quiet_libraries()
    try:
        with handled() as signals, only_rank() as ranks:
            from seppo_fast.run import run

            return run(parsed, None if resume is None else os.fspath(resume), ranks, signals)
    except Stop as caught:
        stop = caught
    print(stopped(stop, dry=False), file=sys.stderr, flush=True)
    signal.raise_signal(stop.signum)
    raise SystemExit(128 + stop.signum)  # if the program's own handler returns


def parse_arguments(argv: list[str] | None = None, prog: str = "seppo_fast/train.py") -> argparse.Namespace:
    """The command line; `--local_rank` is what DeepSpeed's launcher adds."""
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a JSON file, or the name of one in seppo_fast/configs")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override keys of the configuration, e.g. seppo.sampler.steps=20 optimizer.params.lr=1e-6")
    parser.add_argument("--resume", metavar="auto|PATH",
                        help="go on from the run folder's newest complete checkpoint, or from PATH")
    parser.add_argument("--dry-run", action="store_true",
                        help="check everything that can be checked, print the plan, train nothing")
    parser.add_argument("--rates", metavar="FILE",
                        help="with --dry-run: a device's speed, as `python -m benchmarks.throughput` measures it")
    parser.add_argument("--gpus", nargs="+", default=[], metavar="N",
                        help="with --dry-run: plan for these numbers of GPUs, too, e.g. --gpus 8 64 512")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    for name in ("rates", "gpus"):
        if getattr(arguments, name) and not arguments.dry_run:
            parser.error(f"--{name} goes with --dry-run")
    return arguments


def main(argv: list[str] | None = None, prog: str = "seppo_fast/train.py") -> int:
    """Exit status: 0 done or stopped by SIGTERM, 143 if that was before the ranks had joined, 130 stopped by SIGINT, 2 bad input,
    1 anything else. `prog` is what the command is called in messages.
    """
    arguments = parse_arguments(argv, prog)
    from seppo_fast.command import announce
    from seppo_fast.errors import UserError
    from seppo_fast.failure import FirstFailure, explained, lost_contact
    from seppo_fast.signals import Stop, StopSignals

    failure, signals = FirstFailure(), StopSignals()
    announce()
    try:
        work(arguments, signals, failure.lost("go on with --resume auto"))
        failure.close()
        return 0
    except Stop as stop:
        status, words = signals.status(stop.signum), stopped(stop, arguments.dry_run)
        if stop.together and stop.checkpoint:
            if os.environ["RANK"] == "0":
                print(words, file=sys.stderr, flush=True)
            failure.close()
            from seppo_fast.contact import part

            part()
            return status
        # A rank alone may be here: the launcher ends the others with SIGTERM when one of them fails.
    except UserError as error:
        status, words = 2, f"seppo_fast: {error}"
    except Exception as error:
        status, words = 1, f"seppo_fast: {explained(error, then='go on with --resume auto')}"
        if signals.received and lost_contact(error):  # the other rank was signalled, too, and did not have to wait
            status = signals.status(signals.received)
    failure.say(words)
    failure.close()
    # An ordinary exit would wait for the other ranks, in destructors of the process group; they notice that this one is gone.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def work(arguments: argparse.Namespace, signals: "StopSignals", lost: Callable[[str], None]) -> None:
    """Train, or print the plan; `lost` prints the message of a process that ends because another one is gone."""
    from seppo_fast.configfile import load_config
    from seppo_fast.nodes import check_programs
    from seppo_fast.ranks import join, leave, quiet_libraries
    from seppo_fast.rendezvous import launched
    from seppo_fast.training import status

    quiet_libraries()
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from seppo_fast.planning.dry_run import dry_run

        launch = launched()
        if launch is None or launch.rank == 0:
            print(dry_run(config, launch.world if launch else 1, arguments.rates, arguments.gpus), flush=True)
        return
    progress = status.Status()
    ranks = join(status.noted(progress, lost))
    signals.joined = True
    check_programs(ranks, config.as_dict())
    import torch

    if hint := unused_devices(ranks.world, torch.cuda.device_count()):
        print(hint, flush=True)
    from seppo_fast.run import run

    final = run(config, arguments.resume, ranks, signals, progress=progress)
    if ranks.rank == 0:
        print(f"done: the trained model is in {final}", flush=True)
    leave()


def unused_devices(world: int, devices: int) -> str | None:
    """A hint for a run of one process on a machine with several GPUs."""
    if world > 1 or devices < 2:
        return None
    return (f"this run uses one of this machine's {devices} GPUs; to use all, start `deepspeed --module seppo_fast.train` with the"
            " same arguments (set CUDA_VISIBLE_DEVICES=0 to hide this line)")


def stopped(stop: "Stop", dry: bool) -> str:
    """The message about a stop by a signal."""
    if stop.checkpoint:
        return f"stopped by {stop}{stop.while_doing}; checkpoint: {stop.checkpoint}. Go on with --resume auto"
    return f"stopped by {stop}" if dry else f"stopped by {stop} before training began; what is cached is kept"


class CallableModule(ModuleType):
    """`from seppo_fast import train` finds this module, whatever was imported before: so the module itself can be called."""

    def __call__(self, config: Mapping[str, Any] | str | Path, *, set: Mapping[str, Any] | None = None,
                 resume: str | Path | None = None) -> Path:
        return train(config, set=set, resume=resume)


CallableModule.__call__.__doc__ = train.__doc__
if __name__ == "__main__":
    sys.exit(main())
sys.modules[__name__].__class__ = CallableModule
