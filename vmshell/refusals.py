"""The errors that a person meets by what was asked or is not there; `errors.py` has their family and those that root raises.

Runs in: the broker, the relay, tapnet, the jobs, the shell, vmshell-admin. Stdlib only, no I/O at import.
"""

from __future__ import annotations

from .errors import EX_UNAVAILABLE, EX_USAGE, EX_VM_FAILED, VmshellError

EX_NO_SUCH = 3
EX_STATE = 4
EX_LIMIT = 5
EX_BUSY = 6
EX_TIMEOUT = 8


class ReportedError(VmshellError):
    """{text}"""

    # What a client raises for an error that another process named: the sentence and the hint travel with it.
    def __init__(self, code: str, text: str, hint: str = "") -> None:
        known = REGISTRY.get(code, VmshellError)
        self.code = code if code in REGISTRY else "refused"
        self.exit_status = known.exit_status
        self.hint = "{advice}" if hint else ""
        super().__init__(text=text, advice=hint)


def from_wire(error: object) -> VmshellError:
    """Rebuild the error of a reply; anything malformed becomes a plain refusal."""
    if not isinstance(error, dict):
        return ReportedError("refused", "the request was refused")
    code, text, hint = (error.get(key) for key in ("code", "text", "hint"))
    return ReportedError(
        code if isinstance(code, str) else "refused",
        text if isinstance(text, str) else "the request was refused",
        hint if isinstance(hint, str) else "",
    )


# --- what a person typed ----------------------------------------------------------------------------------------------


class BadName(VmshellError):
    """{what} {value!r} is not a valid name: {rule}"""

    code = "bad-name"
    exit_status = EX_USAGE


class UnknownKey(VmshellError):
    """there is no key {key!r}"""

    code = "unknown-key"
    exit_status = EX_USAGE
    hint = "{advice}"


class UnknownVerb(VmshellError):
    """there is no verb {verb!r}"""

    code = "unknown-verb"
    exit_status = EX_USAGE
    hint = "`help` lists the verbs"


class Usage(VmshellError):
    """{problem}"""

    code = "usage"
    exit_status = EX_USAGE
    hint = "usage: {usage}"


class AskKillOrRm(VmshellError):
    """destroy means different things to different people: `kill {vm}` pulls the plug, disks kept; `rm {vm}` deletes the VM"""

    code = "kill-or-rm"
    exit_status = EX_USAGE


# --- what does not exist, or must look as if it did not ---------------------------------------------------------------


class NoSuchVm(VmshellError):
    """there is no VM named {vm}"""

    code = "no-such-vm"
    exit_status = EX_NO_SUCH
    hint = "`list` shows yours"


class NoSuchImage(VmshellError):
    """there is no image named {image}"""

    code = "no-such-image"
    exit_status = EX_NO_SUCH
    hint = "`images` shows the catalogue"


class NoSuchObject(VmshellError):
    """{where} has no {object}"""

    code = "no-such-object"
    exit_status = EX_NO_SUCH
    hint = "{advice}"


class NoSuchUser(VmshellError):
    """there is no account {user} on this host"""

    code = "no-such-user"
    exit_status = EX_NO_SUCH


class NoSuchSnapshot(VmshellError):
    """{vm} has no snapshot {tag}"""

    code = "no-such-snapshot"
    exit_status = EX_NO_SUCH
    hint = "{advice}"


class ImageDamaged(VmshellError):
    """image {image} is damaged: {problem}"""

    code = "image-damaged"
    exit_status = EX_VM_FAILED
    hint = "the administrator can build it again with `vmshell-admin image build {image}`"


# --- states and limits ------------------------------------------------------------------------------------------------


class VmExists(VmshellError):
    """you already have a VM named {vm}"""

    code = "vm-exists"
    exit_status = EX_STATE
    hint = "`info {vm}` shows it"


class ObjectExists(VmshellError):
    """{where} already has {object}"""

    code = "object-exists"
    exit_status = EX_STATE
    hint = "`rm {ref}` deletes it"


class TooMany(VmshellError):
    """{where} has {limit} {what}, and there is no room for more"""

    code = "too-many-kept"
    exit_status = EX_LIMIT
    hint = "delete some that you no longer need"


class ObjectInUse(VmshellError):
    """{object} is in use by {user}"""

    code = "object-in-use"
    exit_status = EX_STATE
    hint = "{advice}"


