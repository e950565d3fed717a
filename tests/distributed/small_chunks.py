"""train_ppo.py with room for the logits of four tokens at once, as a large vocabulary has for a few hundred."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import ppo.models
from train_ppo import main

if __name__ == "__main__":
    ppo.models.CHUNK_ELEMENTS = 4 * 400
    main()
