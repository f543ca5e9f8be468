"""Train the family's tokenizer and write it to `tokenizer/`.

    python -m benchmarks.reference_models.vocabulary

Byte-level BPE: all 256 bytes are pieces, so that any text survives a round trip. Every digit is a
piece of its own; runs of white space may be one, which suits code.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from benchmarks.reference_models.family import CONTEXT, VOCABULARY
from benchmarks.reference_models.sources import (
    ASSISTANT,
    END,
    END_OF_TEXT,
    SHARED,
    TEXTS,
    TOKENIZER,
    USER,
    read,
)

SYSTEM = "<|system|>"
SPARE = [f"<|spare_{i}|>" for i in range(3)]  # so that tuning can add roles and keep the shape
SPECIAL = [END_OF_TEXT, SYSTEM, USER, ASSISTANT, END, *SPARE]

# Apostrophe endings | a digit | a word | punctuation | white space to the end of a line | white
# space but for the blank before a word | the rest of it.
PIECES = r"['’]\p{L}{1,2}(?!\p{L})|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s*\n|\s+(?!\S)|\s+"

TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role not in ("system", "user", "assistant") -%}
{{- raise_exception("the roles are system, user and assistant") -}}
{%- endif -%}
{{- "<|" + message.role + "|>" + message.content | trim + "<|end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- "<|assistant|>" -}}
{%- endif -%}
"""


def train(texts: Iterable[str], size: int = VOCABULARY) -> Tokenizer:
    """Train a tokenizer of `size` pieces; encoded texts begin with the end-of-text token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    start = tokenizer.token_to_id(END_OF_TEXT)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A",
        pair=f"{END_OF_TEXT} $A $B",
        special_tokens=[(END_OF_TEXT, start)],
    )
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": CONTEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(TEMPLATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=SHARED)
    parser.add_argument("--out", type=Path, default=TOKENIZER)
    options = parser.parse_args()
    texts = (text for name in TEXTS for text in read(name, options.shared)[0])
    save(train(texts), options.out)


if __name__ == "__main__":
    main()
