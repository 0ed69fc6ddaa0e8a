"""One function per request: check it, call a service, answer. Part of the broker's process."""
