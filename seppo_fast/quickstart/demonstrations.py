"""The demonstrations: clean digits with right captions, as an image folder with metadata.jsonl."""

import json
import shutil
from pathlib import Path

from seppo_fast.pictures import picture
from seppo_fast.quickstart.digits import CAPTIONS, Digits


def write_demonstrations(folder: Path, digits: Digits) -> int:
    """One PNG a digit, and `file_name` and `text` in metadata.jsonl; returns how many."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = []
    for index, (pixels, label) in enumerate(zip(digits.pixels, digits.labels.tolist(), strict=True)):
        name = f"{index:04d}.png"
        picture(pixels).save(folder / name)
        rows.append(json.dumps({"file_name": name, "text": CAPTIONS[label]}) + "\n")
    # Last, so that an incomplete folder is not a data set.
    (folder / "metadata.jsonl").write_text("".join(rows))
    return len(rows)
