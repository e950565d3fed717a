"""Environment variables and a flag of benchmarks. Imports nothing: children inherit the peak memory."""

# The same values as in utils/launch.sh for CPUs.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
}


def add_dtype(parser) -> None:
    """Adds --dtype to an argparse parser."""
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="fp32 for CPUs without bf16")
