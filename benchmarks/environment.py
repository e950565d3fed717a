"""The environment variables of measured processes. Imports nothing: a child inherits its parent's peak of memory."""

# As utils/launch.sh sets them on the CPU.
MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
}
