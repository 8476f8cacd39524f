"""Clips, demonstrations, judge and report of the video quickstart."""

import csv
import json

import av
import numpy as np
import pytest
import torch
from PIL import Image

from seppo_fast.configfile import batch_plan, load_config
from seppo_fast.quickstart.digits import Digits, degrade, split_digits
from seppo_fast.quickstart.steps import overrides
from seppo_fast.quickstart.video.clips import CAPTIONS, FRAMES, TRAVEL, Clips, clips_of, random_clips, spoil_motion, spoiled
from seppo_fast.quickstart.video.demonstrations import write_demonstrations
from seppo_fast.quickstart.video.judge import Judge, direction, likeness, travel
from seppo_fast.quickstart.video.report import loop, stills, table, write_result
from seppo_fast.seeds import generator


@pytest.fixture(scope="module")
def digits():
    return split_digits(0)


@pytest.fixture(scope="module")
def judge(digits):
    return Judge(digits[1], digits[0], samples=80)


@pytest.fixture(scope="module")
def clips(digits):
    return random_clips(digits[0], 80, generator("test"))


def test_a_digit_goes_over_the_whole_canvas_in_its_caption_s_direction(digits):
    square = Digits(torch.ones(4, 3, 16, 16), torch.tensor([7, 7, 7, 8]))
    clips = clips_of(square, torch.tensor([0, 1, 2, 3]), torch.tensor([0, 3, 16, 5]))
    assert [CAPTIONS[label] for label in clips.labels] == [
        "a seven moving left", "a seven moving right", "a seven moving up", "an eight moving down"]
    assert clips.pixels.sum(dim=(2, 3, 4)).eq(256).all()  # never cut off at the canvas' edge
    corners = [[(int(rows[0]), int(columns[0])) for rows, columns in (torch.where(clip[frame, 0] > 0) for frame in (0, -1))]
               for clip in clips.pixels]
    assert corners == [[(0, 16), (0, 0)], [(3, 0), (3, 16)], [(16, 16), (0, 16)], [(0, 5), (16, 5)]]


def test_random_clips_are_even_in_directions_and_seeded(digits, clips):
    assert clips.pixels.shape == (80, FRAMES, 1, 32, 32) and len(clips) == 80
    assert (clips.labels % 4).bincount().tolist() == [20] * 4
    again = random_clips(digits[0], 80, generator("test"))
    assert torch.equal(again.pixels, clips.pixels) and torch.equal(again.labels, clips.labels)


def test_clips_are_spoiled_as_asked_for(digits):
    def crawl(**faults: float) -> Clips:
        none = {"wrong_directions": 0.0, "bad_motion": 0.0, "degraded": 0.0}
        return spoiled(random_clips(digits[0], 200, generator("crawl")), **none | faults, seed=0)

    clean, wrong, jumping, dirty = crawl(), crawl(wrong_directions=0.4), crawl(bad_motion=0.5), crawl(degraded=0.5)
    assert (direction(clean.pixels) == clean.labels % 4).all()
    assert (wrong.labels != clean.labels).float().mean().item() == pytest.approx(0.4, abs=0.1)
    assert torch.equal(wrong.labels // 4, clean.labels // 4) and torch.equal(wrong.pixels, clean.pixels)
    changed = (jumping.pixels != clean.pixels).flatten(1).any(dim=1)
    assert changed.float().mean().item() == pytest.approx(0.5, abs=0.1)
    changed = (dirty.pixels != clean.pixels).flatten(1).any(dim=1)
    assert changed.float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert (direction(dirty.pixels) == clean.labels % 4).all()  # bad pictures that move well
    assert dirty.pixels.min() >= 0 and dirty.pixels.max() <= 1


def test_demonstrations_are_vp9_files_and_their_csv(clips, tmp_path):
    few = Clips(clips.pixels[:5], clips.labels[:5])
    folder = tmp_path / "demonstrations"
    path = write_demonstrations(folder, few)
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["name"], row["is_transmit"]) for row in rows] == [(CAPTIONS[label], "0") for label in few.labels]
    for row, pixels in zip(rows, few.pixels, strict=True):
        with av.open(str(folder / f"{row['videoid']}.webm")) as container:
            assert container.streams.video[0].codec_context.name in ("vp9", "libvpx-vp9")
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert frames.shape == (FRAMES, 32, 32, 3)
        assert np.abs(frames / 255 - pixels.permute(0, 2, 3, 1).numpy()).max() < 0.05
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    (folder / "stale.webm").write_bytes(b"left over")
    write_demonstrations(folder, few)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_motion_is_measured_in_pixels(clips):
    assert (direction(clips.pixels) == clips.labels % 4).all()
    along = travel(clips.pixels).abs().max(dim=1).values
    assert along.min() > 0.95 * TRAVEL and along.max() < 1.05 * TRAVEL
    torch.testing.assert_close(travel(clips.pixels.flip(1)), -travel(clips.pixels), atol=0.01, rtol=0)
    assert (direction(degrade(clips.pixels.flatten(0, 1), generator("page")).view_as(clips.pixels)) == clips.labels % 4).all()


