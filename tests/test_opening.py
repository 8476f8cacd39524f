"""Files that are missing, no files, somebody else's, too large or no text: each is a message that names it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from seppo_fast.configfile import load_config
from seppo_fast.errors import UserError
from seppo_fast.failure import explained
from seppo_fast.opening import MOST_TEXT, expanded, in_words, open_regular, read_object, read_text

ROOT = Path(__file__).resolve().parent.parent
STRANGER = 54321  # a user without a name, as in containers


def unusable(folder: Path) -> dict[str, tuple[Path, str]]:
    """Paths of all kinds, and what is said about each."""
    paths = {name: folder / name for name in "fifo socket folder link large latin bomb list twice".split()}
    os.mkfifo(paths["fifo"])
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(paths["socket"]))
    server.close()
    paths["folder"].mkdir()
    paths["link"].symlink_to(folder / "nothing")
    with paths["large"].open("wb") as file:
        file.truncate(1 << 30)
    for name, content in (("latin", "Ä".encode("latin-1")), ("bomb", b"[" * 100_000), ("list", b"[1]"),
                          ("twice", b'{"a": 1, "a": 2}')):
        paths[name].write_bytes(content)
    return {"fifo": (paths["fifo"], "it is a named pipe, and no regular file"), "socket": (paths["socket"], "it is a socket"),
            "folder": (paths["folder"], "it is a folder"),
            "link": (paths["link"], f"a link to {folder / 'nothing'}, which is not"),
            "large": (paths["large"], f"has {1 << 30} bytes, where a text of at most {MOST_TEXT}"),
            "latin": (paths["latin"], "is no UTF-8 text (byte 0)"), "bomb": (paths["bomb"], "nested too deeply"),
            "list": (paths["list"], "expected a JSON object at the top level, got list"),
            "twice": (paths["twice"], "a is given twice"),
            "device": (Path("/dev/zero"), "it is a device"), "missing": (folder / "missing", "is missing. Fetch it."),
            "long": (folder / ("x" * 300), "File name too long")}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    for path, words in unusable(tmp_path).values():
        with pytest.raises(UserError) as caught:
            read_object(path, "Fetch it.")
        assert str(path) in str(caught.value) and words in str(caught.value)


def test_a_configuration_that_is_no_file(tmp_path: Path) -> None:
    for name, (path, words) in unusable(tmp_path).items():
        with pytest.raises(UserError) as caught:
            load_config(str(path))
        assert ("no such file, and none of the shipped ones" if name == "missing" else words) in str(caught.value)


def test_what_can_be_read_is(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps({"a": "ü"}, ensure_ascii=False).encode())
    assert read_object(file) == {"a": "ü"} and read_text(file) == '{"a": "ü"}'
    with open_regular(file) as stream:
        assert stream.read(3) == b"\xef\xbb\xbf"


CHILD = """
import sys, os
from pathlib import Path
from seppo_fast.errors import UserError
from seppo_fast.opening import in_words, read_object
os.setgroups([]); os.setgid({uid}); os.setuid({uid})
for path in sys.argv[1:]:
    try:
        read_object(Path(path))
    except UserError as error:
        print(error)
try:
    open(sys.argv[1])
except OSError as error:
    print(in_words(error))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_files_of_another_user(tmp_path: Path) -> None:
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        if folder.stat().st_uid == os.getuid() and "pytest" in str(folder):
            folder.chmod(0o755)
    closed, locked = tmp_path / "closed.json", tmp_path / "locked" / "inside.json"
    locked.parent.mkdir()
    for file in (closed, locked):
        file.write_text("{}")
    closed.chmod(0o600)
    locked.parent.chmod(0o700)
    shown = subprocess.run([sys.executable, "-c", CHILD.format(uid=STRANGER), closed, locked], cwd=ROOT, capture_output=True,
                           text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    first, second, third = shown.stdout.splitlines()
    whose = f"belongs to root (0) and has mode %s, and this runs as user {STRANGER}; its owner can `chmod %s` it"
    told = f"permission denied: {closed} {whose % ('0600', 'a+r')}."
    assert first == f"{closed} cannot be read: {told}" and third == f"{closed} cannot be read or written: {told}"
    assert second == f"{locked} cannot be read: permission denied: {locked.parent} {whose % ('0700', 'a+rx')}."


def test_a_home_that_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert expanded("~no-such-user/model") == Path("~no-such-user/model")
    monkeypatch.setenv("HOME", "/somewhere")
    assert expanded("~/model") == Path("/somewhere/model")


def test_a_permission_that_nobody_asked_for_has_no_traceback(tmp_path: Path) -> None:
    said = explained(PermissionError(13, "Permission denied", str(tmp_path / "samples")), "go on with --resume auto")
    assert said.startswith(f"{tmp_path / 'samples'} cannot be read or written: permission denied: {tmp_path} belongs to")
    assert said.endswith("to write there, ask its owner, or choose another place. Then go on with --resume auto")


def test_other_errors_are_left_to_others() -> None:
    assert in_words(ValueError("x")) is None and in_words(PermissionError(13, "no file")) is None
