"""The digest of a chunk: CRC-64/NVME, which runs far above network speed, and which object stores offer for whole objects too.

It finds damage, not forgery: who may write to the bucket may write the manifest. `relight push` also records each file's SHA-256.
"""

from collections.abc import Iterable

from awscrt import checksums

from weights_cache.chunks import CHUNK_BYTES


def chunk_digest(data: memoryview | bytes, before: int = 0) -> int:
    """The digest of bytes, as an unsigned number of 64 bits; of a longer run of them, if `before` is that of what precedes them."""
    digest: int = checksums.crc64nvme(data, before)
    return digest


def whole_digest(digests: Iterable[int], size: int) -> int:
    """The digest of a file of `size` bytes out of those of its chunks, without reading the file."""
    whole, left = 0, size
    for digest in digests:
        length = min(left, CHUNK_BYTES)
        whole = checksums.combine_crc64nvme(whole, digest, length)
        left -= length
    return whole