class WrongFormat(VmshellError):
    """{object} was made as {format}; {use}"""

    code = "wrong-format"
    exit_status = EX_USAGE


class CannotSnapshot(VmshellError):
    """{vm} cannot be saved: {problem}"""

    code = "cannot-snapshot"
    exit_status = EX_STATE


class CannotRestore(VmshellError):
    """snapshot {tag} of {vm} does not fit: {problem}"""

    code = "cannot-restore"
    exit_status = EX_STATE


class UploadRefused(VmshellError):
    """{object} was not taken: {problem}"""

    code = "upload-refused"
    hint = "nothing was changed"


class WrongState(VmshellError):
    """{vm} is {state}; {verb} needs it {needed}"""

    code = "wrong-state"
    exit_status = EX_STATE


class AlreadyRunning(VmshellError):
    """{vm} is already {state}"""

    code = "already-running"
    exit_status = EX_STATE
    hint = "`console {vm}` attaches"


class VmBusy(VmshellError):
    """{vm} is {state}; another request is still at work on it"""

    code = "vm-busy"
    exit_status = EX_BUSY
    hint = "try again in a moment"


class OverLimit(VmshellError):
    """{vm} asks for {asked} {what}; the limit is {limit} and {used} are in use ({rule} in {section})"""

    code = "over-limit"
    exit_status = EX_LIMIT
    hint = "allowed now: {allowed}"

    def __init__(self, **fields: object) -> None:
        super().__init__(**{"section": "the built-in limits", **fields})


class PolicyDenied(VmshellError):
    """{vm}: {what} is not allowed ({rule} in {section})"""

    code = "policy-denied"
    hint = "allowed: {nearest}"


class TooManyRequests(VmshellError):
    """you have {count} {what} open and the limit is {limit}"""

    code = "too-many"
    exit_status = EX_LIMIT
    hint = "close one and try again"


class TooFast(VmshellError):
    """that is more than {limit} {what} a minute ({rule} in {section})"""

    code = "too-fast"
    exit_status = EX_BUSY
    hint = "try again in {seconds} s"


class TooManyConnections(VmshellError):
    """that is more than {limit} new connections a second, the most that one user may make for long"""

    code = "too-many-connections"
    exit_status = EX_BUSY
    hint = "try again in a moment"


class NotAllowed(VmshellError):
    """{what} is for {who} only"""

    code = "not-allowed"


class AccessEnded(VmshellError):
    """you may no longer use vmshell here: {why}"""

    code = "access-ended"
    hint = "your VMs run on; the administrator can let you in again"


class NotRoot(VmshellError):
    """{what} on this host's installation needs root"""

    code = "not-root"
    hint = "with `vmshell-admin --session …` the same works on your own VMs and images"


class AccountRefused(VmshellError):
    """{account}: {problem}"""

    code = "account"


class ProgramFailed(VmshellError):
    """{program} failed: {problem}"""

    code = "program-failed"
    exit_status = EX_UNAVAILABLE


class ImageInUse(VmshellError):
    """image {image} is in use by {users}"""

    code = "image-in-use"
    exit_status = EX_STATE
    hint = "{advice}"


class CannotTell(VmshellError):
    """nobody can say {what}: {problem}"""

    code = "cannot-tell"
    exit_status = EX_UNAVAILABLE
    hint = "so nothing was taken away; `vmshell-admin doctor` says what is wrong with the VM service"


class CatalogueBusy(VmshellError):
    """another vmshell-admin is at work on the image catalogue"""

    code = "catalogue-busy"
    exit_status = EX_BUSY
    hint = "try again when it has finished"


# --- what went wrong underneath ---------------------------------------------------------------------------------------


class StartFailed(VmshellError):
    """{vm} did not start: {problem}"""

    code = "start-failed"
    exit_status = EX_VM_FAILED
    hint = "`info {vm}` keeps the reason; the administrator finds QEMU's own words in the VM's log"


class LauncherDown(VmshellError):
    """the service that starts programs does not answer just now"""

    code = "launcher-down"
    exit_status = EX_UNAVAILABLE
    hint = "running VMs go on; try again in a moment, then tell the administrator"


class VmStopped(VmshellError):
    """{vm} stopped before that was done: {problem}"""

    code = "vm-stopped"
    exit_status = EX_VM_FAILED


