"""boto3's `download_file`, with its defaults or (`tuned`) with fewer, larger parts and reads."""

import sys
from pathlib import Path

import boto3
from boto3.s3.transfer import TransferConfig

from bench.peers.timed import measure

TUNED = TransferConfig(max_concurrency=4, multipart_chunksize=16 << 20, multipart_threshold=16 << 20, io_chunksize=1 << 20)


def main(uri: str, name: str, destination: Path, config: TransferConfig | None) -> None:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    path = destination / name

    def fetch() -> Path:
        client.download_file(bucket, f"{prefix}/{name}", str(path), Config=config)
        return path

    measure(fetch)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), TUNED if "tuned" in sys.argv[5:] else None)
