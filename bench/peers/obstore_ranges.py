"""obstore: ranges streamed side by side by a few threads, each to its place in one preallocated file."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import obstore  # type: ignore[import-not-found]
from obstore.store import S3Store  # type: ignore[import-not-found]

from bench.peers.timed import measure

# The fastest of 2 to 8 threads, ranges of 4 to 64 MiB, pieces of 64 KiB to whole ranges, threads or asyncio.
THREADS, PART_BYTES, PIECE_BYTES = 4, 64 << 20, 128 << 10


def main(uri: str, name: str, destination: Path) -> None:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    options = {"allow_http": True, "timeout": "300s"}
    store = S3Store(bucket, endpoint=os.environ["AWS_ENDPOINT_URL"], virtual_hosted_style_request=False, client_options=options)
    path, key = destination / name, f"{prefix}/{name}"

    def fetch() -> Path:
        size = obstore.head(store, key)["size"]
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC)
        os.posix_fallocate(fd, 0, size)

        def part(start: int) -> None:
            reply = obstore.get(store, key, options={"range": (start, min(start + PART_BYTES, size))})
            for piece in reply.stream(min_chunk_size=PIECE_BYTES):
                left = memoryview(piece)
                while left:
                    written = os.pwrite(fd, left, start)
                    left, start = left[written:], start + written

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(part, range(0, size, PART_BYTES)))
        os.close(fd)
        return path

    measure(fetch)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
