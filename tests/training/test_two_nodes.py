"""Two machines, of one rank each, train and evaluate as one machine with two; what they do not share, and who is gone, is said.

The machines are namespaces (two_nodes.py), joined by one cable. Real ones, ssh and schedulers are not there.
"""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forked import Forks, Result
from outcomes import steady_rows
from two_nodes import ROOT, Node, impossible, two_nodes

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why := impossible()), reason=why)]
MINUTE = 60
SHARE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # else torch 2.13 does not tell a new machine where rank 0 is (nodes.md)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Iterator[tuple[Node, Node]]:
    """They share the folders of this session's tests."""
    with two_nodes(tmp_path_factory.getbasetemp().parent, forks.folder) as pair:
        yield pair


@pytest.fixture
def on_nodes(nodes: tuple[Node, Node], forks: Forks, tmp_path: Path) -> Callable[..., Result]:
    """`on_nodes(raw, *arguments)` runs a command with rank 0 on node-a and rank 1 on node-b."""
    def run(raw: Any, *arguments: str, **how: Any) -> Result:
        file = tmp_path / "config.json"
        file.write_text(json.dumps(raw))
        return forks.run(str(file), *arguments, ranks=2, nodes=[node.holder.pid for node in nodes], **how)

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two ranks on one machine."""
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def raw(settings: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The configuration of the runs that are compared."""
    return lambda folder, **changes: settings(**{"seppo.output_dir": str(folder), "seppo.iterations": 3,
                                                 "seppo.checkpoint.every": 1, "seppo.samples.every": 2, **changes})


@pytest.fixture
def as_whole(whole: Path, raw: Callable[..., dict[str, Any]], train_on_ranks: Callable[..., list[Path]]) -> Callable[[Path], None]:
    """Checks that a run ended as the one on one machine."""
    if not whole.exists():
        train_on_ranks([raw(whole)])

    def check(run: Path) -> None:
        one, other = ({str(file.relative_to(folder)): file.read_bytes() for kind in ("final", "pool", "samples") for file in
                       (folder / kind).rglob("*") if file.suffix in (".safetensors", ".png")} for folder in (whole, run))
        assert len(one) > 6 and one == other
        assert steady_rows(whole) == steady_rows(run)

    return check


def test_they_train_as_one_machine(on_nodes: Callable[..., Result], raw: Callable[..., dict[str, Any]], tmp_path: Path,
                                   as_whole: Callable[[Path], None]) -> None:
    done = on_nodes(raw(tmp_path / "run"))
    assert done.statuses == [0, 0], done.output[-3000:]
    as_whole(tmp_path / "run")


def test_they_evaluate_as_one_machine(on_nodes: Callable[..., Result], forks: Forks, sd: Path, tmp_path: Path) -> None:
    from tiny import tiny_clip

    (tmp_path / "prompts.txt").write_text("a red cat\na blue sky\na dog\n")
    clip = tiny_clip(tmp_path / "clip")
    arguments = ["--models", f"base={sd}", "--prompts", str(tmp_path / "prompts.txt"), "--steps", "2", "--scores", "pickscore",
                 "vendi", "--weights", f"pickscore={clip}", f"vendi={clip}", "--batch-size", "1", "--out"]
    on_one = forks.run([[*arguments, str(tmp_path / "one")]], ranks=2, module="evaluation.on_ranks")
    on_two = on_nodes([[*arguments, str(tmp_path / "two")]], module="evaluation.on_ranks")
    assert on_one.statuses == on_two.statuses == [0, 0], on_one.output[-2000:] + on_two.output[-3000:]
    one, two = ({file.name: file.read_bytes() for file in (tmp_path / name / "samples" / "base").iterdir()}
                for name in ("one", "two"))
    assert len(one) == 3 and one == two
    one, two = (json.loads((tmp_path / name / "scores.json").read_text()) for name in ("one", "two"))
    assert one["samples"] == two["samples"] and one["table"] == two["table"]


def test_deepspeed_without_ssh(nodes: tuple[Node, Node], raw: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """DeepSpeed's launcher, started on each machine; the one that uses ssh is not tested."""
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    (tmp_path / "config.json").write_text(json.dumps(raw(tmp_path / "run", **{"seppo.iterations": 1})))
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "hostfile"), "--no_ssh",
               "--master_addr", "node-a", "--master_port", "29500"]
    started = [node.start(*command, "--node_rank", str(rank), "seppo_fast/train.py", "--config", str(tmp_path / "config.json"),
                          output=tmp_path / node.name) for rank, node in enumerate(nodes)]
    said = [(process.wait(150), (tmp_path / node.name).read_text()) for process, node in zip(started, nodes, strict=True)]
    assert [status for status, _ in said] == [0, 0], "".join(words[-3000:] for _, words in said)
    assert f"done: the trained model is in {tmp_path / 'run' / 'final'}" in said[0][1]


