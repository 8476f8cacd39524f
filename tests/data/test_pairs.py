"""Preference pairs from every source: which image is the winner, what a run takes of a pair, how the two are framed."""

import io
from pathlib import Path

import pytest
import torch
from data.data_files import cached, image_bytes, pixels, refused, rows_of, settings
from data.pair_files import COUNT, FORMS, LOSERS, WINNERS, contents
from PIL import Image

from seppo_fast import config
from seppo_fast.data.content import Content
from seppo_fast.data.encode import pixels_of
from seppo_fast.data.rows import Identity, Row, read_bytes
from seppo_fast.data.sources import open_source
from seppo_fast.models import Model


@pytest.mark.parametrize("form", FORMS)
def test_every_source_gives_winners_losers_or_either(form: str, tmp_path: Path) -> None:
    write, more = FORMS[form]
    source = write(tmp_path / "s")
    both = rows_of(source, needs_loser=True, **more)
    assert [(row.prompt, *contents(row)) for row in both] == [(f"pair {i}", WINNERS[i], LOSERS[i]) for i in range(COUNT)]
    single = rows_of(source, **more)
    assert [contents(row) for row in single] == [(winner,) for winner in WINNERS] and len({row.key for row in single}) == COUNT
    draws = [[row.image if isinstance(row.image, bytes) else read_bytes(row.image)
              for row in rows_of(source, seed=seed, choose="random", **more)] for seed in range(4)]
    assert all(images[i] in (WINNERS[i], LOSERS[i]) for images in draws for i in range(COUNT))
    assert 3 < sum(images[i] == LOSERS[i] for images in draws for i in range(COUNT)) < 17
    assert "data.choose='random' does not go with method 'dpo'" in refused(source, needs_loser=True, choose="random", **more)


def test_every_source_gives_the_same_cache(model: Model, tmp_path: Path) -> None:
    found = []
    for form in ("pick-a-pic", "datasets", "loser_file_name", "two folders with captions", "tar"):
        data = settings(FORMS[form][0](tmp_path / form), tmp_path, cache_dtype="float32")
        found.append(cached(model, data, tmp_path, needs_loser=True).rows(range(COUNT)))
    assert all(torch.equal(rows.mean, found[0].mean) and torch.equal(rows.loser_mean, found[0].loser_mean) for rows in found)
    assert not torch.equal(found[0].mean, found[0].loser_mean)


def framed(winner: bytes, loser: bytes, key: str, **more: object) -> tuple[torch.Tensor, torch.Tensor]:
    data = config.Data(resolution=16, crop="random", flip=True, **more)
    _, first, second = pixels_of(Row(key, "x", winner, loser), data, 0, Content())
    return first, second


def test_winner_and_loser_are_cropped_and_mirrored_alike() -> None:
    """The loser is the winner's negative, of its size or twice as large: wherever both are cut, they sum up to nothing."""
    smooth = Image.fromarray(pixels(1, 4, 6)).resize((96, 64), Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    smooth.save(stream, "PNG")
    seen = set()
    for times in (1, 2):
        negative = io.BytesIO()
        larger = smooth.resize((96 * times, 64 * times), Image.Resampling.BICUBIC)
        Image.eval(larger, lambda level: 255 - level).save(negative, "PNG")
        for number in range(20):
            first, second = framed(stream.getvalue(), negative.getvalue(), str(number))
            assert (first + second).abs().max() < (0.01 if times == 1 else 0.06)  # a level of 255 is 0.008
            seen.add(first.sum().item())
    assert len(seen) > 8  # crops and flips differ from row to row


def test_a_loser_of_another_shape_is_cut_in_its_middle() -> None:
    first, second = framed(image_bytes(1, height=16, width=20), image_bytes(2, height=40, width=16), "a")
    assert first.shape == second.shape == (3, 16, 16)
    expected = torch.from_numpy(pixels(2, 40, 16)[12:28].transpose(2, 0, 1).copy()) / 127.5 - 1
    assert torch.allclose(second, expected, atol=1e-6) or torch.allclose(second, expected.flip(2), atol=1e-6)


@pytest.mark.parametrize(("form", "loser"), [("loser_file_name", "3.bad.png"), ("two folders", "rejected/3.png"),
                                             ("two folders with captions", "train/rejected/3.png")])
def test_another_loser_is_other_data(form: str, loser: str, tmp_path: Path) -> None:
    source = FORMS[form][0](tmp_path / "s")

    def identities() -> list[Identity]:
        return [open_source(settings(source, tmp_path), needs_loser, 0).identity() for needs_loser in (True, False)]

    pairs, single = identities()
    (source / loser).write_bytes(image_bytes(77, "BMP"))
    others = identities()
    assert others[0].names != pairs.names and others[0].written != pairs.written and others[1] == single
