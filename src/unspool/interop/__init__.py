"""Other people's models with our `generate()`: `wrap` one, or put it behind every model of transformers (`patch`).

How a foreign module is read and run is `unspool.bridge`'s business; here are the public ways in, and the way out again.
"""

from unspool.interop.patch import disable, enable, enabled
from unspool.interop.wrap import Wrapped, wrap

__all__ = ["Wrapped", "disable", "enable", "enabled", "wrap"]
