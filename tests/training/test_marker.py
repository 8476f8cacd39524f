"""A checkpoint's marker: whatever it holds is a reason and never a traceback; its checksums find what sizes do not."""

import json
import os
from pathlib import Path

import pytest

from seppo_fast.checksums import checksum
from seppo_fast.errors import UserError
from seppo_fast.training.checkpoint import State, complete, policy_of, read_state
from seppo_fast.training.marker import MARKER, Written, damaged, declare, missing


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A folder of three files and their marker."""
    folder = tmp_path / "update_00000004"
    (folder / "shares").mkdir(parents=True)
    for name, size in (("shares/states.safetensors", 3000), ("rank_0.safetensors", 200), ("state.json", 10)):
        (folder / name).write_bytes(os.urandom(size))
    declare(folder, {})
    return folder


def flip(file: Path, place: int = 7) -> None:
    """Change one bit of a file."""
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)


def test_a_whole_checkpoint_lacks_nothing(whole: Path) -> None:
    assert missing(whole) is None and damaged(whole) is None and complete(whole.parent) == [whole]


@pytest.mark.parametrize("content", [
    b"null", b"[]", b"{}", b"12", b'"text"', b"", bytes(300), b"\xff\xfe{}", b'{"format": 2}', b'{"format": 2, "files": {}}',
    b'{"format": 2, "files": []}', b'{"format": 2, "files": {"state.json": 10}}', b'{"format": 2, "files": {"state.json": null}}',
    b'{"format": 2, "files": {"state.json": {"size": "10"}}}', b'{"format": 2, "files": {"state.json": {"size": -1}}}',
    b'{"format": 2, "files": {"../update_00000004/state.json": {"size": 10}}}',
    b'{"format": 3, "files": {"state.json": {"size": 10}}}',
    b'{"/etc/passwd": 10}', b'{"../x": 10}', b'{"state.json": null}', b'{"state.json": true}', b'{"state.json": 10.5}',
    b"[" * 100_000, b'{"state.json": 1e400}',
], ids=lambda content: repr(content[:40]))
def test_what_is_no_marker_is_a_reason(content: bytes, whole: Path) -> None:
    (whole / MARKER).write_bytes(content)
    assert str(missing(whole)).startswith("its complete.json cannot be read ("), missing(whole)
    assert complete(whole.parent) == []


def test_a_marker_that_is_no_file(whole: Path) -> None:
    (whole / MARKER).unlink()
    assert missing(whole) == "it has no complete.json"
    os.mkfifo(whole / MARKER)
    assert missing(whole) == "it has no complete.json", "nobody writes to it: reading would wait for ever"


def test_a_marker_of_the_first_format_counts_and_is_judged_by_sizes(whole: Path) -> None:
    sizes = {name: (whole / name).stat().st_size for name in ("shares/states.safetensors", "rank_0.safetensors", "state.json")}
    (whole / MARKER).write_text(json.dumps(sizes))
    flip(whole / "state.json")
    assert missing(whole) is None and damaged(whole) is None
    os.truncate(whole / "state.json", 9)
    assert missing(whole) == "state.json has 9 bytes, not 10"


@pytest.mark.parametrize("name", ["shares/states.safetensors", "rank_0.safetensors", "state.json"])
def test_a_flipped_bit_is_found_by_the_rank_whose_share_it_is(name: str, whole: Path) -> None:
    flip(whole / name)
    assert missing(whole) is None, "the size is as it was"
    lack = f"{name} is damaged: its checksum is not the one of what was written"
    assert damaged(whole) == lack
    assert [damaged(whole, rank, 2) for rank in range(2)].count(lack) == 1
    assert [damaged(whole, rank, 5) for rank in range(5)].count(lack) == 1


def test_what_was_summed_while_it_was_written_is_not_read_again(whole: Path) -> None:
    known = Written(size=3000, xxh3_128=checksum(whole / "shares/states.safetensors"))
    flip(whole / "shares/states.safetensors")  # after it was written, and before the marker was
    declare(whole, {"shares/states.safetensors": known})
    assert str(damaged(whole)).startswith("shares/states.safetensors is damaged")
    with pytest.raises(OSError, match="has 3000 bytes, and 2999 were written"):
        declare(whole, {"shares/states.safetensors": Written(size=2999)})


def test_a_copy_beside_is_no_checkpoint_of_the_run(whole: Path) -> None:
    whole.rename(whole.with_name("update_00000004 copy"))
    assert complete(whole.parent) == []


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path: Path) -> None:
    assert complete(tmp_path / "checkpoints") == []
    (tmp_path / "checkpoints").write_text("a file is in the way")
    with pytest.raises(UserError, match=r"checkpoints cannot be read \(Not a directory\)"):
        complete(tmp_path / "checkpoints")


STATE = {"run_id": "a", "world": 1, "data": None, "config": {}}


@pytest.mark.parametrize("content", [
    "null", "[]", "12", "", "\0" * 40, "{}", json.dumps(STATE | {"update": "4"}), json.dumps(STATE | {"update": None}),
    json.dumps(STATE | {"run_id": 5}), json.dumps(STATE | {"config": []}), json.dumps(STATE | {"pool": {"policy": 1}}),
    json.dumps(STATE | {"unheard_of": 1}),
])
def test_what_is_no_state_is_a_reason(content: str, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(ValueError, match=r"its state.json cannot be read \("):
        read_state(tmp_path)


def test_a_state_from_before_some_of_its_keys(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps(STATE | {"update": 4, "best": 2}))
    assert read_state(tmp_path) == State("a", 1, None, {}, update=4, best=2.0)


def test_a_damaged_policy_is_not_taken_for_the_best_one(whole: Path) -> None:
    from safetensors.torch import save_file
    from torch import ones

    save_file({"w": ones(4)}, whole / "policy.safetensors")
    declare(whole, {})
    assert policy_of(whole)["w"].tolist() == [1.0] * 4
    flip(whole / "policy.safetensors", -1)
    with pytest.raises(UserError, match=r"policy.safetensors cannot be read: policy.safetensors is damaged"):
        policy_of(whole)
