"""Models, clips and networks for evaluations of videos, and what runs the command on them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub
import pytest
from data.video_files import pictures, write_video
from evaluation.video_networks import alexnet_shapes, i3d_shapes, inception_shapes, random_weights, write
from tiny import tiny_adapter, tiny_sd


@pytest.fixture(scope="session")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two Stable Diffusions, a motion adapter for 10 frames, real clips a and b, and d, which is cut."""
    root = tmp_path_factory.mktemp("videos")
    for seed, name in enumerate(("base", "tuned")):
        tiny_sd(root / name, seed=seed)
    tiny_adapter(root / "adapter", motion_max_seq_length=10)
    for seed, name in enumerate(("a.webm", "b.webm", "d.webm")):
        write_video(root / "real" / name, pictures(12, height=40, width=48, seed=seed))
    cut = root / "real" / "d.webm"
    cut.write_bytes(cut.read_bytes()[:-200])
    (root / "prompts.csv").write_text("videoid,name\na,a red cat\nb,a blue sky\nc,the photo\nd,a dog\n")
    return root


@pytest.fixture(scope="session")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The published files of the scores' networks, with random weights."""
    root = tmp_path_factory.mktemp("networks")
    shapes = {"lpips": alexnet_shapes(), "fid": inception_shapes(), "fvd": i3d_shapes()}
    return {name: write(random_weights(each), root / name) for name, each in shapes.items()}


@pytest.fixture(scope="session")
def of_videos(videos: Path) -> Callable[..., list[str]]:
    """`of_videos(out, *more)`: the arguments for clips of the first model, one step each."""
    return lambda out, *more: ["--models", f"base={videos / 'base'}", "--motion-adapter", str(videos / "adapter"), "--prompts",
                               str(videos / "prompts.csv"), "--real", str(videos / "real"), "--out", str(out), "--steps", "1",
                               *map(str, more)]


@pytest.fixture
def evaluated(ranks: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], dict[str, Any]]:
    """`evaluated(arguments)`: the result of the command in this process; no hub is asked."""
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)

    from seppo_fast.evaluate import parse_arguments
    from seppo_fast.evaluation.arguments import request_of
    from seppo_fast.evaluation.run import evaluate

    return lambda arguments: evaluate(request_of(parse_arguments(arguments), ranks, print), ranks, lambda line: None)
