"""An OpenAI-compatible HTTP server over one `Runtime`: ``edge-shiftkv serve``."""

try:
    import fastapi  # noqa: F401
    import uvicorn  # noqa: F401
except ImportError as error:
    raise ImportError(f'the server needs FastAPI and uvicorn: pip install "edge-shiftkv[server]" ({error})') from error
