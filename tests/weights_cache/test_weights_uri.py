"""WEIGHTS_URI: a bucket, a prefix, and perhaps one snapshot."""

import pytest

from weights_cache.environment import SettingsError
from weights_cache.uri import WeightsUri

SNAPSHOT = "0123456789abcdef" * 2


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        pytest.param("s3://bucket/model", WeightsUri("bucket", "model"), id="a prefix"),
        pytest.param("s3://bucket/team/model/v1", WeightsUri("bucket", "team/model/v1"), id="a deep prefix"),
        pytest.param("s3://bucket/model/", WeightsUri("bucket", "model"), id="one slash at the end is no part of it"),
        pytest.param("s3://bucket/mödel v1", WeightsUri("bucket", "mödel v1"), id="whatever a key may hold"),
        pytest.param(f"s3://bucket/model#{SNAPSHOT}", WeightsUri("bucket", "model", SNAPSHOT), id="a snapshot"),
        pytest.param(f"s3://bucket/model/#{SNAPSHOT}", WeightsUri("bucket", "model", SNAPSHOT), id="a snapshot after a slash"),
    ],
)
def test_a_uri_is_taken_apart(text: str, uri: WeightsUri) -> None:
    assert WeightsUri.parse(text) == uri


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("", id="nothing"),
        pytest.param("bucket/model", id="no scheme"),
        pytest.param("gs://bucket/model", id="another store"),
        pytest.param("https://bucket/model", id="a web address"),
        pytest.param("s3://bucket", id="no prefix"),
        pytest.param("s3://bucket/", id="an empty prefix"),
        pytest.param("s3:///model", id="no bucket"),
        pytest.param("s3://bucket/model#", id="an empty snapshot"),
        pytest.param("s3://bucket/model#v1", id="a snapshot that is a word"),
        pytest.param(f"s3://bucket/model#{SNAPSHOT[1:]}", id="a snapshot one digit short"),
        pytest.param(f"s3://bucket/model#{SNAPSHOT.upper()}", id="a snapshot in capitals"),
        pytest.param(f"s3://bucket/model#{SNAPSHOT}\n", id="a line break at the end"),
    ],
)
def test_what_is_not_such_a_uri_is_refused_and_repeated(text: str) -> None:
    with pytest.raises(SettingsError, match="must be s3://bucket/prefix") as caught:
        WeightsUri.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["s3://bucket/team/model", f"s3://bucket/model#{SNAPSHOT}"])
def test_a_uri_prints_as_it_was_written(text: str) -> None:
    assert str(WeightsUri.parse(text)) == text
