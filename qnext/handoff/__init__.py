"""Prefill and decode in different processes: a sequence's state goes from one to the other."""
