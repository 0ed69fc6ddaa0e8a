"""A VM from its definition to a running guest and to its end. Part of the broker's process."""
