"""Which frames are chosen: MagicTime's rule on cases worked out by hand, and on many against its own formulas."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from seppo_fast.config import Video
from seppo_fast.data.framing import Framing
from seppo_fast.data.video.clips import as_stored
from seppo_fast.data.video.frames import chosen, is_fixed
from seppo_fast.data.video.probe import Facts

choose = partial(chosen, seed=0, key="k", epoch=0)


def test_a_time_lapse_is_seen_from_end_to_end():
    assert choose(300, Video(), True) == [0, 20, 40, 60, 80, 100, 120, 140, 159, 179, 199, 219, 239, 259, 279, 299]
    assert choose(17, Video(), True) == [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16]
    assert choose(6, Video(frames=4), True) == [0, 2, 3, 5]
    assert choose(100, Video(choice="uniform"), False) == choose(100, Video(), True)
    assert choose(9, Video(frames=1), True) == [8]


def test_any_other_clip_is_seen_through_a_window():
    assert choose(61, Video(), False) == list(range(0, 61, 4))  # the one window that fits
    first = {choose(70, Video(), False, key=str(i))[0] for i in range(200)}
    assert first == set(range(10))
    for i in range(20):
        indices = choose(200, Video(choice="window"), True, key=str(i))
        assert indices == list(range(indices[0], indices[0] + 61, 4)) and indices[-1] < 200
    assert choose(31, Video(), False) == list(range(0, 31, 2))  # a short clip: closer together
    assert choose(20, Video(), False) == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 15, 16, 17, 19]
    assert {choose(3, Video(frames=1), False, key=str(i))[0] for i in range(50)} == {0, 1, 2}


@pytest.mark.parametrize("time_lapse", [True, False])
def test_short_clips_repeat_in_order(time_lapse):
    assert choose(16, Video(), time_lapse) == list(range(16))
    assert choose(10, Video(), time_lapse) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7, 8, 9]
    assert choose(1, Video(), time_lapse) == [0] * 16
    assert choose(3, Video(frames=8), time_lapse) == [0, 0, 0, 1, 1, 1, 2, 2]


@given(st.integers(1, 400), st.integers(2, 24), st.integers(1, 8), st.booleans(), st.integers(0, 9))
@settings(max_examples=200, deadline=None)
def test_the_rule_in_its_own_formulas(length, frames, stride, time_lapse, epoch):
    found = chosen(length, Video(frames=frames, stride=stride), time_lapse, 3, "key", epoch)
    if length <= frames:
        expected = sorted(i % length for i in range(frames))
    elif time_lapse:
        interval = (length - 1) / (frames - 1)
        expected = [round(i * interval) for i in range(frames - 1)] + [length - 1]
    else:
        span = min(length, (frames - 1) * stride + 1)
        assert 0 <= found[0] <= length - span
        exact = np.linspace(found[0], found[0] + span - 1, frames)
        expected = np.floor(exact + 1e-9).astype(int).tolist()
    assert found == expected


def test_the_draw_depends_on_seed_key_and_epoch():
    video = Video(frames=4)
    draws = [tuple(chosen(1000, video, False, seed, key, epoch)) for seed in (0, 1) for key in ("a", "b") for epoch in (0, 1)]
    assert len(set(draws)) == 8 and draws[0] == tuple(chosen(1000, video, False, 0, "a", 0))


def test_what_is_fixed():
    fixed = {(choice, lapse): is_fixed(Video(choice=choice), lapse) for choice in ("uniform", "dynamic", "window")
             for lapse in (True, False)}
    assert [where for where, so in fixed.items() if so] == [("uniform", True), ("uniform", False), ("dynamic", True)]


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("quarters", range(4))
@pytest.mark.parametrize("mirror", [False, True])
def test_a_square_of_the_stored_picture_is_that_of_the_upright_one(quarters, mirrored, mirror):
    stored = torch.arange(5 * 9).view(5, 9)
    upright = torch.rot90(stored.flip(-1) if mirrored else stored, quarters, (0, 1))
    shown = Framing(upright.shape[1], upright.shape[0], 1 if quarters % 2 else 2, 3 if quarters % 2 else 1, mirror)
    expected = upright[shown.top:shown.top + 3, shown.left:shown.left + 3]
    expected = expected.flip(-1) if mirror else expected
    facts = Facts(1, 9, 5, (1, 1), quarters, mirrored, "vp9", "yuv420p", (2, 1), (0, 0))
    frame, turns = as_stored(shown, facts, 3)
    square = stored[frame.top:frame.top + 3, frame.left:frame.left + 3]
    assert (frame.width, frame.height) == (9, 5)
    assert torch.equal(torch.rot90(square.flip(-1) if frame.mirror else square, turns, (0, 1)), expected)
