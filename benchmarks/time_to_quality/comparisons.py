"""What is compared, and when a way is said to cost quality. Committed before the reported runs."""

from collections.abc import Sequence

from benchmarks.intervals import Interval

MEASURES = {"prompt_accuracy": "prompt accuracy", "cleanliness": "cleanliness"}  # these decide; Vendi is shown beside them
MARGIN = 0.05  # the most that a way may lose by the interval's lower end and still be said to cost nothing measurable
# "fast" was added when the others had run: ways that cost nothing measurable by themselves, together.
# Each of these against `paper`, on both measures, paired by seed: where both end (the mean of the last two judged policies), and at
# equal FLOPs (where the way ends, or at half of the paper's FLOPs where it ends later).
COMPARED = {
    "digits": ("ddim_20", "ddim_10", "dpmsolver_20", "dpmsolver_10", "unipc_10", "interval", "every_2", "every_4", "reuse_2",
               "reuse_4", "adapter", "one_step", "best", "fast", "sft"),
    "ditto": ("ddim_10", "dpmsolver_10", "unipc_10", "interval", "every_2", "reuse_4", "adapter", "one_step", "best", "fast",
              "sft"),
    "flow": ("euler_20", "euler_8", "unipc_10", "interval", "reuse_2", "adapter", "one_step", "best", "sft"),
}
COSTS, NOTHING, OPEN = "costs quality", "costs nothing measurable", "these seeds do not tell"


def verdict(differences: Sequence[Interval]) -> str:
    """What the differences to `paper` at the end say, one for each measure: the worst of them decides."""
    if any(found.half is None for found in differences):
        return OPEN
    if any(found.high < 0 for found in differences):
        return COSTS
    return NOTHING if all(found.low > -MARGIN for found in differences) else OPEN
