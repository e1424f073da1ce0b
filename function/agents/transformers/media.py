"""Tasks of images and of speech, which come as bytes.

A small body may hold a huge image or recording. How large it is, is looked at before it is decoded.
"""

import importlib.util
import io
import shutil
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from function.agent import BadInput
from function.agents.transformers import loading
from function.agents.transformers.parameters import GENERATION, TEXT, Parameter, number, one_of, whole
from function.agents.transformers.rows import MOST_ROWS, Forward, Row
from function.agents.transformers.tasks import SCORES, kind_of, refusing
from function.bodies import memory_limit
from weights_cache.environment import SettingsError

_BASE64 = '{"b64": …} with its bytes in base64'

MOST_PIXELS = 50_000_000  # of the images of a batch together
MOST_RATIO = 64  # of an image's sides: many a model has the shorter one brought to a size of its own, and the longer one with it
_PIXEL_BYTES = 16  # that a pixel takes until the image has the model's size
_IMAGES = ("PNG", "JPEG", "MPO", "GIF", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "PPM", "JPEG2000")  # Pillow runs a program for others
_DRAFTS = (2, 4, 8)  # by which a JPEG can be made smaller while it is decoded


class ImageClassification:
    """Labels and their scores, the best first."""

    parameters: Mapping[str, Parameter] = {"top_k": whole(1), "function_to_apply": SCORES}
    media_types: tuple[str, ...] = ("image/*",)

    def __init__(self, task: str, model: Any, weights: Any) -> None:
        transformers = loading.library()
        with loading.explained("image-classification"):
            import PIL.Image
        PIL.Image.init()
        self._images = PIL.Image
        self._formats = [name for name in _IMAGES if name in PIL.Image.OPEN]
        self._most = _most(MOST_PIXELS, _PIXEL_BYTES)
        processor = loading.load_image_processor(weights)
        with loading.explained(f"the pipeline {task!r}"):
            self._pipe = transformers.pipeline(task, model=model, image_processor=processor, device=model.device)
        self._forward = Forward(model, None, ("logits",), is_by_token=False)

    def predict(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[Any]:
        """One answer for each image, from one forward pass. Raises BadInput."""
        rows, left = [], self._most
        for one in inputs:
            row, pixels = self._row(one, left)
            rows.append(row)
            left -= pixels
        numbers = self._forward.run(rows)
        options = self._pipe._sanitize_parameters(**parameters)[2]  # noqa: SLF001  its own way from names to steps
        return [self._pipe.postprocess(one, **options) for one in numbers]

    def size(self, input: Any) -> float:  # noqa: A002  the contract's word
        """All are brought to one size."""
        return 1

    def warm_up(self) -> None:
        """A grey image."""
        image = io.BytesIO()
        self._images.new("RGB", (32, 32), "grey").save(image, "PNG")
        self.predict([image.getvalue()], {})

    def _row(self, one: Any, left: int) -> tuple[Row, int]:
        """What the model gets of an image, and its pixels. left: of those that the batch may have. Raises BadInput."""
        if not isinstance(one, bytes):
            raise BadInput(f"each input must be an image: its bytes as the body, with its Content-Type, or {_BASE64}; not {kind_of(one)}")
        try:
            with warnings.catch_warnings():  # Pillow's own bound, which is another
                warnings.simplefilter("ignore")
                image = self._images.open(io.BytesIO(one), formats=self._formats)
                self._fit(image, left)
                image.load()
                return Row(dict(self._pipe.preprocess(image))), image.width * image.height
        except (BadInput, MemoryError):
            raise
        except self._images.UnidentifiedImageError as error:
            raise BadInput(f"the image cannot be used: it is none that can be read here ({', '.join(self._formats)})") from error
        except Exception as error:  # a broken file has Pillow raise anything
            said = loading.first_line(error) or type(error).__name__
            raise BadInput(f"the image cannot be used: {said:.300}") from error

    def _fit(self, image: Any, left: int) -> None:
        """Have a JPEG that is too large decoded smaller. Raises BadInput for others, before they are decoded."""
        width, height = image.size
        if max(width, height) > MOST_RATIO * min(width, height):
            raise BadInput(f"the image has {width} × {height} pixels: the longer side may be {MOST_RATIO} times the shorter one at most")
        if width * height > self._most and image.format == "JPEG" and not image.info.get("progressive"):  # which is held in full
            scale = next((scale for scale in _DRAFTS if width * height <= self._most * scale**2), _DRAFTS[-1])
            image.draft(None, (width // scale, height // scale))
        if (pixels := image.width * image.height) > left:
            others = f", and those before it {self._most - left}" if left < self._most else ""
            raise BadInput(f"the image has {pixels} pixels ({image.width} × {image.height}){others}; together they may have {self._most}")


SHORTEST_S = 0.025  # of a recording: what the first layers of the usual models look at
LONGEST_S = 3600  # of a recording, all of its channels together
LONGEST_PASS_S = 120  # that one pass takes of it: attention costs the square of it
_SAMPLE_BYTES = 16  # that a sample takes with what is made of it
_BLOCK = 1 << 18  # samples that are read at once
_UNKNOWN = 1 << 62  # frames of a file that does not say how many it has
_SPEECH = {
    "return_timestamps": Parameter(
        'true, false, "word" or "char"', lambda value: type(value) is bool or (type(value) is str and value in ("word", "char"))
    ),
    "chunk_length_s": number(1, LONGEST_PASS_S),
    "stride_length_s": number(0, LONGEST_PASS_S),
}
_GENERATING = {  # of models that make the text token by token, such as Whisper
    "language": TEXT,
    "task": one_of("transcribe", "translate"),
    **{name: GENERATION[name] for name in ("max_new_tokens", "num_beams", "do_sample", "temperature")},
}


class SpeechRecognition:
    """{"text": …}, or with `return_timestamps` also "chunks". One recording at a time, as each takes as long as it is."""

    media_types: tuple[str, ...] = ("audio/*", "video/*")

    def __init__(self, task: str, model: Any, weights: Any) -> None:
        transformers = loading.library()
        self._has_soundfile = importlib.util.find_spec("soundfile") is not None
        self._has_ffmpeg = shutil.which("ffmpeg") is not None
        if not self._has_soundfile and not self._has_ffmpeg:
            raise SettingsError(f"{task} needs the package soundfile (pip install soundfile) or the program ffmpeg, to read recordings")
        self.parameters: Mapping[str, Parameter] = _SPEECH | (_GENERATING if model.can_generate() else {})
        tokenizer, extractor = loading.load_tokenizer(weights), loading.load_feature_extractor(weights)
        self._rate = extractor.sampling_rate
        self._most = _most(LONGEST_S * self._rate, _SAMPLE_BYTES)
        self._windows = model.can_generate()  # Whisper's kind cuts by itself what is long
        with loading.explained(f"the pipeline {task!r}"):
            self._pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer, feature_extractor=extractor, device=model.device)

    def predict(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[Any]:
        """The text of each recording. Raises BadInput."""
        own = {name: parameters[name] for name in _SPEECH if name in parameters}
        generation = {name: value for name, value in parameters.items() if name not in own}
        if generation:
            own["generate_kwargs"] = generation
        recordings, total = [], 0
        for one in inputs:
            recordings.append(self._samples(one))
            total += len(recordings[-1])
            self._check_pieces(len(recordings[-1]) / self._rate, parameters)
            if total > self._most:
                raise BadInput(f"the recordings have more than {self._most} samples together: send fewer at once")
        with refusing():
            return [self._pipe({"raw": samples, "sampling_rate": self._rate}, **own) for samples in recordings]

    def size(self, input: Any) -> float:  # noqa: A002  the contract's word
        """In bytes."""
        return len(input) if isinstance(input, bytes) else 1

    def warm_up(self) -> None:
        """A quarter of a second of silence."""
        self._pipe({"raw": np.zeros(self._rate // 4, np.float32), "sampling_rate": self._rate})

    def _samples(self, one: Any) -> Any:
        """float32 [n], at the rate that the model takes. Raises BadInput."""
        samples = self._read(one) if isinstance(one, bytes) else self._given(one)
        if len(samples) < SHORTEST_S * self._rate:
            raise BadInput(f"the recording is shorter than {SHORTEST_S:g} s")
        return samples

    def _check_pieces(self, seconds: float, parameters: Mapping[str, Any]) -> None:
        """Raises BadInput for a recording that is too long for one pass, or would be cut into too many."""
        chunk, stride = parameters.get("chunk_length_s"), parameters.get("stride_length_s")
        if chunk is None:
            if stride is not None:
                raise BadInput("'stride_length_s' is what pieces share, and wants 'chunk_length_s', how long they are")
            if seconds > LONGEST_PASS_S and not self._windows:
                which = f"{seconds:.0f} s long, and one pass takes {LONGEST_PASS_S}"
                raise BadInput(f"the recording is {which}: have it cut with the parameter 'chunk_length_s', such as 30")
            return
        if stride is not None and 4 * stride > chunk:
            raise BadInput(f"'stride_length_s' may be a quarter of 'chunk_length_s' at most, {chunk / 4:g}: it is shared on both sides")
        pieces = seconds / (chunk - 2 * (chunk / 6 if stride is None else stride))
        if pieces > MOST_ROWS:
            raise BadInput(f"the recording makes {pieces:.0f} pieces of {chunk:g} s, and may make {MOST_ROWS}: ask for longer ones")

    def _given(self, one: Any) -> Any:
        if isinstance(one, Mapping) and set(one) == {"raw", "sampling_rate"}:
            if type(one["sampling_rate"]) not in (int, float) or one["sampling_rate"] != self._rate:
                raise BadInput(f'"sampling_rate" must be {self._rate}, as the model takes it')
            if (samples := self._numbers(one["raw"])) is not None:
                return samples
        wants = f'its bytes as the body, with its Content-Type, or {_BASE64}, or {{"raw": [numbers], "sampling_rate": {self._rate}}}'
        raise BadInput(f"each input must be a recording: {wants}")

    def _numbers(self, raw: Any) -> Any:
        """float32 [n]; None for what is no list of numbers that float32 has."""
        if not isinstance(raw, list) or not all(type(one) in (int, float) for one in raw):
            return None
        self._check_length(len(raw), 1)
        with np.errstate(over="ignore"):
            try:
                samples = np.array(raw, np.float64).astype(np.float32)
            except OverflowError:
                return None
        return samples if np.isfinite(samples).all() else None

    def _check_length(self, frames: int, channels: int) -> None:
        if frames * channels > self._most:
            of = f" of {channels} channels" if channels > 1 else ""
            raise BadInput(
                f"the recording has {frames * channels} samples{of}, and may have {self._most}: send it in parts, or in one channel"
            )

    def _read(self, data: bytes) -> Any:
        if self._has_soundfile and (found := self._read_here(data)) is not None:
            return found
        if not self._has_ffmpeg:
            raise BadInput("soundfile cannot read the recording, and the image has no ffmpeg for other formats; send WAV, FLAC, OGG or MP3")
        # A sample more than there may be says that there are too many.
        words = f"ffmpeg -hide_banner -loglevel quiet -i pipe:0 -ac 1 -ar {self._rate} -f f32le -fs {4 * (self._most + 1)} pipe:1".split()
        made = subprocess.run(words, input=data, stdout=subprocess.PIPE, check=False).stdout
        samples = np.frombuffer(made, np.float32, len(made) // 4)
        if not len(samples):
            raise BadInput("ffmpeg can read nothing of the recording")
        self._check_length(len(samples), 1)
        return samples

    def _read_here(self, data: bytes) -> Any:
        """By soundfile; None for what ffmpeg has to read."""
        import soundfile

        try:
            with soundfile.SoundFile(io.BytesIO(data)) as file:
                if file.samplerate == self._rate:
                    return self._mixed(file)
                rate = file.samplerate
        except soundfile.SoundFileError:
            return None
        if self._has_ffmpeg:
            return None
        raise BadInput(
            f"the recording has {rate} samples a second, the model takes {self._rate}: send it so, or put ffmpeg into the function's image"
        )

    def _mixed(self, file: Any) -> Any:
        """The mean of its channels, block by block: what its head says of its length may be wrong."""
        if file.frames < _UNKNOWN:
            self._check_length(file.frames, file.channels)
        blocks = [np.zeros(0, np.float32)]
        frames, size = 0, max(1, _BLOCK // file.channels)
        while len(block := file.read(size, dtype="float32", always_2d=True)):
            frames += len(block)
            self._check_length(frames, file.channels)
            blocks.append(block.mean(axis=1))
        return np.concatenate(blocks)


def _most(upper: int, each_bytes: int) -> int:
    """How many there may be: a quarter of the container's memory, and no more than `upper`."""
    limit = memory_limit()
    return upper if limit is None else min(upper, limit // 4 // each_bytes)
