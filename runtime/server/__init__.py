"""An OpenAI-compatible server over one engine: HTTP in, requests to the engine, committed tokens out.

`app.py` has the routes and `listen.py` the socket and the signals. Needs the extra ``llm42c[serve]``.
"""
