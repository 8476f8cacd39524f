"""Clips as the trainer gets them: streamed by (row, epoch) alone, or cached; what cannot be used is listed."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from data.data_files import listed
from data.video_files import VideoModel, pictures, video_settings, write_csv, write_video

from seppo_fast import config
from seppo_fast.capturing import no_capture
from seppo_fast.data import ClipStream, LatentCache, build_cache, open_source
from seppo_fast.data.video import pyav
from seppo_fast.data.video.clips import clip
from seppo_fast.data.video.prefetcher import Prefetcher
from seppo_fast.data.video.probe import probe
from seppo_fast.errors import UserError
from seppo_fast.models import common
from seppo_fast.models.families import open_directory

CLIPS = 5


@pytest.fixture(scope="module")
def video_model(sd: Path) -> VideoModel:
    return VideoModel(open_directory(sd))


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A CSV of five clips, the first a time-lapse, and four more rows that no run can use."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(CLIPS):
        write_video(folder / f"{i}.{'mp4' if i == 3 else 'webm'}", pictures(12 if i else 3, 20, 28, seed=i))
    whole = (folder / "1.webm").read_bytes()
    for name, content in (("cut.webm", whole[:-99]), ("empty.webm", b""), ("text.mp4", b"words\n" * 99), ("named.mp4", whole)):
        (folder / name).write_bytes(content)
    return write_csv(folder / "clips.csv", [*((i, f"caption {i % 3}", int(i > 0)) for i in range(CLIPS)),
                                            *((name, "bad", 1) for name in ("cut", "empty", "text", "named"))])


def built(model: VideoModel, data: config.Data, folder: Path, **more: object) -> LatentCache | ClipStream:
    source = open_source(data, False, 0, video=True)
    return build_cache(source, model, data, output_dir=folder / "run", needs_loser=False, progress=False, **{"seed": 0, **more})


def streaming(source: Path, folder: Path, video: dict | None = None, **more: object) -> config.Data:
    return video_settings(source, folder, video, **{"crop": "random", "flip": True, "max_skipped": 0.5, **more})


def direct(model: VideoModel, data: config.Data, source: Path, row: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and std (C, F, h, w) without cache, stream or DALI."""
    file = next(source.parent.glob(f"{row}.*"))
    pixels = pyav.decode(clip(f"clips.csv:{row + 2}", file, probe(file), row == 0, data, 0, epoch))
    mean, std = model.encode(model.load_vae("cpu"), pixels[None])
    return mean[0], std[0]


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """As near as two decoders that differ by a grey level here and there."""
    return bool((found - wanted).abs().max() < 0.05 * wanted.std()) and bool((found - wanted).abs().mean() < 0.005 * wanted.std())


def test_rows_of_a_stream(video_model, clips, tmp_path):
    data = streaming(clips, tmp_path)
    stream = built(video_model, data, tmp_path)
    assert isinstance(stream, ClipStream) and len(stream) == CLIPS and stream.shape == (4, 4, 8, 8)
    found = stream.rows([3, 0, 3], [0, 0, 1])
    assert found.mean.shape == found.std.shape == (3, 4, 4, 8, 8) and found.mean.dtype == torch.float32
    for place, (row, epoch) in enumerate([(3, 0), (0, 0), (3, 1)]):
        mean, std = direct(video_model, data, clips, row, epoch)
        assert close(found.mean[place], mean) and close(found.std[place], std)
    assert not close(found.mean[0], found.mean[2])
    assert found.keys == ["clips.csv:5", "clips.csv:2", "clips.csv:5"] and found.captions == ["caption 0", "caption 0", "caption 0"]
    assert stream.prompts.captions([0, 1, 4]) == ["caption 0", "caption 1", "caption 1"]
    assert torch.equal(stream.embeddings([1])["prompt_embeds"], video_model.load_text("cpu")(["caption 0"])["prompt_embeds"])
    reasons = {row["key"]: row["reason"] for row in listed(tmp_path)}
    expected = {7: "truncated", 8: "0 bytes", 9: "unreadable", 10: "its name says .mp4, its content is matroska"}
    assert len(reasons) == 4 and all(text in reasons[f"clips.csv:{line}"] for line, text in expected.items())
    stream.close()


def test_batch_order_and_what_was_announced_change_nothing(video_model, clips, tmp_path):
    data = streaming(clips, tmp_path)
    one, other = built(video_model, data, tmp_path), built(video_model, data, tmp_path)
    places = [(row, epoch) for epoch in (0, 1) for row in (4, 2, 0, 3, 1)]
    together = one.rows(*zip(*places, strict=True))
    other.prefetch([1, 3, 2], [0, 1, 7])
    for place in reversed(range(len(places))):
        row, epoch = places[place]
        alone = other.rows([row], [epoch])
        assert torch.equal(alone.mean[0], together.mean[place]) and torch.equal(alone.std[0], together.std[place])
    one.close()
    other.close()


