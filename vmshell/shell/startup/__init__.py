"""From a login to the first request. Part of the shell's process."""
