"""What a process of the platform has of our own environment: what names a place, a language or a resource of this machine, and no more.

Whoever types `relight run` has tokens in the environment, of which no container in a cluster would know. So what is inherited is listed
here; what else a pod needs stands in its manifest, or is named by `relight run --env`.
"""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

_NAMES = """
    PATH HOME USER LOGNAME SHELL TERM TZ TMPDIR TMP TEMP LANG LANGUAGE XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME
    HTTP_PROXY HTTPS_PROXY FTP_PROXY ALL_PROXY NO_PROXY http_proxy https_proxy ftp_proxy all_proxy no_proxy
    SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE NODE_EXTRA_CA_CERTS
    LD_LIBRARY_PATH LD_PRELOAD GLIBC_TUNABLES VIRTUAL_ENV CONDA_PREFIX
    CUDA_HOME CUDA_PATH CUDA_VISIBLE_DEVICES CUDA_DEVICE_ORDER CUDA_CACHE_PATH CUDA_MODULE_LOADING CUDA_LAUNCH_BLOCKING
    NVIDIA_VISIBLE_DEVICES NVIDIA_DRIVER_CAPABILITIES
    OPENBLAS_NUM_THREADS NUMEXPR_NUM_THREADS VECLIB_MAXIMUM_THREADS
"""
# Families of which every member is of that kind. The interpreter's own names have no second word (PYTHONPATH, PYTHONUTF8).
_FAMILIES = r"LC_[A-Z]+|PYTHON[A-Z0-9]+|(OMP|GOMP|KMP|MKL|MALLOC)_[A-Z_]+"
_INHERITED = re.compile("|".join((*_NAMES.split(), _FAMILIES)))
# What is on this machine is asked for without a proxy; else a pod could not reach the embedded object store.
_LOOPBACK = ("127.0.0.1", "::1", "localhost", ".localhost")


def inherited(besides: Iterable[str] = ()) -> dict[str, str]:
    """What a process has besides what is said to it. besides: names that are inherited, too."""
    names = set(besides)
    env = {name: value for name, value in os.environ.items() if name in names or _INHERITED.fullmatch(name)}
    if any(name.lower() in ("http_proxy", "all_proxy") for name in env):
        env |= _without_proxy(env)
    # `python` in a container is the one its packages are installed for.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    return env


def _without_proxy(env: dict[str, str]) -> dict[str, str]:
    hosts = [host.strip() for host in (env.get("no_proxy") or env.get("NO_PROXY") or "").split(",")]
    found = ",".join(dict.fromkeys([*filter(None, hosts), *_LOOPBACK]))
    return {"NO_PROXY": found, "no_proxy": found}
