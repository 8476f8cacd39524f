"""Rows that cannot be used: listed in the run's folder, and too many of them stop the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seppo_fast.data.latents import Prompts
from seppo_fast.data.rows import Skipped, Source
from seppo_fast.data.shards import replacing
from seppo_fast.errors import UserError
from seppo_fast.models.tokens import cut_off

LISTED = 100  # captions in truncated.jsonl
EXAMPLES = 3  # bad rows that the message quotes
WORTH_STOPPING = 1000  # rows; smaller sets are read to the end, so that the list is whole


def most_skippable(source: Source, share: float) -> float:
    """With more bad rows than this there are too many, however good the rest is; infinite for small sets and unknown counts."""
    counts = [part.count for part in source.parts]
    if None in counts or sum(counts) < WORTH_STOPPING:
        return float("inf")
    return share * sum(counts)


def check_skipped(stamps: list[dict[str, Any]], share: float, name: str, output_dir: Path, write: bool) -> None:
    """Lists the skipped rows; `UserError` when they are too many, or when nothing is left."""
    skipped = [tuple(pair) for stamp in stamps for pair in stamp["skipped"]]
    if write:
        write_skipped(output_dir, skipped)
    read, ties, usable = (sum(stamp[key] for stamp in stamps) for key in ("read", "ties", "rows"))
    if read == 0:
        raise UserError(f"{name} has no rows")
    if len(skipped) > share * (read - ties):
        found = f"{len(skipped)} of {read - ties} rows ({len(skipped) / (read - ties):.1%}) cannot be used"
        raise UserError(too_many(found, skipped, name, output_dir, share))
    if usable == 0:
        raise UserError(f"{name}: nothing is left: of {read} rows {ties} are ties and {len(skipped)} cannot be used")


def stop_early(bad: list[Skipped], name: str, output_dir: Path, share: float) -> None:
    """Stops the run: there are too many bad rows already, and the rest need not be read."""
    skipped = [(row.key, row.reason) for row in bad]
    write_skipped(output_dir, skipped)
    found = f"{len(skipped)} rows so far cannot be used, so the rest was not read"
    raise UserError(too_many(found, skipped, name, output_dir, share))


def too_many(found: str, skipped: list[tuple[str, str]], name: str, output_dir: Path, share: float) -> str:
    """The message for more bad rows than `data.max_skipped` allows."""
    examples = "".join(f"\n  {key}: {reason}" for key, reason in skipped[:EXAMPLES])
    return (f"{name}: {found}; seppo.data.max_skipped allows {share:.1%}. Mend or remove them, or raise it:"
            f"{examples}\n  (all of them: {output_dir / 'skipped.jsonl'})")


def write_skipped(output_dir: Path, skipped: list[tuple[str, str]]) -> None:
    """`skipped.jsonl`: one line a row, with its key and the reason."""
    with replacing(output_dir / "skipped.jsonl") as stream:
        for key, reason in skipped:
            stream.write((json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n").encode())


def tell_truncated(stamps: list[dict[str, Any]], prompts: Prompts, output_dir: Path, say: Callable[[str], None]) -> None:
    """Says how many captions are longer than what the text encoder sees; `truncated.jsonl` has the first of them."""
    cut = [(text, tokens) for stamp in stamps for text, tokens in stamp["cut"]]
    file = output_dir / "truncated.jsonl"
    if not cut:
        file.unlink(missing_ok=True)
        return
    limit = stamps[0]["limit"]
    with replacing(file) as stream:
        for text, tokens in cut[:LISTED]:
            stream.write((json.dumps({"caption": text, "tokens": tokens, "seen": limit}, ensure_ascii=False) + "\n").encode())
    say(f"captions: of {len(prompts.texts) - 1} different ones {cut_off(cut, limit)}; the first {min(len(cut), LISTED)} of them:"
        f" {file}")
