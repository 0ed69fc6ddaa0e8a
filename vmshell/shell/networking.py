"""The verbs about networks: which there are, a VM's cards and what they carry, what is published, and bytes to a guest's port.

Runs in: the shell. Touches standard input and output, and the descriptors that come with answers.
"""

from __future__ import annotations

import os

from .. import messages
from ..errors import EX_DONE, BadValue, NotConnected, Usage, safe
from ..names import check_vm_ref, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from .context import Context
    from .grammar import Values
    from .show import Row

CHUNK = 1 << 17  # bytes read at a time
WORLD = "world"


# --- looking ---------------------------------------------------------------------------------------------------------


def networks(context: Context, values: Values) -> int:
    from . import show

    answer = context.ask(messages.Networks())
    rows = show.rows(answer.get("networks"))
    if values.flag("json"):
        show.document(context, answer)
    elif rows:
        show.table(context, ["NAME", "KIND", "SUBNET", "OUTSIDE", "ROLE", "CARDS"], [_network(row) for row in rows])
    else:
        context.note("no network is allowed to you; the administrator's policy says which are")
    return EX_DONE


def _network(row: Row) -> dict[str, str]:
    cells = {heading: safe(row.get(heading.lower()) or "", 64) for heading in ("NAME", "KIND", "SUBNET", "OUTSIDE", "ROLE")}
    if row.get("isolated") is True:
        cells["ROLE"] = f"{cells['ROLE']}, isolated"
    return {**cells, "CARDS": str(row.get("cards") or "")}


def net(context: Context, values: Values) -> int:
    from . import show

    request = messages.Net(vm=values.text("vm"))
    answer = context.ask(request)
    if values.flag("json"):
        show.document(context, answer)
    elif values.flag("follow"):
        _follow(context, request, answer)
    else:
        _say_cards(context, show.rows(answer.get("cards")))
        _say_published(context, show.rows(answer.get("published")))
    return EX_DONE


def _say_cards(context: Context, cards: list[Row]) -> None:
    from . import show

    if not cards:
        context.note("no network cards: `set NAME net0=NETWORK` adds one, `networks` shows what there is")
        return
    headings = ["CARD", "NETWORK", "ADDRESS", "MAC", "LINK", "RATE", "RECEIVED", "SENT"]
    cells = [
        {
            "CARD": safe(card.get("name"), 20),
            "NETWORK": f"{safe(card.get('network'), 64)} ({safe(card.get('kind'), 20)})",
            "ADDRESS": safe(card.get("address") or "", 40),
            "MAC": safe(card.get("mac") or "", 20),
            "LINK": safe(card.get("link") or "", 10),
            "RATE": f"{_number(card, 'rate')} kbit/s" if _number(card, "rate") else "",
            "RECEIVED": format_size(_number(card, "rx_bytes")),
            "SENT": format_size(_number(card, "tx_bytes")),
        }
        for card in cards
    ]
    if not any(cell["RATE"] for cell in cells):
        headings.remove("RATE")
    show.table(context, headings, cells)
    for card in cards:
        names = [safe(card.get(key), 160) for key in ("dns", "address6") if card.get(key)]
        forwards = card.get("forward")
        names += [f"forwards {safe(text, 40)}" for text in forwards] if isinstance(forwards, list) else []
        if names:
            context.say(f"{safe(card.get('name'), 20)}: {', '.join(names)}")


def _say_published(context: Context, rows: list[Row]) -> None:
    for row in rows:
        to = safe(row.get("to"), 65)
        place = f" at port {_number(row, 'host_port')} of this host" if to == WORLD and _number(row, "host_port") else ""
        context.say(f"published: {_number(row, 'port')}/{safe(row.get('proto'), 4)} to {to}{place}")


def _follow(context: Context, request: messages.Net, answer: Row) -> None:
    """A line for each card and second, until Ctrl-C or the VM's end."""
    import sys
    import time

    from . import show

    before = {str(card.get("name")): card for card in show.rows(answer.get("cards"))}
    try:
        while answer.get("state") in messages.ALIVE:
            time.sleep(1)
            answer = context.ask(request)
            for card in show.rows(answer.get("cards")):
                old = before.get(str(card.get("name")), card)
                seen = {key: max(0, _number(card, key) - _number(old, key)) for key in ("rx_bytes", "tx_bytes")}
                speeds = f"received {format_size(seen['rx_bytes'])}/s, sent {format_size(seen['tx_bytes'])}/s"
                context.say(f"{safe(card.get('name'), 20)}: {speeds}")
                before[str(card.get("name"))] = card
            sys.stdout.flush()
        context.note(f"{safe(answer.get('name'), 100)} is {safe(answer.get('state'), 20)}")
    except KeyboardInterrupt:
        return


