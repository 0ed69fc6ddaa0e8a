"""The verbs about networks: which there are, a VM's cards and what they carry, what is published, and bytes to a guest's port.

Runs in: the shell. Touches standard input and output; connects to the user's own guests.
"""

from __future__ import annotations

from ... import messages
from ...errors import EX_DONE, ProtocolError, safe
from ...names import format_size
from ...refusals import NotConnected, Usage
from ..cli.values import split_grantee, split_place, split_port

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from ..cli.grammar import Values
    from ..context import Context
    from ..ui.output import Row

DIAL_SECONDS = 5.0
PACE = 1.0  # seconds between two lines of --follow


# --- looking ---------------------------------------------------------------------------------------------------------


def networks(context: Context, values: Values) -> int:
    from ..ui import output

    answer = context.ask(messages.Networks())
    rows = output.rows(answer.get("networks"))
    if values.flag("json"):
        output.document(context, answer)
    elif rows:
        output.table(context, ["NAME", "KIND", "SUBNET", "OUTSIDE", "ROLE", "CARDS"], [_network_cells(row) for row in rows])
    else:
        context.note("no network is allowed to you; the administrator's policy says which are")
    return EX_DONE


def _network_cells(row: Row) -> dict[str, str]:
    from ..ui import output

    isolated = ", isolated" if row.get("isolated") is True else ""
    return {
        "NAME": safe(row.get("name"), 40),
        "KIND": safe(row.get("kind"), 20),
        "SUBNET": safe(row.get("subnet") or "", 50),
        "OUTSIDE": safe(row.get("outside") or "", 20),
        "ROLE": safe(row.get("role") or "", 20) + isolated,
        "CARDS": str(output.number(row.get("cards")) or ""),
    }


def net(context: Context, values: Values) -> int:
    from ..ui import output

    request = messages.Net(vm=values.text("vm"))
    if values.flag("follow"):
        return _follow(context, request, json=values.flag("json"))
    answer = context.ask(request)
    if values.flag("json"):
        output.document(context, answer)
        return EX_DONE
    cards = output.rows(answer.get("cards"))
    published = output.rows(answer.get("published"))
    facts = [fact for card in cards for fact in _card(card)]
    output.pairs(context, [*facts, *(("published", output.published(row)) for row in published)])
    if not cards:
        context.note("no network cards: `set NAME net0=NETWORK` adds one, `networks` shows what there is")
    return EX_DONE


def _card(card: Row) -> list[tuple[str, str]]:
    """What a person reads of a card, its name first."""
    from ..ui import output

    name, rate = safe(card.get("name"), 20), output.number(card.get("rate"))
    forwards = card.get("forward")
    carried = [
        f"{what} {format_size(output.number(card.get(f'{way}_bytes')))} in {output.number(card.get(f'{way}_packets'))} packets"
        for what, way in (("received", "rx"), ("sent", "tx"))
        if card.get(f"{way}_packets")
    ]
    return [
        (name, f"{safe(card.get('network'), 40)} ({safe(card.get('kind'), 20)}), link {safe(card.get('link'), 10)}"),
        ("address", ", ".join(safe(card.get(key), 50) for key in ("address", "address6") if card.get(key))),
        ("name", safe(card.get("dns") or "", 160)),
        ("mac", f"{safe(card.get('mac'), 20)} ({safe(card.get('model'), 20)})"),
        ("rate", f"at most {rate} kbit/s each way" if rate else ""),
        ("traffic", ", ".join(carried)),
        *(("forwards", safe(text, 40)) for text in (forwards if isinstance(forwards, list) else [])),
    ]


def _follow(context: Context, request: messages.Net, *, json: bool) -> int:
    """A line every second until Ctrl-C or the VM's end: drawn over the last one where the terminal can do that."""
    import sys
    from time import monotonic, sleep

    terminal = context.terminal
    redraws = terminal.stdout_tty and not terminal.dumb and not json
    answer, before = context.ask(request), monotonic()
    try:
        while answer.get("state") in messages.ALIVE:
            sleep(max(0.0, before + PACE - monotonic()))
            old, then = answer, before
            answer, before = context.ask(request), monotonic()
            line = _as_line(answer) if json else _speeds(old, answer, before - then)
            sys.stdout.write(f"\r{line[: terminal.size()[0] - 1]}\x1b[K" if redraws else f"{line}\n")
            sys.stdout.flush()
    except KeyboardInterrupt:
        return EX_DONE
    finally:
        if redraws:
            sys.stdout.write("\n")
    context.note(f"{safe(answer.get('name'), 100)} is {safe(answer.get('state'), 20)}")
    return EX_DONE


def _as_line(answer: Row) -> str:
    import json

    return json.dumps(answer, sort_keys=True, ensure_ascii=True)


