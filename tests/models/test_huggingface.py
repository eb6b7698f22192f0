"""The BERT family as transformers' own: against the originals, in folders, by Auto classes, Trainer and pipeline."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dfs_engine import create_model, load_model, save_model
from dfs_engine.inference import EarlyExit, MaxProbability
from dfs_engine.models.official import to_official_state_dict
from dfs_engine.validate.tolerances import assert_close

transformers = pytest.importorskip("transformers")
from dfs_engine.models import huggingface  # noqa: E402  (needs transformers)

ROOT = Path(__file__).parents[2]
TOKENS, CLASSES, WORDS = 7, 3, 44
BERT = {
    "vocab_size": WORDS,
    "hidden_size": 15,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 22,
    "max_position_embeddings": 20,
    "initializer_range": 0.2,
}
CONFIGS = {
    "bert": BERT,
    "distilbert": {
        "vocab_size": WORDS,
        "dim": 15,
        "n_layers": 3,
        "n_heads": 3,
        "hidden_dim": 22,
        "max_position_embeddings": 20,
        "initializer_range": 0.2,
    },
    "electra": BERT | {"embedding_size": 9, "num_attention_heads": 5},
    "roberta": BERT | {"pad_token_id": 1},
}
EVERY = pytest.mark.parametrize("name", CONFIGS)
RELATIVES = pytest.mark.parametrize("name", ["distilbert", "electra", "roberta"])


def make(name, variant="dfs", num_classes=CLASSES, dtype=torch.float32, **options):
    return create_model(
        name, num_classes=num_classes, variant=variant, dtype=dtype, **{"config": CONFIGS[name]} | options
    )


def batch(name):
    """Sentences of 7, 2 and 4 words, padded."""
    lengths = torch.tensor([TOKENS, 2, 4])
    is_word = torch.arange(TOKENS) < lengths[:, None]
    padding = CONFIGS[name].get("pad_token_id", 0)
    ids = torch.where(is_word, torch.randint(2, WORDS, (3, TOKENS)), padding)
    return {"input_ids": ids, "attention_mask": is_word.long()}


def stock_of(model):
    """transformers' model with the same weights, and the last exit's head."""
    config = copy.deepcopy(model.config)
    config.return_dict = True
    stock = model.stock_class(config).to(model.dtype)
    parts = model.take_apart(stock)
    first = model.blocks[0]
    parts.embeddings.load_state_dict(first.embeddings.state_dict())
    if parts.projection is not None:
        parts.projection.load_state_dict(first.projection.state_dict())
    for layer, block in zip(parts.layers, model.blocks, strict=True):
        layer.load_state_dict(block.layer.state_dict())
    parts.exit.load_state_dict(model.exits[-1].state_dict())
    return stock.train(model.training)


@EVERY
@pytest.mark.parametrize("variant", ["dense", "dfs"])
def test_hidden_states_and_logits_are_transformers(name, variant):
    model = make(name, variant, dtype=torch.float64).eval()
    stock, inputs = stock_of(model), batch(name)
    logits, features = model(**inputs, return_features=True)
    expected = stock(**inputs, output_hidden_states=True)
    for index, (feature, hidden) in enumerate(zip(features, expected.hidden_states[1:], strict=True)):
        assert_close(f"hidden state {index}", feature, hidden)
    assert_close("last logits", logits[-1], expected.logits)
    assert_close("without features", model(**inputs)[-1], expected.logits)


@RELATIVES
def test_an_exit_is_transformers_head(name):
    """Behind each hidden state, with the exit's own weights."""
    model = make(name, dtype=torch.float64).eval()
    inputs, stock = batch(name), stock_of(model)
    hidden = stock(**inputs, output_hidden_states=True).hidden_states[1:]
    for index, (exit, logits) in enumerate(zip(model.exits, model(**inputs), strict=True)):
        model.take_apart(stock).exit.load_state_dict(exit.state_dict())
        if name == "distilbert":
            expected = stock.classifier(stock.pre_classifier(hidden[index][:, 0]).relu())
        else:
            expected = stock.classifier(hidden[index])
        assert_close(f"logits {index}", logits, expected)


