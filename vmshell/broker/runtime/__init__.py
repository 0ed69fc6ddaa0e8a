"""The event loop, the log and small files. Part of the broker's process."""
