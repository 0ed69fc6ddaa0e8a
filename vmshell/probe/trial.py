"""One probe guest: started in the jail that VMs get, listened to until it has said enough, and always killed.

Runs in: the probe. Touches: the processes it started.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time

from ..launch.devices import DiskPlan
from ..launch.jail import command
from ..launch.plan import LaunchPlan
from ..launch.seccomp import program
from . import guest

_CONSOLE_MAX = 64
_ERRORS_MAX = 4096
_MEMORY = 32  # MiB

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

# What QEMU says, and goes on as if it had not: the CPU met something it cannot run.
KVM_GAVE_UP = b"KVM internal error"


class Tools:
    """The programs that the probe starts; tests put stand-ins here."""

    def __init__(self, *, qemu: str, bwrap: str, kvm: str = "/dev/kvm") -> None:
        self.qemu = qemu
        self.bwrap = bwrap
        self.kvm = kvm


class Trial:
    """A guest under one accelerator. `console` is what it said, `errors` what QEMU or bwrap said, `seconds` how long it took.

    `end` kills it. Should the probe itself be killed outright, the kernel kills the guest, from the moment when bwrap has asked
    for that; in the few milliseconds before, ten seconds of CPU time are its limit (`brief`).
    """

    def __init__(self, accel: str, tools: Tools, uid: int | None, kvm_gid: int | None = None) -> None:
        self.accel = accel
        self.console = b""
        self.errors = b""
        self.over = False
        self.seconds = 0.0
        self._started = time.monotonic()
        self._pid = 0
        self._info = b""
        self._fds: dict[int, str] = {}
        lent: list[int] = []  # the child's ends
        try:
            disk = _memfd("probe-disk", guest.SECTOR, guest.DISK_SIZE, lent)
            seccomp = _memfd("probe-seccomp", program(), 0, lent)
            console, errors, info = (self._pipe(name, lent) for name in ("console", "errors", "info"))
            plan = LaunchPlan(
                number=0,
                accel=accel,
                cpus=1,
                memory=_MEMORY,
                disks=(DiskPlan(layers=((disk, "raw"),), bootindex=1),),
                info_fd=info,
                seccomp_fd=seccomp,
                uid=uid,
                gid=uid,
                kvm_gid=kvm_gid,
                file_size_max=guest.DISK_SIZE,
                paused=False,  # it has no monitor
            )
            words = command(plan, qemu=tools.qemu, bwrap=tools.bwrap, brief=True)
            self._pid = spawn(words, console, errors, plan.all_fds())
        except BaseException:
            self.end()
            raise
        finally:
            for fd in lent:
                os.close(fd)

    @property
    def done(self) -> bool:
        """The guest came through."""
        return guest.DONE in self.console

    @property
    def restarted(self) -> bool:
        """The CPU could not go on and began anew: what a triple fault does."""
        return self.console.count(guest.START) > 1

    def fds(self) -> list[int]:
        """What to wait for; empty when there is nothing more to learn."""
        return [] if self.over else list(self._fds)

    def read(self, fd: int) -> None:
        """Take what *fd* brought."""
        try:
            data = os.read(fd, 4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        kind = self._fds[fd]
        if kind == "console":
            self.console = (self.console + data)[:_CONSOLE_MAX]
        elif kind == "errors":
            self.errors = (self.errors + data)[:_ERRORS_MAX]
        else:
            self._info = (self._info + data)[:_ERRORS_MAX]
        if not data:
            os.close(fd)
            del self._fds[fd]
        # The error pipe ends when the last of the processes has: all there was to read has been read.
        ended = "errors" not in self._fds.values()
        self.over = self.over or self.done or self.restarted or KVM_GAVE_UP in self.errors or ended
        self.seconds = time.monotonic() - self._started

    def end(self) -> None:
        """Kill what runs and see it gone; close everything. May be called twice."""
        if self._pid:
            self._kill()
            self._pid = 0
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def _kill(self) -> None:
        # Stopped first: from then on bwrap neither starts QEMU nor reaps it, so the number it told us means QEMU or nothing.
        os.kill(self._pid, signal.SIGSTOP)
        _, status = os.waitpid(self._pid, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return  # it had ended, and bwrap ends after QEMU
        child = self._child()
        if child:
            os.kill(child, signal.SIGKILL)
        # Before it told us, whatever it started is still in our process group and waits for it.
        os.killpg(self._pid, signal.SIGKILL)
        os.waitpid(self._pid, 0)

    def _child(self) -> int:
        """QEMU's pid, if bwrap has got that far: the number from its --info-fd, believed when it really is bwrap's child."""
        for fd in [fd for fd, kind in self._fds.items() if kind == "info"]:
            self.read(fd)
        try:
            pid = int(json.loads(self._info)["child-pid"])
            with open(f"/proc/{pid}/stat", "rb") as file:
                parent = int(file.read().rpartition(b")")[2].split()[1])
        except (ValueError, KeyError, TypeError, OSError):
            return 0
        return pid if parent == self._pid else 0

    def _pipe(self, name: str, lent: list[int]) -> int:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(reader, False)
        self._fds[reader] = name
        lent.append(writer)
        return writer


def _memfd(name: str, content: bytes, size: int, lent: list[int]) -> int:
    """A file in memory with *content*, at least *size* bytes long, read from its start."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC)
    lent.append(fd)
    os.write(fd, content)
    os.truncate(fd, max(size, len(content)))
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def spawn(words: list[str], output: int, errors: int, fds: tuple[int, ...]) -> int:
    """Start *words* in a process group of its own with just these descriptors and nothing to read; return the pid."""
    actions: list[tuple[int, int, str, int, int] | tuple[int, int, int]] = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, output, 1),
        (os.POSIX_SPAWN_DUP2, errors, 2),
        # Onto itself: that only takes close-on-exec away, in the child.
        *((os.POSIX_SPAWN_DUP2, fd, fd) for fd in fds),
    ]
    return os.posix_spawn(words[0], words, {}, file_actions=actions, setpgroup=0, setsigmask=[], setsigdef=[signal.SIGPIPE])


def wait(poll: select.poll, deadline: float) -> list[tuple[int, int]]:
    """Wait for *poll* until time.monotonic() is *deadline*. The only place where the probe can be told to stop (see `main`)."""
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    try:
        return poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def watch(trials: list[Trial], deadline: float) -> None:
    """Listen to all of them until each is over or time.monotonic() reaches *deadline*."""
    while time.monotonic() < deadline:
        owners = {fd: trial for trial in trials for fd in trial.fds()}
        if not owners:
            return
        poll = select.poll()
        for fd in owners:
            poll.register(fd, select.POLLIN)
        for fd, _ in wait(poll, deadline):
            if fd in owners[fd].fds():
                owners[fd].read(fd)
