"""vmshell: a login shell and a broker that give many people on one Linux host virtual machines of their own."""

__version__ = "0.1.0"
