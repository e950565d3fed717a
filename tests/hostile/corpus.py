"""All cases: name -> case."""

from tests.hostile import configs, tokens
from tests.hostile.case import Case

CASES: dict[str, Case] = configs.CASES | tokens.CASES
