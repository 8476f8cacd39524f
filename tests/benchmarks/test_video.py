"""The figures about videos: what is read from a run, and what the README says of a result."""

import json

import pytest

from benchmarks.video.readme import video
from benchmarks.video.waiting import waiting_share


def test_the_share_of_waiting_is_of_the_whole_run(tmp_path):
    rows = [{"seconds_sampling": 8.0, "seconds_training": 1.0, "seconds_data": 1.0},
            {"seconds_sampling": 0.0, "seconds_training": 9.0, "seconds_data": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert waiting_share(tmp_path) == pytest.approx(0.1)


def test_the_table_has_a_line_for_each_case_with_the_most_threads(tmp_path):
    assert "not measured yet" in video(tmp_path)
    case = {"codec": "vp9", "size": "256x256", "choice": "window", "pyav_frames_per_s": 50.4, "calls": 3}
    rows = [case | {"threads": 1, "dali_frames_per_s": 1.0, "dali_over_pyav": 0.02},
            case | {"threads": 2, "dali_frames_per_s": 100.2, "dali_over_pyav": 1.988}, case | {"threads": 2, "codec": "h264"}]
    result = {"machine": {"cpu": "a CPU", "cores": 2, "load_average_at_start": 0.5}, "load_average_at_end": 2, "commit": "abc",
              "versions": {"dali": "2.4", "av": "18"}, "settings": {"resolution": 256, "frames": 16, "length": 96}, "rows": rows}
    (tmp_path / "video_cpu.json").write_text(json.dumps(result))
    said = video(tmp_path)
    assert said.partition("\n\nWaiting")[0].count("\n") == 5 and "2 threads" in said
    assert "| vp9, 256x256, window | 100 | 50 | 1.99x |" in said
    assert "| h264, 256x256, window | - | 50 | not decoded by DALI here |" in said


def test_what_training_waits_for_its_clips_is_said_of_each_machine(tmp_path):
    assert "Waiting on a GPU (target: at most 5% of the time): not measured yet" in video(tmp_path)
    found = {"waiting_share": 0.0123, "seconds": {"sampling": 2.0, "training": 1.0, "data": 0.04}, "config": "some.json"}
    about = {"machine": {"cpu": "Some CPU", "threads": 2, "cores": 4}, "commit": "abc"}
    (tmp_path / "waiting_cpu.json").write_text(json.dumps(about | found))
    (tmp_path / "gpu_suite.json").write_text(json.dumps({"machine": {"gpu": "Some GPU"}, "commit": "def", "video": found}))
    text = video(tmp_path)
    assert "waits for its clips 1.2% of the time on Some CPU, 2 of 4 cores" in text and "of the time on Some GPU" in text
    assert "Waiting on a GPU" not in text
