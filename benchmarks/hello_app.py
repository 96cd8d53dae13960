"""The smallest Serve application: what serve_llm.py's start, idle and HTTP figures are held against."""

from ray import serve
from starlette.requests import Request


@serve.deployment
class Hello:
    """Says so."""

    async def __call__(self, request: Request) -> str:
        """The answer to everything; the request's body is read, as one with a prompt has to be."""
        await request.body()
        return "hello"


app = Hello.bind()