def _speeds(old: Row, new: Row, seconds: float) -> str:
    """What each card carried from one answer to the next, as its guest sees it."""
    from ..ui import output

    before = {str(card.get("name")): card for card in output.rows(old.get("cards"))}
    parts = []
    for card in output.rows(new.get("cards")):
        last = before.get(str(card.get("name")), card)
        rx, tx = (
            format_size(int(max(0, output.number(card.get(key)) - output.number(last.get(key))) / seconds))
            for key in ("rx_bytes", "tx_bytes")
        )
        parts.append(f"{safe(card.get('name'), 20)}: received {rx}/s, sent {tx}/s")
    return "; ".join(parts) or "no network cards"


# --- publishing ------------------------------------------------------------------------------------------------------


def publish(context: Context, values: Values) -> int:
    from ..ui import output

    vm, port, to = values.text("vm"), values.optional("port"), values.optional("to")
    if port is not None and to is not None:
        answer = context.ask(_message(vm, port, to, remove=False))
        rows = [answer]
    elif port is None and to is None:
        everything = context.ask(messages.Net(vm=vm))
        answer = {"published": everything.get("published", [])}
        rows = output.rows(answer["published"])
    else:
        missing = "a port" if port is None else "--to, and whom"
        raise Usage(problem=f"publish needs {missing}", usage="publish NAME PORT[/udp] --to USER|@GROUP|world[:HOSTPORT]")
    if values.flag("json"):
        output.document(context, answer)
        return EX_DONE
    for row in rows:
        context.say(f"published: {output.published(row)}")
    _say_pending(context, answer)
    if not rows:
        context.note(f"nothing is published: `publish {safe(vm)} 80 --to USER`, @GROUP or world")
    return EX_DONE


def unpublish(context: Context, values: Values) -> int:
    vm, port, to = values.text("vm"), values.text("port"), values.optional("to")
    answer = context.ask(_message(vm, port, to, remove=True))
    whom = f" to {safe(to)}" if to else ""
    context.say(f"{safe(vm)}: {'/'.join(map(str, split_port(port)))} is no longer published{whom}")
    _say_pending(context, answer)
    return EX_DONE


def _say_pending(context: Context, answer: Row) -> None:
    if answer.get("pending"):
        context.note(f"not yet in force: {safe(answer['pending'], 200)}; it will be as soon as that has changed")


def _message(vm: str, port: str, to: str | None, *, remove: bool) -> messages.Publish:
    number, proto = split_port(port)
    whom, host_port = split_grantee(to) if to is not None else ("", 0)
    return messages.Publish(vm=vm, port=number, proto=proto, to=whom, host_port=host_port, remove=remove)


# --- bytes to a port -------------------------------------------------------------------------------------------------


def connect(context: Context, values: Values) -> int:
    """Standard input and output and a TCP connection to a guest, until the guest closes. Nothing of ours goes in between."""
    from ..client import pump

    vm, port = split_place(values.text("place"))
    given = values.number("port", 0)
    if bool(port) == bool(given):
        problem = "connect was given two ports" if port else "connect needs a port"
        raise Usage(problem=problem, usage="connect NAME:PORT")
    must_own_stdin(context, "connect")
    # No progress line: standard error belongs to whoever uses this as a ProxyCommand.
    answer, _ = context.broker.call(messages.Connect(vm=vm, port=port or given))
    terminal = context.terminal
    terminal.cooked()
    try:
        with _dial(vm, *place_of(answer)) as sock:
            pump.run(terminal, sock, context.take_typed_ahead())
    except BrokenPipeError:
        raise
    except OSError as error:
        raise NotConnected(vm=vm, problem=f"the connection broke ({(error.strerror or str(error)).lower()})") from error
    finally:
        terminal.restore()
        if context.interactive:
            terminal.quiet()
    return EX_DONE


def place_of(answer: Row) -> tuple[str, int]:
    """Address and port of a guest's service, from what the broker answers to `connect`."""
    address, port = answer.get("address"), answer.get("port")
    if not isinstance(address, str) or not isinstance(port, int):
        raise ProtocolError(problem="it should say where the guest is and does not")
    return address, port


def _dial(vm: str, address: str, port: int) -> socket.socket:
    """A connection to a guest, in our user's name: the host's filter lets it reach own VMs only."""
    import socket

    try:
        sock = socket.create_connection((address, port), DIAL_SECONDS)
    except OSError as error:
        problem = f"no answer within {DIAL_SECONDS:.0f} s" if isinstance(error, TimeoutError) else error.strerror or str(error)
        raise NotConnected(vm=vm, problem=problem[:1].lower() + problem[1:]) from error
    sock.settimeout(None)
    return sock


def must_own_stdin(context: Context, verb: str) -> None:
    """Where requests come line by line from a pipe, standard input is not the verb's; at a prompt the person's keys are."""
    if not (context.single or context.terminal.stdin_tty):
        problem = f"{verb} reads standard input, which is where your requests come from"
        raise Usage(problem=problem, usage=f"ssh HOST {verb} …")
