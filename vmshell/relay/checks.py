"""What a descriptor that the broker brings has to be, by what it is for: the kernel says what it is, nobody's word counts.

QEMU never sees another one: no directory, no file that neither the broker's uid owns nor everybody may read, no socket that leads
elsewhere, no tap of another VM or card.
Runs in: the relay. Asks the kernel about open descriptors.
"""

from __future__ import annotations

import os

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


def check_viewer(keys: int, output: int) -> None:
    """Raise BadDescriptor unless these can be our ends of a viewer's two pipes."""
    _check("keys", check_pipe, keys, os.O_RDONLY)
    _check("output", check_pipe, output, os.O_WRONLY)


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
