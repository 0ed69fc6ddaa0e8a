"""nftables through its own library: one call is one transaction, and no process is started for it.

Runs in: tapnet. Touches the tables `bridge vmshell` and `inet vmshell`.
"""

from __future__ import annotations

import ctypes

from vmshell.refusals import NetworkFailed

LIBRARY = "libnftables.so.1"
MISSING = f"{LIBRARY} is missing; install the package nftables (Debian: libnftables1)"
_STATELESS = 1 << 2  # listings without counters and the fill of limits
_NUMERIC = 1 << 7 | 1 << 8 | 1 << 9


class Nft:
    """The library's context. Without the library every `run` says so: it may be installed while we run."""

    def __init__(self) -> None:
        self._library: ctypes.CDLL | None = None
        self._context = ctypes.c_void_p()

    def run(self, text: str, check: bool = False) -> None:
        """Carry out *text* (as `nft -f` reads it), all of it or nothing; with *check* the kernel only says whether it would."""
        library = self._open()
        library.nft_ctx_set_dry_run(self._context, check)
        if library.nft_run_cmd_from_buffer(self._context, text.encode("ascii")) != 0:
            said = library.nft_ctx_get_error_buffer(self._context) or b""
            first = said.decode("utf-8", "replace").strip().splitlines() or ["no reason given"]
            raise NetworkFailed(problem=f"nftables refused the filter: {first[0].removeprefix('internal:0:0-0: ')}")

    def accepts(self, text: str) -> bool:
        """Would the kernel take *text*? Nothing is changed."""
        try:
            self.run(text, check=True)
        except NetworkFailed:
            return False
        return True

    def listing(self) -> str:
        """Both tables as the kernel has them, without what changes by itself."""
        return "".join(self.show(f"list table {table}") for table in ("bridge vmshell", "inet vmshell"))

    def show(self, question: str) -> str:
        """What `list …` or `get …` shows; nothing if there is none of it."""
        library = self._open()
        library.nft_ctx_set_dry_run(self._context, False)
        if library.nft_run_cmd_from_buffer(self._context, question.encode("ascii")) != 0:
            library.nft_ctx_get_error_buffer(self._context)  # else it would be the next one's
            return ""
        return (library.nft_ctx_get_output_buffer(self._context) or b"").decode("utf-8", "replace")

    def _open(self) -> ctypes.CDLL:
        if self._library is not None:
            return self._library
        try:
            library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise NetworkFailed(problem=MISSING) from error
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        for name in ("nft_ctx_get_error_buffer", "nft_ctx_get_output_buffer"):
            getattr(library, name).restype = ctypes.c_char_p
            getattr(library, name).argtypes = [ctypes.c_void_p]
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        library.nft_ctx_set_dry_run.argtypes = [ctypes.c_void_p, ctypes.c_bool]
        library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
        for name in ("nft_ctx_buffer_error", "nft_ctx_buffer_output"):
            getattr(library, name).argtypes = [ctypes.c_void_p]
        context = ctypes.c_void_p(library.nft_ctx_new(0))
        library.nft_ctx_buffer_error(context)
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_output_set_flags(context, _STATELESS | _NUMERIC)
        self._library, self._context = library, context
        return library
