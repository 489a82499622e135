"""An OpenAI-compatible server whose requests are each steered by their own policy.

`pip install 'safesteer[serve]'`. The operator's policies and what clients may change of them: `authority`. One batch of requests
after another on a transformers model: `engine`. The HTTP side: `app`.
"""
