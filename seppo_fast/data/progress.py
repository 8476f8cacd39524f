"""The progress bar of the cache of images or clips."""

from tqdm import tqdm

from seppo_fast.data.rows import Source


class Progress:
    """Rows/s and time left for this rank's share; parts of unknown length count as the finished ones' mean."""

    def __init__(self, source: Source, todo: list[int], show: bool, doing: str, unit: str):
        self.left = {part: source.parts[part].count for part in todo}
        self.done: list[int] = []
        self.bar = tqdm(desc=doing, unit=unit, disable=not show, total=self.total(), smoothing=0.05)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def update(self, rows: int) -> None:
        self.bar.update(rows)

    def finished(self, part: int, rows: int) -> None:
        del self.left[part]
        self.done.append(rows)
        self.bar.total = self.total()
        self.bar.refresh()

    def total(self) -> int | None:
        mean = sum(self.done) / len(self.done) if self.done else None
        expected = [mean if count is None else count for count in self.left.values()]
        return None if None in expected else round(sum(self.done) + sum(expected))
