"""Which of ssh's messages are its own words, and which a guest may have written: what may be a guest's decides nothing.

Runs in: the shell. Pure.
"""

from __future__ import annotations

import re

CHANGED = re.compile(r"@{20,}|No \S+ host key is known for \S+ and you have requested strict checking\.")
ACCEPTED = "Host key fingerprint is "  # a key that was pinned; a picture follows, in the same message
PICTURE = 11  # lines
ADDED = "Warning: Permanently added "  # a key that was not
# What it may say before that without text of the guest's that could hold a line end.
BEFORE = re.compile(
    r"Pseudo-terminal will not be allocated because stdin is not a terminal\."
    r"|command-line.*"
    r'|Remote version "[^"]*" uses unsafe RSA signature scheme; disabling use of RSA keys'
    r"|(kex protocol error|[a-z_]+): type \d+ seq \d+"
)
WAY = "(publickey|password|keyboard-interactive|hostbased|gssapi-keyex|gssapi-with-mic)"
# What a guest may as well bring about as write, and sentences without a word of its own.
HARMLESS = (
    r"Permission denied, please try again\.|Authentication failed\.|Mismatch; try again, EOF to quit\."
    r"|{user}@{host}: Permission denied \(({way}(,{way})*)?\)\."
    r"|(Connection (closed|reset) by|Disconnected from) {host} port {port}|Connection to {host} port {port} timed out"
    r"|(\w+: )?Connection to {host} port {port}: (incorrect signature|message authentication code incorrect|Broken pipe)"
    r"|Received disconnect from {host} port {port}:\d+: .*|Timeout, server {host} not responding\."
    r"|client_loop: send disconnect: (Broken pipe|Connection reset by peer)"
    r"|(PTY allocation|shell|exec) request failed on channel \d+"
    r"|\*\* WARNING: connection is not using a post-quantum key exchange algorithm\."
    r'|\*\* This session may be vulnerable to "store now, decrypt later" attacks\.'
    r"|\*\* The server may need to be upgraded\. See https://openssh\.com/pq\.html"
)


class Said:
    """Which of ssh's messages are its own words, and which a guest may have written.

    ssh copies text of the guest's into its messages, line ends and all. Before it has judged the host key that only happens
    behind words of its own, in a message that ends the connection; afterwards a message may be the guest's from its first letter
    (the instructions of a login). So ssh's are the lines up to the first that is not in BEFORE, that one included. Its verdict on
    the key is that one, or what says so is forged.
    """

    def __init__(self, user: str, address: str, port: int, *, pinned: bool) -> None:
        self._pinned = pinned
        self._harmless = re.compile(HARMLESS.format(user=re.escape(user), host=re.escape(address), port=port, way=WAY))
        self._own = True
        self._picture = 0
        self.added = False
        self.changed: list[str] = []  # the page about a changed key: half of it names files of ours

    def hear(self, line: str) -> str:
        """What to show of *line*, or an empty string."""
        if self.changed:
            self.changed.append(line)
            return ""
        if self._picture and line.startswith(("+", "|")):
            self._picture -= 1
            return ""
        self._picture = 0
        if not self._own:
            return line if self._harmless.fullmatch(line) else f"guest: {line}"
        self._own = BEFORE.fullmatch(line) is not None
        return line if self._own else self._first(line)

    def _first(self, line: str) -> str:
        """The first line after which the guest may have a say."""
        if self._pinned and CHANGED.match(line):
            self.changed.append(line)
        elif self._pinned and line.startswith(ACCEPTED):
            self._picture = PICTURE
        elif not self._pinned and line.startswith(ADDED):
            self.added = True
        else:
            return line
        return ""
