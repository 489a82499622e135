"""Measures of a response that need no judge.

nll         - 1/T  sum_t log p(y_t | x, y_<t)   in nats, under the unsteered model, y being the response's T tokens;
            perplexity is its exponential (`statistics.perplexity`)
bleu        corpus BLEU of one pair, smoothed (sacrebleu `sentence_bleu`, effective order), 0 to 100
rouge_l     F1 of the longest common subsequence (rouge-score `rougeL` with stemming), 0 to 1
repetition  share of words in a 4-word run seen before (`judges.detectors.repetition`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from safesteer.activations import batches_by_length, pad
from safesteer.models import EncodedPrompt, LoadedModel, check_lengths, encode
from safesteer.next_token import BATCH_TOKENS


@torch.inference_mode()
def negative_log_likelihoods(
    loaded: LoadedModel,
    prompts: Sequence[str],
    responses: Sequence[str],
    progress: Callable[[int], None] = lambda count: None,
) -> list[float | None]:
    """Mean negative log-likelihood of a token of each response after its prompt, in nats; None for an empty response."""
    tokenizer = loaded.tokenizer
    rows = []
    for prompt, response in zip(prompts, responses, strict=True):
        start = encode(tokenizer, prompt).ids
        rows.append(
            EncodedPrompt(start + tuple(tokenizer(response, add_special_tokens=False)["input_ids"]), len(start), 0)
        )
    check_lengths(rows, tokenizer, loaded.context)
    values: list[float | None] = [None] * len(rows)
    for batch in batches_by_length(rows, BATCH_TOKENS):
        ids, mask = pad([rows[index] for index in batch], loaded.pad_id, "right")
        logits = loaded.model(input_ids=ids.to(loaded.device), attention_mask=mask.to(loaded.device)).logits
        for slot, index in enumerate(batch):
            first, last = rows[index].content_start, len(rows[index])
            if last > first:
                chosen = torch.log_softmax(logits[slot, first - 1 : last - 1].float(), dim=-1)
                picked = chosen.gather(1, ids[slot, first:last].to(chosen.device).unsqueeze(1))
                values[index] = -float(picked.mean())
        progress(len(batch))
    return values


def overlaps(responses: Sequence[str], references: Sequence[str]) -> list[tuple[float, float]]:
    """(BLEU, ROUGE-L) of each response against its reference."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    bleu, rouge = BLEU(effective_order=True), RougeScorer(["rougeL"], use_stemmer=True)
    return [
        (float(bleu.sentence_score(one, [other]).score), float(rouge.score(other, one)["rougeL"].fmeasure))
        for one, other in zip(responses, references, strict=True)
    ]