def test_no_video_is_decoded_while_a_graph_is_captured(video_model, clips, tmp_path):
    """What is announced, and what is waited for, is decoded when the capture has ended."""
    entered, asked, decode = [], threading.Event(), ClipStream._clip

    def noted(self, row, epoch):
        asked.set()
        return decode(self, row, epoch)

    stream = built(video_model, streaming(clips, tmp_path), tmp_path)
    decoder, stream._clip = stream.decoder, noted.__get__(stream)
    stream.decoder = lambda clips: entered.append(no_capture.locked()) or decoder(clips)
    with no_capture:  # as by cuda_graph.capture
        stream.prefetch([0, 1], [0, 0])
        taker = threading.Thread(target=stream.rows, args=([2], [0]))
        taker.start()
        assert asked.wait(60), "the thread has begun, up to the decoder"
        taker.join(0.2)
        assert not entered and taker.is_alive()
    taker.join(60)
    assert entered and not taker.is_alive()
    stream.decoder = decoder
    stream.close()


@pytest.mark.slow
def test_a_fixed_choice_is_cached_and_equals_the_stream(video_model, clips, tmp_path):
    cached = built(video_model, streaming(clips, tmp_path, {"choice": "uniform"}), tmp_path)
    assert isinstance(cached, LatentCache) and cached.shape == (4, 4, 8, 8) and len(cached) == CLIPS
    stream = built(video_model, streaming(clips, tmp_path, {"choice": "uniform"}, cache_latents=False), tmp_path)
    rows = [4, 0, 1, 2, 3]
    torch.testing.assert_close(cached.rows(rows, [9] * 5).mean, stream.rows(rows, [0] * 5).mean, rtol=0, atol=1e-6)
    cached.prefetch(rows, [0] * 5)
    cached.close()
    stream.close()
    assert cached.fingerprint != stream.fingerprint


def test_what_was_probed_is_not_probed_again_and_another_draw_is_another_run(video_model, clips, tmp_path):
    def of(**more: object) -> tuple[str, set[Path]]:
        seed = more.pop("seed", 0)
        stream = built(video_model, streaming(clips, tmp_path, **more), tmp_path, seed=seed)
        stream.close()
        return stream.fingerprint, set((tmp_path / "cache").iterdir())

    first, folders = of()
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.arrow")}
    assert of() == (first, folders)
    others = [of(video={"stride": 3}), of(video={"frames": 5}), of(seed=1), of(resolution=24), of(crop="center")]
    assert len({first, *(fingerprint for fingerprint, _ in others)}) == 6 and all(there == folders for _, there in others)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.arrow")} == written


@pytest.mark.slow
def test_two_ranks_share_the_probing(video_model, clips, tmp_path, monkeypatch):
    monkeypatch.setattr("seppo_fast.data.metadata.ROWS_PER_PART", 2)
    meet = threading.Barrier(2, timeout=60)
    alone = built(video_model, streaming(clips, tmp_path / "alone"), tmp_path / "alone")
    results: dict[int, ClipStream] = {}

    def rank(number: int) -> None:
        results[number] = built(video_model, streaming(clips, tmp_path), tmp_path, rank=number, world=2, barrier=meet.wait)

    ranks = [threading.Thread(target=rank, args=(number,)) for number in (0, 1)]
    for thread in ranks:
        thread.start()
    for thread in ranks:
        thread.join()
    assert results[0].fingerprint == results[1].fingerprint == alone.fingerprint
    for number in (0, 1):
        assert torch.equal(results[number].rows([4, 1], [0, 2]).mean, alone.rows([4, 1], [0, 2]).mean)
        results[number].close()
    alone.close()


def test_too_many_bad_files_stop_the_run(video_model, clips, tmp_path):
    with pytest.raises(UserError, match=r"4 of 9 rows \(44.4%\) cannot be used; seppo.data.max_skipped allows 5.0%"):
        built(video_model, streaming(clips, tmp_path, max_skipped=0.05), tmp_path)
    assert len(listed(tmp_path)) == 4


def test_a_video_that_goes_missing_later_stops_the_run_by_name(video_model, tmp_path):
    for name in "ab":
        write_video(tmp_path / f"{name}.webm", pictures(6))
    source = write_csv(tmp_path / "clips.csv", [("a", "x", 1), ("b", "y", 1)])
    stream = built(video_model, streaming(source, tmp_path), tmp_path)
    (tmp_path / "b.webm").unlink()
    stream.prefetch([0, 1], [0, 0])
    assert stream.rows([0], [0]).mean.isfinite().all()
    with pytest.raises(UserError, match=r"clips.csv:3: .*b.webm was deleted or changed"):
        stream.rows([1], [0])
    assert stream.rows([0], [1]).mean.isfinite().all()
    stream.close()


