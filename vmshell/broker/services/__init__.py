"""Connections to the other processes of ours. Part of the broker's process."""
