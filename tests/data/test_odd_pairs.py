"""Half a pair, data without losers, and names that could mean another image than the one that is meant."""

import unicodedata
from pathlib import Path

import pytest
from data.data_files import cached, image_bytes, listed, refused, rows_of, samples, settings, write_parquet, write_tar
from data.pair_files import COUNT, LOSERS, WINNERS, captions, contents, dataset, folders, metadata, pickapic, put, two_columns

from seppo_fast.data.rows import Row, Skipped
from seppo_fast.models import Model

HALVES = {
    "parquet": lambda folder: write_parquet(folder / "p.parquet", [
        {"chosen": image_bytes(0), "rejected": image_bytes(1), "text": "good"},
        {"chosen": image_bytes(0), "rejected": b"cut off", "text": "x"}, {"chosen": image_bytes(0), "rejected": None, "text": "x"},
        {"chosen": None, "rejected": image_bytes(1), "text": "x"},
        {"chosen": image_bytes(0), "rejected": image_bytes(0), "text": "x"}]),
    "loser_file_name": lambda folder: metadata(
        put(folder, [image_bytes(0), image_bytes(1), b"cut off"]),
        {"file_name": "0.png", "loser_file_name": "1.png", "text": "good"},
        {"file_name": "0.png", "loser_file_name": "2.png", "text": "x"}, {"file_name": "0.png", "text": "x"},
        {"loser_file_name": "1.png", "text": "x"}, {"file_name": "0.png", "loser_file_name": "0.png", "text": "x"}),
    "tar": lambda folder: write_tar(folder / "a.tar", [
        ("a.png", image_bytes(0)), ("a.loser.png", image_bytes(1)), ("a.txt", b"good"),
        ("b.png", image_bytes(0)), ("b.loser.png", b"cut off"), ("b.txt", b"x"), ("c.png", image_bytes(0)), ("c.txt", b"x"),
        ("d.loser.png", image_bytes(0)), ("d.txt", b"x"),
        ("e.png", image_bytes(0)), ("e.rejected.png", image_bytes(0)), ("e.txt", b"x")]),
}
REASONS = {"parquet": ["the loser: not an image", "the loser: no image", "no image", "the same picture"],
           "loser_file_name": ["the loser: not an image", "the loser: no image file name", "no image file name",
                               "the same picture"],
           "tar": ["the loser: not an image", "no loser; the sample has: png, txt", "no image; the sample has: loser.png, txt",
                   "the same picture"]}


@pytest.mark.parametrize("form", HALVES)
def test_half_a_pair_is_skipped_and_counted(form: str, model: Model, tmp_path: Path) -> None:
    data = settings(HALVES[form](tmp_path / "s"), tmp_path, max_skipped=1.0)
    cache = cached(model, data, tmp_path, needs_loser=True)
    assert cache.rows([0]).captions == ["good"] and len(cache) == 1
    found = [row["reason"] for row in listed(tmp_path)]
    assert len(found) == 4 and all(part in reason for part, reason in zip(REASONS[form], found, strict=True)), found
    # whatever the losers are, methods without them only want winners
    assert len(cached(model, data, tmp_path)) == 4


def test_files_of_two_folders_that_have_no_partner(model: Model, tmp_path: Path) -> None:
    folder = captions(tmp_path / "s") / "train"
    (folder / "rejected" / "1.png").unlink()
    (folder / "chosen" / "2.png").unlink()
    (folder / "other.png").write_bytes(image_bytes(8))
    (folder / "other.txt").write_text("of no pair")
    data = settings(tmp_path / "s", tmp_path, max_skipped=0.9)
    assert len(cached(model, data, tmp_path, needs_loser=True)) == 3
    reasons = {row["key"]: row["reason"] for row in listed(tmp_path)}
    words = {"train/chosen/1.png": "the loser: no such image file", "train/other.png": "no loser: it is in no folder of winners",
             "train/rejected/2.png": "no winner: no file of this name"}
    assert reasons.keys() == words.keys() and all(reasons[key].startswith(start) for key, start in words.items())
    assert [row.key for row in rows_of(tmp_path / "s")] == [
        "train/other.png", *(f"train/chosen/{i}.png" for i in (0, 1, 3, 4))]