def test_what_they_do_not_share_is_named(on_nodes: Callable[..., Result], raw: Callable[..., dict[str, Any]], tmp_path: Path,
                                         nodes: tuple[Node, Node], sd: Path) -> None:
    one, other = nodes

    def refused(configuration: dict[str, Any]) -> str:
        done = on_nodes(configuration)
        assert done.statuses == [2, 2], done.output[-3000:]
        assert done.ended - done.started < 40
        return done.output

    said = refused(raw("/tmp/run"))
    assert said.count("seppo.output_dir /tmp/run: not seen on node-b (rank 1) is what node-a (rank 0) wrote to /tmp/run") == 2, said
    assert "(not /tmp)" in said and "cache_dir" not in said.split("not shared")[1].split("same run folder")[0]

    subprocess.run(one.inside("cp", "-r", str(sd), "/tmp/model"), check=True)
    said = refused(raw(tmp_path / "run", **{"seppo.model.path": "/tmp/model"}))
    assert said.count("on node-b (rank 1): seppo.model.path '/tmp/model' does not exist") == 2, said

    subprocess.run(other.inside("cp", "-r", str(sd), "/tmp/model"), check=True)
    subprocess.run(other.inside("sh", "-c", "echo >> /tmp/model/unet/config.json"), check=True)
    said = refused(raw(tmp_path / "run", **{"seppo.model.path": "/tmp/model"}))
    size = (sd / "unet" / "config.json").stat().st_size
    assert f"unet/config.json: {size} on node-a (rank 0); {size + 1} on node-b (rank 1)" in said, said

    subprocess.run(other.inside("sh", "-c", f"cp -r {ROOT}/seppo_fast /tmp/source && echo >> /tmp/source/pictures.py &&"
                                            f" mount --bind /tmp/source {ROOT}/seppo_fast"), check=True)
    try:
        said = refused(raw(tmp_path / "run"))
    finally:
        subprocess.run(other.inside("umount", f"{ROOT}/seppo_fast"), check=True)
    assert "seppo_fast/pictures.py: " in said and "on node-b (rank 1)\nInstall the same versions" in said, said
    assert not (tmp_path / "run").exists()


def test_a_dead_machine_ends_the_other_with_a_message(on_nodes: Callable[..., Result], raw: Callable[..., dict[str, Any]],
                                                      nodes: tuple[Node, Node], tmp_path: Path) -> None:
    """The cable is out: nothing comes any more, not even the end of a connection."""
    results: list[Result] = []
    thread = threading.Thread(target=lambda: results.append(on_nodes(raw(tmp_path / "run", **{"seppo.iterations": 500}))))
    thread.start()
    until(lambda: (tmp_path / "run" / "metrics.jsonl").exists(), thread.is_alive)
    nodes[1].cable("down")
    cut = time.monotonic()
    try:
        thread.join(100)
    finally:
        nodes[1].cable("up")
    [done] = results
    assert done.statuses == [1, 1] and done.ended - cut < MINUTE, (done.statuses, done.ended - cut)
    for rank, host in enumerate(("node-a", "node-b")):
        assert (f"seppo_fast: lost contact with rank {rank} on {host}, of whose machine nothing was heard for 30 seconds: it is"
                " down, or cut off; go on with --resume auto") in done.output, done.output[-3000:]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and status["message"].startswith("lost contact with rank 1 on node-b")


def test_a_killed_machine_comes_back(nodes: tuple[Node, Node], raw: Callable[..., dict[str, Any]], tmp_path: Path,
                                     as_whole: Callable[[Path], None]) -> None:
    """torchrun on both: the other machine says what happened, waits for the new one, and both go on from the last checkpoint."""
    one, other = nodes
    config = tmp_path / "config.json"
    config.write_text(json.dumps(raw(tmp_path / "run")))
    torchrun = torchrun_of("2:2", config)
    outputs = [tmp_path / name for name in ("one", "other", "new")]
    first, lost = (node.start(*torchrun, output=output, **SHARE) for node, output in zip(nodes, outputs, strict=False))
    until(lambda: any((tmp_path / "run" / "checkpoints").glob("update_*")), lambda: first.poll() is None)
    other.kill()
    killed = time.monotonic()
    lost.wait()
    until(lambda: bool(re.search("^seppo_fast: .*lost ", outputs[0].read_text(), re.M)), lambda: time.monotonic() < killed + MINUTE)
    again = other.start(*torchrun, output=outputs[2], **SHARE)
    assert (first.wait(150), again.wait(60)) == (0, 0), "".join(output.read_text()[-3000:] for output in outputs)
    assert "resuming from" in outputs[0].read_text() + outputs[2].read_text()
    as_whole(tmp_path / "run")


def test_the_machine_that_is_left_goes_on_alone(nodes: tuple[Node, Node], raw: Callable[..., dict[str, Any]],
                                                tmp_path: Path) -> None:
    """torchrun with a range of machines: the same pairs on one rank in place of two."""
    config, run = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(raw(run)))
    outputs = [tmp_path / name for name in ("one", "other")]
    left, lost = (node.start(*torchrun_of("1:2", config), output=output, **SHARE)
                  for node, output in zip(nodes, outputs, strict=True))
    until(lambda: any((run / "checkpoints").glob("update_*")), lambda: left.poll() is None)
    nodes[1].kill()
    lost.wait()
    assert left.wait(150) == 0, outputs[0].read_text()[-3000:]
    assert "the checkpoint was written by 2 ranks" in (said := outputs[0].read_text()) and "going on with 1 rank at" in said
    assert (run / "final").exists() and [row["update"] for row in steady_rows(run)] == [*range(1, 7)]


def torchrun_of(machines: str, config: Path) -> list[str]:
    """The command that is given on each machine."""
    return [sys.executable, "-m", "torch.distributed.run", f"--nnodes={machines}", "--nproc_per_node=1", "--max-restarts=2",
            "--rdzv_backend=c10d", "--rdzv_endpoint=node-a:29400", "--rdzv_id=run", "seppo_fast/train.py",
            "--config", str(config), "--resume", "auto"]


def until(condition: Callable[[], bool], going: Callable[[], bool]) -> None:
    """Wait for the condition, as long as it can come true."""
    while not condition():
        assert going(), "it ended early"
        time.sleep(0.02)
