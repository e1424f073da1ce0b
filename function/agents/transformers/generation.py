"""A causal language model of transformers, asked what follows for several sequences in the same forward passes.

`Together` does it for decoders with attention over all tokens or over a window of them, which nearly all are: the library's own model
code runs on a cache that has a slot for each sequence (see `generation_cache`), with positions and masks of each. Other models, such as
those with a recurrent state, are asked sequence by sequence (`Apart`), each with the library's own cache. Which of the two a model is for
is tried when it is loaded: what it says of two sequences together has to be what it says of each alone.
"""

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from function.agents.transformers.generation_attention import grouped, install, uninstall
from function.agents.transformers.generation_cache import Pass, Room
from weights_cache.environment import SettingsError

log = logging.getLogger("relight.function")

ATTENTIONS = {"full_attention", "sliding_attention"}
PADDED = 1.25  # times the tokens that prompts have, which they may take padded to each other's length
SPARE_COLUMNS = 4096  # of a room, below which its memory is kept while nobody uses it


class Decoder(Protocol):
    """What a model is to its callers."""

    takes_parts: bool  # of a prompt, one after the other

    def open(self) -> Any:
        """A sequence's cache, empty."""

    def close(self, cache: Any) -> None:
        """It is not needed any more."""

    def forward(self, parts: Sequence[tuple[Any, Sequence[int]]]) -> Tensor:
        """The logits that follow the last new token of each sequence: float32 [sequences, vocabulary].

        parts: for each sequence its cache, and its tokens that are not yet in it, at least one. A pass that failed can be made again.
        """


def decoder(model: Any) -> Decoder:
    """The way that this model allows."""
    reason = _why_apart(model)
    if reason is None:
        together = Together(model)
        try:
            reason = _difference(model, together)
        except (TypeError, ValueError, AttributeError, RuntimeError, IndexError, KeyError, NotImplementedError) as error:
            reason = f"it failed on sequences together: {error!r:.200}"
        if reason is None:
            return together
        uninstall(model)
    log.warning("streams of %s do not share forward passes, as %s", type(model).__name__, reason)
    return Apart(model)


class Row:
    """A sequence's place in the room."""

    def __init__(self) -> None:
        self.slot = -1  # none yet
        self.length = 0  # tokens in it


