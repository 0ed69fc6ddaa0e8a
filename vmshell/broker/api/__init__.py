"""The front's connections: who asks, what is asked, which handler answers. Part of the broker's process."""
