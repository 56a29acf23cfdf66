"""OPT: one file per engine behind one interface, `LanguageSession`."""

from __future__ import annotations

from blip2.language.session import (
    Beam,
    Generation,
    GenerationOptions,
    LanguageSession,
    Limits,
)

__all__ = ["Beam", "Generation", "GenerationOptions", "LanguageSession", "Limits"]
