"""Model cards: the README of a model directory, with the header that model hubs read."""

from __future__ import annotations

import textwrap

from tfcli.config.model import ModelConfig

START = '"Once upon a time"'
TRANSFORMERS = "With transformers:\n\n```python\n{}\n```"
TFCLI = "With tfcli:\n\n```sh\n{}\n```"
SEQ2SEQ = """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForSeq2SeqLM.from_pretrained(".")"""
TRANSLATE = f"""{SEQ2SEQ}
batch = tokenizer({START}, return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**batch)[0], skip_special_tokens=True))"""
ENCODE = f"""\
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModel.from_pretrained(".")
print(model(**tokenizer({START}, return_tensors="pt")).last_hidden_state.shape)"""
GENERATE = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

# The tokenizer adds no tokens of its own: an empty prompt begins with the end-of-text token.
tokenizer, model = AutoTokenizer.from_pretrained("."), AutoModelForCausalLM.from_pretrained(".")
ids = tokenizer({START}, return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=100)[0], skip_special_tokens=True))"""
FILL = """\
from transformers import pipeline

print(pipeline("fill-mask", ".")("Once upon a [MASK]."))"""
GGUF = """\
With transformers, which dequantizes it to 16 or 32 bits:

```python
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", gguf_file="{file}", config=AutoConfig.from_pretrained("."))
```"""


def page(title: str, about: str, *examples: str, pipeline: str = "", library: str = "transformers") -> str:
    """A README: header, title, one paragraph and ways to use the model."""
    tags = ["gguf", "tfcli"] if library == "gguf" else ["tfcli"]
    header = [f"library_name: {library}", *([f"pipeline_tag: {pipeline}"] if pipeline else [])]
    header += ["tags:", *(f"- {tag}" for tag in tags)]
    about = textwrap.fill(about, 120, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(["\n".join(["---", *header, "---"]), f"# {title}", about, *examples]) + "\n"


def size(config: ModelConfig) -> str:
    """A sentence on the shape of a model."""
    blocks = f"{config.depth} blocks"
    if config.encoder_depth:
        blocks = f"An encoder of {config.encoder_depth} blocks and a decoder of {config.depth}"
    kv = "" if config.kv_heads == config.heads else f" ({config.kv_heads} of keys and values)"
    return (
        f"{blocks}, width {config.width}, {config.heads} heads{kv}, a vocabulary of {config.vocab_size} tokens and "
        f"a context of {config.context} tokens."
    )


def of_model(config: ModelConfig) -> str:
    """The card of a model without a task: a decoder, an encoder or an encoder-decoder."""
    if config.encoder_depth:
        about = f"{size(config)} It is a sequence-to-sequence model."
        example = TRANSFORMERS.format(TRANSLATE)
        return page("An encoder-decoder, made with tfcli", about, example, pipeline="translation")
    if not config.architecture.causal:
        about = f"{size(config)} It gives a vector for each token of a text."
        example = TRANSFORMERS.format(ENCODE)
        return page("An encoder, saved by tfcli", about, example, pipeline="feature-extraction")
    about = f"A decoder: {size(config)} It continues text; it was not trained to follow instructions or to be correct."
    examples = (TFCLI.format(f"tfcli generate --model . --prompt {START}"), TRANSFORMERS.format(GENERATE))
    return page("A small language model, made with tfcli", about, *examples, pipeline="text-generation")


def of_masked(config: ModelConfig) -> str:
    """The card of an encoder pretrained on masked tokens."""
    about = f"{size(config)} The architecture is ModernBERT's. It predicts the tokens that [MASK] stands for, and is a "
    about += "starting point for classifiers and taggers."
    examples = (TFCLI.format('tfcli predict . --task fill "Once upon a [MASK]."'), TRANSFORMERS.format(FILL))
    return page("A small encoder, made with tfcli", about, *examples, pipeline="fill-mask")


def of_spans(config: ModelConfig) -> str:
    """The card of an encoder-decoder pretrained by span corruption."""
    about = f"{size(config)} Stored as mBART. It was pretrained by span corruption: it reads a text in which tokens "
    about += "such as <extra_id_0> stand for masked spans, and predicts these. It is a starting point for models that "
    about += "learn sequence-to-sequence tasks."
    examples = (TFCLI.format("tfcli finetune . pairs.tsv --task translate"), TRANSFORMERS.format(SEQ2SEQ))
    return page("An encoder-decoder, made with tfcli", about, *examples)


def of_task(task: str, base: str | None, config: ModelConfig) -> str:
    """The card of a model finetuned for a task from ``base``, or from scratch where that is None."""
    about = f"{'Trained from scratch' if base is None else f'Finetuned from {base}'}. {size(config)}"
    return page(f"A model for {task}, finetuned with tfcli", about, TFCLI.format('echo "Some text." | tfcli predict .'))


def of_gguf(name: str, file: str, *, bits: int, transformers: bool) -> str:
    """The card of a quantized model in ``file``, which ``transformers`` reads if config.json is in its directory."""
    about = "All matrices, embedding and head included, are stored in blocks of 32 weights that share a scale (GGUF's "
    about += "Q8_0); norms are in fp32."
    if bits == 4:
        about = "Matrices are stored in blocks of 32 weights that share a scale and a minimum (GGUF's Q4_1); embedding "
        about += "and head are in 8 bits (Q8_0), norms in fp32."
    commands = f"tfcli generate --model . --prompt {START}\nllama-cli -m {file} -p {START}"
    examples = [f"```sh\n{commands}\n```", *([GGUF.format(file=file)] if transformers else [])]
    return page(f"{name} in {bits} bits", about, *examples, pipeline="text-generation", library="gguf")
