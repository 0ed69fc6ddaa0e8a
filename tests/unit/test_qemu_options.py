"""The table of QEMU's options is complete: the page's 56 forms with its own words, and everything the installed QEMU prints."""

from __future__ import annotations

import csv
import shutil
import subprocess
from pathlib import Path

import pytest

from vmshell.shell.qemu_cli import options, translate
from vmshell.shell.qemu_cli.handlers import HANDLERS
from vmshell.shell.qemu_cli.options import ALLOWED, DENIED, FORMS, OPTIONS, PARTS, SHOWN, UNUSED

PAGE = Path(__file__).parent.parent / "data" / "options-2007.tsv"
QEMU = "qemu-system-x86_64"


def page_rows() -> list[dict[str, str]]:
    with PAGE.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))


def printed_options(text: str) -> set[str]:
    """Every option of a `-help`: `-h or -help`, `-fda/-fdb file`, `--preconfig`, `-name …`."""
    found = set()
    for line in text.splitlines():
        if not line.startswith("-"):
            continue
        first, *rest = line.split()
        found |= set(first.split("/"))
        if rest[:1] == ["or"]:
            found.add(rest[1])
    return {"-" + name.lstrip("-") for name in found}


@pytest.mark.skipif(shutil.which(QEMU) is None, reason="no QEMU is installed")
def test_every_option_of_the_installed_qemu_has_a_row() -> None:
    text = subprocess.run([QEMU, "-help"], capture_output=True, text=True, timeout=120, check=True).stdout
    printed = printed_options(text)
    assert {"-h", "-help", "-hda", "-hdb", "-preconfig", "-object", "-drive"} <= printed
    assert len(printed) > 100
    assert not sorted(printed - set(OPTIONS)), "options without a class"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(QEMU) is None, reason="no QEMU is installed")
def test_which_options_take_an_argument_is_qemus_word() -> None:
    """QEMU looks for missing arguments before it does anything; a wrong guess here would make an option of an argument."""
    wrong, known = [], 0
    for name, option in OPTIONS.items():
        done = subprocess.run([QEMU, "-version", name], capture_output=True, text=True, timeout=120, check=False)
        if "invalid option" in done.stderr:
            continue  # of another version
        known += 1
        if ("requires an argument" in done.stderr) != bool(option.argument):
            wrong.append(name)
    assert not wrong
    assert known > 100


def test_the_page_has_56_forms_and_17_of_them_allowed() -> None:
    rows = page_rows()
    assert len(rows) == 56
    classes = [row["class"] for row in rows]
    assert {kind: classes.count(kind) for kind in set(classes)} == {ALLOWED: 17, DENIED: 26, UNUSED: 13}


@pytest.mark.parametrize("row", page_rows(), ids=lambda row: row["form as listed"][:24])
def test_the_pages_class_stands_in_the_table(row: dict[str, str]) -> None:
    assert OPTIONS[row["option"].split()[0]].page == row["class"]


def test_the_table_claims_nothing_that_is_not_on_the_page() -> None:
    on_page = {row["option"].split()[0] for row in page_rows()}
    assert {name for name, option in OPTIONS.items() if option.page} == on_page


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_says_why_and_what_else(name: str) -> None:
    option = OPTIONS[name]
    assert {option.page, option.today} <= {"", ALLOWED, DENIED, UNUSED}
    assert option.page or option.today
    assert option.instead
    # Whatever is refused as a whole needs its reason here.
    assert option.reason or name in HANDLERS
    assert "\n" not in option.reason + option.instead


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if name not in HANDLERS])
@pytest.mark.parametrize("dash", ["", "-"])
def test_what_nobody_reads_is_refused_in_one_line(name: str, dash: str) -> None:
    option = OPTIONS[name]
    words = [dash + name, *(["1"] if option.argument else [])]
    found = translate.translate(["-hda", "root", *words, "-m", "512"], lambda word: f"shelf:{word}")
    assert [row.option for row in found.refused] == [" ".join(words)]
    assert found.refused[0].kind == (option.page or option.today) != ALLOWED
    assert translate.refusal_lines(found) == [
        f"{' '.join(words)}: {SHOWN[option.verdict]}: {option.reason}; instead: {option.instead}"
    ]
    assert found.table == {}


def test_allowed_options_are_read_by_somebody() -> None:
    assert {name for name, option in OPTIONS.items() if ALLOWED in (option.page, option.today)} <= set(HANDLERS)
    assert set(HANDLERS) <= set(OPTIONS)


def test_forms_and_parts_belong_to_options() -> None:
    assert {name for name, _ in [*FORMS, *PARTS]} <= set(OPTIONS)
    assert all(kind in (DENIED, UNUSED) and reason and instead for kind, reason, instead in FORMS.values())
    assert options.POSITIONAL.verdict == DENIED
