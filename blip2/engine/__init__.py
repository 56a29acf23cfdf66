"""Requests in at any time, tokens out as they are made: see `Engine`."""

from blip2.engine.engine import Engine, Load
from blip2.engine.request import Picture, Request

__all__ = ["Engine", "Load", "Picture", "Request"]
