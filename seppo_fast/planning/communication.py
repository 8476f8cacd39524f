"""What ranks send to each other in an update, and how long that takes: rings over links of known rates, one after another."""

from typing import Annotated

from pydantic import BaseModel, Field

from seppo_fast.configfile import Batch, Config
from seppo_fast.planning.cost import Cost
from seppo_fast.planning.engine_bytes import uses_bf16_optimizer
from seppo_fast.training.engine import engine_config, precision, zero_stage

Positive = Annotated[float, Field(gt=0)]
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}  # of DeepSpeed's names


class Cluster(BaseModel):
    """How GPUs are joined; rates are in GB/s (10^9 bytes), in one direction. `source`: what is published, measured or assumed."""

    gpus_per_node: Annotated[int, Field(gt=0)] = 8
    link_gb_s: Positive  # of a GPU, within its node
    network_gb_s: Positive  # of a node, to all others together
    reached: Annotated[float, Field(gt=0, le=1)] = 0.7  # the share of these rates that collectives reach
    stragglers: Annotated[float, Field(ge=0)] = 0.05  # how much longer the slowest rank computes than the mean
    disk_gb_s: Positive = 2.0  # of the shared disk, for checkpoints and past policies
    source: str


def one_way(cluster: Cluster, gpus: int, size: float) -> float:
    """Seconds of a reduce-scatter of `size` bytes, or of an all-gather: of half an all-reduce.

    A ring of n sends (n - 1) / n of the bytes. Over several nodes it is one ring within each node, and then, for each GPU's part of
    the bytes, one between the nodes: these share their node's network, which carries (m - 1) / m of the bytes for m nodes.
    """
    local = min(gpus, cluster.gpus_per_node)
    nodes = -(-gpus // cluster.gpus_per_node)
    within = (local - 1) / local * size / cluster.link_gb_s
    between = (nodes - 1) / nodes * size / cluster.network_gb_s
    return (within + between) / (cluster.reached * 1e9)


def sent(config: Config, batch: Batch, cost: Cost) -> float:
    """The bytes that an update passes one way, each counted as often as it is passed; the time is linear in them.

    Stages 0 and 1 reduce the gradients of all micro-batches once, and hand out the sums. From stage 1 on each rank updates its part
    of the weights, which are then gathered. Stage 2 reduces the gradients in each micro-batch, to the rank that owns them. Stage 3
    also gathers all weights, frozen ones too, for each micro-batch's forward and again for its backward.
    """
    raw = engine_config(config, batch)
    stage, size = zero_stage(raw), precision(raw).dtype.itemsize
    gradients, weights = cost.trained * gradient_bytes(config, batch), cost.trained * size
    if stage == 0:
        return 2 * gradients
    if stage == 1:
        return 2 * gradients + weights
    if stage == 2:
        return batch.accumulation * gradients + weights
    return batch.accumulation * (gradients + 2 * cost.parameters * size)


def gradient_bytes(config: Config, batch: Batch) -> int:
    """Bytes of a gradient as it is sent."""
    raw = engine_config(config, batch)
    size = precision(raw).dtype.itemsize
    if wanted := ITEMSIZE.get(raw.get("communication_data_type") or ""):
        return wanted
    if uses_bf16_optimizer(raw):
        return 2  # the fp32 sums are rounded
    sums = raw.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    return 4 if sums and zero_stage(raw) == 1 else size
