"""Two replicas of SmolLM2 on Ray Serve, behind one door:

cd examples && serve run ray_serve:app

A stream whose replica dies goes on at the other one, and the client's bytes are those of an undisturbed run.
`pip install "llm42c[serve,ray]"`.
"""

from __future__ import annotations

from llm42c.runtime.server.replicas.on_ray import application

app = application("smollm2", replicas=2, threads=1, hedge_ms=2000)

if __name__ == "__main__":
    print("start it with: serve run ray_serve:app")
