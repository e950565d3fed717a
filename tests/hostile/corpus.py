"""All cases: name -> case."""

from tests.hostile.case import Case
from tests.hostile import configs

CASES: dict[str, Case] = configs.CASES