@RELATIVES
def test_dense_trains_as_transformers_does(name):
    model = make(name, "dense", dtype=torch.float64).eval()
    stock, inputs, labels = stock_of(model), batch(name), torch.randint(CLASSES, (3,))
    F.cross_entropy(model(**inputs)[-1], labels).backward()
    stock(**inputs, labels=labels).loss.backward()
    parts = model.take_apart(stock)
    pairs = [(model.blocks[0].embeddings, parts.embeddings), (model.exits[-1], parts.exit)]
    pairs += [(block.layer, layer) for block, layer in zip(model.blocks, parts.layers, strict=True)]
    largest = max(parameter.grad.abs().max().item() for parameter in model.parameters() if parameter.grad is not None)
    for mine, theirs in pairs:
        for (parameter_name, left), right in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert_close(parameter_name, left.grad, right.grad, scale=1e-2 * largest)


@RELATIVES
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
def test_dfs_and_split_are_detach(name, reference):
    """With dropout, where it is drawn for as many numbers in each: not in the last layer."""
    inputs, labels, seed = batch(name), torch.randint(CLASSES, (3,)), int(torch.randint(2**31, ()))
    detach = make(name, "detach", dtype=torch.float64, reference=reference).train()
    state = copy.deepcopy(detach.state_dict())

    def gradients(model):
        model.load_state_dict(state)
        for module in model.blocks[-1].modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.manual_seed(seed)
        model(**inputs, labels=labels).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(detach)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for variant in ("split", "dfs"):
        backend = {"backend": "aten"} if variant == "dfs" else {}
        found = gradients(make(name, variant, dtype=torch.float64, reference=reference, **backend).train())
        for parameter, gradient in found.items():
            assert_close(f"{variant} {parameter}", gradient, expected[parameter], scale=1e-2 * largest)


@pytest.mark.parametrize("name", ["electra", "roberta"])
def test_dropout_before_the_pooler_too(name):
    model = make(name, "dense").train()
    exit, feature = model.exits[0], torch.randn(2, TOKENS, 15)
    exit.dropout.p = 1.0
    torch.testing.assert_close(exit.feature((feature,))[0], exit.activation(exit.pooler.bias).expand(2, -1))


@EVERY
def test_it_starts_from_a_pretrained_folder(name, tmp_path):
    stock = make(name).stock_class(type(make(name).config).__base__(**CONFIGS[name], num_labels=CLASSES)).eval()
    stock.save_pretrained(tmp_path)
    model, inputs = create_model(name, num_classes=CLASSES, pretrained=tmp_path).eval(), batch(name)
    assert_close("last logits", model(**inputs)[-1], stock(**inputs).logits)
    assert create_model(**model.get_config()).load_state_dict(model.state_dict())
    others = create_model(name, num_classes=CLASSES + 2, pretrained=tmp_path)
    assert others(**inputs)[-1].shape == (3, CLASSES + 2)


@EVERY
def test_folder_and_auto_classes(name, tmp_path):
    model, inputs = make(name, beta=0.3, reference=False).eval(), batch(name)
    model.config.id2label = {0: "bad", 1: "fair", 2: "good"}
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"dfs_{name}"
    card = (tmp_path / "README.md").read_text()
    assert f"# {name} with 3 exits" in card
    assert "pipeline_tag: text-classification" in card
    for read in (type(model), transformers.AutoModelForSequenceClassification):
        loaded, info = read.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values())
        assert type(loaded) is type(model)
        assert loaded.get_config() == model.get_config()
        assert loaded.config.id2label == {0: "bad", 1: "fair", 2: "good"}
        output = loaded(**inputs)
        assert all(torch.equal(*pair) for pair in zip(output.exit_logits, model(**inputs), strict=True))
        assert torch.equal(output.logits, output.exit_logits[-1])
    assert isinstance(transformers.AutoConfig.from_pretrained(tmp_path), type(model.config))


