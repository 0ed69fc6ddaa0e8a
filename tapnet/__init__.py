"""tapnet: the process that makes taps, bridges and filters, with CAP_NET_ADMIN and nothing else.

It imports our leaves, and the model for root's policy. Until it is there, every VM has a network of its own inside its jail: DHCP
answers, nothing else is reachable.
"""
