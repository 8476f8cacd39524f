"""Which split a file is of, by the names of its folders and its own: the conventions of the `datasets` library, in any case.

As there, `data/NAME-00000-of-00002.*` is of the split NAME, a folder's name comes before a file's, and where no name tells
everything is "train". Unlike there, what names no split is not left out without a word.
"""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath

from datasets.data_files import NON_WORDS_CHARS, SPLIT_KEYWORDS

from seppo_fast.data.rows import printable
from seppo_fast.errors import UserError

TRAIN, ALL = "train", "all"
EXAMPLES = 3
KEYWORDS = {keyword: str(split) for split, keywords in SPLIT_KEYWORDS.items() for keyword in keywords}
WORD = re.compile(rf"(?<![^{NON_WORDS_CHARS}])({'|'.join(KEYWORDS)})(?![^{NON_WORDS_CHARS}])", re.IGNORECASE)
SHARDED = re.compile(r"(?:data/)?([^/]+?)-\d{5}-of-\d{5}[^/]*")


def split_named(part: str, wanted: str) -> str | None:
    """The split that a file's or folder's name tells; `wanted` may be one that has no keyword."""
    found = WORD.search(part)
    if found:
        return KEYWORDS[found[1].lower()]
    return wanted if wanted in (part, PurePosixPath(part).stem) else None


def split_of_folders(folders: Iterable[str], wanted: str) -> str | None:
    """The split that the innermost folder with a split's name gives."""
    return next(filter(None, (split_named(part, wanted) for part in reversed(tuple(folders)))), None)


def splits_of(names: Sequence[str], wanted: str) -> list[str | None]:
    """The split of each file, by its name relative to the source's folder; None where the name gives none."""
    sharded = [SHARDED.fullmatch(name) for name in names]
    found = [match for match in sharded if match]
    if any(match[1] in (wanted, *KEYWORDS) or match.string.startswith("data/") for match in found):
        return [match[1] if match else split_of(name, wanted) for name, match in zip(names, sharded, strict=True)]
    return [split_of(name, wanted) for name in names]


def split_of(name: str, wanted: str) -> str | None:
    """The split that a relative path gives: by its folders, else by the file's own name."""
    path = PurePosixPath(name)
    return split_of_folders(path.parent.parts, wanted) or split_named(path.name, wanted)


def canonical(split: str) -> str:
    """`val` is `validation`, as in `datasets`."""
    return KEYWORDS.get(split.lower(), split)


def choose(splits: Iterable[str | None], wanted: str, where: str, examples: Sequence[str] = ()) -> set[str | None]:
    """Those of the `splits` that make up `data.split`; None stands for files that name no split, such as the `examples`."""
    there = set(splits)
    if wanted == ALL:
        return there
    names = {TRAIN if split is None and TRAIN not in there else split for split in there}
    split = wanted if wanted in names else canonical(wanted)
    if split not in names:
        raise UserError(f"seppo.data.split={wanted!r}: {where} has no such split; it has the splits:"
                        f" {', '.join(sorted(filter(None, names)))}")
    if split == TRAIN and None in names:
        few = f" ({', '.join(map(printable, examples[:EXAMPLES]))}{', ...' * (len(examples) > EXAMPLES)})" if examples else ""
        raise UserError(f"seppo.data.split={wanted!r}: {where} has names for the split train, and others that name no split{few}:"
                        f" move these away, into a folder 'train', or take everything with seppo.data.split={ALL!r}")
    return {TRAIN, None} if split == TRAIN else {split}


def files_of_split(files: Sequence[Path], root: Path, wanted: str) -> list[Path]:
    """Those of the files under `root` that are of the split."""
    splits = splits_of([file.relative_to(root).as_posix() for file in files], wanted)
    unnamed = [str(file.relative_to(root)) for file, split in zip(files, splits, strict=True) if split is None]
    chosen = choose(splits, wanted, str(root), unnamed)
    return [file for file, split in zip(files, splits, strict=True) if split in chosen]


def check_file(file: Path, wanted: str) -> None:
    """`UserError` when the source is one file that is not of the split; for the split train it may have any name."""
    if wanted not in (TRAIN, ALL):
        choose(splits_of([file.name], wanted), wanted, str(file))
