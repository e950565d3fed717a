"""Checks for a GPU, started by tests/gpu.sh. One module per check: `check(toy, report)`, toy: tiny sizes, for a CPU."""
