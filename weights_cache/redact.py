"""Text without what nobody may read in a log: passwords in URLs, and the signatures that make an address as good as a password."""

import re

_HIDDEN = "***"

# User and password of a URL: up to the last @ before its path, and of a password that holds what it may not (a slash) up to the last @.
# The digits of a port are no password.
# Bounded, so that no text takes longer than its length.
_USER = re.compile(r"(?<=://)(?:[^\s/?#'\"<>@]{0,300}:(?!\d*(?:[/?#\s'\"<>]|$))[^\s'\"<>]{0,1000}|[^\s/?#'\"<>]{0,300})@")
_QUERY = re.compile(
    r"(?i)\b(X-Amz-(?:Signature|Credential|Security-Token)|X-Goog-(?:Signature|Credential)|AWSAccessKeyId|Signature|sig)=[^\s&'\"<>]+"
)
_HEADER = re.compile(r"(?i)\b((?:Proxy-)?Authorization['\"]?\s*[:=]\s*['\"]?)[^\r\n'\"]+")


def redacted(text: str) -> str:
    """The text with each of them replaced by asterisks."""
    if "@" in text:
        text = _USER.sub(f"{_HIDDEN}@", text)
    if "=" in text:
        text = _QUERY.sub(rf"\1={_HIDDEN}", text)
    return _HEADER.sub(rf"\1{_HIDDEN}", text) if "uthorization" in text.lower() else text
