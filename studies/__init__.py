"""Numerical studies behind decisions; each is a command that writes its numbers and figures."""
