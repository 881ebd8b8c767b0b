"""Fuzzers: inputs that are damaged at random, from a seed, and must be accepted rightly or refused with one sentence.

`mutation.py` damages bytes, `workers.py` runs a function on many cases under limits.
"""
