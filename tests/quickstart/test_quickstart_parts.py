"""Digits, tokenizer, demonstrations and judge of the quickstart."""

import json

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image
from transformers import CLIPTokenizer

from seppo_fast.quickstart.demonstrations import write_demonstrations
from seppo_fast.quickstart.digits import CAPTIONS, Digits, degrade, sloppy_crawl, split_digits
from seppo_fast.quickstart.judge import Judge
from seppo_fast.quickstart.tokenizer import train_tokenizer
from seppo_fast.seeds import generator


@pytest.fixture(scope="module")
def digits():
    return split_digits(0)


@pytest.fixture(scope="module")
def judge(digits):
    return Judge(digits[1], digits[0])


def test_split_is_disjoint_complete_and_seeded(digits):
    learnt, held_out = digits
    assert len(learnt) + len(held_out) == 1797
    assert learnt.pixels.shape[1:] == (3, 16, 16) and 0 <= learnt.pixels.min() and learnt.pixels.max() <= 1
    assert torch.cdist(learnt.pixels.flatten(1), held_out.pixels.flatten(1)).min() > 0
    assert torch.equal(split_digits(0)[0].labels, learnt.labels)
    assert not torch.equal(split_digits(1)[0].labels, learnt.labels)


def test_crawl_has_the_faults_it_is_asked_for(digits):
    learnt, _ = digits
    crawl = sloppy_crawl(learnt, 0, copies=4, wrong_captions=0.3, degraded=0.4)
    assert len(crawl) == 4 * len(learnt)
    wrong = (crawl.labels != learnt.labels.repeat(4)).float().mean().item()
    degraded = (crawl.pixels != learnt.pixels.repeat(4, 1, 1, 1)).flatten(1).any(dim=1).float().mean().item()
    assert wrong == pytest.approx(0.3, abs=0.03) and degraded == pytest.approx(0.4, abs=0.03)
    assert crawl.labels.min() >= 0 and crawl.labels.max() <= 9
    assert crawl.pixels.min() >= 0 and crawl.pixels.max() <= 1
    faultless = sloppy_crawl(learnt, 0, copies=1, wrong_captions=0.0, degraded=0.0)
    assert torch.equal(faultless.pixels, learnt.pixels) and torch.equal(faultless.labels, learnt.labels)


def test_tokenizer_knows_the_captions_words_and_survives_the_disk(tmp_path):
    tokenizer = train_tokenizer(CAPTIONS)
    ids = tokenizer("a handwritten seven").input_ids
    assert tokenizer.convert_ids_to_tokens(ids)[1:-1] == ["a</w>", "handwritten</w>", "seven</w>"]
    assert len({tuple(tokenizer(caption).input_ids) for caption in CAPTIONS}) == 10
    # CLIPTextModel pools where the id is largest.
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    tokenizer.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    padded = loaded("Ünseen wörds, 日本 7!", padding="max_length", truncation=True)
    assert len(padded.input_ids) == 77 == loaded.model_max_length
    assert loaded.decode(padded.input_ids, skip_special_tokens=True) == "ünseen wörds , 日本 7 !"


def test_demonstrations_are_an_image_folder(digits, tmp_path):
    learnt, _ = digits
    few = Digits(learnt.pixels[:12], learnt.labels[:12])
    folder = tmp_path / "demonstrations"
    folder.mkdir()
    (folder / "stale.png").write_bytes(b"left over")
    assert write_demonstrations(folder, few) == 12
    assert not (folder / "stale.png").exists()
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == [CAPTIONS[label] for label in few.labels]
    for row, pixels in zip(rows, few.pixels, strict=True):
        image = np.asarray(Image.open(folder / row["file_name"]))
        assert image.shape == (16, 16, 3)
        assert np.abs(image / 255 - pixels.permute(1, 2, 0).numpy()).max() <= 0.5 / 255 + 1e-6
    by_datasets = load_dataset("imagefolder", data_dir=str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert sorted(by_datasets["text"]) == sorted(row["text"] for row in rows)


def test_judge_reads_real_digits_and_tells_clean_from_degraded(judge, digits):
    learnt, _ = digits
    scores = judge.score(learnt.pixels, learnt.labels.tolist())
    assert scores.prompt_accuracy == judge.accuracy > 0.95
    assert scores.cleanliness == pytest.approx(0.95, abs=0.005)
    assert scores.samples == len(learnt)
    bad = judge.score(degrade(learnt.pixels, generator("test")), learnt.labels.tolist())
    assert bad.cleanliness < 0.1 and bad.prompt_accuracy > 0.8
    wrong = judge.score(learnt.pixels, ((learnt.labels + 1) % 10).tolist())
    assert wrong.prompt_accuracy < 0.05 and wrong.cleanliness == scores.cleanliness


def test_judge_rejects_noise(judge):
    noise = torch.rand(200, 3, 16, 16, generator=generator("noise"))
    scores = judge.score(noise, [index % 10 for index in range(200)])
    assert scores.cleanliness == 0 and scores.prompt_accuracy < 0.3
