"""The accounts helper: looks up users and groups for the broker, which must not wait for a directory that is slow or silent."""
