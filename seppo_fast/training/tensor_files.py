"""Safetensors files, written one tensor after another: no second copy of all of them has to fit into host memory."""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seppo_fast.checksums import Hashing
from seppo_fast.training.marker import Written

TYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
         torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def write_flat(path: Path, tensors: Mapping[str, Tensor], about: Any) -> Written:
    """Write tensors of any shape and device as vectors, with `about` as JSON in the metadata; the file's size and checksum."""
    # The larger types first, so that each tensor begins where its type may begin.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": {"about": json.dumps(about)}}
    end = 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": TYPES[tensors[name].dtype], "shape": [tensors[name].numel()], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        hashing = Hashing(file)
        hashing.write(struct.pack("<Q", len(text)))
        hashing.write(text)
        for name in order:
            hashing.write(tensors[name].detach().reshape(-1).cpu().view(torch.uint8).numpy())
    return Written(size=hashing.size, xxh3_128=hashing.hexdigest())
