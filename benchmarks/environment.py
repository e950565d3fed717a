"""Environment variables and a flag of benchmarks. Imports nothing: a child inherits its parent's peak of memory."""

# As utils/launch.sh sets them on the CPU.
MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
}


def add_dtype(parser) -> None:
    """--dtype of an argparse parser."""
    parser.add_argument("--dtype", choices=["bf16", "fp32"], default="bf16", help="fp32 where a CPU has no bf16")