def test_a_video_replaced_under_its_name_size_and_time_is_noticed_and_a_touched_one_goes_on(video_model, tmp_path):
    one, two = (write_video(tmp_path / f"{name}.mov", pictures(6, seed=seed)).read_bytes() for name, seed in (("a", 0), ("b", 1)))
    one, two = (each + bytes(max(len(one), len(two)) - len(each)) for each in (one, two))  # of one size
    file = tmp_path / "a.mov"
    file.write_bytes(one)
    data = streaming(write_csv(tmp_path / "clips.csv", [("a", "x", 1)]), tmp_path)
    first = built(video_model, data, tmp_path)
    before = first.rows([0], [0]).mean
    times = (file.stat().st_atime_ns, file.stat().st_mtime_ns)
    for touched in ((1, 1), times):
        os.utime(file, ns=touched)
        assert torch.equal(first.rows([0], [0]).mean, before)
    file.write_bytes(two)
    os.utime(file, ns=times)
    with pytest.raises(UserError, match="a.mov was deleted or changed"):
        first.rows([0], [0])
    first.close()
    again = built(video_model, data, tmp_path)
    assert again.fingerprint == first.fingerprint and again.content != first.content
    assert not torch.equal(again.rows([0], [0]).mean, before)
    again.close()


def test_the_vae_never_has_more_pictures_than_the_key_says(video_model, clips, tmp_path, monkeypatch):
    sizes = []
    encode = common.encode
    monkeypatch.setattr(common, "encode", lambda vae, pixels: (sizes.append(len(pixels)), encode(vae, pixels))[1])
    stream = built(video_model, streaming(clips, tmp_path, encode_batch_size=3), tmp_path)
    stream.rows([0, 1], [0, 0])
    stream.close()
    assert sizes == [3, 1, 3, 1]


def test_a_clip_is_described_in_its_shard(video_model, clips, tmp_path):
    built(video_model, streaming(clips, tmp_path), tmp_path).close()
    stream = built(video_model, streaming(clips, tmp_path), tmp_path)
    kept = [json.loads(text) for text in stream.images[list(range(CLIPS))].column("clip").to_pylist()]
    stream.close()
    assert [each["file"] for each in kept] == ["0.webm", "1.webm", "2.webm", "3.mp4", "4.webm"]
    assert [each["facts"]["frames"] for each in kept] == [3, 12, 12, 12, 12] and kept[0]["time_lapse"] is True


class Maker:
    """Squares numbers, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.may_go = threading.Event()
        self.may_go.set()

    def __call__(self, items: list[int]) -> list[int | Exception]:
        self.may_go.wait(30)
        self.asked.append(items)
        return [UserError(f"{item} is no good") if item < 0 else item**2 for item in items]


def settled(ahead: Prefetcher, count: int) -> None:
    """Waits until `count` items are made and nothing is at work."""
    with ahead.changed:
        assert ahead.changed.wait_for(lambda: len(ahead.ready) == count and not ahead.making, 30)


def test_reading_ahead_is_bounded_and_goes_on_when_something_is_taken():
    make = Maker()
    ahead = Prefetcher(make, room=3, at_once=2)
    ahead.announce(range(10))
    settled(ahead, 3)
    assert make.asked == [[0, 1], [2]]
    assert ahead.take([0, 1]) == [0, 1]
    settled(ahead, 3)
    assert make.asked[2:] == [[3, 4]]
    assert ahead.take([9, 2, 9]) == [81, 4, 81]  # one that is not ready comes first
    assert ahead.take([3, 4, 5, 6, 7, 8]) == [9, 16, 25, 36, 49, 64]
    assert sorted(item for items in make.asked for item in items) == list(range(10))
    ahead.close()


def test_false_announcements_do_not_stay():
    make = Maker()
    ahead = Prefetcher(make, room=2, at_once=1)
    ahead.announce([1, 2, 3])
    settled(ahead, 2)
    assert ahead.take([50]) == [2500]
    ahead.announce([51, 52])
    settled(ahead, 2)
    assert set(ahead.ready) == {51, 52}
    ahead.close()


def test_errors_come_to_the_one_who_asks():
    make = Maker()
    ahead = Prefetcher(make, room=4, at_once=4)
    ahead.announce([1, -2, 3])
    settled(ahead, 3)
    assert ahead.take([1]) == [1]
    with pytest.raises(UserError, match="-2 is no good"):
        ahead.take([-2, 3])
    ahead.close()
    broken = Prefetcher(lambda items: [][1], room=1, at_once=1)
    broken.announce([1])
    for _ in range(2):
        with pytest.raises(IndexError):
            broken.take([1])
    broken.close()


def test_announcing_never_waits_and_closing_ends_who_waits():
    make = Maker()
    make.may_go.clear()
    ahead = Prefetcher(make, room=2, at_once=1)
    ahead.announce(range(100))
    waiting: list[BaseException] = []

    def ask() -> None:
        try:
            ahead.take([5])
        except RuntimeError as error:
            waiting.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    closer = threading.Thread(target=ahead.close)
    closer.start()
    thread.join(30)
    make.may_go.set()
    closer.join(30)
    assert not thread.is_alive() and not closer.is_alive() and not ahead.thread.is_alive()
    assert len(waiting) == 1 and "closed" in str(waiting[0])
