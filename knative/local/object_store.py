"""The embedded object store: an S3 server in memory, for one machine. `python -m knative.local.object_store PORT`."""

import logging
import signal
import sys
import threading

from moto.server import ThreadedMotoServer


def main() -> None:
    """Serve on a loopback port until SIGTERM."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line for each request
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the platform, which then ends us
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=int(sys.argv[1]), verbose=False)
    server.start()
    stop.wait()


if __name__ == "__main__":
    main()
