"""`python -m regard`."""

from .cli import app

app()
