#!/bin/sh
# The last step of building an image's /opt/relight: it is compiled, listed, and the same each time it is built from the same sources.
set -eu
export PYTHONHASHSEED=0
python -m compileall -q -j 0 --invalidation-mode unchecked-hash -x /torch/testing/ /opt/relight
# With SOURCE_DATE_EPOCH as its time, and no number of its own.
/opt/sbom/bin/cyclonedx-py environment --spec-version 1.6 --output-reproducible --output-file /opt/relight/sbom.cdx.json /opt/relight/bin/python
find /opt/relight -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
