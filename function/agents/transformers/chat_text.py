"""Tokens to text, piece by piece: no piece has half a character or lacks a space, and together they are what the tokenizer makes of all."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from function.agents.byte_alphabet import BYTES

TAIL = 6  # tokens of the prompt that the first piece is decoded after, as some tokenizers drop a space at the beginning
LACKING = "\ufffd"  # what a tokenizer writes for bytes that are no character, or not yet one


class Vocabulary:
    """What a tokenizer of the library says of tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        fast = getattr(tokenizer, "backend_tokenizer", None)
        self.decode: Callable[[Sequence[int]], str] = fast.decode if fast is not None else self._decode
        self.special = set(tokenizer.all_special_ids) | {
            number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
        }
        self.describe = lru_cache(maxsize=8192)(self._describe)

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def marker(self, text: str) -> int | None:
        """The special token of this very text, if there is one."""
        found = self._tokenizer.convert_tokens_to_ids(text)
        return found if isinstance(found, int) and found in self.special else None

    def _describe(self, token: int) -> tuple[str, list[int] | None]:
        """A token's own text, and its bytes where they are known: the text of half a character is no text."""
        piece = self._tokenizer.convert_ids_to_tokens(token)
        text: str = self._tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if isinstance(piece, str) and piece.startswith("▁") and not text.startswith(" "):
            text = " " + text
        if LACKING not in text:
            return text, list(text.encode())
        if isinstance(piece, str) and len(piece) == 6 and piece.startswith("<0x"):
            return text, [int(piece[3:5], 16)]
        known = [BYTES.get(character) for character in piece or ""]
        return text, [byte for byte in known if byte is not None] if None not in known else None


class Words:
    """The text of one sequence's tokens, as they come."""

    def __init__(self, vocabulary: Vocabulary, prompt: Sequence[int], kept: Mapping[int, str]) -> None:
        """kept: special tokens that belong to the text, and how they are written."""
        self._vocabulary = vocabulary
        self._kept = kept
        self._tokens = list(prompt[-TAIL:])
        self._told = len(self._tokens)  # of these tokens, whose text is out
        self._before = vocabulary.decode(self._tokens)

    def add(self, token: int) -> str:
        """The text that is certain now."""
        if token in self._kept:
            text = self.rest() + self._kept[token]
            self._tokens, self._told, self._before = [], 0, ""
            return text
        if token in self._vocabulary.special:
            return ""
        self._tokens.append(token)
        text = self._vocabulary.decode(self._tokens)
        if len(text) <= len(self._before) or text.endswith(LACKING):
            return ""
        piece = text[len(self._before) :]
        del self._tokens[: self._told]
        self._told = len(self._tokens)
        self._before = self._vocabulary.decode(self._tokens)
        return piece

    def rest(self) -> str:
        """What was held back, when nothing follows; a character that lacks bytes is left out."""
        return self._vocabulary.decode(self._tokens)[len(self._before) :].rstrip(LACKING)
