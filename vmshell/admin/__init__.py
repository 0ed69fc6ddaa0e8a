"""`vmshell-admin`: what the administrator (or, with `--session`, a person for themselves) does beside the VM service.

Runs in: a process of its own, as whoever typed it. Never part of the broker.
"""
