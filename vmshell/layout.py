"""Every path and socket, from a few roots, so that tests can move them all.

Runs in: every process. Stdlib only; nothing is created here.
"""

from __future__ import annotations

# The form of the lasting state. `make install` brings older state to it (etc/migrate.sh); newer state is refused.
STATE_VERSION = 2


class Layout:
    """Where things are.

    *etc* holds the administrator's files, *state* the lasting ones, *run* what is gone at reboot, *log* the relay's.
    `embedded` is true in session mode, where one person's broker and relay start with the first shell and end with the last.
    """

    def __init__(self, *, etc: str, state: str, run: str, log: str, embedded: bool) -> None:
        self.etc = etc
        self.state = state
        self.run = run
        self.log = log
        self.embedded = embedded

    @classmethod
    def system(cls) -> Layout:
        """The layout of an installed host."""
        return cls(etc="/etc/vmshell", state="/var/lib/vmshell", run="/run/vmshell", log="/var/log/vmshell", embedded=False)

    @classmethod
    def session(cls, environ: dict[str, str], uid: int, home: str) -> Layout:
        """One person's own, under the XDG directories (as the standard says, only absolute paths count)."""

        def xdg(variable: str, default: str) -> str:
            value = environ.get(variable, "")
            return value if value.startswith("/") else default

        state = xdg("XDG_STATE_HOME", f"{home}/.local/state") + "/vmshell"
        runtime = xdg("XDG_RUNTIME_DIR", "")
        return cls(
            etc=xdg("XDG_CONFIG_HOME", f"{home}/.config") + "/vmshell",
            state=xdg("XDG_DATA_HOME", f"{home}/.local/share") + "/vmshell",
            # Without a runtime directory (no logind) the run directory sits beside the log and is judged by boot id.
            run=runtime + "/vmshell" if runtime else f"{state}/run",
            log=f"{state}/log",
            embedded=True,
        )

    @classmethod
    def from_args(cls, text: str) -> Layout:
        """Read what `to_args` wrote: `etc:state:run:log:embedded` as one argument of a process we start."""
        etc, state, run, log, embedded = text.split(":")
        return cls(etc=etc, state=state, run=run, log=log, embedded=embedded == "1")

    def to_args(self) -> str:
        """This layout as one argument for a process we start (paths with a colon cannot be expressed and are refused)."""
        parts = [self.etc, self.state, self.run, self.log]
        if any(":" in part or not part.startswith("/") for part in parts):
            raise ValueError("a layout needs absolute paths without ':'")
        return ":".join([*parts, "1" if self.embedded else "0"])

    @property
    def policy(self) -> str:
        return f"{self.etc}/policy.toml"

    @property
    def broker_socket(self) -> str:
        return f"{self.run}/broker.sock"

    @property
    def front_socket(self) -> str:
        """Where the broker hears from the front who has come."""
        return f"{self.run}/front.sock"

    @property
    def launcher_socket(self) -> str:
        return f"{self.run}/launcher.sock"

    @property
    def relay_socket(self) -> str:
        return f"{self.run}/relay.sock"

    @property
    def tapnet_socket(self) -> str:
        return f"{self.run}/tapnet.sock"

    @property
    def names(self) -> str:
        """The data that dnsmasq reads: who has which address and name. The broker writes it, everybody may read it."""
        return f"{self.run}/names"

    @property
    def dnsmasq_conf(self) -> str:
        """dnsmasq's configuration, in a folder of its own service's: nothing of the broker's is there."""
        return f"{self.run}-names/dnsmasq.conf"

    @property
    def addresses(self) -> str:
        """Which segment has which network and which card has which address, for good."""
        return f"{self.state}/net/addresses.json"

    @property
    def broker_run(self) -> str:
        """What the broker keeps for itself until the next reboot: its lock, what it found out about the host."""
        return f"{self.run}/broker"

    @property
    def host_facts(self) -> str:
        """The acceleration probe's answer, good until the next reboot."""
        return f"{self.broker_run}/host.json"

    @property
    def state_mark(self) -> str:
        """Says of which version the state is, as `state 2 vmshell 0.1.0`; the installer writes it, in system mode only."""
        return f"{self.state}/version"

    @property
    def images(self) -> str:
        return f"{self.state}/images"

    @property
    def vms(self) -> str:
        return f"{self.state}/vms"

    def vm_state(self, uid: int, name: str) -> str:
        """A VM's lasting directory. By the owner's uid: account names come in shapes that do not belong into a path."""
        return f"{self.vms}/{uid}/{name}"

    @property
    def shelves(self) -> str:
        return f"{self.state}/shelf"

    def shelf(self, uid: int) -> str:
        """The objects that belong to no VM, of all accounts that have had this uid."""
        return f"{self.shelves}/{uid}"

    @property
    def run_vms(self) -> str:
        return f"{self.run}/vms"

    def vm_run(self, number: int) -> str:
        """A running VM's directory: `qmp.sock`, the FIFOs `input` and `output`, and `run.json`."""
        return f"{self.run_vms}/{number}"

    def vm_log(self, number: int) -> str:
        """The relay's directory for a VM: `console.log`, its rotations, and QEMU's own words in `qemu.log`."""
        return f"{self.log}/{number}"


def read_state_version(layout: Layout) -> int:
    """Return the version of the state as its mark has it; 0 without one: it is older than marks, or half brought to this form."""
    try:
        with open(layout.state_mark, encoding="ascii", errors="replace") as file:
            words = file.readline(100).split()
    except FileNotFoundError:
        return 0
    return int(words[1]) if words[:1] == ["state"] and words[1:2] and words[1].isdecimal() else 0
