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
from vmshell.servicemanager import notify, passed_socket

from .features import Features
from .network import Network
from .rootpolicy import RootPolicy
from .service import Service, report

_LISTEN = "--listen-fd="


def main(argv: list[str]) -> int:
    """Serve; *argv* is the layout as one argument, and perhaps the number of the listening socket."""
    layout = Layout.from_args(argv[0])
    os.umask(0o077)
    passed = [int(option.removeprefix(_LISTEN)) for option in argv[1:] if option.startswith(_LISTEN)]
    listener = socket.socket(fileno=passed[0]) if passed else passed_socket("tapnet")
    own = listener is None
    if listener is None:
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
    notify("READY=1")
    service.run()
    service.close()
    if own:
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
