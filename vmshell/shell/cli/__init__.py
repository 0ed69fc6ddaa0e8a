"""The language of requests: grammar, table of verbs, help, completion. Part of the shell's process."""
