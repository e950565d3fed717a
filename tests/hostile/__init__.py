"""Hostile inputs: a corpus of cases with limits of time and memory, and a fuzzer of valid files."""
