"""`WEIGHTS_URI`: where a model's weights are, and optionally which version of them."""

import re
from dataclasses import dataclass

from weights_cache.environment import SettingsError
from weights_cache.excerpt import quoted, told

# A bucket's name has neither user nor password; S3 allows 1024 bytes of a key.
_FORM = re.compile(r"s3://([^/#@:\s]{1,255})/([^#]{0,1023}[^/#])/?(?:#([0-9a-f]{32}))?")


@dataclass(frozen=True)
class WeightsUri:
    """`s3://bucket/prefix`, or `s3://bucket/prefix#snapshot` for those weights or none at all."""

    bucket: str
    prefix: str
    snapshot: str | None = None

    @classmethod
    def parse(cls, text: str) -> "WeightsUri":
        """Raises SettingsError if `text` is not such a URI."""
        match = _FORM.fullmatch(text)
        if not match or not text.isprintable() or len(match[2].encode(errors="surrogatepass")) > 1024:
            raise SettingsError(
                f"weights URI {told(quoted(text))}: must be s3://bucket/prefix, "
                "or s3://bucket/prefix#snapshot with the 32 hex digits of one"
            )
        return cls(*match.groups())

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}" + (f"#{self.snapshot}" if self.snapshot else "")
