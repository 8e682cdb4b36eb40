"""The exercises of notebook 07. Each truth comes from a real cache, or from the bytes that are really held."""

from __future__ import annotations

from labkit.cache import KIVI
from labkit.check.answer import Note, exercise, hint, near, number, right, some_of
from labkit.check.start import _model
from labkit.measure import memory

TOKENS, SHARE = 1024, 0.75  # of exercise 4's text; of the heads in exercise 3
POLICIES = ("recent only", "random", "StreamingLLM", "H2O", "SnapKV")


@exercise(number("bytes"))
def kv_bytes_per_token(answer, lm=None) -> Note:
    """How many bytes does the full KV cache of this model hold for each token?"""
    lm = _model(lm)
    truth = memory.kv_per_token(lm)
    config = lm.model.config
    heads, depth = config.num_attention_heads, config.num_hidden_layers
    shared = heads // (getattr(config, "num_key_value_heads", None) or heads)
    width = lm.model.get_output_embeddings().weight.element_size()
    if near(answer, truth, 0.005):
        return right(
            f"A real cache grows by just that. Per token that is little; 1,000 tokens are {truth / 1e3:.0f} MB, and each text "
            "in a batch has a cache of its own."
        )
    if near(answer, truth / 2, 0.005):
        return hint(
            "Half of it. What is kept besides the keys? Or have you counted two bytes for a number that has four?"
        )
    if shared > 1 and near(answer, truth * shared, 0.005):
        return hint("That holds if each query head had keys and values of its own. How many KV heads are there?")
    if near(answer, truth / depth, 0.005):
        return hint("That is one layer's. Does one layer's cache serve the others?")
    if near(answer, truth / width, 0.005):
        return hint("That is how many numbers are kept. How many bytes has each, in the type that this model runs in?")
    if near(answer, 8 * truth, 0.005):
        return hint("These are bits.")
    return hint("Multiply: layers, keys and values, KV heads, numbers in a head, bytes of a number.")


@exercise(number("tokens"))
def outweighs(answer, weights: float | None = None, lm=None) -> Note:
    """From how many tokens on does the full cache of one text hold more bytes than the 4-bit weights?"""
    lm = _model(lm)
    if weights is None:
        from labkit.quantize import RTN

        weights = RTN(bits=4)(lm, progress=False).nbytes
    truth = weights / memory.kv_per_token(lm)
    if near(answer, truth, 0.03):
        return right(
            f"About {truth:,.0f}. With 16 texts at once it is a sixteenth of that for each: a server that has its weights in 4 "
            "bits is full of caches."
        )
    if near(answer, lm.nbytes / memory.kv_per_token(lm), 0.03):
        return hint("That is so for the weights as they were. How many bytes have they in 4 bits?")
    if near(answer, truth / 8, 0.03) or near(answer, truth * 8, 0.03):
        return hint("A factor of 8: bits and bytes have been mixed up.")
    way = "More" if answer < truth else "Fewer"
    return hint(f"{way} than that. Divide the bytes that the weights hold by the bytes of a token in the cache.")


@exercise(some_of(POLICIES))
def keeps_first(answer, kept=None, budget: int = 32, lm=None) -> Note:
    """Which policies keep token 0 in at least three of four heads, at this budget?"""
    kept = _kept(lm) if kept is None else kept
    shares = {name: float(kept.mask(name, budget)[..., 0].float().mean()) for name in POLICIES}
    truth = {name for name, share in shares.items() if share >= SHARE}
    if answer == truth:
        others = [
            f"{name} in {100 * shares[name]:.0f} %" for name in POLICIES if name in truth and name != "StreamingLLM"
        ]
        return right(
            f"In the real caches: {' and '.join(others) or 'no other'} of the heads. Who looks at attention finds the sink by "
            "itself, for most heads rest most of their attention on it."
        )
    if answer - truth:
        return hint("One of yours evicts token 0 in many heads. Which of them never looks at the attention?")
    return hint("Those, yes, but there is one more. Whose score is large for a token that every query looks at?")


@exercise(number("a share between 0 and 1"))
def kivi_share(answer, lm=None) -> Note:
    """After a prompt of 1,024 tokens: KIVI(bits=2)'s bytes over the full cache's (residual 128, groups of 32)?"""
    from labkit.ui.lessons.kv_bytes import measured

    lm = _model(lm)
    truth = measured(lm, KIVI(bits=2), TOKENS) / measured(lm, None, TOKENS)
    if near(answer, truth, 0.01):
        return right(
            "Codes, scales and minima come to 3 bits a number. The newest values, kept whole, weigh as much as all the older "
            "values together; keys wait for a full block of 128, and 1,024 tokens leave none waiting."
        )
    width = 8 * lm.model.get_output_embeddings().weight.element_size()
    if near(answer, 2 / width, 0.01):
        return hint(
            "These are the codes alone. Each group of 32 has a scale and a minimum in fp16, and some tokens stay whole."
        )
    if near(answer, 3 / width, 0.01):
        return hint("Right for what is rounded. Which tokens are not rounded?")
    if near(answer, (3 * (TOKENS - 128) + width * 128) / (width * TOKENS), 0.01):
        return hint("So it is for the values. Keys are rounded 128 at once: how many of 1,024 are left waiting?")
    way = "More" if answer < truth else "Less"
    return hint(f"{way} than that. Work out keys and values apart: bits of a rounded number, and how many are rounded.")


def _kept(lm):
    from labkit.ui.lessons.kept_tokens import KeptTokens, needle_prompt

    lm = _model(lm)
    return KeptTokens(lm, needle_prompt(lm))
