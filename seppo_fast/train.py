"""Train: `deepspeed seppo_fast/train.py --config ds_a100.json [--set seppo.data.source=PATH] [--resume auto] [--dry-run]`."""

import argparse
import os
import signal
import sys
import traceback
from pathlib import Path

# Run by path, Python puts this file's folder first, where our `data` and `models` would pass for top-level packages.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    sys.path[0] = str(Path(__file__).resolve().parent.parent)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--local_rank` is what DeepSpeed's launcher adds."""
    parser = argparse.ArgumentParser(prog="seppo_fast/train.py", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="a JSON file, or the name of one in seppo_fast/configs")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", dest="overrides",
                        help="override keys of the configuration, e.g. seppo.sampler.steps=20 optimizer.params.lr=1e-6")
    parser.add_argument("--resume", metavar="auto|PATH",
                        help="go on from the run folder's newest complete checkpoint, or from PATH")
    parser.add_argument("--dry-run", action="store_true",
                        help="check everything that can be checked, print the plan, train nothing")
    parser.add_argument("--rates", metavar="FILE",
                        help="with --dry-run: a device's speed, as `python -m benchmarks.throughput` measures it")
    parser.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.rates and not arguments.dry_run:
        parser.error("--rates goes with --dry-run")
    return arguments


def main() -> int:
    """Exit status: 0 done or stopped by SIGTERM, 130 stopped by SIGINT, 2 bad input, 1 anything else."""
    arguments = parse_arguments()
    from seppo_fast.configfile import load_config
    from seppo_fast.disk import NO_ROOM
    from seppo_fast.errors import UserError
    from seppo_fast.ranks import FirstFailure, Stop, StopSignals, join, leave, lost_contact, quiet_libraries

    quiet_libraries()
    failure = FirstFailure()
    rank = int(os.environ.get("RANK", 0))
    status = 1
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.dry_run:
            from seppo_fast.training.dry_run import dry_run

            if rank == 0:
                print(dry_run(config, int(os.environ.get("WORLD_SIZE", 1)), arguments.rates), flush=True)
            return 0
        signals = StopSignals()
        ranks = join()
        from seppo_fast.training.run import run

        final = run(config, arguments.resume, ranks, signals)
        if rank == 0:
            print(f"done: the trained model is in {final}", flush=True)
        leave()
        return 0
    except Stop as stop:
        status = 130 if stop.signum == signal.SIGINT else 0
        if stop.checkpoint:
            if rank == 0:
                print(f"stopped by {stop}; checkpoint: {stop.checkpoint}. Go on with --resume auto", file=sys.stderr, flush=True)
            return status
        # A rank alone may be here: the launcher ends the others with SIGTERM when one of them fails.
        if failure.is_ours():
            print(f"stopped by {stop} before training began; what is cached is kept", file=sys.stderr, flush=True)
    except UserError as error:
        status = 2
        if failure.is_ours():
            print(f"seppo_fast: {error}", file=sys.stderr, flush=True)
    except Exception as error:
        if failure.is_ours():
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                cause = f"no room left on the disk ({error}); free some and go on with --resume auto"
            elif lost_contact(error):
                cause = (f"rank {rank} lost another rank, which was killed (out of memory?) or stopped on another machine,"
                         f" where the cause is printed: {str(error).split('. ')[0]}. Go on with --resume auto")
            else:
                cause = f"rank {rank} failed\n{traceback.format_exc()}"
            print(f"seppo_fast: {cause}", file=sys.stderr, flush=True)
    # Ordinary exit would wait for the other ranks in destructors of the process group; they are told by our absence.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main())
