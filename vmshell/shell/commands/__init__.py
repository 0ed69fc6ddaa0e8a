"""What the verbs do. Part of the shell's process."""
