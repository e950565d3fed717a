"""All cases: name -> case."""

from tests.hostile import configs, data, state, tokens
from tests.hostile.case import Case

CASES: dict[str, Case] = configs.CASES | tokens.CASES | state.CASES | data.CASES
