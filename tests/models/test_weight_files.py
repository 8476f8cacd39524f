"""Weights that are not what they say: safetensors headers that lie, pickles that would run code."""

import json
import os
import struct

import pytest
import torch

from seppo_fast.errors import UserError
from seppo_fast.models import open_model
from seppo_fast.models.files import check_tensors


def written(path, entries, size=16, header=None):
    """A safetensors file with this header: as text, or of entries."""
    text = (json.dumps(entries) if header is None else header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))
    return path


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


LIES = {
    "overlapping": {"a": entry(0, 8), "b": entry(4, 16)}, "a hole": {"a": entry(0, 4, (1,)), "b": entry(8, 16)},
    "beyond the end": {"a": entry(8, 24), "b": entry(0, 8)}, "backwards": {"a": entry(8, 0), "b": entry(8, 16)},
    "negative": {"a": entry(-8, 0), "b": entry(0, 16, (4,))}, "another shape": {"a": entry(0, 16, (5,))},
    "a huge shape": {"a": entry(0, 16, (2**62, 2**62))}, "unknown dtype": {"a": entry(0, 16, (4,), "F31")},
    "no entry": {"a": 3}, "no offsets": {"a": {"dtype": "F32", "shape": [4]}}, "text as offset": {"a": entry(0, "16", (4,))},
}


@pytest.mark.parametrize("lie", LIES)
def test_headers_that_lie(tmp_path, lie):
    path = written(tmp_path / "model.safetensors", LIES[lie])
    with pytest.raises(UserError, match=r"model\.safetensors has (a damaged safetensors header|\d+ bytes where)"):
        check_tensors(path)


def test_names_given_twice(tmp_path):
    header = f'{{"a": {json.dumps(entry(0, 8))}, "a": {json.dumps(entry(8, 16))}}}'
    with pytest.raises(UserError, match="a is given twice"):
        check_tensors(written(tmp_path / "model.safetensors", None, header=header))


def test_a_header_of_gigabytes(tmp_path):
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 5 << 30))
        file.truncate(6 << 30)  # no bytes on the disk
    with pytest.raises(UserError, match="damaged safetensors header"):
        check_tensors(path)


def test_a_right_one_passes(tmp_path):
    check_tensors(written(tmp_path / "model.safetensors", {"a": entry(0, 8), "b": entry(8, 16), "__metadata__": {"format": "pt"}}))


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("part, stem", [("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")])
def test_pickles_that_would_run_code(own_sd, tmp_path, part, stem, zipped):
    ran = tmp_path / "ran"
    for file in (own_sd / part).glob("*.safetensors"):
        file.unlink()
    file = own_sd / part / f"{stem}.bin"
    torch.save({"weight": Code(ran)}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError) as caught:
        open_model(str(own_sd))
    assert str(file) in str(caught.value) and "would run code and is not loaded" in str(caught.value)
    assert "safetensors" in str(caught.value) and "weights_only" not in str(caught.value)
    assert not ran.exists()


def test_an_index_of_shards_that_names_no_files(own_sd):
    weights = own_sd / "unet/diffusion_pytorch_model.safetensors"
    index = own_sd / "unet/diffusion_pytorch_model.safetensors.index.json"
    for value in (3, None, [], "", {"a": "b"}):
        index.write_text(json.dumps({"weight_map": {"a": value}}))
        with pytest.raises(UserError, match="should give each weight the name of a file"):
            open_model(str(own_sd))
    index.write_text(json.dumps({"weight_map": {"a": f"../unet/{weights.name}"}}))
    with pytest.raises(UserError, match="are missing"):
        open_model(str(own_sd))
