"""OPT sessions: one file per engine, one interface."""

from blip2.language.session import (
    Beam,
    Generation,
    GenerationOptions,
    LanguageSession,
    Limits,
)

__all__ = ["Beam", "Generation", "GenerationOptions", "LanguageSession", "Limits"]