def test_a_model_card_of_ones_own_stays(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    make("bert").save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_every_exit_of_a_saved_model_is_a_start(tmp_path):
    model, inputs = make("bert").eval(), batch("bert")
    model.save_pretrained(tmp_path)
    other = create_model("bert", num_classes=CLASSES, beta=0.7, pretrained=tmp_path)
    assert all(module.training for module in other.modules())
    assert other.get_config()["beta"] == 0.7
    assert all(torch.equal(*pair) for pair in zip(other.eval()(**inputs), model(**inputs), strict=True))


def test_a_folder_of_transformers_is_not_taken_for_ours(tiny_bert):
    with pytest.raises(ValueError, match=r"got one of model_type='bert'. .* create_model\('bert', pretrained=FOLDER\)"):
        huggingface.MultiExitBert.from_pretrained(tiny_bert)


def test_another_type_is_named(tiny_bert):
    with pytest.raises(ValueError, match=r"expected a roberta, got model_type='bert'. Its name here is bert: create_"):
        create_model("roberta", pretrained=tiny_bert)


def test_roberta_reads_two_tokens_less_than_it_has_positions():
    model = make("roberta").eval()
    assert model.input_shape == (18,)
    model(torch.full((1, 18), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, 19), 5))


@RELATIVES
def test_no_published_checkpoints(name):
    with pytest.raises(ValueError, match=f"got a MultiExit.* '{name}', of which there are no published checkpoints"):
        to_official_state_dict(make(name))


@EVERY
def test_weight_file_and_early_exit(name, tmp_path):
    """The package's own ways with a model go with these too."""
    model, inputs = make(name).eval(), batch(name)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path).eval()
    assert type(loaded) is type(model)
    logits = loaded(**inputs)
    assert all(torch.equal(*pair) for pair in zip(logits, model(**inputs), strict=True))
    prediction = EarlyExit(loaded, MaxProbability(0.0)).predict(**inputs)
    assert prediction.exits.tolist() == [0, 0, 0]
    assert torch.equal(prediction.classes, logits[0].argmax(-1))


