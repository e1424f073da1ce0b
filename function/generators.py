"""Random numbers in processes that are forked from one: each draws its own, unless a library has chosen the seed.

A generator that was seeded by the system is given another seed in each fork, as it would have in a fresh process. One that was given a
seed when it was made keeps it.
"""

import gc
import random
import secrets
import sys
import weakref
from typing import Any

_NUMPY = "numpy.random.bit_generator"  # where numpy asks the system, by the name that it has imported


class Generators:
    """Notes, as long as it is entered, the generators that the system seeds. It is entered for each import."""

    def __init__(self) -> None:
        self._python: weakref.WeakSet[random.Random] = weakref.WeakSet()
        self._numpy: list[Any] = []  # bit generators
        self._drawn: set[int] = set()  # numbers of the system's that numpy has seeded with
        self._torch_seed = _torch_seed()
        self._seed, self._seed_all, self._randbits = random.Random.seed, random.seed, secrets.randbits
        self._has_seeded = False

    def __enter__(self) -> None:
        seed, randbits = self._seed, self._randbits

        def note(generator: random.Random, a: Any = None, version: int = 2) -> None:
            (self._python.add if a is None else self._python.discard)(generator)
            seed(generator, a, version)

        def note_all(a: Any = None, version: int = 2) -> None:
            self._has_seeded = a is not None
            self._seed_all(a, version)

        def note_drawn(k: int) -> int:
            self._drawn.add(number := randbits(k))
            return number

        random.Random.seed, random.seed, secrets.randbits = note, note_all, note_drawn  # type: ignore[method-assign, assignment]
        if _NUMPY in sys.modules:
            sys.modules[_NUMPY].randbits = note_drawn  # type: ignore[attr-defined]

    def __exit__(self, *_: object) -> None:
        random.Random.seed, random.seed, secrets.randbits = self._seed, self._seed_all, self._randbits  # type: ignore[method-assign]
        if _NUMPY in sys.modules:
            sys.modules[_NUMPY].randbits = self._randbits  # type: ignore[attr-defined]
        if self._drawn:
            kinds = _subclasses(sys.modules[_NUMPY].BitGenerator) if _NUMPY in sys.modules else set()
            self._numpy += [found for found in gc.get_objects() if type(found) in kinds and self._is_the_systems(found)]
            self._drawn.clear()

    def _is_the_systems(self, found: Any) -> bool:
        return getattr(_seed_sequence(found), "entropy", None) in self._drawn

    def is_seeded(self) -> bool:
        """Whether an import has chosen the numbers that everybody draws; since the first time that torch was there, of torch's."""
        known, self._torch_seed = self._torch_seed, _torch_seed()
        numpy = getattr(getattr(sys.modules.get("numpy.random.mtrand"), "_rand", None), "_bit_generator", None)
        return (
            self._has_seeded or (known is not None and known != self._torch_seed) or (numpy is not None and _seed_sequence(numpy) is None)
        )

    def differ(self) -> None:
        """Give this process, which has just been forked, numbers of its own. (Python's `random` sees to its own generator.)"""
        for generator in self._python:
            generator.seed()
        for generator in self._numpy:
            generator.state = type(generator)().state
        if "numpy.random" in sys.modules:
            sys.modules["numpy.random"].seed()
        if torch := _torch():
            torch.seed()


def _seed_sequence(bit_generator: Any) -> Any:
    """What one of numpy's was seeded with; None if that is a number of the old kind."""
    return getattr(bit_generator, "seed_seq" if hasattr(bit_generator, "seed_seq") else "_seed_seq", None)


def _subclasses(cls: type) -> set[type]:
    return {cls}.union(*map(_subclasses, cls.__subclasses__()))


def _torch() -> Any:
    """Torch's generator for the CPU, if torch is there. (One for a GPU is made when that is first used, in each process.)"""
    return getattr(sys.modules.get("torch._C"), "default_generator", None)


def _torch_seed() -> int | None:
    generator = _torch()
    return generator.initial_seed() if generator is not None else None
