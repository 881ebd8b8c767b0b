"""The command `audit`: what is wrong with a set of shards, and what leaks between its splits."""

from data_prep.audit.command import audit

__all__ = ["audit"]
