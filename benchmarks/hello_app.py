"""The smallest Serve application: what serve_llm.py's start and idle figures are held against."""

from ray import serve


@serve.deployment
class Hello:
    """Says so."""

    async def __call__(self) -> str:
        """The answer to everything."""
        return "hello"


app = Hello.bind()
