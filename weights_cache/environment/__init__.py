"""What a program is told by its environment: settings, and how they are told without their secrets.

The one package that all others share, and the only one of the cache that `knative` may import. It imports nothing of ours.
"""

from weights_cache.environment.masking import hiding, is_secret, masked, told
from weights_cache.environment.settings import SettingsError, read, setting

__all__ = ["SettingsError", "hiding", "is_secret", "masked", "read", "setting", "told"]
