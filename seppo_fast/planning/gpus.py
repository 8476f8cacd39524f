"""The same run on other numbers of GPUs: hours with communication, stragglers and writing, memory, and what the batch allows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from seppo_fast.config import METHODS
from seppo_fast.configfile import BATCH_KEYS, Batch, Config, batch_plan
from seppo_fast.errors import UserError
from seppo_fast.evaluation.adapters import Adapter
from seppo_fast.models import Model
from seppo_fast.planning.communication import Cluster, one_way, sent
from seppo_fast.planning.cost import Cost, estimate
from seppo_fast.planning.disk import Parts, gb, parts_of
from seppo_fast.planning.time_plan import Rate, duration, hours, known_rate, planned_with, work_of
from seppo_fast.reference.batching import even

HEAD = ("GPUs", "pairs", "rollouts", "in all", "sampling", "training", "network", "stragglers", "disk", "memory a rank")
LONGEST = 7  # digits of a number of GPUs


@dataclass(frozen=True)
class Fit:
    """A number of GPUs and the batch. `share`: pairs of an update that the busiest rank has; 0 where some ranks would have none.

    `batch` is what that rank does: of a number that does not divide the effective batch, as if all had so many. `note`: what has to
    be changed, or why it cannot be.
    """

    gpus: int
    size: int  # of the effective batch
    share: int = 0
    batch: Batch | None = None
    note: str = ""


@dataclass(frozen=True)
class Hours:
    """The hours of a run by what takes them, the bytes of memory a rank, and what the busiest rank draws in how many batches."""

    sampling: float
    training: float
    communication: float
    stragglers: float
    writing: float
    memory: int
    rollouts: int
    batches: int

    @property
    def all(self) -> float:
        """The whole run."""
        return self.sampling + self.training + self.communication + self.stragglers + self.writing


def fit(config: Config, gpus: int) -> Fit:
    """How the effective batch is shared by so many GPUs. The micro-batch becomes smaller where it has to."""
    given = config.deepspeed
    size = given.get("train_batch_size")
    try:
        batch = batch_plan(given, gpus)
        grows = f"{batch.size} pairs an update" if size is None else ""
        return Fit(gpus, batch.size, batch.size // gpus, batch, grows)
    except UserError:
        if not size:
            raise
    if gpus > size:
        return Fit(gpus, size, note=f"{gpus - size} of them have no work: an update has {size} pairs, so use at most {size} GPUs,"
                                    " or raise train_batch_size")
    share = -(-size // gpus)
    most = min(share, given.get("train_micro_batch_size_per_gpu") or share)
    if size % gpus:
        batch = Batch(size, even(share, most), -(-share // most), gpus)
        near = " and ".join(str(number) for number in nearest_divisors(size, gpus))
        return Fit(gpus, size, share, batch, f"{gpus} do not divide {size}, which is refused: {near} do")
    micro = next(number for number in range(most, 0, -1) if share % number == 0)
    batch = Batch(size, micro, share // micro, gpus)
    keys = dict(zip(BATCH_KEYS[1:], (micro, share // micro), strict=True))
    changes = ", ".join(f"{key}={value}" for key, value in keys.items() if given.get(key) not in (None, value))
    return Fit(gpus, size, share, batch, f"with {changes}")


def nearest_divisors(size: int, number: int) -> list[int]:
    """The nearest divisors of `size` below and above `number`, which is none and less than `size`."""
    return [next(n for n in numbers if size % n == 0) for numbers in (range(number, 0, -1), range(number, size + 1))]


def hours_of(config: Config, found: Fit, cost: Cost, rate: Rate, cluster: Cluster, written: int, held_out: int = 0) -> Hours:
    """The hours of the run on `found.gpus`. Nothing overlaps; the busiest rank decides, and all wait for the slowest."""
    assert found.batch is not None
    ours = config.seppo
    work = work_of(config, found.batch, cost, held_out)
    own = rollouts(config, found)
    work = replace(work, pairs=ours.updates * found.share * found.gpus, gpus=found.gpus, micro=found.batch.micro,
                   sampler_batch=even(own, work.sampler_batch) if own else work.sampler_batch)
    sampling, training = hours(rate, work)
    late = cluster.stragglers * (sampling + training) if found.gpus > 1 else 0.0
    sending = ours.updates * one_way(cluster, found.gpus, sent(config, found.batch, cost)) / 3600
    batches = -(-own // work.sampler_batch)
    return Hours(sampling, training, sending, late, written / (cluster.disk_gb_s * 1e9) / 3600, cost.reserved, own, batches)


def rollouts(config: Config, found: Fit) -> int:
    """What the busiest rank draws ahead: for an update, or for an iteration where that is drawn as a whole. 0 without rollouts."""
    ours = config.seppo
    if not METHODS[ours.method].draws:
        return 0
    if ours.sampler.samples_per_iteration:
        return -(-ours.sampler.samples_per_iteration // found.gpus)
    return found.share * (ours.updates_per_iteration if ours.sampler.window == "iteration" else 1)


def written_bytes(config: Config, parts: Parts) -> int:
    """What a run writes from its first update to its end; what is removed meanwhile, too."""
    ours = config.seppo
    checkpoints = -(-ours.updates // (ours.checkpoint.every or ours.updates_per_iteration))
    counts = {"checkpoints": checkpoints, "sample sets": ours.iterations}
    return sum(part.size * counts.get(name, part.count) for name, part in parts.items())


def plans(config: Config, model: Model, numbers: Sequence[int], rate: Rate, cluster: Cluster, held_out: int = 0,
          adapter: Adapter | None = None) -> list[tuple[Fit, Hours | None]]:
    """For each number of GPUs how the batch is shared, and the hours; no hours where some GPUs would have no work."""
    rows: list[tuple[Fit, Hours | None]] = []
    for gpus in numbers:
        found, spent = fit(config, gpus), None
        if found.batch is not None:
            cost = estimate(model, config, found.batch, adapter)
            written = written_bytes(config, parts_of(config, found.batch, cost, model))
            spent = hours_of(config, found, cost, rate, cluster, written, held_out)
        rows.append((found, spent))
    return rows


def gpus_plan(config: Config, model: Model, numbers: Sequence[int], rates: Sequence[Rate], here: str = "", held_out: int = 0,
              adapter: Adapter | None = None) -> str:
    """A table with a row for each number of GPUs: on this machine's kind if its rate is known, else on the first known one."""
    rate, cluster = chosen(rates, here)
    found = plans(config, model, numbers, rate, cluster, held_out, adapter)
    rows = [HEAD, *(cells(*row) for row in found)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    notes = [f"  {each.gpus} GPUs: {each.note}" for each, _ in found if each.note]
    sampler = config.seppo.sampler
    window = "iteration" if sampler.samples_per_iteration or sampler.window == "iteration" else "update"
    title = (f"on more GPUs ({rate.device}): pairs of an update and rollouts of an {window} on the busiest rank, and in how"
             " many batches; the time, and its shares, one after another (no data, warm-up, grids, scores)")
    return "\n".join([title, *table, *notes, *assumptions(cluster)])


def cells(found: Fit, spent: Hours | None) -> tuple[str, ...]:
    """A row of the table."""
    if spent is None or found.batch is None:
        return (str(found.gpus), *("-" * (len(HEAD) - 1)))
    shares = (spent.sampling, spent.training, spent.communication, spent.stragglers, spent.writing)
    drawn = f"{spent.rollouts} in {spent.batches}" if spent.rollouts else "none"
    return (str(found.gpus), f"{found.share} in {found.batch.accumulation}", drawn, duration(spent.all),
            *(f"{share / spent.all:.1%}" for share in shares), gb(spent.memory))


def assumptions(cluster: Cluster) -> list[str]:
    """What the table goes by, in two lines."""
    return [f"  {cluster.gpus_per_node} GPUs a node; {cluster.link_gb_s:g} GB/s a GPU within it and {cluster.network_gb_s:g} GB/s a"
            f" node between them, in one direction, of which {cluster.reached:.0%} are reached; the slowest rank computes"
            f" {cluster.stragglers:.0%} longer; {cluster.disk_gb_s:g} GB/s to the disk", f"  {cluster.source}"]


def chosen(rates: Sequence[Rate], here: str = "") -> tuple[Rate, Cluster]:
    """The rate that is planned with, without gaps, and its links; those of another device where its own are not known."""
    rate = planned_with(rates, here)
    if rate.cluster is not None:
        return rate, rate.cluster
    device, known = next((other.device, other.cluster) for other in (known_rate(rates), *rates) if other.cluster is not None)
    return rate, known.model_copy(update={"source": f"assumed: those of {device}; {known.source}"})


def check_numbers(given: Sequence[str]) -> list[int]:
    """The numbers of `--gpus`, each once and in order; `UserError` for what is none."""
    numbers = set()
    for text in given:
        if not (text.isascii() and text.isdigit() and len(text) <= LONGEST and int(text)):
            raise UserError(f"--gpus {text}: expected a number of GPUs, such as --gpus 8 64 512")
        numbers.add(int(text))
    return sorted(numbers)
