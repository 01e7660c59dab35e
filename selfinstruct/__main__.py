"""``python -m selfinstruct``."""

from selfinstruct.cli.main import run

run()
