"""The launcher: the only process of ours that stays up as root. It starts QEMU and jobs under uids of their own, and ends them.

main       who may ask, root's policy, the sockets; then the server
server     one connection, four requests, one event
runs       QEMUs: the plan completed and checked, started, signalled
jobs       storage workers and probes, each under a uid out of a pool
uids       which uids are ours to give, and who else lives among them
policy     what the launcher itself reads of root's policy
ending     the end of all processes of one uid
"""