SINGLE = {
    "parquet": (lambda folder: write_parquet(folder / "p.parquet", [{"image": image_bytes(), "text": "x"}]),
                "'chosen' and 'rejected'"),
    "folder": (lambda folder: metadata(put(folder, WINNERS), {"file_name": "0.png", "text": "x"}), "loser_file_name"),
    "captions": (lambda folder: put(put(folder, WINNERS), [b"x"], ".txt"), "folders 'chosen' and 'rejected'"),
    "tar": (lambda folder: write_tar(folder / "a.tar", samples(2)), "KEY.loser.jpg"),
}


@pytest.mark.parametrize("form", SINGLE)
def test_data_without_losers_say_what_is_needed(form: str, tmp_path: Path) -> None:
    write, remedy = SINGLE[form]
    said = refused(write(tmp_path / "s"), needs_loser=True)
    assert "method 'dpo' needs pairs of images" in said and "has one image a row" in said and remedy in said
    assert remedy in refused(tmp_path / "s", choose="random") and isinstance(rows_of(tmp_path / "s")[0], Row)


def test_columns_that_may_mean_something_else(tmp_path: Path) -> None:
    file = two_columns("chosen", "rejected")(tmp_path)
    assert "both 'chosen'" in refused(file, image_column="chosen", loser_column="chosen")
    assert "seppo.data.loser_column='looser'" in refused(file, loser_column="looser")
    assert contents(rows_of(file, needs_loser=True, image_column="rejected", loser_column="chosen")[0]) == (LOSERS[0], WINNERS[0])
    assert "needs pairs" in refused(file, needs_loser=True, image_column="rejected")
    labelled = pickapic(tmp_path / "p")
    for keys in ({"loser_column": "jpg_1"}, {"image_column": "jpg_0", "loser_column": "jpg_1"}):
        assert "label_0 says of each row" in refused(labelled, needs_loser=True, **keys)
    three = [{"image": image_bytes(1), "chosen": image_bytes(2), "rejected": image_bytes(3), "text": "an edit"}]
    file = write_parquet(tmp_path / "e" / "p.parquet", three)
    assert "several columns that may hold the image: chosen, image" in refused(file)
    assert contents(rows_of(file, needs_loser=True, image_column="chosen")[0]) == (image_bytes(2), image_bytes(3))
    lone = write_parquet(tmp_path / "l" / "p.parquet", [{"rejected": image_bytes(1), "text": "x"}])
    assert "has no image column" in refused(lone)
    several = [{"image": image_bytes(1), "rejected": image_bytes(2), "loser": image_bytes(3), "text": "x"}]
    file = write_parquet(tmp_path / "m" / "p.parquet", several)
    assert contents(rows_of(file)[0]) == (image_bytes(1),)
    assert "may hold the loser: rejected, loser" in refused(file, needs_loser=True)


def test_answers_about_an_image_are_no_images(tmp_path: Path) -> None:
    """`chosen` and `rejected` of a language model's preference data are texts."""
    answers = {"text": "what is it?", "chosen": "a cat", "rejected": "a dog"}
    file = write_parquet(tmp_path / "p.parquet", [{"image": image_bytes(1)} | answers])
    folder = metadata(put(tmp_path / "f", WINNERS), {"file_name": "0.png"} | answers)
    for source in (file, folder):
        assert contents(rows_of(source)[0])[0] in (image_bytes(1), WINNERS[0])
        assert "several columns that may hold the image" in refused(source, needs_loser=True)
    chats = {"prompt": "x", "chosen": [{"role": "user"}], "rejected": [{"role": "user"}]}
    assert "has no image column" in refused(write_parquet(tmp_path / "c" / "p.parquet", [chats]))


def test_declared_image_columns_whose_names_do_not_tell(tmp_path: Path) -> None:
    source = dataset("left", "right")(tmp_path)
    assert "several columns that may hold the image: right, left" in refused(source)
    assert contents(rows_of(source, needs_loser=True, image_column="left", loser_column="right")[0]) == (WINNERS[0], LOSERS[0])


