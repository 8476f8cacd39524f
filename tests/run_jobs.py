"""Started by DeepSpeed's launcher on every rank: trains the configurations of a JSON list one after the other."""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)


def main() -> None:
    from seppo_fast.configfile import parse_config
    from seppo_fast.training.ranks import StopSignals, join, quiet_libraries
    from seppo_fast.training.run import run

    quiet_libraries()
    ranks = join()
    jobs = next(argument for argument in sys.argv[1:] if argument.endswith(".json"))
    for raw in json.loads(Path(jobs).read_text()):
        run(parse_config(raw), None, ranks, StopSignals())


if __name__ == "__main__":
    main()
