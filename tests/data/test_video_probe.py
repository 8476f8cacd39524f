"""Whether a video can be used is known before it is: what is found, and what it turns out to be."""

import shutil
from pathlib import Path

import av
import numpy as np
import pytest
from data.data_files import image_bytes
from data.video_files import pictures, write_video

from seppo_fast.data.rows import BadRow
from seppo_fast.data.video.probe import probe


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The content of good videos, by what they are."""
    folder, frames = tmp_path_factory.mktemp("whole"), pictures(20)
    files = {"webm": write_video(folder / "a.webm", frames), "mkv": write_video(folder / "a.mkv", frames),
             "mp4": write_video(folder / "a.mp4", frames), "mov": write_video(folder / "a.mov", frames),
             "fast.mp4": write_video(folder / "b.mp4", frames, options={"movflags": "faststart"})}
    return {name: file.read_bytes() for name, file in files.items()}


def refused(file: Path, content: bytes | None = None) -> str:
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BadRow) as caught:
        probe(file)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "codec"), [("webm", "vp9"), ("mkv", "h264"), ("mp4", "h264"), ("mov", "mjpeg"),
                                             ("fast.mp4", "h264")])
def test_a_good_file_is_whole_and_any_cut_is_found(whole, kind, codec, tmp_path):
    file = tmp_path / f"a.{kind}"
    content = whole[kind]
    file.write_bytes(content)
    facts = probe(file)
    assert (facts.frames, facts.width, facts.height, facts.codec, facts.quarters) == (20, 32, 24, codec, 0)
    assert facts.stamp == (len(content), file.stat().st_mtime_ns)
    for cut in (1, len(content) // 3, len(content) - 1):
        reason = refused(file, content[:cut])
        assert "truncated" in reason, (cut, reason)
    assert "0 bytes" in refused(file, b"")


def test_a_wrong_name_no_video_and_nothing_at_all(whole, tmp_path):
    assert refused(tmp_path / "a.mp4", whole["webm"]) == "its name says .mp4, its content is matroska,webm"
    assert "its name says .webm, its content is mov,mp4" in refused(tmp_path / "a.webm", whole["mp4"])
    assert "its name says .mp4, its content is png" in refused(tmp_path / "b.mp4", image_bytes())
    assert "unreadable" in refused(tmp_path / "c.mp4", b"these are words, not pictures\n" * 99)
    assert "unreadable" in refused(tmp_path / "c.webm", bytes(5000))
    assert refused(tmp_path / "d.gif", whole["mp4"]) == "d.gif is none of .mp4, .mov, .webm, .mkv"
    assert "no such video file" in refused(tmp_path / "none.mp4")
    (tmp_path / "folder.mp4").mkdir()
    assert "cannot read" in refused(tmp_path / "folder.mp4")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=48000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate, silence.pts = 48000, 0
        container.mux([*sound.encode(silence), *sound.encode(None)])
    assert refused(tmp_path / "sound.mp4") == "it has no video stream"


def test_damage_that_can_be_seen(whole, tmp_path):
    content = whole["mkv"]
    found = []
    for place in range(len(content) // 3, len(content) - 400, 53):
        damaged = bytearray(content)
        damaged[place:place + 40] = bytes(b ^ 0x5A for b in damaged[place:place + 40])
        (tmp_path / "a.mkv").write_bytes(damaged)
        try:
            assert probe(tmp_path / "a.mkv").frames == 20, place  # a part is lost only with notice
            found.append("")
        except BadRow as bad:
            found.append(str(bad))
    assert 3 * sum(map(bool, found)) > len(found) and any("does not fit" in reason for reason in found), found


def test_changing_sizes_and_odd_turns(tmp_path):
    first, second = (write_video(tmp_path / f"{size}.mkv", pictures(4, size, size), "mjpeg") for size in (16, 32))
    with av.open(str(tmp_path / "both.mkv"), "w") as out, av.open(str(first)) as one, av.open(str(second)) as two:
        stream = out.add_stream_from_template(one.streams.video[0])
        for offset, source in ((0, one), (400, two)):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.pts + offset, stream
                    out.mux(packet)
    assert refused(tmp_path / "both.mkv") == "its pictures change their size: 16x16, then 32x32"
    assert "no multiple of 90 degrees" in refused(write_video(tmp_path / "a.mp4", pictures(2), rotation=30))


@pytest.mark.parametrize(("rotation", "quarters"), [(90, 1), (180, 2), (-90, 3), (270, 3)])
def test_rotation_is_what_ffmpeg_itself_says(rotation, quarters, tmp_path):
    file = write_video(tmp_path / "a.mp4", pictures(2), rotation=rotation)
    assert probe(file).quarters == quarters and not probe(file).mirrored
    with av.open(str(file)) as container:
        assert next(container.decode(video=0)).rotation % 360 == 90 * quarters


def test_mirrors_sound_uneven_times_and_pixels_that_are_not_square(tmp_path):
    frames = pictures(6)
    assert probe(write_video(tmp_path / "a.mp4", frames, mirrored=True)).mirrored
    assert probe(write_video(tmp_path / "b.webm", frames, audio=True)).frames == 6
    assert probe(write_video(tmp_path / "c.webm", frames, times=[0, 10, 500, 510, 2000, 2001])).frames == 6
    assert probe(write_video(tmp_path / "d.mp4", frames, pixel="2/1")).pixel == (2, 1)
    assert probe(write_video(tmp_path / "e.mp4", frames[:1])).frames == 1
    assert probe(write_video(tmp_path / "f.webm", pictures(2, 17, 23))).width == 23
    shutil.copy(tmp_path / "a.mp4", tmp_path / "A.MP4")
    assert probe(tmp_path / "A.MP4").frames == 6


def test_words_in_no_known_encoding_do_not_matter(tmp_path):
    file = tmp_path / "a.mkv"
    with av.open(str(file), "w") as container:
        container.metadata["title"] = "a title"
        stream = container.add_stream("mjpeg", rate=10)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuvj420p"
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(pictures(1, 16, 16)[0], format="rgb24")), *stream.encode(None)])
    content = file.read_bytes()
    assert b"a title" in content
    file.write_bytes(content.replace(b"a title", b"a \xff\xfetle"))
    assert probe(file).frames == 1
