"""Interfaces, taps and who may reach whom, as tapnet and dnsmasq are told. Part of the broker's process."""
