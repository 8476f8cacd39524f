"""Videos that parse as something else than they are: colours beyond SDR, transparency, several streams, edit lists, two fields."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from data.test_video_decode import LEVEL, clip_of, needs_dali, shown
from data.test_video_probe import refused
from data.video_files import VP9, pictures, video_settings, write_video

from seppo_fast.data.framing import Framing
from seppo_fast.data.video import dali, pyav
from seppo_fast.data.video.clips import Clip
from seppo_fast.data.video.decoder import Decoder
from seppo_fast.data.video.probe import Facts, probe
from seppo_fast.data.video.trial import X265

CPU = torch.device("cpu")
SILENT = {"preset": "ultrafast", "x265-params": X265}


@pytest.mark.parametrize(("name", "codec", "form", "signal", "reason"), [
    ("hdr10.mp4", "libx265", "yuv420p10le", (9, 16), "PQ, as in HDR10"), ("hlg.webm", "libvpx-vp9", "yuv420p", (9, 18), "HLG"),
    ("hlg.mov", "prores_ks", "yuv422p10le", (9, 18), "HLG"), ("wide.mp4", "libx264", "yuv420p", (9, 14), "BT.2020"),
    ("p3.mp4", "libx264", "yuv420p", (12, 1), "Display P3"), ("linear.mkv", "libx264", "yuv420p", (1, 8), "linear"),
])
def test_colours_beyond_sdr_are_a_reason(name, codec, form, signal, reason, tmp_path):
    file = write_video(tmp_path / name, pictures(3), codec, colours=(9, 1), signal=signal, form=form,
                       encoder=SILENT if codec == "libx265" else None)
    assert reason in refused(file)


@pytest.mark.parametrize(("name", "codec", "form", "colours", "signal"), [
    ("a.mp4", "libx265", "yuv420p10le", (1, 1), (1, 1)), ("b.mov", "prores_ks", "yuv422p10le", (1, 1), (1, 1)),
    ("c.mp4", "libx264", "yuv420p10le", (9, 1), (2, 14)), ("d.mp4", "libx264", "yuv444p", (5, 1), (5, 6)),
    ("e.mkv", "ffv1", "yuv420p10le", (1, 1), (1, 13)),
], ids=["10-bit hevc", "10-bit prores", "bt.2020 matrix", "bt.601", "srgb curve"])
def test_ten_bits_and_other_matrices_of_sdr_stay_right(name, codec, form, colours, signal, tmp_path):
    frames = pictures(5)
    each = clip_of(write_video(tmp_path / name, frames, codec, colours=colours, signal=signal, form=form,
                               encoder=SILENT if codec == "libx265" else None))
    assert (each.facts.format[:7], each.facts.colours[0]) == (form[:7], colours[0])
    assert (pyav.decode(each) - shown(frames, each)).abs().mean() < 4 * LEVEL


def test_what_the_stream_does_not_say_is_the_containers(tmp_path):
    frames = pictures(5)
    file = write_video(tmp_path / "a.mov", frames, "prores_ks", colours=(1, 1), signal=(1, 1), form="yuv422p10le")
    content = bytearray(file.read_bytes())
    for place in range(len(content) - 4):
        if content[place:place + 4] == b"icpf":
            content[place + 18:place + 21] = 2, 2, 2  # the header of each ProRes frame
    file.write_bytes(content)
    each = clip_of(file)
    assert each.facts.colours[0] == 1
    assert (pyav.decode(each) - shown(frames, each)).abs().mean() < LEVEL


def test_colours_that_ffmpeg_does_not_convert(tmp_path):
    green = write_video(tmp_path / "a.mp4", pictures(2), colours=(8, 1))
    assert "matrix is number 8" in refused(green)
    hevc = write_video(tmp_path / "b.mp4", pictures(2), "libx265", encoder=SILENT, form="yuv420p")
    content = hevc.read_bytes()
    assert content.count(b"hev1") == 1 and probe(hevc).codec == "hevc"
    assert "Dolby Vision" in refused(hevc, content.replace(b"hev1", b"dvh1"))


def with_alpha(frames: np.ndarray) -> np.ndarray:
    """The left half is transparent, and hides red."""
    rgba = np.concatenate([frames, np.full_like(frames[..., :1], 255)], -1)
    rgba[:, :, :rgba.shape[2] // 2] = (255, 0, 0, 0)
    return rgba


@pytest.mark.parametrize(("name", "codec", "form", "marks"), [
    ("vp9.webm", "libvpx-vp9", "yuva420p", {"alpha_mode": "1"}), ("vp8.mkv", "libvpx", "yuva420p", {"alpha_mode": "1"}),
    ("prores.mov", "prores_ks", "yuva444p10le", {}), ("animation.mov", "qtrle", "argb", {}), ("png.mov", "png", "rgba", {}),
    ("ffv1.mkv", "ffv1", "gbrap10le", {}),
])
def test_what_is_transparent_is_white(name, codec, form, marks, tmp_path):
    frames = pictures(5, 32, 32)
    each = clip_of(write_video(tmp_path / name, with_alpha(frames), codec, form=form, marks=marks,
                               encoder={"auto-alt-ref": "0"} if "vpx" in codec else None))
    expected = frames.copy()
    expected[:, :, :16] = 255
    assert each.facts.alpha
    assert (pyav.decode(each) - shown(expected, each)).abs().mean() < 4 * LEVEL
    if codec.startswith("libvpx"):
        assert "transparent" in dali.Dali(16, 1, 1, CPU).refuses(each.facts)


def test_alpha_that_cannot_be_read_is_a_reason(tmp_path):
    file = write_video(tmp_path / "a.mkv", pictures(2), marks={"alpha_mode": "1"})
    assert "FFmpeg here does not read of h264" in refused(file)


def with_cover_first(file: Path) -> Path:
    """The mp4 with a cover, its `udta` moved before the tracks: FFmpeg then numbers the cover 0."""
    content = file.read_bytes()
    start = content.index(b"moov") - 4
    end = start + int.from_bytes(content[start:start + 4])
    boxes, place = [], start + 8
    while place < end:
        length = int.from_bytes(content[place:place + 4])
        boxes.append(content[place:place + length])
        place += length
    boxes.sort(key=lambda box: {b"mvhd": 0, b"udta": 1}.get(box[4:8], 2))
    file.write_bytes(content[:start + 8] + b"".join(boxes) + content[end:])
    return file


def cover(container: av.container.OutputContainer, picture: np.ndarray) -> None:
    stream = container.add_stream("mjpeg")
    stream.height, stream.width, stream.pix_fmt = *picture.shape[:2], "yuvj420p"
    stream.disposition = av.stream.Disposition.attached_pic
    container.mux([*stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")), *stream.encode(None)])


def two_streams(file: Path, first: np.ndarray, second: np.ndarray) -> Path:
    """VP9; the second stream is the default one."""
    with av.open(str(file), "w") as container:
        streams = []
        for frames, mark in ((first, 0), (second, av.stream.Disposition.default)):
            stream = container.add_stream("libvpx-vp9", rate=10, options=VP9)
            stream.height, stream.width, stream.pix_fmt, stream.disposition = *frames.shape[1:3], "yuv420p", mark
            streams.append((stream, frames))
        for index in range(len(first)):
            for stream, frames in streams:
                frame = av.VideoFrame.from_ndarray(frames[index], format="rgb24")
                frame.pts, frame.time_base = index, Fraction(1, 10)
                container.mux(stream.encode(frame))
        for stream, _ in streams:
            container.mux(stream.encode(None))
    return file


def test_the_film_is_taken_and_not_its_cover(tmp_path):
    frames = pictures(6)
    film = write_video(tmp_path / "film.mp4", frames)
    with av.open(str(film)) as source, av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        cover(container, np.full((16, 16, 3), 250, np.uint8))
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                container.mux(packet)
    each = clip_of(with_cover_first(tmp_path / "a.mp4"))
    with av.open(str(each.file)) as container:
        assert container.streams[0].disposition & av.stream.Disposition.attached_pic
    assert (each.facts.stream, each.facts.frames, each.facts.alone) == (1, 6, False)
    assert (pyav.decode(each) - pyav.decode(clip_of(film))).abs().max() == 0
    with av.open(str(tmp_path / "only.mp4"), "w") as container:
        cover(container, np.full((16, 16, 3), 250, np.uint8))
    assert "still picture" in refused(tmp_path / "only.mp4")


@needs_dali
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_of_several_films_both_decoders_take_the_default_one(name, tmp_path):
    frames = pictures(6)
    each = clip_of(two_streams(tmp_path / name, 255 - frames, frames))
    pipeline = dali.Dali(16, 1, 1, CPU)
    assert each.facts.stream == 1
    assert (pyav.decode(each) - shown(frames, each)).abs().mean() < 4 * LEVEL
    assert (pipeline.decode([each])[0] - pyav.decode(each)).abs().max() <= 2.01 * LEVEL
    assert "several video streams" in pipeline.refuses(each.facts)  # on a GPU nobody saw which it takes


@needs_dali
def test_frames_that_an_edit_list_leaves_out_are_no_frames(tmp_path):
    frames = pictures(12)
    source = write_video(tmp_path / "source.mp4", frames, "libvpx-vp9", gop=100)
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(source)) as film, av.open(str(tmp_path / "a.mp4"), "w", options=options) as container:
        stream = container.add_stream_from_template(film.streams.video[0])
        for packet in film.demux(video=0):
            if packet.size:
                early = int(Fraction(1, 2) / packet.time_base)  # the film begins half a second into what is stored
                packet.pts, packet.dts, packet.stream = packet.pts - early, packet.dts - early, stream
                container.mux(packet)
    each = clip_of(tmp_path / "a.mp4")
    assert each.facts.frames == 7 and each.facts.cut and not probe(source).cut
    assert (pyav.decode(each) - shown(frames[5:], each)).abs().mean() < 4 * LEVEL
    pipeline = dali.Dali(16, 1, 1, CPU)
    assert "edit list" in pipeline.refuses(each.facts) and pipeline.refuses(probe(source)) is None


def test_fields_and_changing_colours_are_reasons(tmp_path):
    fields = write_video(tmp_path / "a.mp4", pictures(3, 32, 32), encoder={"x264-params": "tff=1"})
    assert "it is interlaced" in refused(fields)
    one, two = (write_video(tmp_path / f"{form}.mkv", pictures(2), "mjpeg", form=form) for form in ("yuvj420p", "yuvj444p"))
    with av.open(str(tmp_path / "both.mkv"), "w") as out, av.open(str(one)) as first, av.open(str(two)) as second:
        stream = out.add_stream_from_template(first.streams.video[0])
        for offset, source in ((0, first), (400, second)):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.pts, packet.dts, packet.stream = packet.pts + offset, packet.pts + offset, stream
                    out.mux(packet)
    assert "change their pixels or colours: ('yuvj420p', " in refused(tmp_path / "both.mkv")


@pytest.mark.parametrize(("name", "codec", "form"), [
    ("grey.mkv", "ffv1", "gray"), ("grey16.mkv", "ffv1", "gray16le"), ("rgb.mkv", "ffv1", "gbrp10le"),
    ("vp9.webm", "libvpx-vp9", "gbrp"), ("rgb.mov", "qtrle", "rgb24"), ("full.mkv", "ffv1", "yuv444p"),
])
def test_odd_pixel_formats(name, codec, form, tmp_path):
    frames = pictures(5)
    if form.startswith("gray"):
        frames = np.repeat(frames[..., :1], 3, -1)
    each = clip_of(write_video(tmp_path / name, frames, codec, form=form))
    assert (pyav.decode(each) - shown(frames, each)).abs().mean() < 4 * LEVEL


def test_a_palette_may_be_transparent(tmp_path):
    levels = np.zeros((16, 16), np.uint8)
    levels[:, 8:] = 1
    palette = np.zeros((256, 4), np.uint8)  # alpha first
    palette[1] = 255, 200, 10, 30
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=10)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "pal8"
        container.mux([*stream.encode(av.VideoFrame.from_ndarray((levels, palette), format="pal8")), *stream.encode(None)])
    pixels = ((pyav.decode(clip_of(tmp_path / "a.mov", crop="center", flip=False)) + 1) * 127.5).round()
    assert pixels[0, :, 3, 3].tolist() == [255, 255, 255] and pixels[0, :, 3, 12].tolist() == [200, 10, 30]


def test_a_clip_whose_white_is_rounded_up_was_filled_in():
    facts = Facts(3, 16, 16, (1, 1), 0, False, "h264", "yuv420p", (2, 1), (0, 0))
    each = Clip("k", Path("a.mp4"), facts, [0, 1, 2], Framing(16, 16, 0, 0, False), 0, 16)
    white = torch.tensor(255 * float(torch.tensor(1 / 127.5)) - 1)  # one fused multiply-add, as on a GPU
    assert white > 1
    filled = torch.stack([white, torch.tensor(-1.0), white]).view(1, 3, 1, 1).expand(3, 3, 16, 16).clone()
    assert not dali.is_whole(filled, each)
    filled[:, 1] += LEVEL
    assert dali.is_whole(filled, each)


@needs_dali
def test_a_kind_is_tried_once_and_by_no_file(tmp_path, monkeypatch):
    dali.tried.cache_clear()
    monkeypatch.setitem(dali.CODECS, "cpu", {"vp9", "h264"})  # as if DALI said that it had H.264
    frames, said = pictures(3, 144, 144), []
    h264, vp9 = (write_video(tmp_path / name, frames) for name in ("a.mp4", "a.webm"))
    clips = [clip_of(file, key=str(i)) for i, file in enumerate((h264, vp9, h264, h264))]
    decoder = Decoder(video_settings("unused", tmp_path), "cpu", said.append)
    for found, each in zip([*decoder(clips), *decoder(clips)], 2 * clips, strict=True):
        assert (found - pyav.decode(each)).abs().max() <= 2.01 * LEVEL
    decoder.close()
    assert said == ["videos: h264 is decoded by PyAV on the CPU: DALI does not decode h264 in yuv420p here"]
    assert not decoder.refused and dali.tried.cache_info().misses == 2


@needs_dali
def test_what_a_trial_says():
    assert dali.tried(CPU, "vp9", "yuv444p", (256, 256)) is None
    assert dali.tried(CPU, "mjpeg", "yuvj422p", (35, 19)) is None
    assert "no clip of vp9 in nv12 could be made here" in dali.tried(CPU, "vp9", "nv12", (256, 256))
    assert "DALI does not decode av1 in yuv420p of 64x64 here" in dali.tried(CPU, "av1", "yuv420p", (64, 64))


@needs_dali
@pytest.mark.skipif(not torch.cuda.is_available(), reason="waits for a GPU with NVDEC")
@pytest.mark.parametrize("codec", ["h264", "hevc", "vp9"])
def test_a_gpu_decodes_what_its_trial_says(codec, tmp_path):
    encoder = {"h264": "libx264", "hevc": "libx265", "vp9": "libvpx-vp9"}[codec]
    frames = pictures(8, 160, 256)
    each = clip_of(write_video(tmp_path / "a.mp4", frames, encoder, encoder=SILENT if codec == "hevc" else None))
    pipeline = dali.Dali(16, 2, 1, torch.device("cuda:0"))
    assert pipeline.refuses(each.facts) is None
    assert (pipeline.decode([each])[0] - pyav.decode(each)).abs().mean() <= 4 * LEVEL
    assert pipeline.decode([replace(each, indices=[0, 3, 7, 8])]) == [None]  # past the end
    assert "of 8192x8192 here" in dali.tried(torch.device("cuda:0"), "h264", "yuv420p", (8192, 8192))