class Together:
    """Sequences share passes: those with one new token all in one, and prompts of like length."""

    takes_parts = True

    def __init__(self, model: Any) -> None:
        install(model)
        self._model = _Caller(model)
        self._device: torch.device = model.device
        self._dtype: torch.dtype = model.dtype
        self._room = Room()
        self._rows: list[Row | None] = []  # by slot
        config = model.config.get_text_config(decoder=True)
        kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or ()))
        window = getattr(config, "sliding_window", None)
        # What the model is handed as attention_mask: one for all layers, or by the kind of layer where there are several.
        self._windows: dict[str, int | None] = {kind: window if kind == "sliding_attention" else None for kind in kinds}
        if len(self._windows) < 2:
            self._windows = {"": window if kinds != ["full_attention"] else None}

    def open(self) -> Row:
        """It has a slot from its first pass on."""
        return Row()

    def close(self, cache: Row) -> None:
        """Its slot is free."""
        if cache.slot >= 0:
            self._rows[cache.slot] = None
            cache.slot = -1
        while self._rows and self._rows[-1] is None:
            self._rows.pop()
        if not self._rows and self._room.columns > SPARE_COLUMNS:
            self._room.empty()

    def forward(self, parts: Sequence[tuple[Row, Sequence[int]]]) -> Tensor:
        """See Decoder."""
        for row, _ in parts:
            self._place(row)
        self._room.ensure(len(self._rows), max(row.length + len(tokens) for row, tokens in parts))
        self._gather([row for row, tokens in parts if len(tokens) == 1])
        given = {row.slot: (at, row, tokens) for at, (row, tokens) in enumerate(parts)}
        found: list[Tensor] = [torch.empty(0)] * len(parts)
        for group in _groups(given):
            places, rows, new = zip(*(given[slot] for slot in group), strict=True)
            for at, logits in zip(places, self._pass(rows, new), strict=True):
                found[at] = logits
        for row, tokens in parts:
            row.length += len(tokens)  # now, so that a pass that failed half-way can be made again
        return torch.stack(found)

    def _pass(self, rows: Sequence[Row], tokens: Sequence[Sequence[int]]) -> Tensor:
        """One forward pass of sequences in adjacent slots; shorter ones are padded in front, so that what follows is always at the end."""
        starts, counts = [row.length for row in rows], [len(some) for some in tokens]
        width = max(counts)
        ids = torch.tensor([[0] * (width - len(some)) + list(some) for some in tokens], device=self._device)
        ends = torch.tensor([start + count for start, count in zip(starts, counts, strict=True)], device=self._device)
        positions = (ends[:, None] + torch.arange(-width, 0, device=self._device)).clamp(min=0)
        now = self._room.now = Pass(rows[0].slot, starts, counts, torch.arange(len(rows), device=self._device), ends - 1)
        lengths = [start + count for start, count in zip(starts, counts, strict=True)]
        masks = {kind: grouped(self._mask(positions, now.length, window), lengths) for kind, window in self._windows.items()}
        mask: Any = masks.get("", masks)
        return self._model(ids, self._room, position_ids=positions, attention_mask=mask)

    def _mask(self, positions: Tensor, length: int, window: int | None) -> Tensor:
        """What each new token does not see, as it is added to attention's scores: [slots, 1, tokens, columns]."""
        columns = torch.arange(length, device=self._device)
        is_seen = columns <= positions[..., None]
        if window is not None:
            is_seen &= columns > positions[..., None] - window
        mask = torch.zeros(is_seen.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(~is_seen, torch.finfo(self._dtype).min)[:, None]

    def _place(self, row: Row) -> None:
        """A slot, if it has none."""
        if row.slot < 0:
            row.slot = self._rows.index(None) if None in self._rows else len(self._rows)
            self._rows[row.slot : row.slot + 1] = [row]

    def _gather(self, rows: Sequence[Row]) -> None:
        """Bring these into the first slots. A sequence is moved only when one before it has left, or is left out."""
        wanted = set(map(id, rows))
        behind = [row for row in rows if row.slot >= len(rows)]
        for slot in range(len(rows)):
            there = self._rows[slot]
            if id(there) in wanted:
                continue
            row = behind.pop()
            held = there.length if there else 0
            self._room.swap(row.slot, slot, max(row.length, held), is_copy=not held)
            self._rows[slot], self._rows[row.slot] = row, there
            if there:
                there.slot = row.slot
            row.slot = slot


def _groups(given: Mapping[int, tuple[int, Row, Sequence[int]]]) -> list[list[int]]:
    """Slots that take a pass together: adjacent ones, either with a token each or with prompts that padding makes not much longer."""
    groups: list[list[int]] = []
    width = total = 0
    for slot in sorted(given):
        count = len(given[slot][2])
        group = groups[-1] if groups else []
        wider = max(width, count)
        if group and group[-1] == slot - 1 and (width == 1) == (count == 1) and wider * (len(group) + 1) <= PADDED * (total + count):
            group.append(slot)
            width, total = wider, total + count
        else:
            groups.append([slot])
            width = total = count
    return groups


class Alone:
    """A sequence with the library's own cache for it."""

    def __init__(self) -> None:
        self.cache: Any = None
        self.is_broken = False


class Apart:
    """Each sequence has passes of its own."""

    takes_parts = False  # recurrent states are made of a whole prompt at once

    def __init__(self, model: Any) -> None:
        self._model = _Caller(model)
        self._device: torch.device = model.device

    def open(self) -> Alone:
        """Its cache is made by its first pass."""
        return Alone()

    def close(self, cache: Alone) -> None:
        """Free the cache."""
        cache.cache = None

    def forward(self, parts: Sequence[tuple[Alone, Sequence[int]]]) -> Tensor:
        """See Decoder; but a sequence whose pass has failed is lost."""
        return torch.cat([self._one(cache, tokens) for cache, tokens in parts])

    def _one(self, own: Alone, tokens: Sequence[int]) -> Tensor:
        if own.is_broken:
            raise RuntimeError("a forward pass of this sequence has failed, and its cache may be half-way")
        own.is_broken = True
        logits = self._model(torch.tensor([list(tokens)], device=self._device), own.cache)
        own.cache, own.is_broken = self._model.cache, False
        return logits


class _Caller:
    """Calls a model by the names that its version of the library has for what is handed over."""

    def __init__(self, model: Any) -> None:
        parameters = inspect.signature(model.forward).parameters
        self._model = model
        self._cache = next((name for name in ("cache", "past_key_values") if name in parameters), "")
        if not self._cache:
            raise SettingsError(f"{type(model).__name__} of this version of transformers takes no cache that texts could be made with")
        self._fixed = {"use_cache": True, **({"logits_to_keep": 1} if "logits_to_keep" in parameters else {})}
        self.cache: Any = None  # as the last pass left it

    def __call__(self, ids: Tensor, cache: Any, **more: Any) -> Tensor:
        """Logits that follow the last token of each row: float32."""
        found = self._model(input_ids=ids, **{self._cache: cache}, **self._fixed, **more)
        self.cache = getattr(found, self._cache, None)
        logits: Tensor = found.logits[:, -1].float()
        return logits


def _why_apart(model: Any) -> str | None:
    """What stands against passes together, as far as the model's class and config tell."""
    config = model.config.get_text_config(decoder=True)
    parameters = inspect.signature(model.forward).parameters
    if strange := set(getattr(config, "layer_types", None) or ()) - ATTENTIONS:
        return f"it has layers of {', '.join(sorted(strange))}"
    if "local" in (getattr(config, "attention_layers", None) or ()):
        return "it has windows of its own making"  # GPT-Neo: by the place in the pass, not by position
    if getattr(model, "_is_stateful", False):
        return "it has a recurrent state"
    if "position_ids" not in parameters:
        return "it takes no positions"
    return None


@torch.inference_mode()
def _difference(model: Any, together: Together) -> str | None:
    """Whether two sequences together get other logits than each alone; both their prompts and a token after them."""
    size = model.config.get_text_config(decoder=True).vocab_size
    texts = [[(7 * n + 11 * m) % size for n in range(length)] for m, length in enumerate((6, 4))]
    rows = [together.open() for _ in texts]
    alone = _Caller(model)
    try:
        for seen, last in ((0, -1), (-1, None)):
            found = together.forward([(row, text[seen:last]) for row, text in zip(rows, texts, strict=True)])
            for logits, text in zip(found, texts, strict=True):
                wanted = alone(torch.tensor([text[:last]], device=model.device), None)[0]
                scale = float(wanted.abs().max())
                if not float((logits - wanted).abs().max()) <= (1e-3 if _is_exact(model) else 0.1) * scale:
                    return "what it says of sequences together is not what it says of each alone"
    finally:
        for row in rows:
            together.close(row)
    return None


def _is_exact(model: Any) -> bool:
    """Whether it computes in a precision in which company hardly matters."""
    return bool(model.dtype == torch.float32)
