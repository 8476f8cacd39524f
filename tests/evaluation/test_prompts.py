"""Prompt sets in every form that they are published in, and what is said of those that cannot be read."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from seppo_fast.errors import UserError
from seppo_fast.evaluation.prompts import read_prompts


def texts(*given: object, **options: object) -> list[str]:
    return [prompt.text for prompt in read_prompts([str(each) for each in given], **options)]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.txt", "a cat\n\n  a dog, \"big\" \r\nein Bär\u2028im Wald\n")
    assert texts(file) == ["a cat", 'a dog, "big"', "ein Bär\u2028im Wald"]
    assert {prompt.sets for prompt in read_prompts([str(file)])} == {("mine",)}


def test_jsonl_has_objects_or_strings(tmp_path: Path) -> None:
    lines = [{"prompt": "a cat", "style": "photo"}, "a dog", {"caption": "a cow", "clip": 3}]
    file = write(tmp_path / "p.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    found = read_prompts([str(file)])
    assert [(prompt.text, prompt.sets) for prompt in found] == [("a cat", ("p", "p/photo")), ("a dog", ("p",)), ("a cow", ("p",))]


def test_parti_prompts_keep_their_quotes(tmp_path: Path) -> None:
    rows = 'Prompt\tCategory\tChallenge\tNote\n"hello" on a sign\tWorld Knowledge\tWriting\t\nthe "x\tAnimals\tBasic\tn\n'
    assert texts(write(tmp_path / "PartiPrompts.tsv", rows)) == ['"hello" on a sign', 'the "x']


def test_hpsv2_is_a_folder_of_lists_one_a_style(tmp_path: Path) -> None:
    for style, prompts in (("anime", ["a", "b"]), ("photo", ["c"])):
        write(tmp_path / f"{style}.json", json.dumps(prompts))
    found = read_prompts([f"hpsv2={tmp_path}"])
    assert [(prompt.text, prompt.sets) for prompt in found] == [
        ("a", ("hpsv2", "hpsv2/anime")), ("b", ("hpsv2", "hpsv2/anime")), ("c", ("hpsv2", "hpsv2/photo"))]
    one = write(tmp_path / "all.json", json.dumps({"anime": ["a", "b"], "photo": ["c"]}))
    assert read_prompts([f"hpsv2={one}"]) == found


def test_pick_a_pic_counts_a_prompt_once_and_quietly(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    table = pyarrow.table({"caption": ["x", "y", "x", "z"], "jpg_0": [b"1"] * 4})
    pyarrow.parquet.write_table(table, tmp_path / "validation_unique.parquet")
    assert texts(tmp_path / "validation_unique.parquet") == ["x", "y", "z"]
    assert texts(tmp_path / "validation_unique.parquet", limit=2) == ["x", "y"]
    assert capsys.readouterr().out == ""


def test_chronomagic_names_the_real_clips(tmp_path: Path) -> None:
    file = write(tmp_path / "ChronoMagic-Bench-150.csv", 'videoid,name\nabc,"A flower, opening"\n007,Dough rises\n')
    assert [(prompt.text, prompt.clip) for prompt in read_prompts([str(file)])] == [
        ("A flower, opening", "abc"), ("Dough rises", "007")]


def test_a_prompt_that_comes_again_is_left_out_and_named(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.txt", "x\ny\nx\n"), write(tmp_path / "b.txt", "y\nz\n")
    said: list[str] = []
    assert texts(first, second, say=said.append) == ["x", "y", "z"]
    assert len(said) == 2 and "line 3" in said[0] and "'x'" in said[0] and "b.txt, line 1" in said[1]


@pytest.mark.parametrize(("name", "content", "message"), [
    ("p.txt", "", "p.txt has no prompts"),
    ("p.txt", "\n  \n", "p.txt has no prompts"),
    ("p.jsonl", '{"prompt": "a"}\n{"prompt": ', "line 2: not valid JSON"),
    ("p.jsonl", '{"prompt": " "}', "line 1: ' ' is no prompt"),
    ("p.jsonl", '{"prompt": 3}', "line 1: 3 is no prompt"),
    ("p.jsonl", "[1]", "neither a JSON object nor a string"),
    ("p.csv", "id,words\n1,a\n", "no column prompt, caption, text, name, but id, words"),
    ("p.csv", 'prompt\n"open\nquote\n', "look at the quotes"),
    ("p.json", '{"anime": "x"}', "a list of prompts is needed"),
    ("p.json", "[", "not valid JSON"),
    ("p.json", '{"anime": ["a", null]}', "anime, number 2: None is no prompt"),
    ("p.parquet", "no parquet", "no readable parquet file"),
    ("p.docx", "x", "what kind of file is that"),
    ("p.csv", "id,prompt\n1,a fox\n2,a fox, sitting\n", "line 3: 3 values where the header has 2 names; is a text with a comma"),
    ("p.csv", "prompt\na fox, sitting\n", "line 2: 2 values where the header has 1 name;"),
    ("p.csv", "id,prompt\n1\n", "line 2: 1 value where the header has 2 names; are some missing"),
    ("p.tsv", "Prompt\tCategory\na\tb\tc\n", "line 2: 3 values where the header has 2 names"),
    ("p.csv", "prompt,Prompt \na,b\n", "has the column prompt twice"),
    ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1: prompt is given twice"),
    ("p.jsonl", '{"prompt": "a", "Prompt": "b"}', "line 1 has the column prompt twice"),
    ("p.json", '{"anime": ["a"], "anime": ["b"]}', "anime is given twice"),
    ("p.jsonl", "{'prompt': 'a'}", "looks like a Python dict"),
    ("p.jsonl", '[\n{"prompt": "a"}\n]', "begins a JSON array over several lines"),
])
def test_what_cannot_be_read_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        read_prompts([str(write(tmp_path / name, content))])
    assert name in str(raised.value)


def test_other_encodings_missing_files_and_equal_names_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Bär".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin.txt: not a UTF-8 text file \(byte 1\)"):
        texts(tmp_path / "latin.txt")
    with pytest.raises(UserError, match="nothing.txt does not exist"):
        texts(tmp_path / "nothing.txt")
    (tmp_path / "other").mkdir()
    one, two = write(tmp_path / "a.txt", "x"), write(tmp_path / "other" / "a.txt", "y")
    with pytest.raises(UserError, match="another set called 'a'"):
        texts(one, two)
    assert texts(one, f"b={two}") == ["x", "y"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no .json files in this folder"):
        texts(tmp_path / "empty")


def test_spreadsheets_ways_are_read_rightly(tmp_path: Path) -> None:
    assert texts(write(tmp_path / "a.csv", " Prompt ,Style\n\n   \na fox,\n")) == ["a fox"]
    assert texts(write(tmp_path / "b.tsv", "Prompt\tNote\na fox\n")) == ["a fox"]
    (tmp_path / "c.csv").write_text("prompt\na fox\n", encoding="utf-16")
    (tmp_path / "d.csv").write_text("prompt\ra fox\rtwo\r", newline="")
    assert texts(tmp_path / "c.csv") == ["a fox"] and texts(tmp_path / "d.csv") == ["a fox", "two"]
