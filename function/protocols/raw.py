"""Bodies that are an input as they are, for an agent that says which types it takes (`media_types`): an image, a sound, a form of files."""

import io
from fnmatch import fnmatchcase
from typing import IO

import flask
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import FormDataParser

from function.errors import BadInput
from function.http import JSON, Function, PredictRequest

FORM = "multipart/form-data"


def of_body(function: Function) -> PredictRequest | None:
    """What the body asks: one input of bytes, or one for each file of a form, whose other fields are parameters; None if it is neither.

    Raises BadInput, and what Function.body does.
    """
    kind, taken = flask.request.mimetype, function.model.traits.media_types
    if kind == JSON or not taken:
        return None
    if kind == FORM:
        return _of_form(function)
    return PredictRequest([function.body()], is_bare=True) if _is_taken(kind, taken) else None


def _is_taken(kind: str, taken: tuple[str, ...]) -> bool:
    return any(fnmatchcase(kind, pattern) for pattern in taken)


def _in_memory(
    total_content_length: int | None, content_type: str | None, filename: str | None, content_length: int | None = None
) -> IO[bytes]:
    """Where a file of a form is kept."""
    return io.BytesIO()


def _of_form(function: Function) -> PredictRequest:
    request, limit = flask.request, function.settings.max_inputs
    body = function.body()
    parser = FormDataParser(
        stream_factory=_in_memory,  # the body is bounded, and in memory already
        max_form_memory_size=len(body),
        max_form_parts=2 * limit,
        silent=False,
    )
    try:
        _, fields, files = parser.parse(io.BytesIO(body), FORM, len(body), request.mimetype_params)
    except RequestEntityTooLarge:
        raise BadInput(f"the form has more than {2 * limit} parts; at most {limit} inputs are taken (FUNCTION_MAX_INPUTS)") from None
    except ValueError as error:
        raise BadInput(f"the body is no form: {error!s:.200}") from None
    found = [(file, file.stream.read()) for _, file in files.items(multi=True)]
    found = [(file, content) for file, content in found if file.filename or content]  # the others are fields where no file was chosen
    if not found:
        raise BadInput("the form has no file; each file is an input")
    taken = function.model.traits.media_types
    if odd := next((file for file, _ in found if not _is_taken(file.mimetype or "application/octet-stream", taken)), None):
        raise BadInput(f"a file of type {odd.mimetype!r:.100} is not taken; this model takes {', '.join(taken)}")
    inputs = [content for _, content in found]
    # What comes more than once is a list of what it says.
    said = {name: texts[0] if len(texts) == 1 else texts for name, texts in fields.lists()}
    return PredictRequest(inputs, is_bare=len(inputs) == 1, parameters=said or None)
