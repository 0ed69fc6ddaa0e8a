"""Makes `machine_code.py`, which is all that tests need, of the sources beside it: `python tests/guest_programs/assemble.py`."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ORIGINS = {"rom": 0, "kernel": 0}  # all others are boot sectors
BOOT_SECTOR = 0x7C00
WIDTH = 116


def names() -> list[str]:
    return sorted(path.stem for path in HERE.glob("*.s"))


def assemble(name: str) -> bytes:
    """The machine code of *name*.s. Needs GNU as and ld."""
    with tempfile.TemporaryDirectory() as folder:
        made, code = f"{folder}/{name}.o", f"{folder}/{name}.bin"
        subprocess.run(["as", "--32", f"-I{HERE}", "-o", made, str(HERE / f"{name}.s")], check=True)
        origin = ORIGINS.get(name, BOOT_SECTOR)
        subprocess.run(["ld", "-melf_i386", f"-Ttext={origin:#x}", "-estart", "--oformat=binary", "-o", code, made], check=True)
        return Path(code).read_bytes()


def main() -> None:
    lines = ['"""Machine code of the guest programs, from the sources beside it. Written by `assemble.py`."""', "", "CODE = {"]
    for name in names():
        code = assemble(name).hex()
        lines += [f'    "{name}": bytes.fromhex(']
        lines += [f'        "{code[at : at + WIDTH]}"' for at in range(0, len(code), WIDTH)]
        lines += ["    ),"]
    (HERE / "machine_code.py").write_text("\n".join([*lines, "}", ""]))


if __name__ == "__main__":
    main()
