"""Ends this process, with a message, when another rank is gone, also where a dead machine sends nothing any more.

Collectives do not do that: gloo waits for hours and NCCL for half an hour at a connection on which nothing comes. So each rank has
one more connection, to rank 0, on which nothing is sent while all is well: the kernels ask each other for signs of life. A step
needs nothing for it, and a rank that computes, writes or holds Python's lock for long is not taken for dead.
"""

import errno
import json
import os
import select
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch.distributed as dist

from seppo_fast.errors import UserError

SILENCE = 30  # seconds without a sign of life from another machine
GRACE = 10  # seconds for this process's own message, which may say more, before it is ended
HELLO = 5  # seconds for a new connection's first line
SILENT = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENETUNREACH)  # the second, where nobody has the address
BYE = b"bye\n"
_peers: list[socket.socket] = []  # of this process: all ranks for rank 0, rank 0 for the others
_left = threading.Event()


def to_stderr(words: str) -> None:
    """Print the message of an end."""
    print(f"seppo_fast: {words}", file=sys.stderr, flush=True)


def watch(rank: int, world: int, host: str, store: dist.Store, lost: Callable[[str], None] = to_stderr) -> None:
    """Connect this rank, which has met the others in `store`, and watch from then on; `lost` prints the message of the end.

    `host` is the machine where the ranks met. Rank 0 need not be there: its own addresses are tried, too.
    """
    _left.clear()
    _peers.clear()
    names = {rank: f"rank {rank} on {socket.gethostname()}"}
    if rank == 0:
        _peers.extend(_accept(world, store, names))
    else:
        connection, names[0] = _connect(rank, names[rank], host, store)
        _peers.append(connection)
    for connection in _connections():  # two ranks may lose each other that both reach rank 0; it comes first where it knows
        _ask_for_life(connection, 2 * SILENCE)
    for peer in _peers:
        peer.settimeout(None)
        _ask_for_life(peer, SILENCE)
    others = dict(zip((peer.fileno() for peer in _peers), (names[other] for other in sorted(names) if other != rank), strict=True))
    threading.Thread(target=_until_lost, args=(others, lost), daemon=True).start()


def part() -> None:
    """Tell the others that this rank ends as it should; otherwise its end is theirs, too."""
    _left.set()
    for peer in _peers:
        try:
            peer.sendall(BYE)
            peer.shutdown(socket.SHUT_WR)
        except OSError:  # it has ended
            pass


def _accept(world: int, store: dist.Store, names: dict[int, str]) -> list[socket.socket]:
    """Rank 0's connections, in the order of the ranks."""
    dual = socket.has_dualstack_ipv6()
    word, found = uuid.uuid4().hex, dict[int, socket.socket]()
    with socket.create_server(("", 0), family=socket.AF_INET6 if dual else socket.AF_INET, dualstack_ipv6=dual,
                              backlog=world) as server:
        addresses = [address.address.split("%")[0] for some in psutil.net_if_addrs().values() for address in some
                     if address.family in (socket.AF_INET, socket.AF_INET6)]
        store.set("contact", json.dumps([word, server.getsockname()[1], addresses, names[0]]))
        while len(found) < world - 1:
            connection, _ = server.accept()
            try:
                connection.settimeout(HELLO)
                said, rank, name = _line(connection)
                if said != word:
                    raise ValueError("a stranger")
                connection.sendall(json.dumps(word).encode() + b"\n")
                names[rank], found[rank] = name, connection
            except (OSError, ValueError, TypeError):
                connection.close()
    return [found[rank] for rank in sorted(found)]


def _connect(rank: int, name: str, host: str, store: dist.Store) -> tuple[socket.socket, str]:
    """The connection to rank 0, and rank 0's name."""
    word, port, addresses, first = json.loads(store.get("contact"))
    for address in dict.fromkeys([host, *addresses]):
        try:
            connection = socket.create_connection((address, port), HELLO)
        except OSError:
            continue
        try:
            connection.sendall(json.dumps([word, rank, name]).encode() + b"\n")
            if _line(connection) == word:  # else it is another machine with this address
                return connection, first
        except (OSError, ValueError):
            pass
        connection.close()
    raise UserError(f"{name} cannot connect to {first}, port {port}, at {host} or any of {', '.join(addresses)}: open the ports"
                    " above 32768 between the machines")


def _line(connection: socket.socket) -> Any:
    """The JSON in the next line, of at most 4096 bytes, and nothing of what follows."""
    line = b""
    while not line.endswith(b"\n") and len(line) < 4096:
        if not (byte := connection.recv(1)):
            break
        line += byte
    return json.loads(line)


def _connections() -> Iterator[socket.socket]:
    """This process's TCP connections, also those of gloo, which gives no access to them. Each is a copy, closed afterwards."""
    folder = "/proc/self/fd"
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        try:
            if not os.readlink(f"{folder}/{name}").startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername():
                    yield connection
        except OSError:  # it listens, or was closed meanwhile
            pass


def _ask_for_life(connection: socket.socket, seconds: int) -> None:
    """Let the kernel end the connection once nothing has come from the other machine for so many seconds."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", (seconds - 10) // 5),
                          ("TCP_USER_TIMEOUT", 1000 * seconds)):
        if hasattr(socket, option):  # Linux
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _until_lost(others: dict[int, str], lost: Callable[[str], None]) -> None:
    """Wait for the end of a connection without a word, or for rank 0's word that another one ended so; then end this process."""
    ready, connections = select.poll(), {peer.fileno(): peer for peer in _peers}
    for descriptor in connections:
        ready.register(descriptor, select.POLLIN)
    while connections:
        for descriptor, _ in ready.poll():
            gone = _news(connections[descriptor], others[descriptor])
            if gone is None:
                continue
            if gone and not _left.is_set():
                _tell(connections.values(), gone)
                _end(gone, lost)
            ready.unregister(descriptor)
            del connections[descriptor]


def _news(connection: socket.socket, name: str) -> str | None:
    """Who is gone and how; empty where the rank has left as it should, None where nothing is said."""
    try:
        said = _line(connection) if (first := connection.recv(1, socket.MSG_PEEK)) not in (b"", BYE[:1]) else first
    except (OSError, ValueError) as error:
        if getattr(error, "errno", None) in SILENT:
            return f"{name}, of whose machine nothing was heard for {SILENCE} seconds: it is down, or cut off"
        return f"{name}, which ended ({error}): see what it printed; if nothing, it was killed (out of memory?)"
    if said == b"":
        return f"{name}, which ended: see what it printed; if nothing, it was killed (out of memory?)"
    return "" if said == BYE[:1] else str(said)


def _tell(peers: Any, gone: str) -> None:
    """Rank 0 tells the others, which are connected to it alone."""
    for peer in peers:
        try:
            peer.sendall(json.dumps(gone).encode() + b"\n")
        except OSError:
            pass


def _end(gone: str, lost: Callable[[str], None]) -> None:
    """End this process, unless it ends by itself within GRACE seconds."""
    time.sleep(GRACE)
    if not _left.is_set():
        lost(f"lost contact with {gone}")
        os._exit(1)
