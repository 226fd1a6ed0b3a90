"""LiteLLM, unmodified, against the server in argv[1]; prints what test_clients.py checks as one JSON line.

A program of its own: importing it takes seconds and starts threads.
"""

import json
import sys
from typing import Any

import litellm


def main(url: str, prompt: str) -> None:
    openai: Any = {"api_base": f"{url}/v1", "api_key": "none", "num_retries": 0}
    made = litellm.image_generation(prompt=prompt, model="openai/tiny", n=2, seed=7, candidates=3, **openai)
    embedded = litellm.embedding(model="openai/tiny", input=[prompt, "초록 네모"], encoding_format="float", **openai)
    ranked = litellm.rerank(
        model="jina_ai/tiny",
        query=prompt,
        documents=["초록 네모", prompt],
        top_n=1,
        api_base=f"{url}/v1/rerank",
        api_key="none",
    )
    try:
        litellm.image_generation(prompt=prompt, model="openai/another", **openai)
        error = ""
    except litellm.exceptions.NotFoundError as refused:
        error = str(refused)
    found = {
        "images": [one.b64_json for one in made.data],
        "embeddings": [one["embedding"] for one in embedded.data],
        "results": [dict(one) for one in ranked.results],
        "error": error,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
