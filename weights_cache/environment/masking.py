"""Text for logs, errors and terminals, without the credentials that are known by their form.

It is for what somebody else wrote: a URL, a setting's value, an exception's text. What is known to be a secret is not repeated at all.
"""

import re
from collections.abc import Callable, Mapping

HIDDEN = "***"
MOST_VALUE = 80  # characters of a value that is repeated

# A user and password before the host of a URL, whatever signs somebody has left unescaped in the password; of a path that was a URL, too.
_USER = re.compile(
    r"""(?:(?<=://)|(?<=[A-Za-z\d]{2}:/)(?!/))(?:[^\s/?#@"'<>:[]{0,256}:(?!\d{1,5}(?:[/?#]|$))[^\s"'<>]{0,512}|[^\s/?#@"'<>]{1,512})@"""
)
_SCHEMELESS = re.compile(r"^[^\s/@:]*:(?!//)\S*@")  # of a value that is to be a URL
# A value in the query of a URL, or of a form.
_QUERY = re.compile(
    r"""((?:\b(?=X-Amz-|X-Goog-|AWSAccess)|[?&])[\w.-]{0,64}?(?:token|secret|signature|sig|passwo?r?d|api[_-]?key|access[_-]?key(?:[_-]?id)?|credential)=)[^\s&#"'<>]+""",
    re.IGNORECASE,
)
_SECRET_NAME = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|(?:API|ACCESS|SECRET|PRIVATE)_?KEY|HEADERS)(?:_|$)", re.IGNORECASE
)
_LEAST_SECRET = 6  # characters; what is shorter stands in many a word
_SIGN = r"[\w.~+/=-]"
_BEARER = re.compile(  # a lone word after "bearer" is a word
    rf"(\bauthorization\W{{1,6}}(?:b\W)?(?:bearer|basic|token)\s+|\bbearer\s+(?=[a-z]*[\d._~+/=-]{_SIGN})){_SIGN}+", re.IGNORECASE
)
_SIGNED = re.compile(r"""(\bAWS4-HMAC-SHA256\s+)Credential=[^\r\n'"]+""", re.IGNORECASE)


def masked(text: str) -> str:
    """The text with `***` in place of passwords in URLs, of secrets in their queries, and of what `Authorization` or `Bearer` begins."""
    if ":/" in text:
        text = _USER.sub(f"{HIDDEN}@", text)
    if "=" in text:
        text = _QUERY.sub(rf"\1{HIDDEN}", text)
    if "HMAC" in text:
        text = _SIGNED.sub(rf"\1{HIDDEN}", text)
    return _BEARER.sub(rf"\1{HIDDEN}", text)


def is_secret(name: str) -> bool:
    """Whether the name of a variable says that its value is a secret."""
    return bool(_SECRET_NAME.search(name)) and not name.endswith(("_FILE", "_PATH", "_ID"))


def hiding(environ: Mapping[str, str]) -> Callable[[str], str]:
    """`masked` that also hides the values of variables whose names say that they are secrets: libraries repeat what they are given."""
    secrets: set[str] = set()
    for name, value in environ.items():
        if is_secret(name):
            secrets |= {value, *value.splitlines()}
            if "HEADERS" in name.upper():  # name=value,name=value
                secrets |= {re.split("[=:]", pair, maxsplit=1)[-1].strip() for pair in value.split(",")}
    known = sorted((secret for secret in secrets if len(secret) >= _LEAST_SECRET), key=len, reverse=True)
    if not known:
        return masked
    pattern = re.compile("|".join(map(re.escape, known)))
    return lambda text: masked(pattern.sub(HIDDEN, text))


def told(value: str) -> str:
    """A setting's value as an error repeats it: in quotes, masked, of bounded length."""
    value = _SCHEMELESS.sub(f"{HIDDEN}@", masked(value))
    return repr(value if len(value) <= MOST_VALUE else f"{value[:MOST_VALUE]}…")
