"""The pages that have generated tables, and their text with fresh tables."""

import re
from functools import partial

from benchmarks import ROOT
from benchmarks.ablation.readme import ablation, ablation_flow
from benchmarks.fits.readme import fits, gpus, hours, ranks
from benchmarks.flipper.readme import flipper
from benchmarks.improvement.readme import improvement
from benchmarks.loss.readme import loss
from benchmarks.readme.config_keys import keys
from benchmarks.readme.headlines import headlines
from benchmarks.readme.quickstarts import flow, quickstart, video
from benchmarks.readme.quickstarts import improvement as quickstart_improvement
from benchmarks.throughput.readme import throughput
from benchmarks.time_to_quality.readme import time_to_quality
from benchmarks.time_to_quality.ways import TASKS
from benchmarks.video.readme import video as decoding

README = ROOT / "README.md"
BENCHMARKS = ROOT / "benchmarks" / "README.md"
CONFIGS = ROOT / "seppo_fast" / "configs" / "README.md"
PAGES = (README, BENCHMARKS, CONFIGS)
RESULTS = ROOT / "benchmarks" / "results"
TABLES = {"keys": keys, **{name: partial(table, RESULTS) for name, table in (
    ("quickstart", quickstart), ("fits", fits), ("hours", hours), ("gpus", gpus), ("ranks", ranks), ("headlines", headlines),
    ("quickstart_flow", flow),
    ("quickstart_video", video),
    ("quickstart_video_flow", partial(video, name="quickstart_video_flow")),
    ("quickstart_improvement", quickstart_improvement), ("loss", loss), ("throughput", throughput), ("decoding", decoding),
    ("ablation", ablation), ("ablation_flow", ablation_flow), ("flipper", flipper), ("improvement", improvement),
    *((f"time_to_quality_{task}", partial(time_to_quality, task=task)) for task in TASKS))}}


def filled(text: str) -> str:
    """`text` with fresh tables between `<!-- name -->` and `<!-- /name -->`."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        text = pattern.sub(lambda found, make=table: found[1] + make() + "\n" + found[2], text)
    return text
