"""OpenAI's chat requests as BLIP-2 can answer them.

BLIP-2 is no chat model: it reads a picture and `Question: … Answer:`. The last user message is the
question, earlier ones about the same picture and their answers stand before it; without a text it is
asked for a caption. What a request says that would change the answer, and cannot be had, is refused;
other fields are ignored, as clients send many.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import json
import math
import secrets
from typing import Any, NoReturn

from blip2.serving.engine import Question
from blip2.serving.errors import Refusal

MAX_CHOICES = 16
MAX_MESSAGES = 256
MAX_STOPS, MAX_STOP_LETTERS = 4, 64
MAX_TEXT = 20_000  # letters of one message
_MAX_PARTS = 100_000  # commas and brackets in a body; base64 has none
_MAX_SEED = 2**63 - 1
_MAX_TOP_K = 1 << 20
_MAX_TOKENS = 1 << 20  # that may be asked for; answers end earlier


@dataclasses.dataclass(frozen=True)
class Bounds:
    """What a server lets requests ask for."""

    model: str
    max_beams: int
    max_output_len: int
    takes_urls: bool


@dataclasses.dataclass(frozen=True)
class ChatRequest:
    """A request that can be answered.

    Attributes:
        question: what is asked, and how to decode.
        picture: the file's content, or the URL where it is to be had.
        choices: answers asked for.
        streams: whether pieces are sent as they are made.
        reports_usage: whether a stream ends with the counts of tokens.
    """

    question: Question
    picture: bytes | str
    choices: int = 1
    streams: bool = False
    reports_usage: bool = False

    @property
    def rows(self) -> int:
        """Of the engine's cache, that all choices take together."""
        beams = self.question.options["num_beams"]
        return beams if beams > 1 else self.choices


def parse(body: bytes, bounds: Bounds) -> ChatRequest:
    """Read a request's body.

    Raises:
        Refusal: it is not one that can be answered.
    """
    if sum(map(body.count, (b",", b"[", b"{"))) > _MAX_PARTS:
        raise Refusal(
            400, "the body has too many parts"
        )  # each would take far more memory than here
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise Refusal(400, "the body is not valid JSON in UTF-8") from None
    if not isinstance(fields, dict):
        raise Refusal(400, "the body is not a JSON object")
    _check_model(fields, bounds.model)
    _refuse_unsupported(fields)
    streams = _boolean(fields, "stream")
    choices = _integer(fields, "n", 1, MAX_CHOICES) or 1
    options = _options(fields, bounds)
    if 1 < options["num_beams"] < choices:
        _refuse("n", f"n is {choices}, and there are only {options['num_beams']} beams")
    question, picture = _read_messages(fields.get("messages"), bounds)
    question = dataclasses.replace(question, options=options, stop=_stops(fields))
    question = dataclasses.replace(
        question, max_txt_len=_integer(fields, "max_txt_len", 1, _MAX_TOKENS)
    )
    if (template := fields.get("prompt_template")) is not None:
        question = dataclasses.replace(question, template=_template(template))
    return ChatRequest(question, picture, choices, streams, _reports_usage(fields, streams))


def _refuse(param: str, message: str, code: str | None = None) -> NoReturn:
    raise Refusal(400, message, param=param, code=code)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)  # NaN and Infinity are not JSON


def _check_model(fields: dict[str, Any], model: str) -> None:
    asked = fields.get("model", model)
    if not isinstance(asked, str):
        _refuse("model", "model is not a string")
    if asked != model:
        raise Refusal(
            404,
            f"this server has no such model, only {model!r}",
            param="model",
            code="model_not_found",
        )


def _refuse_unsupported(fields: dict[str, Any]) -> None:
    """What would change the answer, and BLIP-2 or this server has not."""
    for name in ("tools", "functions", "logit_bias", "logprobs", "top_logprobs", "audio"):
        if fields.get(name):
            _refuse(name, f"{name} is not supported; leave it out", "unsupported_parameter")
    for name in ("presence_penalty", "frequency_penalty"):
        if fields.get(name):
            _refuse(
                name, f"{name} is not supported; use repetition_penalty", "unsupported_parameter"
            )
    form = fields.get("response_format")
    if form is not None and (not isinstance(form, dict) or form.get("type") != "text"):
        _refuse("response_format", "answers are text alone", "unsupported_parameter")


def _options(fields: dict[str, Any], bounds: Bounds) -> dict[str, Any]:
    """Fields of GenerationOptions. A temperature of 0 is greedy, as is a request that names none."""
    asked = [
        _integer(fields, name, 1, _MAX_TOKENS) for name in ("max_completion_tokens", "max_tokens")
    ]
    longest = asked[0] or asked[1] or bounds.max_output_len
    options: dict[str, Any] = {
        "max_output_len": min(longest, bounds.max_output_len),
        "num_beams": _integer(fields, "num_beams", 1, bounds.max_beams) or 1,
    }
    for name, low, high in (
        ("length_penalty", -10.0, 10.0),
        ("repetition_penalty", 0.01, 100.0),
    ):
        if (value := _number(fields, name, low, high)) is not None:
            options[name] = value
    temperature = _number(fields, "temperature", 0, 100)
    top_p = _number(fields, "top_p", 0, 1)
    top_k = _integer(fields, "top_k", 0, _MAX_TOP_K)
    seed = _integer(fields, "seed", 0, _MAX_SEED)
    if top_p == 0:
        _refuse("top_p", "top_p is 0; give a number above 0 and at most 1")
    # Clients send top_p 1 as a matter of course.
    names_sampling = top_k is not None or top_p not in (None, 1)
    if temperature == 0 or (temperature is None and not names_sampling):
        return options
    if options["num_beams"] > 1:
        _refuse("num_beams", "beam search and sampling exclude each other; set temperature to 0")
    options |= {"temperature": max(temperature or 1.0, 1e-3), "top_k": top_k or 0}
    if top_p is not None:
        options["top_p"] = top_p
    return {**options, "seed": secrets.randbelow(_MAX_SEED) if seed is None else seed}