@EVERY
def test_gradient_checkpointing_changes_nothing_but_memory(name):
    inputs, labels, seed = batch(name), torch.randint(CLASSES, (3,)), int(torch.randint(2**31, ()))
    model = make(name).train()
    saved = {}

    def step():
        saved_bytes = []
        torch.manual_seed(seed)
        model.zero_grad()
        pack = lambda tensor: saved_bytes.append(tensor.nbytes) or tensor  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(**inputs, labels=labels)
        output.loss.backward()
        return sum(saved_bytes), [output.loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    saved["off"], expected = step()
    model.gradient_checkpointing_enable()
    assert model.is_gradient_checkpointing
    saved["on"], found = step()
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    model.gradient_checkpointing_disable()
    saved["off again"], _ = step()
    assert saved["on"] < 0.7 * saved["off"] == 0.7 * saved["off again"]


def test_word_embeddings_can_be_resized():
    model = make("bert")
    model.resize_token_embeddings(WORDS + 5)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == WORDS + 5
    assert model.get_config()["config"]["vocab_size"] == WORDS + 5
    model(torch.full((1, 3), WORDS + 4))


class Items(torch.utils.data.Dataset):
    """Sentences of one word eight times, which is of the second half of the vocabulary where the label is 1."""

    def __init__(self, num_items):
        self.items = []
        for index in range(num_items):
            word = int(torch.randint(4, 24, ())) + 20 * (index % 2)
            ids = torch.tensor([2, *[word] * 6, 3])
            self.items.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": index % 2})

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def accuracy(prediction):
    return {"accuracy": float((np.argmax(prediction.predictions, -1) == prediction.label_ids).mean())}


@pytest.fixture
def train(tmp_path):
    """Trains with transformers' `Trainer`, and returns it."""
    pytest.importorskip("accelerate")

    def train(model, *, data=None, compute_loss_func=None, processing_class=None, **options):
        settings = {"per_device_train_batch_size": 8, "learning_rate": 5e-3, "num_train_epochs": 2} | options
        arguments = transformers.TrainingArguments(
            str(tmp_path / "runs"), use_cpu=True, report_to=[], disable_tqdm=True, logging_steps=1, **settings
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=data or Items(96),
            eval_dataset=Items(40),
            compute_metrics=accuracy,
            compute_loss_func=compute_loss_func,
            processing_class=processing_class,
        )
        trainer.train()
        return trainer

    return train


def test_trainer_then_folder_then_pipeline(train, tiny_bert, tmp_path):
    """A BERT is fine-tuned from a pretrained folder, the best of its checkpoints kept, saved, read and asked."""
    labels = {"id2label": {0: "low", 1: "high"}, "label2id": {"low": 0, "high": 1}}
    model = create_model("bert", num_classes=2, pretrained=tiny_bert, config=labels)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    trainer = train(
        model,
        processing_class=tokenizer,
        num_train_epochs=4,
        learning_rate=2e-2,
        eval_strategy="epoch",
        save_strategy="epoch",
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    best = Path(trainer.state.best_model_checkpoint)
    kept = huggingface.MultiExitBert.from_pretrained(best)
    for name, value in model.state_dict().items():
        assert torch.equal(value, kept.state_dict()[name]), name
    assert trainer.evaluate()["eval_accuracy"] == trainer.state.best_metric > 0.8

    folder = tmp_path / "saved"
    trainer.save_model(folder)
    assert {"config.json", "model.safetensors", "README.md"} <= {path.name for path in folder.iterdir()}
    # Another process, which has not seen the model before; without network.
    sentences = ["w3 w5 w1", "w27 w33 w39 w21 w21", "w31"]
    code = f"""
import dfs_engine.models.huggingface, json
from transformers import pipeline
classify = pipeline("text-classification", model={str(folder)!r}, device="cpu")
print(json.dumps(classify({sentences})))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout.splitlines()[-1])
    inputs = tokenizer(sentences, padding=True, return_tensors="pt")
    expected = model.eval().cpu()(**inputs, return_dict=True).logits.softmax(-1)
    for answer, row in zip(answers, expected, strict=True):
        assert answer["label"] == model.config.id2label[int(row.argmax())]
        assert answer["score"] == pytest.approx(row.max().item(), abs=1e-5)


def test_trainer_resumes_from_its_checkpoint(train, tmp_path):
    data, first = Items(24), make("roberta", num_classes=2, config=CONFIGS["roberta"])
    state = copy.deepcopy(first.state_dict())
    whole = train(first, data=data, num_train_epochs=2, save_strategy="epoch")
    again = make("roberta", num_classes=2, config=CONFIGS["roberta"])
    again.load_state_dict(state)
    resumed = transformers.Trainer(model=again, args=whole.args, train_dataset=data, eval_dataset=Items(8))
    resumed.train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-3"))
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, msg=name)


def test_trainer_with_gradient_checkpointing(train):
    data, model = Items(16), make("bert", num_classes=2)
    state = copy.deepcopy(model.state_dict())
    expected = train(model, data=data, num_train_epochs=1).model.state_dict()
    model.load_state_dict(state)
    trainer = train(model, data=data, num_train_epochs=1, gradient_checkpointing=True)
    assert trainer.model.is_gradient_checkpointing
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


@pytest.mark.parametrize("return_dict", [None, True])
def test_label_smoothing_of_all_exits(train, return_dict):
    """One batch in two pieces: the step of cross entropy with label smoothing, of every exit, on the whole batch."""
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0)
    data, model = Items(6), make("bert", num_classes=2, config=BERT | off)
    model.config.return_dict = return_dict
    other = copy.deepcopy(model)
    train(
        model,
        data=data,
        compute_loss_func=huggingface.exits_loss(label_smoothing=0.2),
        per_device_train_batch_size=3,
        gradient_accumulation_steps=2,
        num_train_epochs=1,
        optim="sgd",
        learning_rate=0.1,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
    )
    inputs = {name: torch.stack([item[name] for item in data]) for name in ("input_ids", "attention_mask")}
    labels = torch.tensor([item["labels"] for item in data])
    exits = other(**inputs, return_dict=False)
    sum(F.cross_entropy(logits, labels, label_smoothing=0.2) for logits in exits).backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    for name, value in other.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_importing_the_package_does_not_import_transformers():
    code = (
        "import sys, dfs_engine; print(sorted({'transformers', 'huggingface_hub', 'safetensors'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
