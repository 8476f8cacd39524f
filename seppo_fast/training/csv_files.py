"""DeepSpeed's CSV files when a run starts or resumes: by itself it appends to existing files, with one more header a process."""

import csv
from pathlib import Path

from deepspeed.monitor.csv_monitor import csvMonitor

from seppo_fast.disk import complete_or_not, explained

OURS, DEEPSPEEDS = "seppo_", "Train_Samples_"  # how the files' names begin
EVALUATIONS = (OURS + "eval_", OURS + "heldout_")


def go_on(monitor: csvMonitor, update: int, evaluated: int, samples: int) -> None:
    """Keep one header and one row a step, up to the resumed update, the last evaluation, or DeepSpeed's count of samples."""
    for file in files(monitor):
        last = evaluated if file.name.startswith(EVALUATIONS) else update if file.name.startswith(OURS) else samples
        with explained(file, "put this right, or switch csv_monitor off"):
            if keep_steps(file, last):
                monitor.filenames.append(file.stem)  # of those that have their header


def set_aside(monitor: csvMonitor) -> list[Path]:
    """Rename the files of an earlier run, so that a run from update 0 does not append to them; returns the new names."""
    aside = []
    for file in files(monitor):
        number = next(n for n in range(1, 10**6) if not file.with_name(f"{file.name}.{n}").exists())
        with explained(file, "put this right, or give csv_monitor another output_path or job_name"):
            aside.append(file.rename(file.with_name(f"{file.name}.{number}")))
    return aside


def files(monitor: csvMonitor) -> list[Path]:
    """The CSV files of this monitor that exist."""
    return sorted(file for file in Path(monitor.log_dir).iterdir()
                  if file.name.startswith((OURS, DEEPSPEEDS)) and file.suffix == ".csv" and file.is_file())


def keep_steps(file: Path, last: int) -> bool:
    """Keep the header and the newest row of each step up to `last`; returns whether there is a header."""
    content = file.read_bytes()
    lines = content.decode(errors="replace").splitlines(keepends=True)
    header = next((line for line in lines if line.startswith("step,")), None)
    if header is None:
        return False
    rows = {step: line for line in lines if (step := _step(line)) is not None and step <= last}
    kept = "".join([header, *rows.values()]).encode()
    if kept != content:
        with complete_or_not(file) as temporary:
            temporary.write_bytes(kept)
    return True


def _step(line: str) -> int | None:
    """The step of a row; None for a line that is no row or was cut off."""
    fields = next(csv.reader([line]), [])
    return int(fields[0]) if len(fields) == 2 and fields[0].isdecimal() and line.endswith("\n") else None