def _number(row: Row, key: str) -> int:
    value = row.get(key)
    return value if type(value) is int else 0


# --- publishing ------------------------------------------------------------------------------------------------------


def publish(context: Context, values: Values) -> int:
    from . import show

    vm, port, to = values.text("vm"), values.optional("port"), values.optional("to")
    if port is None:
        answer = context.ask(messages.Net(vm=vm))
        rows = show.rows(answer.get("published"))
        _say_published(context, rows)
        if not rows:
            context.note(f"nothing is published: `publish {vm} 80 --to USER`, @GROUP or world")
        return EX_DONE
    if to is None:
        raise Usage(problem="publish needs --to, and whom", usage="publish NAME PORT --to USER|@GROUP|world[:HOSTPORT]")
    answer = context.ask(publishing(vm, port, to, remove=False))
    _say_published(context, [answer])
    return EX_DONE


def unpublish(context: Context, values: Values) -> int:
    vm, port = values.text("vm"), values.text("port")
    context.ask(publishing(vm, port, values.optional("to") or "", remove=True))
    context.say(f"{safe(vm)}: {safe(port, 20)} is no longer published")
    return EX_DONE


def publishing(vm: str, port: str, to: str, *, remove: bool) -> messages.Publish:
    """The message of `80`, `53/udp` and `bob`, `@staff`, `world`, `world:8080`; raises BadValue."""
    number, slash, proto = port.partition("/")
    who, colon, host_port = to.partition(":")
    if colon and who != WORLD:
        rule = "a user, @GROUP, world, or world and a port of this host, like world:8080"
        raise BadValue(field="--to", value=safe(to, 80), rule=rule)
    return messages.Publish(
        vm=vm,
        port=port_number(number),
        proto=proto if slash else "tcp",
        to=who,
        host_port=port_number(host_port) if colon else 0,
        remove=remove,
    )


def port_number(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise BadValue(field="PORT", value=safe(text, 40), rule="a port from 1 to 65535, like 22; with /udp behind it for UDP")
    return int(text)


# --- bytes to a port -------------------------------------------------------------------------------------------------


def connect(context: Context, values: Values) -> int:
    """Standard input and output and a TCP connection to a guest, until the guest closes."""
    import socket

    from .storing import must_own_stdin

    vm, port = target(values.text("target"), values.optional("port"))
    must_own_stdin(context, "connect")
    _, fd = context.ask_fd(messages.Connect(vm=vm, port=port))
    if fd is None:
        raise NotConnected(vm=vm, problem="the answer brought no connection")
    with socket.socket(fileno=fd) as stream:
        pump(stream)
    return EX_DONE


def target(text: str, port: str | None) -> tuple[str, int]:
    """`web1:22`, or `web1` and `22`."""
    name, colon, behind = text.rpartition(":") if port is None else (text, ":", port)
    if not colon:
        raise Usage(problem="connect needs a port", usage="connect NAME:PORT")
    return check_vm_ref(name), port_number(behind)


def pump(stream: socket.socket) -> None:
    """Both ways, each as fast as its slower side. An end of input is passed on; the guest's end is ours."""
    stream.setblocking(False)
    os.set_blocking(1, False)
    try:
        _pump(stream)
    finally:
        os.set_blocking(1, True)


def _pump(stream: socket.socket) -> None:
    import select

    to_guest, to_us = b"", b""
    open_input, open_guest, shut = True, True, False
    poll = select.poll()
    while open_guest or to_us:
        if not open_input and not to_guest and not shut:
            shut = True
            stream.shutdown(1)  # SHUT_WR
        _register(poll, 0, select.POLLIN if open_input and not to_guest else 0)
        reads = select.POLLIN if open_guest and not to_us else 0
        _register(poll, stream.fileno(), reads | (select.POLLOUT if to_guest else 0))
        _register(poll, 1, select.POLLOUT if to_us else 0)
        ready = dict(poll.poll())
        try:
            if 0 in ready:
                to_guest = os.read(0, CHUNK)
                open_input = bool(to_guest)
            if to_guest and ready.get(stream.fileno(), 0) & select.POLLOUT:
                to_guest = to_guest[stream.send(to_guest) :]
            if reads and ready.get(stream.fileno(), 0) & ~select.POLLOUT:
                to_us = stream.recv(CHUNK)
                open_guest = bool(to_us)
            if to_us and 1 in ready:
                to_us = to_us[os.write(1, to_us) :]
        except BlockingIOError:
            continue
        except OSError:
            return  # one of the two is gone


def _register(poll: object, fd: int, events: int) -> None:
    """What nobody wants to hear of is not watched: a hang-up would be heard for ever."""
    import select

    assert isinstance(poll, select.poll)
    if events:
        poll.register(fd, events)
        return
    try:
        poll.unregister(fd)
    except KeyError:
        pass
