"""How long training waits for its clips: `python -m benchmarks.video.training --out benchmarks/results [--device cuda]`.

It runs the trainer's command on clips whose frames are chosen anew in every epoch, so that they are decoded and encoded during
the training. On a GPU: a full-size AnimateDiff with random weights, the paper's setting, H.264 clips of 640x360. On the CPU: the
video quickstart's model after a few steps of training, and its VP9 clips. Writes waiting_cpu.json or waiting_gpu.json; the step
`video` of `gpu_suite` stores the same in the suite's file.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.jobs import PHASES, finish, start_training
from benchmarks.result_files import Keep, Row, about
from benchmarks.video.waiting import waiting_share

UPDATES, WARM_UP = 5, 2


def gpu_case(work: Path) -> tuple[str, list[str]]:
    """Configuration and overrides of the paper's setting, 8 pairs an update; its model and clips are made in `work`."""
    from diffusers import MotionAdapter

    from benchmarks.networks import NETWORKS, write_pipeline
    from benchmarks.video import write

    write_pipeline(work / "sd15", "cuda")
    adapter, clips = work / "adapter", work / "clips"
    if not (adapter / "config.json").is_file():
        MotionAdapter(**NETWORKS["animatediff"].motion).half().save_pretrained(adapter)
    clips.mkdir(exist_ok=True)
    first = write(clips / "0.mp4", "libx264", 360, 640)
    for index in range(1, 32):
        (clips / f"{index}.mp4").write_bytes(first.read_bytes())
    (clips / "clips.csv").write_text("videoid,name\n" + "".join(f"{index},a handwritten {index}\n" for index in range(32)))
    return "ds_a100_video.json", [f"seppo.model.path={work / 'sd15'}", f"seppo.model.motion_adapter={adapter}",
                                  f"seppo.data.source={clips / 'clips.csv'}", "train_batch_size=8", "seppo.samples.every=0",
                                  "seppo.sampler.batch_size=8"]


def cpu_case(work: Path) -> tuple[str, list[str]]:
    """The video quickstart's configuration with random windows in place of whole clips."""
    from seppo_fast.quickstart.digits import split_digits
    from seppo_fast.quickstart.video.base import Recipe, make_base
    from seppo_fast.quickstart.video.clips import random_clips
    from seppo_fast.quickstart.video.demonstrations import write_demonstrations
    from seppo_fast.seeds import generator

    make_base(work / "base", Recipe(clips=64, vae_steps=12, text_steps=12, denoiser_steps=2))
    clips = write_demonstrations(work / "clips", random_clips(split_digits(0)[0], 64, generator(0, "clips")))
    return "quickstart_video.json", [f"seppo.model.path={work / 'base'}", f"seppo.data.source={clips}",
                                     f"scheduler.params.total_num_steps={WARM_UP + UPDATES}",
                                     'seppo.data.video={"frames": 8, "choice": "window", "stride": 1}']


def measure(device: str, work: Path, keep: Keep) -> None:
    """Store the share of its time that one run waited for clips, and its pairs per second, both after the warm-up."""
    config, overrides = gpu_case(work) if device == "cuda" else cpu_case(work)
    run, log = work / "run", work / "video.log"
    more = [f"seppo.output_dir={run}", f"seppo.data.cache_dir={work / 'cache'}", "seppo.iterations=1",
            f"seppo.updates_per_iteration={WARM_UP + UPDATES}", "seppo.checkpoint.every=1000000"]
    finish(start_training(config, [*overrides, *more], log), log)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][WARM_UP:]
    notes = [line for line in log.read_text().splitlines() if line.startswith("videos: ")]
    seconds = {name: round(statistics.median(row[f"seconds_{name}"] for row in rows), 3) for name in PHASES}
    result: Row = {"config": config, "updates": len(rows), "waiting_share": round(waiting_share(run, WARM_UP), 5),
                   "seconds": seconds, "decoded_by": notes or "DALI",
                   "pairs_per_s": round(statistics.median(row["pairs_per_s"] for row in rows), 3),
                   "peak_memory_gb": rows[-1]["peak_memory_gb"]}
    keep(result | {"target": "waits for clips in at most 5% of its time", "met": result["waiting_share"] <= 0.05})


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.video.training", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    given = parser.parse_args(argv)
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / f"waiting_{'cpu' if given.device == 'cpu' else 'gpu'}.json"
    with tempfile.TemporaryDirectory(prefix="seppo-video-") as work:
        start = os.getloadavg()[0]

        def keep(found: Row) -> None:
            load = [round(start, 2), round(os.getloadavg()[0], 2)]
            result = about(given.device, "diffusers", "deepspeed") | found | {"load_average": load}
            file.write_text(json.dumps(result, indent=1) + "\n")

        measure(given.device, Path(work), keep)
    print(file.read_text())


if __name__ == "__main__":
    main()
