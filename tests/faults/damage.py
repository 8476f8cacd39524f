"""Files that are damaged between two runs, and put right again."""

import json
import os
import random
from dataclasses import dataclass
from pathlib import Path

from seppo_fast.training import checkpoint

WAYS = ("a flipped bit", "zeros", "cut off", "null")


@dataclass(frozen=True)
class Damaged:
    """A file as it was before, and in which way it was damaged."""

    path: Path
    content: bytes
    how: str

    def mend(self) -> None:
        """Put the file back as it was."""
        write(self.path, self.content)


def damage(path: Path, dice: random.Random) -> Damaged:
    """Damage a file as a disk does: its time stays. A JSON file may also become `null`."""
    content = path.read_bytes()
    how = dice.choice(WAYS if path.suffix == ".json" else WAYS[:-1])
    place = dice.randrange(len(content))
    if how == "a flipped bit":
        after = content[:place] + bytes([content[place] ^ 1 << dice.randrange(8)]) + content[place + 1:]
    else:
        after = {"zeros": bytes(len(content)), "cut off": content[:place], "null": b"null\n"}[how]
    write(path, after)
    return Damaged(path, content, how)


def write(path: Path, content: bytes) -> None:
    """Overwrite a file in its place, with the time that it has."""
    about = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


def files_in(folder: Path) -> list[Path]:
    """All files with content below a folder, hidden and temporary ones apart, in a fixed order."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
    return [path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    return checkpoint.complete(run / "checkpoints")


def one_line(damaged: Damaged) -> str:
    """What was damaged, for a report."""
    return json.dumps(f"{damaged.path.parent.name}/{damaged.path.name}: {damaged.how}")
