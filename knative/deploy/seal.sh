#!/bin/sh
# The last step of installing into an image's /opt/relight: what is new there is compiled, all is listed, and nothing in it tells when it was
# installed. What is older than SOURCE_DATE_EPOCH has been through this: a layer below, which is copied file by file when it is touched.
set -eu
export PYTHONHASHSEED=0
since="@$SOURCE_DATE_EPOCH"
# Some of torch's tests are written for newer Pythons, and say so in their names.
find /opt/relight -name '*.py' -not -name 'py3??_*.py' -newermt "$since" \
    | python -m compileall -q -j 0 --invalidation-mode unchecked-hash -i -
# With SOURCE_DATE_EPOCH as its time, and no number of its own.
/opt/sbom/bin/cyclonedx-py environment --spec-version 1.6 --output-reproducible --output-file /opt/relight/sbom.cdx.json /opt/relight/bin/python
find /opt/relight -newermt "$since" -exec touch --no-dereference --date="$since" {} +
