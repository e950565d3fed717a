"""All cases: name -> case."""

from tests.hostile import checkpoints, configs, data, runs, tokens, weights

CASES = configs.CASES | weights.CASES | tokens.CASES | checkpoints.CASES | runs.CASES | data.CASES
