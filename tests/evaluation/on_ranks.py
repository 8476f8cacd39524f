"""On every rank: the evaluations of a JSON list of arguments, `--config FILE`, one after the other; the last as the command."""

import json
import sys
from pathlib import Path


def main() -> int:
    from seppo_fast import evaluate

    *others, last = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
    for arguments in others:
        evaluate.run(evaluate.parse_arguments(arguments))
    return evaluate.main(["--local_rank=0", *last])
