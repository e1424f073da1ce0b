"""One forward pass for the inputs of a batch: rows of tokens of several lengths.

On a processor they are packed into one row (see `packing`), elsewhere those that are shorter than the longest are padded, and the padding
masked. Not every model keeps a mask (some mix all tokens, or count positions from the end), so that either is relied on only once it was
seen to change nothing; else rows of one length share a pass.
"""

import inspect
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from function.agent import BadInput
from function.agents.transformers.packing import MOST_TOKENS, Packing

log = logging.getLogger("relight.function")

MOST_CELLS = 32_768  # of one pass, padding counted
MOST_ROWS = 256  # that one input may be: pieces of a text, labels
MOST_ROWS_OF_BATCH = 1024
MOST_CHARACTERS = 1 << 20  # of a text; the tokenizer reads all of it, and keeps all that it cuts off
MOST_CHARACTERS_OF_BATCH = 4 << 20
PASS_CELLS = 32  # that a pass costs a processor besides those it has: about as long as reading the weights takes
_TOLERANCE = {torch.float32: 5e-5, torch.float64: 5e-5}  # of what padding may change, by the largest number; in 16 bits:
_TOLERANCE_16 = 3e-2

Numbers = dict[str, Tensor]


@dataclass
class Row:
    """What one forward pass has in one row: numbers of tokens by the model's name for them, or tensors [1, …] that all are alike."""

    inputs: dict[str, Any]
    extra: dict[str, Any] = field(default_factory=dict)  # for the end, and not for the model

    def __len__(self) -> int:
        """In tokens; 1 for what has none."""
        return max((len(value) for value in self.inputs.values() if isinstance(value, list)), default=1)

    def size(self) -> tuple[Any, ...]:
        """The same for rows that need no padding to share a pass."""
        return len(self), *(tuple(value.shape) for value in self.inputs.values() if isinstance(value, Tensor))


