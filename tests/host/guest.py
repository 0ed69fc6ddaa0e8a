"""A guest made of the image `netdemo`, told what to do over its console, by its owner, through ssh and vmshell."""

from __future__ import annotations

import itertools
import shlex
import time

import pexpect

from .machine import Host

PATIENCE = 240  # seconds for an emulated Linux on a busy machine
_COUNT = itertools.count(1)


class Guest:
    """A VM of *user*'s. `make` and `boot` it first."""

    def __init__(self, host: Host, user: str, name: str) -> None:
        self.host = host
        self.user = user
        self.name = name
        self.address = ""
        self._console: pexpect.spawn | None = None

    def vmshell(self, command: str, timeout: float = PATIENCE) -> str:
        """What *command* prints to the owner, who must not be refused it."""
        status, out, err = self.host.run(self.user, command, timeout=timeout)
        assert status == 0, f"{self.user}: {command}: status {status}\n{out}{err}"
        return out

    def make(self, *settings: str) -> Guest:
        self.vmshell(f"new {self.name} --image netdemo --memory 160M")
        if settings:
            self.vmshell(f"set {self.name} {' '.join(settings)}")
        return self

    def boot(self) -> Guest:
        self.vmshell(f"boot {self.name}")
        return self

    def ready(self, card: str = "eth0") -> Guest:
        """Wait until it has an address on *card*, and remember it."""
        look = f"ip -4 addr show {card} | grep inet"
        text = self.sh(f"for i in $(seq {PATIENCE - 40}); do {look} && break; sleep 1; done", timeout=PATIENCE)
        assert "inet " in text, f"{self.name} got no address: {text}"
        self.address = text.split()[1].partition("/")[0]
        return self

    def run(self, command: str, timeout: float = 90) -> tuple[int, str]:
        """Run a line of shell as root in the guest: exit status, and what it said."""
        console = self._attached()
        mark = f"m{next(_COUNT)}"
        # In two halves: should the terminal echo the line, it does not hold the mark itself.
        console.send(f'echo "<m""{mark[1:]}"; eval {shlex.quote(command)}; echo "m""{mark[1:]}=$?>"\n')
        console.expect_exact(f"<{mark}\r\n", timeout=PATIENCE)
        console.expect(rf"{mark}=(\d+)>", timeout=timeout)
        assert console.match
        return int(console.match[1]), str(console.before).replace("\r\n", "\n")

    def sh(self, command: str, timeout: float = 90) -> str:
        """The same for what must succeed."""
        status, out = self.run(command, timeout)
        assert status == 0, f"{self.name}: {command}: status {status}\n{out}"
        return out

    def reaches(self, where: str, count: int = 2) -> bool:
        """Does at least one of *count* pings come back?"""
        return self.run(f"ping -c {count} -W 2 {where}")[0] == 0

    def detach(self) -> None:
        if self._console is not None:
            self._console.close(force=True)
            self._console = None

    def _attached(self) -> pexpect.spawn:
        if self._console is None:
            self._console = self.host.spawn(self.user, f"console {self.name}")
            self._console.expect_exact("agent ready", timeout=PATIENCE)
        return self._console


class Connection:
    """A TCP connection of *guest*'s to port 7 of *address*, where every byte comes back; used now and then."""

    def __init__(self, guest: Guest, address: str) -> None:
        self._guest = guest
        self._at = f"/tmp/connection{next(_COUNT)}"
        self._words: list[str] = []
        guest.sh(f"mkfifo {self._at}.in; sleep 600 >{self._at}.in &")
        guest.sh(f"nc {address} 7 <{self._at}.in >{self._at}.out 2>&1 &")

    def carries(self, word: str, seconds: float = 60) -> None:
        """Send *word*, and wait until it and all before it have come back."""
        self._words.append(word)
        self._guest.sh(f"echo {word} >{self._at}.in")
        end = time.monotonic() + seconds
        while (back := self._guest.sh(f"cat {self._at}.out").split()) != self._words:
            assert time.monotonic() < end, f"{back} came back of {self._words}"
            time.sleep(0.2)
