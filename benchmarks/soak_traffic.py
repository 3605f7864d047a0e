"""What `soak.py` sends to the server: completions of mixed lengths, cancelled ones, malformed ones."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

MOST_TOKENS = 64  # of an answer
_LENGTHS = (4, 1200)  # characters of a prompt, drawn evenly on a logarithmic scale
_SHARES = {"whole": 35, "streamed": 35, "cancelled": 15, "malformed": 15}  # percent
_PATIENCE = 300  # seconds for one answer

_Body = dict[str, Any]
_MALFORMED: dict[str, Callable[[_Body], bytes]] = {
    "half of the JSON": lambda body: json.dumps(body).encode()[: len(json.dumps(body)) // 2],
    "a list instead of an object": lambda body: json.dumps([body]).encode(),
    "no prompt": lambda body: json.dumps({"model": body["model"]}).encode(),
    "prompt longer than the context": lambda body: json.dumps(
        body | {"prompt": body["prompt"] + " and so on" * 20_000}
    ).encode(),
    "max_tokens: -3": lambda body: json.dumps(body | {"max_tokens": -3}).encode(),
    "temperature: hot": lambda body: json.dumps(body | {"temperature": "hot"}).encode(),
    "token ids that do not exist": lambda body: json.dumps(body | {"prompt": [1, 10**7, -5]}).encode(),
    "a model that is not served": lambda body: json.dumps(body | {"model": "no-such-adapter"}).encode(),
}


@dataclass(frozen=True)
class Request:
    """One request to the server.

    Attributes:
        kind: A key of the shares: whole, streamed, cancelled or malformed.
        body: What is posted.
        prompt: Number of the prompt.
        model: Name under which the model, or the adapter on top of it, is served.
        max_tokens: Of the answer.
        malformed: What is wrong with it, if anything.
    """

    kind: str
    body: bytes
    prompt: int
    model: str
    max_tokens: int
    malformed: str | None = None

    @property
    def label(self) -> str:
        """What it is counted as."""
        return self.kind if self.malformed is None else f"{self.kind}: {self.malformed}"


@dataclass
class Outcome:
    """What came of one request.

    Attributes:
        request: What was sent.
        status: HTTP status; None: the connection failed, which `error` tells.
        tokens: Token ids of the answer.
        seconds: Until the answer was complete, or given up.
        error: Exception of the client, or an error inside a stream that had begun with status 200.
    """

    request: Request
    status: int | None = None
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    error: str | None = None

    @property
    def is_as_expected(self) -> bool:
        """Whether a malformed request was refused by 4xx and any other was answered or cancelled."""
        if self.error is not None or self.status is None:
            return False
        return 400 <= self.status < 500 if self.request.kind == "malformed" else self.status == 200


def draw_prompts(texts: Sequence[str], number: int, generator: random.Random) -> list[str]:
    """Return pieces of the texts, from a few characters to the better part of a page."""
    shortest, longest = _LENGTHS
    prompts = []
    for _ in range(number):
        length = round(shortest * (longest / shortest) ** generator.random())
        text = generator.choice(texts)
        start = generator.randrange(len(text) - length)
        prompts.append(text[start : start + length])
    return prompts


def draw_requests(
    prompts: Sequence[str], models: Sequence[str], number: int, generator: random.Random
) -> list[Request]:
    """Return requests of all kinds in random order, models and adapters mixed."""
    requests = []
    for _ in range(number):
        kind = generator.choices(list(_SHARES), list(_SHARES.values()))[0]
        prompt, model = generator.randrange(len(prompts)), generator.choice(models)
        max_tokens = generator.randint(1, MOST_TOKENS)
        body: _Body = {
            "model": model,
            "prompt": prompts[prompt],
            "max_tokens": max_tokens,
            "temperature": 0,
            "return_token_ids": True,
        }
        if kind == "malformed":
            malformed = generator.choice(list(_MALFORMED))
            requests.append(Request(kind, _MALFORMED[malformed](body), prompt, model, max_tokens, malformed))
            continue
        if kind != "whole":
            body["stream"] = True
        requests.append(Request(kind, json.dumps(body).encode(), prompt, model, max_tokens))
    return requests


async def send_all(
    address: str, requests: Sequence[Request], concurrency: int, finished: Callable[[Outcome], None]
) -> None:
    """Send the requests, so many at a time; `finished` gets every outcome as it comes."""
    waiting = iter(requests)
    connections = aiohttp.TCPConnector(limit=concurrency)
    timeout = aiohttp.ClientTimeout(total=_PATIENCE)
    async with aiohttp.ClientSession(connector=connections, timeout=timeout) as session:

        async def send_in_turn() -> None:
            for request in waiting:
                finished(await _send(session, address, request))

        await asyncio.gather(*(send_in_turn() for _ in range(concurrency)))


async def _send(session: aiohttp.ClientSession, address: str, request: Request) -> Outcome:
    outcome = Outcome(request)
    started = time.monotonic()
    try:
        async with session.post(
            f"{address}/v1/completions", data=request.body, headers={"Content-Type": "application/json"}
        ) as response:
            outcome.status = response.status
            if response.status != 200:
                await response.read()
            elif request.kind == "whole":
                outcome.tokens = (await response.json())["choices"][0]["token_ids"]
            else:
                await _read_stream(response, outcome)
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError) as error:
        outcome.error = f"{type(error).__name__}: {error}"
    outcome.seconds = time.monotonic() - started
    return outcome


async def _read_stream(response: aiohttp.ClientResponse, outcome: Outcome) -> None:
    """Collect a stream's tokens; of a cancelled request close the connection behind the first."""
    async for line in response.content:
        if not line.startswith(b"data: ") or line.strip() == b"data: [DONE]":
            continue
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            outcome.error = str(event["error"])
            return
        for choice in event["choices"]:
            outcome.tokens += choice.get("token_ids") or []
        if outcome.request.kind == "cancelled":
            response.close()
            return
