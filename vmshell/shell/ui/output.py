"""Answers as a person reads them (tables that fit the width) or as a script does (one JSON document).

Whatever came over the socket may have been chosen by a user or a guest and goes through `safe` (rule R24).
Runs in: the shell.
"""

from __future__ import annotations

import time

from ...errors import safe
from ...names import MIB, format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..context import Context

    Row = dict[str, object]

COLOURS = {"running": "32", "paused": "33", "starting": "33", "stopping": "33", "queued": "33", "failed": "31", "off": "2"}
# What is left out first when a terminal is narrow.
DISPENSABLE = ("VIEWERS", "IMAGE", "CPUS", "ADDRESS", "MEMORY", "UPTIME", "NOTE", "OWNER")

# What a person calls a limit, its name in `used` (none: a limit of each single VM), its name in `limits`.
ACCOUNT_LIMITS = (
    ("VMs", "vms", "vms_max"),
    ("running VMs", "running", "running_max"),
    ("processors, running", "cpus", "user_cpus"),
    ("memory, running", "memory", "user_memory"),
    ("disk", "disk", "user_disk"),
    ("processors of one VM", "", "cpus_max"),
    ("memory of one VM", "", "memory_max"),
    ("disks of one VM", "", "disk_size_max"),
)
RATES = ("changes", "boots", "consoles", "connections")  # `…_per_minute` is the limit, 0 being none


