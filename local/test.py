"""run the tests; whatever follows goes to pytest"""

import argparse
import importlib.util
import os
import sys

import settings
from local import machine


def run(arguments: argparse.Namespace) -> int:
    if importlib.util.find_spec("pytest") is None:
        raise settings.Invalid("pytest is not installed: make setup")
    os.chdir(machine.FOLDER)
    return os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments.rest])  # noqa: S606  # ours
