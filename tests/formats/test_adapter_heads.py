"""Adapters with the head of a task: peft and transformers say what they compute, and whose they are is checked."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from test_heads import close, ours, theirs, write
from tiny_models import cpu, foreign

from tfcli.config.options import LoraOptions
from tfcli.errors import UserError
from tfcli.formats import convert
from tfcli.formats.hf import adapters
from tfcli.formats.hf import heads as formats
from tfcli.formats.open import open_path
from tfcli.model import heads, lora

AUTO = {"sequence": "SequenceClassification", "token": "TokenClassification", "span": "QuestionAnswering"}
NAMED = {"id2label": {"0": "no", "1": "yes", "2": "so"}, "label2id": {"no": 0, "yes": 1, "so": 2}}
CASES = [
    *(("bert", "BertModel", kind, {}) for kind in AUTO),
    *(("modernbert", "ModernBertForMaskedLM", kind, {"classifier_pooling": "mean"}) for kind in AUTO),
    ("qwen3", "Qwen3ForCausalLM", "sequence", {"pad_token_id": 0}),
    ("gpt2", "GPT2LMHeadModel", "sequence", {"pad_token_id": 0, "bos_token_id": 3, "eos_token_id": 3}),
]


def base(directory: Path, family: str, architecture: str, settings: dict[str, Any]) -> Path:
    return write(directory, foreign(family, architecture=architecture, **settings))


def trained(directory: Path, kind: str) -> formats.Loaded:
    """A base with a new head, and adapters that were moved from where they begin."""
    loaded = formats.load(directory, runtime=cpu(), dtype=torch.float32)
    labels = 2 if kind == "span" else 3
    pooling = "mean" if loaded.hf_config.get("classifier_pooling") == "mean" else "cls"
    head = heads.fresh(loaded.model, kind, labels, seed=1, pooling=pooling)
    before = ours(loaded.model)
    made = lora.attach(loaded.model, LoraOptions(rank=3), seed=1)
    assert torch.equal(ours(loaded.model), before), "an adapter that was just attached changes no logit"
    head.requires_grad_(True)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for layer in made.values():
            layer.b.normal_(0.0, 0.3, generator=generator)
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    assert (ours(loaded.model) - before).abs().max() > 0.05
    return loaded


def tuned(directory: Path, adapter: Path, kind: str) -> Any:
    """Load a base and an adapter with peft; every warning of peft is an error."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    labels = {} if kind == "span" else {"num_labels": 3}
    made = getattr(transformers, f"AutoModelFor{AUTO[kind]}").from_pretrained(directory, **labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", FutureWarning)
        return peft.PeftModel.from_pretrained(made, adapter).eval()


@pytest.mark.parametrize(("family", "architecture", "kind", "settings"), CASES)
def test_peft_computes_what_we_do(
    family: str, architecture: str, kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """A pooler or a transform that is left behind, a prefix of another class, pooling that the base's config denies."""
    directory = base(tmp_path / "base", family, architecture, settings)
    loaded = trained(directory, kind)
    adapters.save(tmp_path / "a", loaded.model, base=directory, about=NAMED)
    expected = theirs(tuned(directory, tmp_path / "a", kind))
    close(kind, ours(loaded.model), expected)
    again = open_path(tmp_path / "a").load_whole(runtime=cpu())
    assert (again.kind, again.hf_config["id2label"]) == (kind, NAMED["id2label"])
    close(kind, ours(again.model), expected)
    notes: list[str] = []
    assert heads.of(open_path(tmp_path / "a").load(runtime=cpu(), on_note=notes.append)[0]) is None
    assert notes[-1].endswith("the head of its task is not read"), "embed and generate need none"


@pytest.mark.parametrize(("family", "architecture", "kind", "settings"), [CASES[0], CASES[4], CASES[-2]])
def test_merged_it_is_the_whole_model(
    family: str, architecture: str, kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The directory that --merge writes is the class of the task, with its labels; a GGUF file has no place for it."""
    import transformers

    directory = base(tmp_path / "base", family, architecture, settings)
    adapters.save(tmp_path / "a", trained(directory, kind).model, base=directory, about={**NAMED, "tfcli": {"x": 1}})
    expected = theirs(tuned(directory, tmp_path / "a", kind))
    for source, merge in ((directory, tmp_path / "a"), (tmp_path / "a", None)):
        out = tmp_path / f"out-{merge is None}"
        convert.convert(source, out, to="hf", merge=merge)
        auto = getattr(transformers, f"AutoModelFor{AUTO[kind]}")
        again, info = auto.from_pretrained(out, output_loading_info=True)
        assert not any(info.values()), info
        again.config.pad_token_id = 0
        close(kind, theirs(again.eval()), expected)
        assert again.config.id2label == {0: "no", 1: "yes", 2: "so"}
        assert json.loads((out / "config.json").read_text())["tfcli"] == {"x": 1}
    if family == "qwen3":
        with pytest.raises(UserError, match="has a task head, which a GGUF file cannot hold"):
            convert.convert(directory, tmp_path / "m.gguf", to="gguf", merge=tmp_path / "a")


@pytest.mark.parametrize(("family", "architecture"), [("bert", "BertModel"), ("modernbert", "ModernBertForMaskedLM")])
def test_what_peft_trained_is_read(family: str, architecture: str, tmp_path: Path) -> None:
    """PEFT saves only the classifier of a head: the part before it is the base's."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    directory = base(tmp_path / "base", family, architecture, {})
    made = transformers.AutoModelForSequenceClassification.from_pretrained(directory, num_labels=4)
    options = {"exclude_modules": ["pooler.dense", "head.dense"], "target_modules": "all-linear"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = peft.get_peft_model(made, peft.LoraConfig(task_type="SEQ_CLS", r=2, **options)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path / "a")
    settings = json.loads((tmp_path / "a" / adapters.CONFIG).read_text())
    assert settings["modules_to_save"] == ["classifier", "score"]
    path = tmp_path / "a" / adapters.CONFIG
    path.write_text(json.dumps({**settings, "base_model_name_or_path": str(directory)}))
    loaded = open_path(tmp_path / "a").load_whole(runtime=cpu())
    close("sequence", ours(loaded.model), theirs(model))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Another base, one that does not exist, an incomplete head, and tensors that belong to no head."""
    directory = base(tmp_path / "base", "bert", "BertModel", {})
    adapters.save(tmp_path / "a", trained(directory, "sequence").model, base=directory, about=NAMED)
    other = write(tmp_path / "other", foreign("bert", seed=1))
    small = write(tmp_path / "small", foreign("bert", hidden_size=16))
    for path, message in ((other, "its norms are different"), (small, "here 16 x 16")):
        with pytest.raises(UserError, match=f"an adapter for another model: .*{message}.*names .*base as its base"):
            adapters.put_on(formats.load(path, runtime=cpu()), tmp_path / "a")
    from safetensors.torch import load_file, save_file

    tensors, file = load_file(tmp_path / "a" / adapters.WEIGHTS), tmp_path / "a" / adapters.WEIGHTS
    headless = {name: value for name, value in tensors.items() if ".classifier." not in name}
    broken = {
        "lacks base_model.model.classifier.weight, the head": headless,
        "nor parts of a head: base_model.model.lm_head.w": {**tensors, "base_model.model.lm_head.w": torch.zeros(2)},
        "classifier.bias is 5, here 3": {**tensors, "base_model.model.classifier.bias": torch.zeros(5)},
    }
    for message, changed in broken.items():
        save_file(changed, file)
        with pytest.raises(UserError, match=message):
            open_path(tmp_path / "a").load_whole(runtime=cpu())
    (tmp_path / "a" / adapters.TASK).write_text("[]")
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"task\.json is a JSON list"):
        open_path(tmp_path / "a").load_whole(runtime=cpu())
    directory.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"which does not exist .*put the path of its base into.*--merge"):
        open_path(tmp_path / "a").load_whole(runtime=cpu())


def test_the_head_is_no_part_of_the_fingerprint(tmp_path: Path) -> None:
    """Catches an adapter that is refused because its base now has a head with a norm, or has lost it."""
    directory = base(tmp_path / "base", "modernbert", "ModernBertForMaskedLM", {})
    loaded = formats.load(directory, runtime=cpu())
    before = adapters.fingerprint(loaded.model)
    heads.detach(loaded.model)
    assert adapters.fingerprint(loaded.model) == before
