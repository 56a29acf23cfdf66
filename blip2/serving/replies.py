"""Answers in OpenAI's form, whole or as chunks of a stream, with what BLIP-2 has beside them."""

from __future__ import annotations

import dataclasses
import json
import time
import uuid
from typing import Any

from blip2.serving.chat import ChatRequest
from blip2.serving.engine import End, News


class Reply:
    """The answer to one request, as it grows: OpenAI's objects, and what BLIP-2 has beside them."""

    def __init__(self, request: ChatRequest, model: str) -> None:
        """Begin with nothing."""
        self.request = request
        self._head = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }
        self.ends: dict[int, End] = {}
        self._texts = [""] * request.choices
        self._sent = [0] * request.choices  # letters, in chunks

    def take(self, news: News) -> None:
        """Note what a choice has grown by, and how it ended; a beam search ends all at once."""
        self._texts[news.choice] += news.text
        if (end := news.end) is None:
            return
        if len(end.answers) == 1:
            self.ends[news.choice] = end
            return
        for number, answer in enumerate(end.answers[: self.request.choices]):
            self._texts[number] = answer["text"]
            self.ends[number] = dataclasses.replace(end, finish_reason=answer["finish_reason"])

    @property
    def is_whole(self) -> bool:
        """Whether every choice has ended."""
        return len(self.ends) == self.request.choices

    @property
    def completion_tokens(self) -> int:
        """Of all choices; of a beam search those of the best."""
        if len(self.ends[0].answers) > 1:
            return self.ends[0].completion_tokens
        return sum(end.completion_tokens for end in self.ends.values())

    @property
    def prompt_tokens(self) -> int:
        """Of the one prompt, its picture's included."""
        return self.ends[0].prompt_tokens

    @property
    def usage(self) -> dict[str, int]:
        """OpenAI's counts."""
        counts = {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens}
        return {**counts, "total_tokens": sum(counts.values())}

    def extras(self, seconds: dict[str, float], picture: dict[str, Any]) -> dict[str, Any]:
        """What OpenAI's answers have no place for."""
        end = self.ends[0]
        return {
            "prompt": end.prompt,
            "seconds": {**seconds, **end.seconds},
            "picture": picture,
            "answers": end.answers,
        }

    def whole(self, extras: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request that does not stream."""
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": self.ends[number].finish_reason,
            }
            for number, text in enumerate(self._texts)
        ]
        head = {**self._head, "object": "chat.completion"}
        return {**head, "choices": choices, "usage": self.usage, "blip2": extras}

    def first_chunks(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        delta = {"role": "assistant", "content": ""}
        return [self._chunk(number, delta, None) for number in range(self.request.choices)]

    def chunks(self) -> list[dict[str, Any]]:
        """What choices have grown by since."""
        grown = []
        for choice, text in enumerate(self._texts):
            if len(text) > self._sent[choice]:
                grown.append(self._chunk(choice, {"content": text[self._sent[choice] :]}, None))
                self._sent[choice] = len(text)
        return grown

    def last_chunks(self, extras: dict[str, Any]) -> list[dict[str, Any]]:
        """What a stream ends with, before [DONE]."""
        chunks = [
            self._chunk(number, {}, self.ends[number].finish_reason)
            for number in range(self.request.choices)
        ]
        chunks[-1]["blip2"] = extras
        if self.request.reports_usage:
            head = {**self._head, "object": "chat.completion.chunk"}
            chunks.append({**head, "choices": [], "usage": self.usage})
        return chunks

    def _chunk(self, choice: int, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        one = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.request.reports_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [one], **usage}


def event(data: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode("ascii") + b"\n\n"


DONE = b"data: [DONE]\n\n"
