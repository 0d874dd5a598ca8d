"""Samplers: draws of a posterior, weighted, exact, as chains or as runs that grew together."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
