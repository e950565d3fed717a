"""sft.train where whole weights find no room beside their shards, as with a large model under ZeRO-3."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from sft.train import main
from utils.engine import TrainEngine

if __name__ == "__main__":
    TrainEngine.fits_gathered = lambda self: False
    main()
