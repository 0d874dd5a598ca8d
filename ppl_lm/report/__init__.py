"""Pages and terminal tables: what is shown of a run, or of several."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