def test_several_losers_of_one_sample(tmp_path: Path) -> None:
    members = [("0.png", WINNERS[0]), ("0.loser.png", LOSERS[0]), ("0.rejected.png", LOSERS[1]), ("0.txt", b"x")]
    file = write_tar(tmp_path / "a.tar", members)
    (row,) = rows_of(file, needs_loser=True)
    assert isinstance(row, Skipped) and "several losers (" in row.reason and "seppo.data.loser_column" in row.reason
    assert contents(rows_of(file, needs_loser=True, loser_column="rejected.png")[0]) == (WINNERS[0], LOSERS[1])
    assert "seppo.data.loser_column='x.png'" in refused(file, loser_column="x.png")
    assert "both 'png'" in refused(file, image_column="png", loser_column="png")


def test_losers_keep_to_their_folder(tmp_path: Path) -> None:
    folder = metadata(put(tmp_path / "f", WINNERS), {"file_name": "0.png", "loser_file_name": "../1.png", "text": "x"})
    (row,) = rows_of(folder, needs_loser=True)
    assert isinstance(row, Skipped) and "the loser: the image '../1.png' is outside the data folder" in row.reason
    (row,) = rows_of(folder, needs_loser=True, allow_outside=True)
    assert row.loser == folder / "../1.png"


def test_a_loser_of_another_split_is_not_trained_on(tmp_path: Path) -> None:
    put(tmp_path / "train", WINNERS), put(tmp_path / "test", LOSERS)
    rows = [{"file_name": "train/0.png", "loser_file_name": name, "text": "x"} for name in ("test/0.png", "train/1.png")]
    bad, good = rows_of(metadata(tmp_path, *rows), needs_loser=True)
    assert bad.reason == "the loser: test/0.png is of the split test" and contents(good) == (WINNERS[0], WINNERS[1])
    assert len([row for row in rows_of(tmp_path, needs_loser=True, split="all") if isinstance(row, Row)]) == 2


def test_two_folders_and_images_beside_them(tmp_path: Path) -> None:
    """Where the named files are beside the metadata, folders called so are something else."""
    folder = folders("chosen", "rejected")(tmp_path / "s")
    put(folder, [image_bytes(50 + i) for i in range(COUNT)])
    assert contents(rows_of(folder)[0]) == (image_bytes(50),)
    assert "has one image a row" in refused(folder, needs_loser=True)


@pytest.mark.parametrize("form", ["NFC", "NFD"])
@pytest.mark.parametrize("captioned", [True, False])
def test_two_folders_of_which_a_mac_wrote_one(form: str, captioned: bool, tmp_path: Path) -> None:
    for folder, image in (("chosen", WINNERS[0]), ("rejected", LOSERS[0])):
        name = unicodedata.normalize("NFC" if (form == "NFC") == (folder == "chosen") else "NFD", "b\u00e4r")
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{name}.png").write_bytes(image)
        if captioned and folder == "chosen":
            (tmp_path / folder / f"{name}.txt").write_text("x")
    if not captioned:
        metadata(tmp_path, {"file_name": "b\u00e4r.png", "text": "x"})
    assert [contents(row) for row in rows_of(tmp_path, needs_loser=True)] == [(WINNERS[0], LOSERS[0])]


@pytest.mark.parametrize("needs_loser", [True, False])
def test_losers_that_metadata_list_as_images_are_no_winners(needs_loser: bool, tmp_path: Path) -> None:
    folder = folders("chosen", "rejected", "chosen/{}.png")(tmp_path)
    with open(folder / "metadata.jsonl", "a") as file:
        file.write('{"file_name": "rejected/0.png", "text": "x"}\n')
    *good, bad = rows_of(folder, needs_loser=needs_loser)
    assert [row.image.parent.name for row in good] == ["chosen"] * COUNT
    assert bad.reason == "rejected/0.png is in the losers' folder beside the winners'; a row names the winner"
