"""The engine: deterministic and ordinary requests in one stream of batches.

python examples/engine.py [MODEL]
"""

from __future__ import annotations

import argparse

from llm42c import SamplingParams
from llm42c.runtime.loader import build_engine

QUESTIONS = (
    "Name three things that float.",
    "What is the shortest sentence in English?",
    "Why is the sky dark at night?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2", help="a folder, a hub id, or 'smollm2'")
    built = build_engine(parser.parse_args().model)
    engine, tokenizer = built.engine, built.tokenizer
    print("contract", engine.contract.hash[:16])

    first = tokenizer("Three rules for walking in the mountains:\n1.")["input_ids"]
    params = SamplingParams(max_tokens=24, temperature=0.8, top_p=0.95, seed=11)
    (alone,) = engine.generate([first], params)
    print(alone.text)

    # The same request again, now among others that come and go, of which one is aborted midway.
    wanted = engine.submit(first, params)
    crowd = [engine.submit(tokenizer(q)["input_ids"], params, deterministic=False) for q in QUESTIONS]
    tokens, logprobs, steps = [], [], 0
    while engine.has_unfinished():
        for output in engine.step():
            if output.request_id == wanted:
                tokens += output.new_token_ids
                logprobs += output.new_logprobs
        steps += 1
        if steps == 8:
            engine.abort(crowd[1])

    same = tokens == alone.token_ids and logprobs == alone.logprobs
    print("together with others:", "the same tokens and log-prob bits" if same else "OTHER BITS")
    raise SystemExit(not same)


if __name__ == "__main__":
    main()
