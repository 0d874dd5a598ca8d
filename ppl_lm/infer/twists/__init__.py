"""Twists: what a text begun is expected to be worth, as functions and as networks that are learned."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
