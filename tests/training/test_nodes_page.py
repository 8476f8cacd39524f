"""The scripts of nodes.md: bash can read them, and the one for Slurm starts, stops and requeues as it says.

There is no Slurm here: its four commands are stood in for by scripts that note what they are told.
"""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT

PAGE = (ROOT / "seppo_fast" / "training" / "nodes.md").read_text()
SCRIPTS = re.findall(r"```bash\n(.*?)```", PAGE, re.S)
COMMANDS = {
    "srun": 'echo "srun $1" >> told; shift; SLURM_PROCID=9 SLURM_LOCALID=1 exec "$@"',
    "scontrol": 'echo "scontrol $1" >> told; [ "$1" = requeue ] || printf "node1\\nnode2\\n"',
    "scancel": 'echo "scancel $1 $2" >> told; kill -TERM "$(cat rank)"',
    "python": 'echo $$ > rank.new; mv rank.new rank; echo "$RANK $LOCAL_RANK $WORLD_SIZE $LOCAL_WORLD_SIZE'
              ' $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS: $*" >> told\n'
              'trap "echo checkpoint >> told; exit 0" TERM; while :; do sleep 0.05; done',
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_bash_can_read_it(script: str) -> None:
    done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
    assert done.returncode == 0 and not done.stderr, done.stderr


def test_slurm(tmp_path: Path) -> None:
    [script] = [script for script in SCRIPTS if "#SBATCH" in script]
    for name, body in COMMANDS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "seppo.sh").write_text(script)
    slurm = {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8",
             "SLURM_CPUS_PER_TASK": "8", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    job = subprocess.Popen(["bash", "seppo.sh", "--set", "a b=c"], cwd=tmp_path, env=os.environ | slurm)
    try:
        while not (tmp_path / "rank").exists():
            assert job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)  # to the script alone, as --signal=B:TERM does
        job.wait(20)
    finally:
        job.kill()
    assert (tmp_path / "told").read_text().splitlines() == [
        "scontrol show", "srun --kill-on-bad-exit=1",
        "9 1 16 8 node1 24567 8: seppo_fast/train.py --config ds_a100.json --resume auto --set a b=c",
        "scancel --signal=TERM 1234567", "checkpoint", "scontrol requeue"]
