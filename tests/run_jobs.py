"""On every rank: trains the configurations of a JSON list, `--config FILE`, one after the other."""

import json
import sys
from pathlib import Path


def main() -> int:
    from seppo_fast.configfile import parse_config
    from seppo_fast.ranks import join, leave, quiet_libraries
    from seppo_fast.run import run
    from seppo_fast.signals import StopSignals

    quiet_libraries()
    ranks = join()
    for raw in json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text()):
        run(parse_config(raw), None, ranks, StopSignals())
    leave()
    return 0
