"""An ONNX model, run by onnxruntime. No code of the user's and no torch is needed.

What goes in and comes out is what the model's file says, by its names. Where the first axis of all tensors may have any size, or is 1, it
counts rows: one row is one input of the agent, and rows of several callers that are alike in shape share a call of onnxruntime, once two
rows were seen to give together what each gives alone. A model whose first axis is something else (a fixed size, a scalar) is run once for
each input, which is then all of its tensors; `/v2` shows one axis more.
"""

import itertools
import logging
import math
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from function import cpus
from function.agent import BadInput, TensorSpec, Weights
from function.errors import bounded
from function.settings import for_agents
from weights_cache.environment import SettingsError
from weights_cache.errors import WeightsError

log = logging.getLogger("relight.function")

Array = np.ndarray[Any, Any]
Row = dict[str, Array]  # by the names of the model's inputs

_DTYPES = {  # onnxruntime's names of element types: the protocol's, and numpy's
    "float16": ("FP16", "float16"),
    "float": ("FP32", "float32"),
    "double": ("FP64", "float64"),
    "bool": ("BOOL", "bool"),
    "string": ("BYTES", "object"),
    **{f"{sign}int{bits}": (f"{sign}int{bits}".upper(), f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
_LOCATION = re.compile(rb"\n\x08location\x12([\x01-\x7f])", re.DOTALL)  # protobuf's key of a file of tensors, and the length of its name
_TRIED_SIZES = (4, 1, 32, 224)  # of axes that may have any
_TRIED_HIGHS = (10, 2)  # whole numbers below: words of a vocabulary, kinds of words
_MOST_TRIED = 1 << 24  # elements
_TOLERANCE, _TOLERANCE_16 = 1e-3, 3e-2  # of what company may change, by the largest number: rounding
_KINDS = {"f": "iuf", "i": "iu", "u": "iu", "b": "b"}  # what a caller may give for a dtype: numpy's kinds of dtypes


@dataclass(frozen=True)
class Slot:
    """An input or output of the model."""

    name: str
    datatype: str  # the protocol's
    dtype: str  # numpy's; empty for what is no tensor (`seq(map(int64,tensor(float)))`, as classifiers of scikit-learn have it)
    axes: tuple[int | str | None, ...] | None  # a size, the name of a size, or nothing; None if nothing is known of them

    @classmethod
    def of(cls, declared: Any, *, is_output: bool = False) -> "Slot":
        """What onnxruntime tells of it, which is the same of a scalar and of what it knows nothing of; inputs are told, so it is a scalar.

        Raises WeightsError for tensors that numpy does not have.
        """
        kind: str = declared.type
        if not kind.startswith("tensor("):
            return cls(declared.name, "BYTES", "", None)
        element = kind.removeprefix("tensor(").removesuffix(")")
        if element not in _DTYPES:
            raise WeightsError(f"tensor {declared.name!r} of the ONNX model is {kind}, which numpy does not have; convert it to float16")
        axes = None if is_output and not declared.shape else tuple(size if size != "" else None for size in declared.shape)
        return cls(declared.name, *_DTYPES[element], axes)

    def counts_rows(self) -> bool:
        """Whether its first axis may."""
        return self.axes is None or (len(self.axes) > 0 and (self.axes[0] == 1 or not isinstance(self.axes[0], int)))

    def spec(self, *, by_rows: bool) -> TensorSpec:
        """What `/v2` says of it."""
        return TensorSpec(self.name, self.datatype, (-1, *self.sizes(by_rows=by_rows)))

    def sizes(self, *, by_rows: bool) -> tuple[int, ...]:
        """The shape of one input of the agent, -1 where any size will do."""
        axes = (self.axes or ())[1:] if by_rows else self.axes or ()
        return tuple(size if isinstance(size, int) and size >= 0 else -1 for size in axes)


class Session:
    """The `.onnx` file among the weights, or the one that FUNCTION_ONNX_FILE names, with the files of external data beside it."""

    arrays = True

    def load(self, weights: Weights, device: str) -> None:
        """Make onnxruntime's session. Raises WeightsError, and SettingsError for a choice of file or device that is not there."""
        settings = for_agents()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cpus.threads(settings.threads)
        options.inter_op_num_threads = 1
        self._session: Any = _session(_model_file(weights, settings.onnx_file), options, _providers(device))
        self._given = [Slot.of(found) for found in self._session.get_inputs()]
        self._made = [Slot.of(found, is_output=True) for found in self._session.get_outputs()]
        self._run_options: Any = onnxruntime.RunOptions()
        self._run_options.log_severity_level = 4  # what goes wrong in a call is raised, too
        if odd := next((slot for slot in self._given if not slot.dtype), None):
            raise WeightsError(f"input {odd.name!r} of the ONNX model is no tensor; such models are not supported")
        tensors = [*self._given, *self._made]
        self._by_rows = all(slot.counts_rows() for slot in tensors)
        # With a size of 1, as models exported from one example have it, a row is a call.
        self._shares_calls = self._by_rows and not any(slot.axes and slot.axes[0] == 1 for slot in tensors)
        self._taken: Row | None = None  # a row that the model is known to take
        self._try()
        self.inputs = [slot.spec(by_rows=self._by_rows) for slot in self._given]
        self.outputs = [slot.spec(by_rows=self._by_rows) if slot.dtype else TensorSpec(slot.name, "BYTES", (-1,)) for slot in self._made]

    def _try(self) -> None:
        """See that rows which share a call do not change each other: a model may mix them, whatever its file says of its axes."""
        for rows in _trials(self._given, by_rows=self._by_rows):
            try:
                alone = [self._call([row])[0] for row in rows]
            except Exception:  # noqa: BLE001, S112  random rows may be no input of this model, which says nothing about what callers send
                continue
            self._taken = rows[0]
            if self._shares_calls and not self._are_alike_together(rows, alone):
                self._end_sharing("two rows of the ONNX model together give other outputs than each alone")
            return
        if self._shares_calls:
            self._end_sharing("it could not be tried whether rows of the ONNX model change each other")

    def _are_alike_together(self, rows: Sequence[Row], alone: Sequence[Any]) -> bool:
        try:
            return _are_alike(alone, self._call(rows))
        except Exception:  # noqa: BLE001  it takes one row, and not two
            return False

    def _end_sharing(self, why: str) -> None:
        self._shares_calls = False
        log.warning("%s: each row is a call of its own from now on", why)

    def predict(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The outputs for each input, in arrays: by name where the model has several outputs. Inputs likewise, or as nested lists."""
        rows = [self._row(item) for item in inputs]
        outputs: list[Any] = [None] * len(rows)
        for alike in self._calls(rows):
            for index, output in zip(alike, self._call([rows[index] for index in alike]), strict=True):
                outputs[index] = output
        return outputs

    def size(self, input: Any) -> int:  # noqa: A002  the contract's word
        """Elements, of all tensors."""
        return sum(map(_elements, input.values())) if isinstance(input, dict) else _elements(input)

    def close(self) -> None:
        """Free what onnxruntime has."""
        self._session = None

    def _row(self, item: Any) -> Row:
        """Raises BadInput."""
        names = [slot.name for slot in self._given]
        if not isinstance(item, dict):
            if len(names) != 1:
                raise BadInput(f"each instance must be an object with the inputs {names}, not {_a(item)}")
            item = {names[0]: item}
        if item.keys() != set(names):
            raise BadInput(f"each instance must have the inputs {names}, not {[str(name)[:100] for name in item][:20]}")
        sizes: dict[int | str | None, int] = {}  # of the axes that have names
        row: Row = {}
        for slot in self._given:
            found = row[slot.name] = self._array(slot, item[slot.name])
            for axis, size in zip((slot.axes or ())[self._by_rows :], found.shape, strict=False):
                if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                    raise BadInput(f"input {slot.name!r}: its axis {axis!r} has {size} elements, that of another input {sizes[axis]}")
        return row

    def _array(self, slot: Slot, value: Any) -> Array:
        """Raises BadInput."""
        wanted = slot.sizes(by_rows=self._by_rows)
        try:
            found = value if isinstance(value, np.ndarray) else np.asarray(value, object if slot.dtype == "object" else None)
        except (ValueError, OverflowError):
            found = None
        if found is not None and (slot.axes is None or _is_like(found.shape, wanted)):
            converted = _converted(found, slot.dtype)
            if converted is not None:
                return converted
        shape = "any shape" if slot.axes is None else f"shape {list(wanted)}"
        if found is None:
            has = "lists of different lengths"
        elif slot.axes is None or _is_like(found.shape, wanted):
            has = _what(found)
        else:
            has = f"shape {list(found.shape)}"
        raise BadInput(f"input {slot.name!r} must be {slot.datatype} of {shape} in each instance, not {has}")

    def _calls(self, rows: Sequence[Row]) -> Iterator[Sequence[int]]:
        """Which rows share a call."""
        if not self._shares_calls:
            yield from ([index] for index in range(len(rows)))
            return
        alike: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for index, row in enumerate(rows):
            alike.setdefault(tuple(array.shape for array in row.values()), []).append(index)
        yield from alike.values()

    def _call(self, rows: Sequence[Row]) -> list[Any]:
        """One call of onnxruntime; an output for each row. Raises BadInput for values that the model refuses."""
        feeds = {name: self._joined([row[name] for row in rows]) for name in rows[0]}
        try:
            found = self._session.run(None, feeds, self._run_options)
        except onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument as error:
            raise BadInput(f"the model refuses this: {bounded(str(error), 300)}") from error
        except (onnxruntime.capi.onnxruntime_pybind11_state.Fail, onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException) as error:
            if not self._still_works():
                raise
            raise BadInput(f"the model fails on this, and not on other values: {bounded(str(error), 300)}") from error
        if len(rows) > 1 and not all(_counts(output, len(rows)) for output in found):
            # The file has it that the first axis counts rows, and the model computes something else.
            self._end_sharing("the outputs of the ONNX model do not have a row for each of its inputs")
            return [self._call([row])[0] for row in rows]
        parts = [self._parts(slot, output, len(rows)) for slot, output in zip(self._made, found, strict=True)]
        if len(parts) == 1:
            return parts[0]
        names = [slot.name for slot in self._made]
        return [dict(zip(names, row, strict=True)) for row in zip(*parts, strict=True)]

    def _still_works(self) -> bool:
        """Whether the model takes what it took before, so that a failure is of the values and not of the model or its device."""
        if self._taken is None:
            return False
        try:
            self._session.run(None, {name: self._joined([array]) for name, array in self._taken.items()}, self._run_options)
        except Exception:  # noqa: BLE001  whatever it is, it is not for these values
            return False
        return True

    def _joined(self, arrays: Sequence[Array]) -> Array:
        if not self._by_rows:
            return arrays[0]
        return arrays[0][None] if len(arrays) == 1 else np.stack(arrays)

    def _parts(self, slot: Slot, output: Any, count: int) -> list[Any]:
        """An output's rows. Raises ValueError if the model gives another number of them."""
        if not self._by_rows or (count == 1 and slot.axes is None and slot.dtype and not _counts(output, 1)):
            return [_plain(output)]
        if not _counts(output, count):
            shape = getattr(output, "shape", type(output).__name__)
            raise ValueError(
                f"output {slot.name!r} has shape {shape} for {count} rows: give its first axis a fixed size in the model's file"
            )
        return list(_plain(output))


def _model_file(weights: Weights, wanted: str | None) -> Path:
    """Where the model is, with all that lies beside it. Raises WeightsError, SettingsError."""
    if wanted:
        folder, _, name = wanted.rpartition("/")
        path = (weights.folder(folder) if folder else weights).directory() / name
        if not path.is_file():
            raise SettingsError(f"FUNCTION_ONNX_FILE={wanted!r}: there is no such file; there are {_listed(path.parent)}")
        return path
    root = weights.directory()
    found = sorted(root.rglob("*.onnx"))
    if not found:
        raise WeightsError(f"there is no .onnx file among the weights; there are {_listed(root, '*')}")
    if len(found) > 1:
        raise SettingsError(f"there are several models, name one in FUNCTION_ONNX_FILE: {_listed(root)}")
    return found[0]


def _session(file: Path, options: Any, providers: list[Any]) -> Any:
    """Raises WeightsError for a model that this onnxruntime cannot run, SettingsError if it would run it elsewhere than it was told."""
    try:
        session = onnxruntime.InferenceSession(file, sess_options=options, providers=providers)
    except Exception as error:  # of a class for each kind of failure, without a base of their own
        raise WeightsError(f"onnxruntime {onnxruntime.__version__} cannot load {file.name}: {bounded(str(error), 500)}") from error
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if wanted not in session.get_providers():  # it takes the processor then, and only warns
        raise SettingsError(f"onnxruntime cannot use {wanted}: its libraries (CUDA, cuDNN) are missing or do not fit; it says above which")
    return session


def external_files(file: Path) -> list[Path]:
    """Those beside a model that hold its tensors, as `torch.onnx.export` makes them, which the model names. Raises OSError for no file."""
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
        named = {data[found.end() : found.end() + found[1][0]] for found in _LOCATION.finditer(data)}
    root = file.parent.resolve()
    paths = {(root / name.decode(errors="replace")).resolve() for name in named}
    return sorted(path.relative_to(root) for path in paths if path.is_relative_to(root) and path.is_file())


def _trials(given: Sequence[Slot], *, by_rows: bool) -> Iterator[list[Row]]:
    """Pairs of random rows, one of which the model may take; what is a mask is of ones."""
    draw = np.random.default_rng(0)
    for size, high in itertools.product(_TRIED_SIZES, _TRIED_HIGHS):
        shapes = {slot.name: [size if axis == -1 else axis for axis in slot.sizes(by_rows=by_rows)] for slot in given}
        if sum(map(math.prod, shapes.values())) > _MOST_TRIED:
            continue
        rows = [{slot.name: _random(slot, shapes[slot.name], high, draw) for slot in given} for _ in range(2)]
        if any(not np.array_equal(rows[0][name], rows[1][name]) for name in shapes):
            yield rows


def _random(slot: Slot, shape: Sequence[int], high: int, draw: np.random.Generator) -> Array:
    if slot.dtype == "object":
        return draw.choice(np.array(["a", "b", "the", "good", "bad", "1", "2"], object), shape)
    if "mask" in slot.name.lower():
        return np.ones(shape, slot.dtype)
    kind = np.dtype(slot.dtype).kind
    return np.asarray(draw.standard_normal(shape) if kind == "f" else draw.integers(0, 2 if kind == "b" else high, shape)).astype(
        slot.dtype
    )


def _are_alike(one: Any, other: Any) -> bool:
    """Whether outputs are the same but for rounding."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_are_alike(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(_are_alike, one, other))
    this, that = np.asarray(one), np.asarray(other)
    if this.dtype.kind != "f" or this.shape != that.shape:
        return np.array_equal(this, that)
    tolerance = _TOLERANCE_16 if this.dtype.itemsize == 2 else _TOLERANCE
    largest = float(np.max(np.abs(this, where=np.isfinite(this), out=np.zeros_like(this)), initial=0))
    return np.allclose(this.astype("float64"), that.astype("float64"), tolerance, tolerance * largest, equal_nan=True)


def _listed(root: Path, pattern: str = "*.onnx") -> str:
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob(pattern) if path.is_file())
    return (", ".join(names[:20]) + (", …" if names[20:] else "")) or "none"


def _providers(device: str) -> list[Any]:
    """onnxruntime's word for a device. Raises SettingsError."""
    kind, _, number = device.partition(":")
    if kind == "cpu":
        return ["CPUExecutionProvider"]
    there = onnxruntime.get_available_providers()
    if kind != "cuda" or "CUDAExecutionProvider" not in there:
        raise SettingsError(
            f"FUNCTION_DEVICE={device!r}: this onnxruntime computes with {', '.join(there)} only; install onnxruntime-gpu in place of "
            "onnxruntime for cuda, or set FUNCTION_DEVICE=cpu"
        )
    return [("CUDAExecutionProvider", {"device_id": int(number or 0)}), "CPUExecutionProvider"]


def _is_like(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, size) for size, want in zip(shape, wanted, strict=True))


def _converted(found: Array, dtype: str) -> Array | None:
    """The same values in a dtype; None if they are no such. Whole numbers may become real, nothing else."""
    if found.dtype == dtype and dtype != "object":
        return found
    if dtype == "object":
        is_text = all(isinstance(text, str) for text in found.flat)
        return found.astype(object) if is_text else None
    wanted = np.dtype(dtype)
    if found.size and found.dtype.kind not in _KINDS[wanted.kind]:
        return None
    with np.errstate(all="ignore"):
        converted = found.astype(wanted)
    is_same = np.isfinite(converted) | ~np.isfinite(found) if wanted.kind == "f" else converted == found
    return converted if np.all(is_same) else None


def _counts(output: Any, rows: int) -> bool:
    """Whether an output has as many rows."""
    return len(output) == rows if isinstance(output, list) or np.ndim(output) else False


def _plain(output: Any) -> Any:
    """Texts as Python's, which the protocols write; numbers as they are."""
    return output.tolist() if isinstance(output, np.ndarray) and output.dtype.kind in "OUS" else output


def _elements(value: Any) -> int:
    """Of nested lists as many as there are if all are as long as the first."""
    count = 1
    while isinstance(value, list) and value:
        count, value = count * len(value), value[0]
    return count * int(np.size(value)) if isinstance(value, np.ndarray) else count


def _what(found: Array) -> str:
    """What its values are, which do not become what is wanted."""
    if found.dtype.kind in "OUS":
        kinds = {str: "texts", bytes: "bytes", type(None): "null", dict: "objects"}
        return " and ".join(sorted({kinds.get(type(one), type(one).__name__) for one in found.ravel().tolist()})) or "nothing"
    return next((ours for ours, numpys in _DTYPES.values() if found.dtype == numpys), str(found.dtype))


def _a(value: Any) -> str:
    return "a list" if isinstance(value, list) else f"a {type(value).__name__}"
