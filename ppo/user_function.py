"""Loads functions that the user names as file.py:function. These files are the only user code that is ever run."""

import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType

from ppo.reward_call import failure_of
from utils.errors import UserError


def load_function(spec: str, flag: str, example: str, modules: dict[str, ModuleType]) -> Callable:
    """Returns the function in `file.py:name`, and runs that file unless it is in `modules`. Raises UserError."""
    path, _, name = spec.rpartition(":")
    if not path or not os.path.isfile(path):
        raise UserError(f"{flag} {spec}: give an existing file and a function, as in {example}")
    if (file := os.path.realpath(path)) not in modules:
        module_spec = importlib.util.spec_from_file_location(flag.removeprefix("--"), path)
        if module_spec is None:
            raise UserError(f"{flag} {spec}: {path} is not a Python file; use a name that ends in .py")
        modules[file] = importlib.util.module_from_spec(module_spec)
        writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no __pycache__ in the user's folder
        try:
            module_spec.loader.exec_module(modules[file])
        except (Exception, SystemExit) as error:
            raise UserError(f"{flag} {spec} cannot be loaded: {failure_of(error)}") from error
        finally:
            sys.dont_write_bytecode = writes
    if not callable(getattr(modules[file], name, None)):
        raise UserError(f"{flag} {spec}: {path} has no function {name}; give the name of one")
    return getattr(modules[file], name)
