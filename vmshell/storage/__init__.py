"""The storage worker: one job on the descriptors it inherited, in a process without rights.

Image contents are guest bytes: they are read here, never in the broker.
"""
