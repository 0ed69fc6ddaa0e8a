"""The launch line: from a `LaunchPlan` to the argument list that ends in a jailed QEMU. Pure functions, nothing is run here.

Used by: launcher, broker, probe. Imports `names` and the standard library's `json` and `struct`; touches nothing.
"""
