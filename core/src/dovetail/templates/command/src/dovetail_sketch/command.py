"""Whether a server is well, by its own account."""

import click
import httpx

from dovetail.errors import DovetailError


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True, help="Where the server listens.")
def command(url: str) -> int:
    """Ask a running server whether it is well.

    The exit code is 0 if it is, and 1 if not.
    """
    try:
        answer = httpx.get(f"{url}/health", timeout=5)
    except httpx.HTTPError as error:
        raise DovetailError(f"Nothing answers at {url} ({error}). Start a server, or give another --url.") from error
    click.echo("It is well." if answer.is_success else f"It is not: {answer.text}")
    return 0 if answer.is_success else 1
