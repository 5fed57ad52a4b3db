"""The studio: the page where people look, point and try. `regard studio` serves it on this machine alone."""

from .server import app, serve

__all__ = ["app", "serve"]
