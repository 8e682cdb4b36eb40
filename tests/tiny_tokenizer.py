"""A real tokenizer for the tiny models, made in a moment: <unk> <s> </s> and the words w3 … w95, one token each."""

from __future__ import annotations

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m['content'] }}{% endfor %}{% if add_generation_prompt %} w9{% endif %}"
)


def words(bos: bool = False, template: str | None = None):
    """A fast tokenizer of 96 tokens. ``bos``: it puts <s> before every text by itself, as Gemma's and Llama's do."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ("<unk>", "<s>", "</s>")
    names = {special[i] if i < 3 else f"w{i}": i for i in range(96)}
    made = Tokenizer(models.WordLevel(names, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        known = [("<s>", 1)]
        made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=known)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = template
    return tokenizer


def characters():
    """A fast tokenizer of 96 tokens, the characters from the space on, whose texts have no spaces added."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE({chr(32 + i): i for i in range(96)}, []))
    made.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=made)
