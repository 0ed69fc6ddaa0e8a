"""The tapnet process: `… tapnet LAYOUT [--listen-fd=N]`.

Runs as its own uid with CAP_NET_ADMIN and nothing else. Takes its listening socket from the service manager, or as descriptor N,
or makes it itself; then serves the broker until SIGTERM. What it has made stays when it ends: running VMs keep their network.
"""

from __future__ import annotations

import os
import resource
import signal
import socket

from vmshell import wire
from vmshell.layout import Layout

from .features import Features
from .network import Network
from .rootpolicy import RootPolicy
from .service import Service, report

_LISTEN = "--listen-fd="
_FIRST_FD = 3  # SD_LISTEN_FDS_START


def main(argv: list[str]) -> int:
    """Serve; *argv* is the layout as one argument, and perhaps the number of the listening socket."""
    layout = Layout.from_args(argv[0])
    os.umask(0o077)
    passed = [int(option.removeprefix(_LISTEN)) for option in argv[1:] if option.startswith(_LISTEN)]
    if not passed and os.environ.pop("LISTEN_PID", "") == str(os.getpid()) and os.environ.pop("LISTEN_FDS", "") == "1":
        passed = [_FIRST_FD]
    if passed:
        os.set_inheritable(passed[0], False)
        listener = socket.socket(fileno=passed[0])
    else:
        os.makedirs(layout.run, 0o755, exist_ok=True)
        listener = wire.listen(layout.tapnet_socket, 0o600)
    # Descriptors on their way to a broker that is slow to take them count as ours.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    root = RootPolicy(layout.policy)
    try:
        network, features = Network(root), Features()
    except PermissionError as error:
        report(f"it cannot start without CAP_NET_ADMIN: {error.strerror}")
        return 1
    network.begin()
    features.probe(network.links, network.nft)
    root.look()
    for problem in filter(None, (root.problem, *network.problems, *features.problems)):
        report(problem)
    service = Service(listener, root, network, features)
    _end_on_signals(service)
    _ready()
    service.run()
    service.close()
    if not passed:
        try:
            os.unlink(layout.tapnet_socket)
        except OSError:
            pass
    return 0


def _end_on_signals(service: Service) -> None:
    """SIGTERM and SIGINT end the loop after the batch that is being carried out."""
    read, write = socket.socketpair()
    read.setblocking(False)
    write.setblocking(False)

    def stop() -> None:
        service.stopping = True

    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(write.detach(), warn_on_full_buffer=False)
    service.add(read, stop)


def _ready() -> None:
    """Tell the service manager, if there is one, that the broker may come."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(b"READY=1", "\0" + address[1:] if address.startswith("@") else address)
        except OSError:
            pass
