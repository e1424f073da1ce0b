"""How tokenizers with byte-level BPE write bytes: each as a character."""


def _byte_alphabet() -> dict[str, int]:
    """Byte by character, as byte-level BPE (Radford et al., 2019) writes bytes: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTES = _byte_alphabet()
