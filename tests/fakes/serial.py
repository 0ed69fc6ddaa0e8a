"""Both sides of a serial port over the FIFOs that the broker makes, each with the few calls that a socket has."""

from __future__ import annotations

import contextlib
import os
import select

from vmshell.broker.lifecycle import serial_port


class SerialPort:
    """One side: reads the one FIFO, writes the other."""

    def __init__(self, reader: int, writer: int, stack: contextlib.ExitStack) -> None:
        self._reader = reader
        self._writer = writer
        self._stack = stack
        self._timeout = 60.0
        for fd in (reader, writer):
            os.set_blocking(fd, False)

    def settimeout(self, seconds: float) -> None:
        self._timeout = seconds

    def sendall(self, data: bytes) -> None:
        """Write *data*; raises TimeoutError when nobody reads."""
        left = memoryview(data)
        while left:
            self._wait([], [self._writer])
            with contextlib.suppress(BlockingIOError):
                # In pieces, of which a pipe takes each whole or not at all.
                left = left[os.write(self._writer, left[: select.PIPE_BUF]) :]

    def recv(self, count: int) -> bytes:
        """Up to *count* bytes; raises TimeoutError when nothing comes."""
        self._wait([self._reader], [])
        return os.read(self._reader, count)

    def lying(self) -> bytes:
        """All that lies there now."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                data += os.read(self._reader, 1 << 16)
        return data

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> SerialPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait(self, readers: list[int], writers: list[int]) -> None:
        if not any(select.select(readers, writers, [], self._timeout)):
            raise TimeoutError("the other side of the serial port")


def guests_side(run_dir: str) -> SerialPort:
    """What QEMU gets: FIFOs made in place of an earlier run's."""
    for name in serial_port.NAMES:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{run_dir}/{name}")
    stack = contextlib.ExitStack()
    input_fd, output_fd = serial_port.make(run_dir, stack)
    return SerialPort(input_fd, output_fd, stack)


def relays_side(run_dir: str) -> SerialPort:
    """What the relay gets."""
    stack = contextlib.ExitStack()
    input_fd, output_fd = serial_port.open_both(run_dir, stack)
    return SerialPort(output_fd, input_fd, stack)
