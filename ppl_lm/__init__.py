"""Say which text you want as a Pyro program. Get it by inference. Know how close you got."""

from importlib.metadata import version

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("ppl_lm")
