"""Measurements. Each folder is a command: `python -m benchmarks.loss`; `python -m benchmarks.readme` makes the tables.

A command measures this trainer beside what it is compared with, in one run. Its result file names the machine, the versions and the
commit.
"""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