def _integer(fields: dict[str, Any], name: str, low: int, high: int) -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= high:
        _refuse(name, f"{name} must be a whole number from {low} to {high}")
    return value


def _number(fields: dict[str, Any], name: str, low: float, high: float) -> float | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) not in (int, float) or not low <= value <= high or math.isnan(value):
        _refuse(name, f"{name} must be a number from {low:g} to {high:g}")
    return float(value)


def _boolean(fields: dict[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        _refuse(name, f"{name} must be true or false")
    return bool(value)


def _reports_usage(fields: dict[str, Any], streams: bool) -> bool:
    options = fields.get("stream_options")
    if options is None:
        return False
    if not streams:
        _refuse("stream_options", "stream_options goes with stream")
    if not isinstance(options, dict):
        _refuse("stream_options", "stream_options must be an object")
    return _boolean(options, "include_usage")


def _stops(fields: dict[str, Any]) -> tuple[str, ...]:
    stops = fields.get("stop")
    if stops is None:
        return ()
    if isinstance(stops, str):
        stops = [stops]
    if (
        not isinstance(stops, list)
        or len(stops) > MAX_STOPS
        or not all(isinstance(stop, str) and 0 < len(stop) <= MAX_STOP_LETTERS for stop in stops)
    ):
        _refuse(
            "stop",
            f"stop must be at most {MAX_STOPS} texts of 1 to {MAX_STOP_LETTERS} letters",
        )
    return tuple(stops)


def _template(template: object) -> str:
    if not isinstance(template, str) or len(template) > MAX_TEXT or template.count("{}") != 1:
        _refuse("prompt_template", "prompt_template must be a text with one {} in it")
    return template


@dataclasses.dataclass(frozen=True)
class _Message:
    role: str
    text: str
    pictures: list[str]


def _read_messages(messages: object, bounds: Bounds) -> tuple[Question, bytes | str]:
    """The question with the turns before it, and the picture that it is about."""
    if not isinstance(messages, list) or not messages:
        _refuse("messages", "messages must be a list with a picture and a question in it")
    if len(messages) > MAX_MESSAGES:
        _refuse("messages", f"there are more than {MAX_MESSAGES} messages")
    read = [_read_message(message) for message in messages]
    # BLIP-2 has no place for what a system message says.
    read = [message for message in read if message.role in ("user", "assistant")]
    if not read or read[-1].role != "user":
        _refuse("messages", "the last message must be the user's")
    shown = [at for at, message in enumerate(read) if message.pictures]
    if not shown:
        _refuse("messages", "there is no picture: add an image_url to the user's message")
    conversation = read[shown[-1] :]
    [url, *more] = conversation[0].pictures
    if more:
        _refuse("messages", "there are several pictures in one message; BLIP-2 looks at one")
    turns, asked = [], None
    for message in conversation[:-1]:
        if message.role == "user":
            asked = message.text
        elif asked is not None:
            turns.append((asked, message.text))
            asked = None
    return Question(conversation[-1].text, tuple(turns)), _picture(url, bounds)


def _read_message(message: object) -> _Message:
    if not isinstance(message, dict):
        _refuse("messages", "a message must be an object")
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system", "developer", "tool", "function"):
        _refuse("messages", "a message's role must be user, assistant or system")
    texts, pictures = [], []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if parts is None and role == "assistant":
        parts = []
    if not isinstance(parts, list) or len(parts) > MAX_MESSAGES:
        _refuse("messages", "a message's content must be a text or a list of parts")
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind == "image_url" and role == "user":
            image_url = part.get("image_url")
            url = image_url.get("url") if isinstance(image_url, dict) else None
            if not isinstance(url, str):
                _refuse("messages", "an image_url must be an object with a url")
            pictures.append(url)
        elif role in ("user", "assistant"):
            _refuse("messages", "a part of a message must be a text or, of the user, an image_url")
    text = "\n".join(texts)
    if len(text) > MAX_TEXT:
        _refuse("messages", f"a message has more than {MAX_TEXT} letters")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        _refuse("messages", "a message has half of a surrogate pair in it")
    return _Message(role, text, pictures)


def _picture(url: str, bounds: Bounds) -> bytes | str:
    """The content of a data: URL, or the address of another."""
    scheme, _, rest = url.partition(":")
    if scheme.lower() == "data":
        kind, comma, encoded = rest.partition(",")
        if not comma or not kind.lower().endswith(";base64"):
            _refuse("messages", "a data: URL must be of the form data:image/png;base64,…")
        try:
            content = base64.b64decode(encoded.encode("ascii"), validate=True)
        except (binascii.Error, UnicodeEncodeError):
            _refuse("messages", "a data: URL is not valid base64")
        if not content:
            _refuse("messages", "a data: URL is empty")
        return content
    if scheme.lower() not in ("http", "https"):
        _refuse("messages", "a picture must be a data: URL, or http or https")
    if not bounds.takes_urls:
        _refuse(
            "messages",
            "this server fetches no pictures; send them as data: URLs",
            "image_urls_not_allowed",
        )
    return url