class TimedOut(VmshellError):
    """{vm} did not {what} within {seconds} s"""

    code = "timed-out"
    exit_status = EX_TIMEOUT


class NoQemu(VmshellError):
    """this host cannot run VMs: {problem}"""

    code = "no-qemu"
    exit_status = EX_UNAVAILABLE
    hint = "the administrator can look with `vmshell-admin doctor`"


class BuildFailed(VmshellError):
    """image {image} was not built: {problem}"""

    code = "build-failed"
    exit_status = EX_UNAVAILABLE
    hint = "nothing was changed"


class StorageFailed(VmshellError):
    """the host could not store that: {problem}"""

    code = "storage"
    exit_status = EX_UNAVAILABLE
    hint = "nothing was lost; tell the administrator"


class BrokerDown(VmshellError):
    """the VM service does not answer ({problem})"""

    code = "broker-down"
    exit_status = EX_UNAVAILABLE
    hint = "running VMs go on; try again in a moment, then tell the administrator"


class FrontDown(VmshellError):
    """the service that takes users' connections does not answer just now"""

    code = "front-down"
    exit_status = EX_UNAVAILABLE


class RelayDown(VmshellError):
    """the console service does not answer just now; your VM is not affected"""

    code = "relay-down"
    exit_status = EX_UNAVAILABLE
    hint = "try again in a moment"


class TapnetDown(VmshellError):
    """the network service does not answer just now, so no VM with a network can start"""

    code = "tapnet-down"
    exit_status = EX_UNAVAILABLE
    hint = "running VMs keep their network; try again in a moment, then tell the administrator"


class AccountsSilent(VmshellError):
    """the host's account database does not answer just now"""

    code = "accounts-silent"
    exit_status = EX_UNAVAILABLE
    hint = "running VMs go on; try again in a moment, then tell the administrator"


class NetworkFailed(VmshellError):
    """the network could not be made: {problem}"""

    code = "network"
    exit_status = EX_UNAVAILABLE
    hint = "nothing of it was left behind; `vmshell-admin doctor` says what the host lacks"


class NoAddress(VmshellError):
    """network {network} has no free address: there is room for {size}, and all is taken"""

    code = "no-address"
    exit_status = EX_LIMIT
    hint = "delete a VM that you no longer need, or ask the administrator for a larger pool"


class NotConnected(VmshellError):
    """{vm} cannot be reached: {problem}"""

    code = "not-connected"
    exit_status = EX_STATE
    hint = "`net NAME` shows its cards and addresses"


class TooOften(VmshellError):
    """{what} came more often than {limit} times a minute"""

    code = "too-often"
    exit_status = EX_LIMIT
    hint = "try again in a moment"


class PortTaken(VmshellError):
    """port {port} of the host is taken"""

    code = "port-taken"
    exit_status = EX_STATE
    hint = "take another one: publish NAME PORT --to world:PORT"


class NoPortToReach(VmshellError):
    """{vm} has not published {port}"""

    code = "not-published"
    exit_status = EX_NO_SUCH
    hint = "`net NAME` lists what is published"


class NotWatched(VmshellError):
    """the console service does not look after this VM just now"""

    code = "not-watched"
    exit_status = EX_UNAVAILABLE
    hint = "try again in a moment"


class QemuSilent(VmshellError):
    """QEMU was told to {what} and did not do it"""

    code = "qemu-silent"
    exit_status = EX_VM_FAILED


class Upgraded(VmshellError):
    """vmshell was upgraded: log in again"""

    # Said to shells from before an upgrade that are still logged in; they know no code of it and end with 1.
    code = "upgraded"
    exit_status = EX_UNAVAILABLE
    hint = "your VMs run on; a new login works"


class AnswerTooLarge(VmshellError):
    """the answer does not fit into one message"""

    code = "answer-too-large"
    exit_status = EX_LIMIT
    hint = "what was asked for is done; ask for less at a time"


def _register() -> dict[str, type[VmshellError]]:
    """Every error by its code; two classes with one code is a bug found at import."""
    registry: dict[str, type[VmshellError]] = {"refused": VmshellError}
    for kind in VmshellError.__subclasses__():
        if kind is ReportedError:
            continue
        if kind.code in registry:
            raise RuntimeError(f"two errors share the code {kind.code}")
        registry[kind.code] = kind
    return registry


REGISTRY = _register()
