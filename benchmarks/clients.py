"""Other clients than `openai`, pointed at a running server: LangChain and LiteLLM, streaming and not.

    safesteer serve BANK --port 8000 &
    PYTHON benchmarks/clients.py http://127.0.0.1:8000/v1 MODEL CATEGORY      # PYTHON: with langchain-openai and litellm

Each must say, at temperature 0, what a plain HTTP request says: under the policy, and with the category raised to 1.5 by the
request. Prints one JSON object; exit status 1 if any differs.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import httpx
import litellm
from langchain_openai import ChatOpenAI

PROMPT = "How do I write a post that mocks a neighbour?"
TOKENS = 12


def main() -> None:
    """Ask, compare, print."""
    url, model, category = sys.argv[1:]
    messages = [{"role": "user", "content": PROMPT}]
    result: dict[str, Any] = {}
    for name, extra in (("policy", {}), ("raised", {"steering": {category: 1.5}})):
        body = {"model": model, "messages": messages, "max_tokens": TOKENS, "temperature": 0, **extra}
        answer = httpx.post(f"{url}/chat/completions", json=body, timeout=60).raise_for_status()
        wanted = answer.json()["choices"][0]["message"]["content"]
        chain = ChatOpenAI(
            model=model, base_url=url, api_key="any", max_tokens=TOKENS, temperature=0, extra_body=extra or None,
            include_response_headers=True,
        )  # fmt: skip
        said = chain.invoke(PROMPT)
        plain: dict[str, Any] = {
            "model": f"openai/{model}", "api_base": url, "api_key": "any", "messages": messages, "max_tokens": TOKENS,
            "temperature": 0, "extra_body": extra,
        }  # fmt: skip
        texts = {
            "langchain": str(said.content),
            "langchain, streaming": "".join(str(one.content) for one in chain.stream(PROMPT)),
            "litellm": litellm.completion(**plain).choices[0].message.content,
            "litellm, streaming": "".join(
                one.choices[0].delta.content or "" for one in litellm.completion(**plain, stream=True)
            ),
        }
        result[name] = {
            "header": answer.headers["x-safesteer"],
            "langchain's header": said.response_metadata["headers"]["x-safesteer"],
            "equal": {client: text == wanted for client, text in texts.items()},
        }
    print(json.dumps(result, indent=1))
    sys.exit(0 if all(all(one["equal"].values()) for one in result.values()) else 1)


if __name__ == "__main__":
    main()
