"""Two machines on one: each has a network, a host name, a /tmp and a /dev/shm of its own, and a cable joins them.

They are namespaces of the kernel, held by a process that sleeps. What lies in the `shared` folders is the same on both, as on a
network file system, and so are this source and its Python.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOSTS = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
SETUP = """
set -e
mount --make-rprivate /
mount -t tmpfs none /mnt
i=0; for folder in "$@"; do mkdir /mnt/$i; mount --rbind "$folder" /mnt/$i; i=$((i + 1)); done
mount -t tmpfs none /tmp; mount -t tmpfs none /dev/shm
i=0; for folder in "$@"; do case "$folder" in /tmp/*) mkdir -p "$folder"; mount --rbind /mnt/$i "$folder";; esac; i=$((i + 1)); done
printf '127.0.0.1 localhost\\n10.77.0.1 node-a\\n10.77.0.2 node-b\\n' > /tmp/hosts; mount --bind /tmp/hosts /etc/hosts
echo "$NAME" > /proc/sys/kernel/hostname
echo ready; exec sleep infinity
"""


class Node:
    """One of the two; `address` is what the other one knows it by."""

    def __init__(self, name: str, shared: Sequence[Path]) -> None:
        self.name, self.address = name, HOSTS[name]
        folders = [*map(str, shared), str(ROOT), sys.prefix, sys.base_prefix]
        self.holder = subprocess.Popen(["unshare", "-n", "-m", "-u", "bash", "-c", SETUP, "bash", *folders], text=True,
                                       stdout=subprocess.PIPE, env=os.environ | {"NAME": name})
        if self.holder.stdout.readline() != "ready\n":
            raise OSError(f"{name} could not be made (see above)")

    def inside(self, *command: str) -> list[str]:
        """The command line that runs a command there."""
        return ["nsenter", "-t", str(self.holder.pid), "-n", "-m", "-u", *command]

    def start(self, *command: str, output: Path, **environment: str) -> subprocess.Popen:
        """Start a command of this source there, its output going to a file."""
        with open(output, "a") as file:
            return subprocess.Popen(self.inside("env", "-C", str(ROOT), *command), stdout=file, stderr=file,
                                    env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment)

    def processes(self) -> list[int]:
        """All processes there but the one that holds it."""
        found, mine = [], os.readlink(f"/proc/{self.holder.pid}/ns/net")
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and int(entry.name) != self.holder.pid and os.readlink(entry / "ns/net") == mine:
                    found.append(int(entry.name))
        return found

    def kill(self) -> None:
        """SIGKILL to all of them."""
        while processes := self.processes():
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.05)

    def cable(self, state: str) -> None:
        """Plug the cable in ("up") or out ("down"): of a machine whose cable is out nothing is heard, as of a dead one."""
        subprocess.run(self.inside("ip", "link", "set", "eth0", state), check=True)

    def close(self) -> None:
        self.kill()
        self.holder.kill()
        self.holder.wait()


@contextmanager
def two_nodes(*shared: Path) -> Iterator[tuple[Node, Node]]:
    """The two, until the end of the block."""
    nodes = []
    try:
        for name in HOSTS:
            nodes.append(Node(name, shared))
        one, other = nodes
        subprocess.run(["ip", "link", "add", "eth0", "netns", str(one.holder.pid), "type", "veth",
                        "peer", "name", "eth0", "netns", str(other.holder.pid)], check=True)
        for node in nodes:
            subprocess.run(node.inside("ip", "address", "add", f"{node.address}/24", "dev", "eth0"), check=True)
            subprocess.run(node.inside("ip", "link", "set", "lo", "up"), check=True)
            node.cable("up")
        yield one, other
    finally:
        for node in nodes:
            node.close()


def impossible() -> str:
    """Why this machine cannot have them; empty where it can."""
    lacking = [tool for tool in ("unshare", "nsenter", "ip") if shutil.which(tool) is None]
    if lacking:
        return f"two nodes need {' and '.join(lacking)} (util-linux, iproute2)"
    probe = "mount -t tmpfs none /mnt && ip link add name one type veth peer name other && echo probe > /proc/sys/kernel/hostname"
    done = subprocess.run(["unshare", "-n", "-m", "-u", "bash", "-c", probe], capture_output=True, text=True)
    return f"two nodes need the right to make namespaces: {done.stderr.strip()}" if done.returncode else ""