class Forward:
    """The forward pass of one model, for any number of rows."""

    def __init__(self, model: Any, tokenizer: Any, outputs: Sequence[str], *, is_by_token: bool) -> None:
        """outputs: of the model, by name. is_by_token: they have a number for each token, and not for the row."""
        self._model = model
        self._outputs = outputs
        self._is_by_token = is_by_token
        self._pad = getattr(tokenizer, "pad_token_id", None)
        self._is_left = getattr(tokenizer, "padding_side", "right") == "left"
        known = inspect.signature(model.forward).parameters
        self._more = {"use_cache": False} if "use_cache" in known else {}
        # A tokenizer of another model's kind tells more than this one may take.
        self._known = None if any(one.kind is one.VAR_KEYWORD for one in known.values()) else set(known)
        self._pads: bool | None = None  # whether padding changes nothing; None: not tried
        self._packing: Packing | None = None

    def run(self, rows: Sequence[Row]) -> list[Numbers]:
        """The outputs for each row, [1, …] on the CPU, without what is padding."""
        order = sorted(range(len(rows)), key=lambda index: rows[index].size())
        found: list[Numbers] = [{}] * len(rows)
        for group in self._groups([rows[index] for index in order]):
            for output in self._pass(group):
                found[order.pop(0)] = output
        return found

    def _groups(self, rows: Sequence[Row]) -> list[list[Row]]:
        """Those that share a pass; rows come by size."""
        if len(rows[0]) != len(rows[-1]) and self._pads is None:
            self._try([rows[len(rows) // 2], rows[-1], rows[0]])
        if rows[0].size() == rows[-1].size() or not (self._pads or self._packing):
            return [part for _, group in groupby(rows, Row.size) for part in _parts(list(group))]
        if self._packing:
            return _packs(rows)
        if self._model.device.type != "cpu":  # where a pass costs about the same however full it is
            return _parts(rows)
        return _cheapest([len(row) for row in rows], rows)

    def _try(self, rows: Sequence[Row]) -> None:
        """Find out how rows may share a pass: their numbers are the same then as those of each alone."""
        self._pads = False
        if "attention_mask" not in rows[0].inputs:
            return
        alone = [output for row in rows for output in self._pass([row])]
        if self._model.device.type == "cpu" and (first := first_position(self._model)) is not None:
            self._packing = Packing(self._model, first)
            try:
                if _are_alike(alone, self._pass(rows)):
                    return
            except Exception as error:  # noqa: BLE001  the model's code was not made for this, and may raise anything
                log.debug("%s does not take texts that are packed: %s", type(self._model).__name__, error)
            self._packing = None
        self._pads = self._pad is not None and _are_alike(alone, self._pass(rows))

    def _pass(self, rows: Sequence[Row]) -> list[Numbers]:
        device, names = self._model.device, [name for name in rows[0].inputs if self._is_taken(name)]
        is_packed = self._packing is not None and len({len(row) for row in rows}) > 1
        try:
            with torch.inference_mode():
                if self._packing and is_packed:
                    inputs = self._packing.packed({name: [row.inputs[name] for row in rows] for name in names})
                else:
                    inputs = {name: joined(name, rows, self._pad, is_left=self._is_left).to(device) for name in names}
                outputs = self._model(**inputs, **self._more)
        finally:
            if self._packing:
                self._packing.end()
        found = {name: outputs[name].cpu() for name in self._outputs}
        is_left = self._is_left and not is_packed
        return [
            {name: self._cut(output[at : at + 1], len(row), is_left=is_left) for name, output in found.items()}
            for at, row in enumerate(rows)
        ]

    def _is_taken(self, name: str) -> bool:
        return self._known is None or name in self._known

    def _cut(self, output: Tensor, length: int, *, is_left: bool) -> Tensor:
        if not self._is_by_token:
            return output
        return output[:, -length:] if is_left else output[:, :length]


def joined(name: str, rows: Sequence[Row], pad: int | None, *, is_left: bool) -> Tensor:
    """One input of the model for all rows, those that are shorter filled up at their beginning or end."""
    values = [row.inputs[name] for row in rows]
    if isinstance(values[0], Tensor):
        return torch.cat(values)
    longest = max(map(len, values))
    filling = [pad if name == "input_ids" else 0]
    full = [filling * (longest - len(value)) for value in values]
    return torch.tensor([more + value if is_left else value + more for value, more in zip(values, full, strict=True)])


def _parts(rows: Sequence[Row]) -> list[list[Row]]:
    """Cut so that none has too many cells."""
    size = max(1, MOST_CELLS // max(map(len, rows)))
    return [list(rows[at : at + size]) for at in range(0, len(rows), size)]


def _cheapest(lengths: Sequence[int], rows: Sequence[Row]) -> list[list[Row]]:
    """Passes that together cost the least on a processor: each reads the weights once, and computes its padding, too."""
    costs, begins = [0], [0]  # of the first so many rows, and where their last pass begins
    for end in range(1, len(rows) + 1):
        most = MOST_CELLS // lengths[end - 1]
        found = ((costs[at] + PASS_CELLS + (end - at) * lengths[end - 1], at) for at in range(max(0, end - max(1, most)), end))
        cost, begin = min(found)
        costs.append(cost)
        begins.append(begin)
    parts: list[list[Row]] = []
    end = len(rows)
    while end:
        parts.insert(0, list(rows[begins[end] : end]))
        end = begins[end]
    return parts


def _packs(rows: Sequence[Row]) -> list[list[Row]]:
    """Cut so that a pass has as many tokens as may be packed, at most."""
    parts: list[list[Row]] = [[]]
    tokens = 0
    for row in rows:
        if parts[-1] and tokens + len(row) > MOST_TOKENS:
            parts.append([])
            tokens = 0
        parts[-1].append(row)
        tokens += len(row)
    return parts


def _are_alike(these: Sequence[Numbers], those: Sequence[Numbers]) -> bool:
    pairs = [(one[name], other[name]) for one, other in zip(these, those, strict=True) for name in one]
    return all(one.shape == other.shape and _are_close(one, other) for one, other in pairs)


def _are_close(one: Tensor, other: Tensor) -> bool:
    tolerance = _TOLERANCE.get(one.dtype, _TOLERANCE_16) * float(one.abs().max())
    return bool(((one - other).abs() <= tolerance).all())


def check_characters(lengths: Sequence[int]) -> None:
    """Raises BadInput for texts that would take too long to make tokens of. lengths: of each."""
    longest, total = max(lengths, default=0), sum(lengths)
    if longest > MOST_CHARACTERS:
        raise BadInput(f"the text has {longest} characters, and may have {MOST_CHARACTERS}")
    if total > MOST_CHARACTERS_OF_BATCH:
        raise BadInput(f"the texts, each with its label or pair, have {total} characters, and may have {MOST_CHARACTERS_OF_BATCH} together")


def check_rows(count: int) -> None:
    """Raises BadInput for an input that would take too many rows."""
    if count > MOST_ROWS:
        raise BadInput(f"an input makes {count} rows (pieces of its text, or labels), and may make {MOST_ROWS}: send it in parts")


def within_bounds(each: Iterable[list[Row]]) -> list[list[Row]]:
    """The rows of each input. Raises BadInput as soon as they are too many."""
    found, total = [], 0
    for rows in each:
        check_rows(len(rows))
        total += len(rows)
        if total > MOST_ROWS_OF_BATCH:
            raise BadInput(f"the inputs make more than {MOST_ROWS_OF_BATCH} rows together (pieces of texts, or labels): send fewer at once")
        found.append(rows)
    return found


class Texts:
    """Makes rows of texts, as long as the model takes them."""

    def __init__(self, tokenizer: Any, limit: int | None) -> None:
        """limit: tokens that the model takes, None if any number."""
        self.tokenizer = tokenizer
        self.limit = limit
        if limit:
            tokenizer.model_max_length = limit  # by which the library's own code cuts, too

    def rows(
        self, texts: Sequence[str], pairs: Sequence[str] | None = None, *, truncation: bool | str = False, keep: Sequence[str] = ()
    ) -> list[Row]:
        """One for each text. pairs: second texts. keep: of what the tokenizer tells, besides what the model wants, in `extra`.

        Raises BadInput for a text that is too long, unless `truncation` says that it be cut.
        """
        cut = {"truncation": truncation, "max_length": self.limit} if truncation and self.limit else {}
        wanted = {f"return_{name.replace('offset_mapping', 'offsets_mapping')}": True for name in keep}
        found = self.encode(list(texts), None if pairs is None else list(pairs), **cut, **wanted)
        names = [name for name in self.tokenizer.model_input_names if name in found]
        rows = []
        for at in range(len(texts)):
            rows.append(Row({name: found[name][at] for name in names}, {name: found[name][at] for name in keep}))
            self.check(len(rows[-1]))
        return rows

    def encode(self, *texts: Any, **options: Any) -> Any:
        """What the tokenizer makes of them. Raises BadInput for a text that it cannot take."""
        check_characters([len(text) for one in texts if one is not None for text in ([one] if isinstance(one, str) else one)])
        try:
            return self.tokenizer(*texts, **options)
        except (UnicodeEncodeError, TypeError):
            raise BadInput("the text holds half a character (a lone surrogate)") from None
        except Exception as error:
            if "too short" not in str(error):  # what a tokenizer says of it has no class of its own
                raise
            raise BadInput(f"what may not be cut is longer than the {self.limit} tokens that the model takes") from error

    def check(self, length: int) -> None:
        """Raises BadInput for a text of too many tokens."""
        if self.limit and length > self.limit:
            raise BadInput(
                f"the text has {length} tokens, and the model takes {self.limit}: shorten it, or have it cut with the parameter "
                '"truncation": true'
            )
        if not length:
            raise BadInput("the text is empty: the tokenizer makes no token of it")


def token_limit(model: Any, tokenizer: Any) -> int | None:
    """How many tokens a model takes: what its tokenizer says, and no more than it has positions for. None if any number."""
    said = tokenizer.model_max_length
    return min([*([said] if 0 < said < 1 << 30 else []), *(count for count, _ in _positions(model))], default=None)


def position_limit(model: Any) -> int | None:
    """How many positions a model has; None if any number."""
    return min((count for count, _ in _positions(model)), default=None)


def first_position(model: Any) -> int | None:
    """The number of a text's first position; None where positions are not those of one table."""
    found = {before for _, before in _positions(model)}
    return found.pop() if len(found) == 1 else None


def _positions(model: Any) -> Iterator[tuple[int, int]]:
    """Of each table of positions, how many a text may have, and the number of its first."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("position_embeddings", "embed_positions", "wpe") and isinstance(module, torch.nn.Embedding):
            # Where numbers are left out at the beginning: those of BART's kind say how many, those of RoBERTa's count from the padding's.
            before = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            yield module.num_embeddings - before, before