def test_what_does_not_move_has_no_direction(clips):
    still = clips.pixels[:, 3:4].expand(-1, FRAMES, -1, -1, -1)
    assert (direction(still) == -1).all() and travel(still).abs().max() < 1e-4
    assert (direction(torch.rand(20, FRAMES, 1, 32, 32, generator=generator("noise"))) == -1).all()
    assert (direction(torch.zeros(2, FRAMES, 1, 32, 32)) == -1).all()


@pytest.mark.slow
def test_judge_knows_real_clips(judge, clips):
    assert judge.accuracy == 1.0
    scores = judge.score(clips.pixels, clips.labels.tolist())
    assert scores.direction_accuracy == scores.moving == 1.0 and scores.samples == 80
    assert scores.ssim > 0.8 and scores.psnr > 18 and scores.frechet_distance < 4
    turned = judge.score(clips.pixels, (clips.labels // 4 * 4 + (clips.labels + 1) % 4).tolist())
    assert turned.direction_accuracy == 0 and turned.moving == 1 and turned.ssim < scores.ssim
    assert turned.frechet_distance == scores.frechet_distance  # it knows nothing of prompts
    assert judge.distance(judge.held_out.pixels) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_grows_with_the_fault(judge, clips):
    shifted = [judge.distance(clips.pixels.roll(pixels, dims=3)) for pixels in (0, 2, 4, 8)]
    assert shifted == sorted(shifted) and shifted[-1] > 4 * shifted[0]
    assert judge.distance(spoil_motion(clips.pixels, generator("spoil"))) > 3 * shifted[0]


def test_pairing_is_the_nearest_clip_of_the_same_caption(judge, clips):
    own = judge.held_out.pixels[:6]
    assert torch.equal(judge.nearest(own, judge.held_out.labels[:6]), own)
    assert likeness(own, own)[0] == pytest.approx(1, abs=1e-4)
    pairs = judge.nearest(clips.pixels[:6], clips.labels[:6])
    for clip, pair, label in zip(clips.pixels, pairs, clips.labels, strict=False):
        errors = (judge.held_out.pixels - clip).square().mean(dim=(1, 2, 3, 4))
        errors[judge.held_out.labels != label] = torch.inf
        assert torch.equal(pair, judge.held_out.pixels[errors.argmin()])


@pytest.fixture
def rows():
    keys = ("loss", "seconds_sampling", "seconds_training", "seconds_data")
    return [{"update": k, "iteration": k, "aaf_rate": 0.5, "implicit_acc": 0.25 * k} | dict.fromkeys(keys, 0.5) for k in (1, 2)]


@pytest.mark.slow
def test_table_and_result_state_what_was_measured(judge, clips, rows, tmp_path):
    labels = clips.labels.tolist()
    before, after = judge.score(clips.pixels.flip(1), labels), judge.score(clips.pixels, labels)
    text = table(before, after, judge, rows)
    lines = {line[:22].strip(): line[22:].split() for line in text.splitlines()}
    assert lines["direction accuracy"] == ["0.0%", "100.0%", "+100.0", "100.0%"]
    assert lines["SSIM"][:2] == [f"{before.ssim:.3f}", f"{after.ssim:.3f}"]
    assert lines["implicit accuracy"] == ["0.25", "0.50"]
    write_result(tmp_path / "result.json", before, after, judge, rows, {"base": 1.26}, {"seed": 0})
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["base"]["direction_accuracy"] == 0 and result["seppo"]["direction_accuracy"] == 1
    assert result["judge"]["clean_clips"]["psnr"] == judge.real.psnr and result["seconds"] == {"base": 1.3}
    assert result["versions"]["torchmetrics"] and result["machine"]["cpu"]


def test_pictures_show_base_left_and_trained_right(clips, tmp_path):
    white, labels = torch.ones_like(clips.pixels), list(range(40)) * 2
    white[:, ::2] = 0.95  # frames that are alike would become one
    loop(tmp_path / "loop.webp", clips.pixels * 0, white, labels)
    with Image.open(tmp_path / "loop.webp") as picture:
        assert picture.n_frames == FRAMES and picture.info["loop"] == 0
        picture.seek(FRAMES - 1)
        page = np.asarray(picture.convert("L"))[24:]
    width = (page.shape[1] - 48 - 16) // 2
    assert np.median(page[:, 48 : 48 + width]) < 20 and np.median(page[:, 48 + width + 16 :]) > 225
    stills(tmp_path / "stills.png", clips.pixels * 0, white, labels)
    middle = np.asarray(Image.open(tmp_path / "stills.png").convert("L"))[350]
    assert (middle[:550] == 0).sum() > 300 and (middle[600:] == 0).sum() < 20


def test_shipped_configuration_is_valid_and_is_the_method(tmp_path):
    config = load_config("quickstart_video.json", overrides(tmp_path, seed=3))
    seppo = config.seppo
    assert (seppo.method, seppo.reference, seppo.flipper, seppo.seed) == ("seppo", "uniform", "aaf", 3)
    assert seppo.model.lora.layers and seppo.data.format == "video" and not seppo.data.flip
    assert seppo.data.resolution == 32 and seppo.data.video.frames == FRAMES
    schedule = config.deepspeed["scheduler"]["params"]
    assert schedule["total_num_steps"] == seppo.iterations * seppo.updates_per_iteration
    assert batch_plan(config.deepspeed, 1).size == 8