def rows(value: object) -> list[Row]:
    """The rows of a page, whatever the broker sent."""
    return [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []


def document(context: Context, body: dict[str, object]) -> None:
    """One JSON document, keys sorted, ASCII only (escapes in it cannot reach a terminal)."""
    import json  # what it brings with it would double the start-up of a plain `list`

    context.say(json.dumps(body, indent=2, sort_keys=True, ensure_ascii=True))


def vm_table(context: Context, vms: list[Row], *, owners: bool) -> None:
    headings = ["NAME", "STATE", "CPUS", "MEMORY", "IMAGE", "ADDRESS", "UPTIME", "VIEWERS", "NOTE"]
    if owners:
        headings.insert(0, "OWNER")
    cells = [_vm_cells(vm) for vm in vms]
    for optional in ("ADDRESS", "NOTE"):
        if not any(cell[optional] for cell in cells):
            headings.remove(optional)
    table(context, headings, cells)


def _vm_cells(vm: Row) -> dict[str, str]:
    return {
        "OWNER": safe(vm.get("owner"), 40),
        "NAME": safe(vm.get("name"), 40),
        "STATE": safe(vm.get("state"), 20),
        "CPUS": str(number(vm.get("cpus"))),
        "MEMORY": format_size(number(vm.get("memory")) * MIB),
        "IMAGE": safe(vm.get("image") or "", 40),
        "ADDRESS": safe(vm.get("address") or "", 40),
        "UPTIME": duration(vm.get("uptime")),
        "VIEWERS": str(number(vm.get("viewers")) or ""),
        "NOTE": safe(vm.get("note") or "", 200),
    }


def image_table(context: Context, images: list[Row]) -> None:
    cells = [
        {
            "NAME": safe(image.get("name"), 40),
            "BOOTS": safe(image.get("boot") or "", 10),
            "DISK": format_size(number(image.get("disk"))) if image.get("disk") else "",
            "MEMORY": format_size(number(image.get("memory_min")) * MIB) + "+" if image.get("memory_min") else "",
            "DESCRIPTION": safe(image.get("description") or "", 200),
        }
        for image in images
    ]
    table(context, ["NAME", "BOOTS", "DISK", "MEMORY", "DESCRIPTION"], cells)


def vm_details(context: Context, vm: Row) -> None:
    seconds = number(vm.get("cpu_time")) / 1000
    resident = format_size(number(vm.get("rss")))
    facts: list[tuple[str, str]] = [
        ("name", f"{safe(vm.get('owner'), 64)}/{safe(vm.get('name'), 40)}"),
        ("state", _paint(context, safe(vm.get("state"), 20)) + (f" ({safe(vm['note'], 200)})" if vm.get("note") else "")),
        ("uptime", duration(vm.get("uptime"))),
        ("processors", f"{number(vm.get('cpus'))}" + (f", {seconds:.1f} s used" if vm.get("pid") else "")),
        ("memory", format_size(number(vm.get("memory")) * MIB) + (f", {resident} resident" if vm.get("rss") else "")),
        ("image", safe(vm.get("image") or "", 40)),
        ("boots from", safe(vm.get("boot") or "", 20)),
        ("machine", f"{safe(vm.get('machine') or '', 20)} {safe(vm.get('accel') or '', 10)}".strip()),
        ("address", safe(vm.get("address") or "", 60)),
        ("description", safe(vm.get("description") or "", 200)),
    ]
    facts += [(safe(device.get("name"), 20), _device(device)) for device in rows(vm.get("devices"))]
    keys = vm.get("host_keys")
    facts += [
        ("published", ", ".join(published(row) for row in rows(vm.get("published")))),
        ("host keys", f"{len(keys)} kept" if isinstance(keys, list) and keys else ""),
        ("snapshots", ", ".join(safe(row.get("tag"), 63) for row in rows(vm.get("snapshots")))),
        ("next boot", _names(vm.get("next_boot"))),
        ("missing", _names(vm.get("missing"))),
        ("viewers", str(number(vm.get("viewers")))),
        ("number", str(number(vm.get("number")))),
        ("created", _moment(vm.get("created"))),
    ]
    error = vm.get("last_error")
    if isinstance(error, dict):
        facts.append(("last error", f"{safe(error.get('text'))} ({safe(error.get('code'), 40)}, {_moment(error.get('at'))})"))
    pairs(context, facts)


def _device(device: Row) -> str:
    if "network" in device:
        link = ", cable out" if device.get("link") == "down" else ""
        return f"{safe(device.get('network'), 64)} ({safe(device.get('model'), 20)}), {safe(device.get('mac'), 20)}{link}"
    text = f"{safe(device.get('path') or 'empty', 80)} on {safe(device.get('bus'), 10)}"
    if "size" in device:
        size, used = format_size(number(device.get("size"))), format_size(number(device.get("used")))
        text += f": {size} {safe(device.get('format'), 10)}, {used} used"
    return text


def published(row: Row) -> str:
    """`80/tcp to bob`, `80/tcp to world, by port 8080 of this host`."""
    place = f", by port {number(row.get('host_port'))} of this host" if row.get("host_port") else ""
    closed = " (closed: the policy no longer allows it)" if row.get("open") is False else ""
    return f"{number(row.get('port'))}/{safe(row.get('proto'), 4)} to {safe(row.get('to'), 66)}{place}{closed}"


def _names(value: object) -> str:
    return ", ".join(safe(name, 80) for name in value) if isinstance(value, list) else ""


def rule_table(context: Context, rules: list[Row]) -> None:
    """The rules of an `explain`, refusals first."""
    cells = [
        {
            "": "ok" if rule.get("ok") is True else "NO",
            "RULE": safe(rule.get("rule"), 40),
            "ABOUT": safe(rule.get("what"), 80),
            "ASKED": safe(rule.get("asked"), 40),
            "USED": safe(rule.get("used"), 20),
            "LIMIT": safe(rule.get("limit"), 40),
            "ALLOWED": safe(rule.get("nearest"), 60),
            "FROM": safe(rule.get("section"), 60),
        }
        for rule in sorted(rules, key=lambda rule: rule.get("ok") is True)
    ]
    table(context, ["", "RULE", "ABOUT", "ASKED", "USED", "LIMIT", "ALLOWED", "FROM"], cells)


def object_table(context: Context, objects: list[Row]) -> None:
    cells = [
        {
            "NAME": safe(row.get("name"), 64),
            "FORMAT": safe(row.get("format"), 10),
            "SIZE": format_size(number(row.get("size"))),
            "TAKES": format_size(number(row.get("used"))),
            "OVER": safe(row.get("base") or "", 40),
            "USED BY": _names(row.get("users")),
        }
        for row in objects
    ]
    table(context, ["NAME", "FORMAT", "SIZE", "TAKES", "OVER", "USED BY"], cells)


def snapshot_table(context: Context, snapshots: list[Row]) -> None:
    cells = [
        {
            "TAG": safe(row.get("tag"), 63),
            "MEMORY": format_size(number(row.get("memory")) * MIB),
            "SAVED": _moment(row.get("created")),
        }
        for row in snapshots
    ]
    table(context, ["TAG", "MEMORY", "SAVED"], cells)


def account(context: Context, answer: Row) -> None:
    admin = ", administrator" if answer.get("admin") else ""
    pairs(
        context,
        [
            ("user", f"{safe(answer.get('user'), 64)} (uid {number(answer.get('uid'))}{admin})"),
            ("mode", safe(answer.get("mode"), 20)),
        ],
    )
    limits, used = answer.get("limits"), answer.get("used")
    if isinstance(limits, dict) and isinstance(used, dict):
        cells = [
            {
                "LIMIT": what,
                "USED": _amount(name, used.get(name)) if name else "",
                "OF": _amount(name or limit, limits.get(limit)),
            }
            for what, name, limit in ACCOUNT_LIMITS
            if limit in limits
        ]
        rates = [(f"{what} a minute", limits.get(f"{what}_per_minute")) for what in RATES]
        cells += [{"LIMIT": what, "USED": "", "OF": str(number(limit))} for what, limit in rates if limit]
        table(context, ["LIMIT", "USED", "OF"], cells)


def versions(context: Context, answer: Row) -> None:
    pairs(
        context,
        [
            ("vmshell", safe(answer.get("version"), 40)),
            ("QEMU", f"{safe(answer.get('qemu') or 'none', 40)} ({safe(answer.get('accel') or 'no acceleration', 20)})"),
            ("mode", safe(answer.get("mode"), 20)),
        ],
    )
    lacks = answer.get("lacks")
    for sentence in lacks if isinstance(lacks, list) else []:
        context.say(f"lacks: {safe(sentence)}")


def greeting(vms: list[Row], *, more: bool) -> str:
    """One line about a person's VMs."""
    if not vms:
        return "You have no VMs yet: `new NAME --image IMAGE` makes one, `images` shows the catalogue, `help` the verbs."
    running = sum(vm.get("state") == "running" for vm in vms)
    count = f"{len(vms)}{'+' if more else ''} VM{'s' if len(vms) > 1 else ''}"
    if len(vms) == 1:
        return f"You have 1 VM: {safe(vms[0].get('name'), 40)} is {safe(vms[0].get('state'), 20)}. `help` lists the verbs."
    return f"You have {count}, {running} running. `list` shows them, `help` the verbs."


# --- the pieces ------------------------------------------------------------------------------------------------------


def table(context: Context, headings: list[str], cells: list[dict[str, str]]) -> None:
    """Columns as wide as they must be; too wide for the terminal, some are left out and the last one is cut."""
    limit = context.terminal.columns()
    widths = {heading: max(len(heading), *(len(cell[heading]) for cell in cells)) for heading in headings}
    if limit:
        _fit(headings, widths, limit)
    context.say(_line(headings, widths, {heading: heading for heading in headings}))
    for cell in cells:
        text = _line(headings, widths, cell)
        if context.terminal.colour and "STATE" in headings:
            start = sum(widths[heading] + 2 for heading in headings[: headings.index("STATE")])
            state = cell["STATE"]
            text = text[:start] + _paint(context, state) + text[start + len(state) :]
        context.say(text)


def _fit(headings: list[str], widths: dict[str, int], limit: int) -> None:
    def total() -> int:
        return sum(widths[heading] + 2 for heading in headings) - 2

    last = headings[-1]
    if last in ("NOTE", "DESCRIPTION") and total() - widths[last] + 20 <= limit:
        widths[last] = min(widths[last], limit - (total() - widths[last]))
    for heading in DISPENSABLE:
        if total() > limit and heading in headings:
            headings.remove(heading)
    if total() > limit:
        widths[headings[-1]] = max(8, widths[headings[-1]] - (total() - limit))


def _line(headings: list[str], widths: dict[str, int], cell: dict[str, str]) -> str:
    parts = []
    for heading in headings:
        text, width = cell[heading], widths[heading]
        if len(text) > width:
            text = text[: width - 2] + ".."
        parts.append(text.rjust(width) if heading in ("CPUS", "MEMORY", "DISK", "USED", "OF") else text.ljust(width))
    return "  ".join(parts).rstrip()


def pairs(context: Context, facts: list[tuple[str, str]]) -> None:
    width = max((len(name) for name, _ in facts), default=0)
    for name, text in facts:
        if text:
            context.say(f"{name.ljust(width)}  {text}")


def _paint(context: Context, state: str) -> str:
    colour = COLOURS.get(state, "") if context.terminal.colour else ""
    return f"\x1b[{colour}m{state}\x1b[0m" if colour else state


def duration(value: object) -> str:
    """Seconds as `45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`; nothing for nothing."""
    if not isinstance(value, int):
        return ""
    if value < 60:
        return f"{value} s"
    if value < 3600:
        return f"{value // 60} min"
    if value < 86400:
        return f"{value // 3600} h {value // 60 % 60:02d} min"
    return f"{value // 86400} d {value // 3600 % 24} h"


def _moment(value: object) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(value)) if isinstance(value, int) and 0 < value < 1 << 33 else ""


def number(value: object) -> int:
    return value if isinstance(value, int) else 0


def _amount(name: str, value: object) -> str:
    if not isinstance(value, int):
        return safe(value, 20) if value is not None else ""
    return format_size(value * MIB) if name.startswith(("memory", "disk")) else str(value)
