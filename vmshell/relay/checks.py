"""What a descriptor that the broker brings has to be, by what it is for: the kernel says what it is, nobody's word counts.

QEMU never sees another one: no directory, no file that neither the broker's uid owns nor everybody may read, no socket that leads
elsewhere, no tap of another VM or card.
Runs in: the relay. Asks the kernel about open descriptors.
"""

from __future__ import annotations

import os
import socket
import stat

from .. import messages
from ..descriptors import check_pipe, check_read_file, check_stream, check_tap
from ..errors import ProtocolError
from ..numbering import tap_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class BadDescriptor(ProtocolError):
    """the descriptor of {what} is refused: {problem}"""


def check_stderr(fd: int) -> None:
    """Raise BadDescriptor unless *fd* can be QEMU's error pipe."""
    _check("stderr", check_pipe, fd)


def check_fifo(fd: int) -> None:
    """Raise BadDescriptor unless *fd* can be one direction of a serial port."""
    _check("serial port", check_pipe, fd, os.O_RDWR)


def check_viewer(fd: int) -> None:
    """Raise BadDescriptor unless *fd* can be a viewer's end of a pair of sockets."""
    _check("viewer", _packets, fd)


def check_order(order: messages.Order, fd: int, owner: int) -> None:
    """Raise BadDescriptor unless *fd* is what *order* brings; *owner* is the broker's uid."""
    if order.what == "insert":
        _check(order.what, check_read_file, fd, owner)
    elif order.what == "nic-add":
        _check(order.what, check_tap, fd, tap_name(order.number, order.value))
    else:
        _check(order.what, check_stream, fd)


def _check(what: str, check: Callable[..., None], *arguments: object) -> None:
    try:
        check(*arguments)
    except (ValueError, OSError) as exc:
        raise BadDescriptor(what=what, problem=exc) from exc


def _packets(fd: int) -> None:
    """Raise ValueError or OSError unless *fd* is a connected Unix socket of packets."""
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        raise ValueError("no socket")
    with socket.socket(fileno=os.dup(fd)) as sock:
        if (sock.family, sock.type) != (socket.AF_UNIX, socket.SOCK_SEQPACKET):
            raise ValueError("no Unix socket of packets")
        sock.getpeername()
