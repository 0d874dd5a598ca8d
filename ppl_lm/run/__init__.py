"""Running: fits, measurements and draws by name, and the folders in which they are kept."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
