"""How the processes of a run find each other, and how they notice that one of them has died.

Waiting has no time limit: one process may work for hours while the others wait for it. So death must be told apart
from silence. Rank 0 holds a connection to every other process; the kernel closes it when a process dies, however busy
or stopped a living one may be, and keep-alive packets tell of a dead host. This holds for NCCL too, whose kernels would
wait for a dead partner for ever.
"""

import multiprocessing.connection
import os
import socket
import sys
import threading
import time
from datetime import timedelta

import torch.distributed as td

from common.launch import Launch, UserError

PATIENCE = timedelta(days=30)  # of every collective
LOST_SECONDS = 20.0  # from a lost connection to the end: the dead process's own message and the launcher come first
HELLO = b"cleansynth "

_lines: dict[socket.socket, int] = {}  # connection: rank at its other end
_listener: list[threading.Thread] = []


def meet(launch: Launch) -> td.Store:
    """The store at which the processes meet. Waits for all of them in a way that signals can end, and says so."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    server = launch.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun holds it
    where = f"WORLD_SIZE={launch.world}, MASTER_ADDR={host}, MASTER_PORT={port}"
    store, here, start, told = None, 0, time.monotonic(), 0.0
    while here < launch.world:
        if store is None and (server or _answers(host, port)):
            try:
                tcp = td.TCPStore(host, port, None, server, timedelta(seconds=60), wait_for_workers=False)
            except (RuntimeError, ValueError) as error:
                text = str(error).splitlines()[0]
                raise UserError(f"the processes cannot meet ({where}): {text}; choose another MASTER_PORT") from error
            store = td.PrefixStore(f"cleansynth-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", tcp)
            store.add("here", 1)
        here = store.add("here", 0) if store else 0
        waited = time.monotonic() - start
        if waited - told > 10 and (store is None or launch.rank == 0):
            told = waited
            what = f"waiting for {launch.world - here} of {launch.world} processes" if store else "waiting for rank 0"
            print(f"{what} ({where}; unset WORLD_SIZE and RANK if they are left over)", file=sys.stderr, flush=True)
        time.sleep(0.02 if waited < 5 else 0.5)
    store.set_timeout(PATIENCE)
    return store


def _answers(host: str, port: int) -> bool:
    """Does anybody listen there? Asked from Python, where a signal can interrupt the wait."""
    try:
        socket.create_connection((host, port), timeout=5).close()
        return True
    except OSError:
        return False


def watch(store: td.Store, launch: Launch) -> None:
    """End this process, with one line and exit code 2, LOST_SECONDS after another died without `leave`."""
    if launch.rank == 0:
        with socket.create_server(("", 0), backlog=launch.world) as server:
            server.settimeout(60)
            store.set("lifeline", f"{_address()} {server.getsockname()[1]}")
            while len(_lines) < launch.world - 1:
                line, _ = server.accept()
                line.settimeout(60)
                word = line.recv(len(HELLO) + 9)
                if word.startswith(HELLO):  # and not a port scanner
                    _lines[line] = int(word.removeprefix(HELLO))
    else:
        host, port = store.get("lifeline").decode().split()
        line = socket.create_connection((host, int(port)), timeout=60)
        line.sendall(HELLO + b"%09d" % launch.rank)
        _lines[line] = 0
    for line in _lines:
        line.setblocking(True)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                line.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    _listener[:] = [threading.Thread(target=_listen, daemon=True)]
    _listener[0].start()


def _address() -> str:
    """Where the others reach this process: MASTER_ADDR if that is this host, else the interface that leads there."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        with socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.connect((host, port))  # sends nothing
            mine = probe.getsockname()[0]
    except OSError:
        return host
    return host if mine.startswith("127.") else mine


def _listen() -> None:
    silent = dict(_lines)
    while silent:
        for line in multiprocessing.connection.wait(list(silent)):
            try:
                farewell = line.recv(1)
            except OSError:  # reset, or a host that no longer answers
                farewell = b""
            rank = silent.pop(line)
            if not farewell:
                time.sleep(LOST_SECONDS)
                os.write(2, f"error: lost contact with rank {rank}, whose own message may tell why\n".encode())
                os._exit(2)


def leave() -> None:
    """Tell the others that this process ends because its work is done, and hear it from them. All do it together."""
    for line in list(_lines):
        try:
            line.sendall(b".")
        except OSError:
            pass
    for thread in _listener:  # a connection closed with something unread would look like death at its other end
        thread.join(10)
    _drop()


def _drop() -> None:
    for line in _lines:
        line.close()
    _lines.clear()
    _listener.clear()


os.register_at_fork(after_in_child=_drop)  # a loader process must not keep up the appearance of its parent's life
