"""``dovetail chat``: a conversation with a running server."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import click

from dovetail import env
from dovetail.cli import http, sampling
from dovetail.errors import DovetailError

if TYPE_CHECKING:
    import httpx
    from rich.console import Console

HELP = "/clear forgets the conversation, /quit leaves, Ctrl-C stops an answer."


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Address of the server.")
@click.option("--api-key", help="The server's key; default: DOVETAIL_API_KEY.")
@click.option("--model", help="Model to ask for; default: the first that the server lists.")
@click.option("--system", help="System message that opens the conversation.")
@sampling.sampling_options
def chat(url: str, api_key: str | None, model: str | None, system: str | None, **values: Any) -> None:
    """Talk to a running server.

    Inside: /clear forgets the conversation, /quit leaves, Ctrl-C stops an answer.
    """
    import httpx
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    with httpx.Client(
        base_url=url,
        headers=http.headers(api_key or env.text("DOVETAIL_API_KEY")),
        timeout=httpx.Timeout(30, read=None),
    ) as client:
        conversation = Conversation(client, url, model, system, sampling.given(values))
        console.print(Text.assemble((conversation.model, "bold green"), f" at {url}. {HELP}"))
        while True:
            line = _read(console)
            if line is None or line in ("/quit", "/exit"):
                return
            if line == "/clear":
                conversation.clear()
                console.print("[dim]The conversation starts anew.[/dim]")
            elif line.startswith("/"):
                console.print(Text(f"Unknown command {line.split()[0]}. {HELP}", style="yellow"))
            elif line:
                _turn(console, conversation, line)


class Conversation:
    """The messages so far, and how to get the next one.

    Raises:
        DovetailError: no server answers, or it lists no model.
    """

    def __init__(
        self, client: httpx.Client, url: str, model: str | None, system: str | None, params: dict[str, Any]
    ) -> None:
        self._client = client
        self._url = url
        self._params = params
        self._opening = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self._opening)
        self.model = model or self._first_model()

    def clear(self) -> None:
        """Forget everything but the system message."""
        self.messages = list(self._opening)

    def say(self, text: str) -> Generator[str, None, None]:
        """Send a message and yield the answer piece by piece.

        The exchange is kept once the answer is whole or its consumer stops early; a failed one is forgotten.

        Raises:
            DovetailError: the server refuses, fails, or does not answer.
        """
        import httpx

        self.messages.append({"role": "user", "content": text})
        body = {"model": self.model, "messages": self.messages, "stream": True, **self._params}
        pieces: list[str] = []
        try:
            with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise http.refusal(response.status_code, response.text)
                for line in response.iter_lines():
                    for choice in http.choices(http.event(line)):
                        piece = choice["delta"].get("content")
                        if piece:
                            pieces.append(piece)
                            yield piece
        except httpx.HTTPError as error:
            self.messages.pop()
            raise http.unreachable(self._url, error) from error
        except DovetailError:
            self.messages.pop()
            raise
        except (GeneratorExit, KeyboardInterrupt):
            self.messages.append({"role": "assistant", "content": "".join(pieces)})
            raise
        self.messages.append({"role": "assistant", "content": "".join(pieces)})

    def _first_model(self) -> str:
        import httpx

        try:
            response = self._client.get("/v1/models")
        except httpx.HTTPError as error:
            raise http.unreachable(self._url, error) from error
        return http.first_model(response.status_code, response.text, self._url)


def _read(console: Console) -> str | None:
    """The next line, or None at the end of input."""
    try:
        if sys.stdin.isatty():
            import readline  # noqa: F401  line editing and history for input()

            return console.input("[bold cyan]you ›[/bold cyan] ").strip()
        line = sys.stdin.readline()
    except EOFError:
        return None
    return line.strip() if line else None


def _turn(console: Console, conversation: Conversation, line: str) -> None:
    """One message and its answer. An error is shown, and the conversation goes on."""
    from rich.text import Text

    started = time.perf_counter()
    count = 0
    answer = conversation.say(line)
    try:
        for piece in answer:
            console.print(piece, end="", markup=False, soft_wrap=True)
            count += 1
        seconds = time.perf_counter() - started
        console.print(f"\n[dim]{count} pieces in {seconds:.1f} s[/dim]")
    except KeyboardInterrupt:
        answer.close()
        console.print("[dim] (stopped)[/dim]")
    except DovetailError as error:
        console.print(Text(str(error), style="red"))
