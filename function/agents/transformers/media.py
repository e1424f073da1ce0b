"""Tasks of images and of speech, which come as bytes."""

import importlib.util
import io
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from function.agent import BadInput
from function.agents.transformers import loading
from function.agents.transformers.parameters import GENERATION, TEXT, Parameter, number, one_of, whole
from function.agents.transformers.rows import Forward, Row
from function.agents.transformers.tasks import SCORES, kind_of, refusing
from weights_cache.environment import SettingsError

_BASE64 = '{"b64": …} with its bytes in base64'


class ImageClassification:
    """Labels and their scores, the best first."""

    parameters: Mapping[str, Parameter] = {"top_k": whole(1), "function_to_apply": SCORES}
    media_types: tuple[str, ...] = ("image/*",)

    def __init__(self, task: str, model: Any, weights: Any) -> None:
        transformers = loading.library()
        with loading.explained("image-classification"):
            import PIL.Image
        self._images = PIL.Image
        processor = loading.load_image_processor(weights)
        with loading.explained(f"the pipeline {task!r}"):
            self._pipe = transformers.pipeline(task, model=model, image_processor=processor, device=model.device)
        self._forward = Forward(model, None, ("logits",), is_by_token=False)

    def predict(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[Any]:
        """One answer for each image, from one forward pass. Raises BadInput."""
        numbers = self._forward.run([self._row(one) for one in inputs])
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

    def _row(self, one: Any) -> Row:
        if not isinstance(one, bytes):
            raise BadInput(f"each input must be an image: its bytes as the body, with its Content-Type, or {_BASE64}; not {kind_of(one)}")
        try:
            image = self._images.open(io.BytesIO(one))
            image.load()
        except (OSError, SyntaxError, ValueError, self._images.DecompressionBombError) as error:
            said = "it is no image that Pillow can read" if isinstance(error, self._images.UnidentifiedImageError) else str(error)
            raise BadInput(f"the image cannot be used: {said}") from error
        return Row(dict(self._pipe.preprocess(image)))


SHORTEST_S = 0.025  # of a recording: what the first layers of the usual models look at
_SPEECH = {
    "return_timestamps": Parameter(
        'true, false, "word" or "char"', lambda value: type(value) is bool or (type(value) is str and value in ("word", "char"))
    ),
    "chunk_length_s": number(1, 3600),
    "stride_length_s": number(0, 3600),
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
        with loading.explained(f"the pipeline {task!r}"):
            self._pipe = transformers.pipeline(task, model=model, tokenizer=tokenizer, feature_extractor=extractor, device=model.device)

    def predict(self, inputs: Sequence[Any], parameters: Mapping[str, Any]) -> list[Any]:
        """The text of each recording. Raises BadInput."""
        own = {name: parameters[name] for name in _SPEECH if name in parameters}
        generation = {name: value for name, value in parameters.items() if name not in own}
        if generation:
            own["generate_kwargs"] = generation
        recordings = [self._samples(one) for one in inputs]
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

    def _given(self, one: Any) -> Any:
        if isinstance(one, Mapping) and set(one) == {"raw", "sampling_rate"}:
            if one["sampling_rate"] != self._rate:
                raise BadInput(f'"sampling_rate" must be {self._rate}, as the model takes it')
            with suppress(TypeError, ValueError):
                samples = np.asarray(one["raw"], np.float32)
                if samples.ndim == 1:
                    return samples
        wants = f'its bytes as the body, with its Content-Type, or {_BASE64}, or {{"raw": [numbers], "sampling_rate": {self._rate}}}'
        raise BadInput(f"each input must be a recording: {wants}")

    def _read(self, data: bytes) -> Any:
        if self._has_soundfile and (found := self._read_here(data)) is not None:
            return found
        if not self._has_ffmpeg:
            raise BadInput("soundfile cannot read the recording, and the image has no ffmpeg for other formats; send WAV, FLAC, OGG or MP3")
        from transformers.pipelines.audio_utils import ffmpeg_read

        with refusing():
            return ffmpeg_read(data, self._rate)

    def _read_here(self, data: bytes) -> Any:
        """By soundfile; None for what ffmpeg has to read."""
        import soundfile

        try:
            samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
        except soundfile.SoundFileError:
            return None
        if rate == self._rate:
            return samples.mean(axis=1)
        if self._has_ffmpeg:
            return None
        raise BadInput(
            f"the recording has {rate} samples a second, the model takes {self._rate}: send it so, or put ffmpeg into the function's image"
        )
