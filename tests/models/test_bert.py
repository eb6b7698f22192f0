"""BERT: transformers' own function, the routing of its hidden states, and how transformers' users call it."""

import copy
import importlib
import inspect
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dfs_engine import create_model
from dfs_engine.models.pretrained import pretrained_folder
from dfs_engine.validate.tolerances import Tolerance, assert_close

transformers = pytest.importorskip("transformers")

SENTENCES, TOKENS, CLASSES = 3, 7, 5
CONFIG = {
    "vocab_size": 30,
    "hidden_size": 15,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 22,
    "max_position_embeddings": 11,
    "initializer_range": 0.2,
}


def make(variant="dfs", state=None, num_classes=CLASSES, dtype=torch.float64, config=CONFIG, **options):
    model = create_model("bert", num_classes=num_classes, variant=variant, dtype=dtype, config=config, **options)
    if state is not None:
        model.load_state_dict(state)
    return model


def batch(lengths=(TOKENS, 2, 4), num_classes=CLASSES):
    """What a tokenizer makes of pairs of sentences, padded to the longest, with labels."""
    lengths = torch.tensor(lengths)
    shape = (len(lengths), int(lengths.max()))
    positions = torch.arange(shape[1])
    return {
        "input_ids": torch.randint(CONFIG["vocab_size"], shape),
        "attention_mask": (positions < lengths[:, None]).long(),
        "token_type_ids": (positions >= lengths[:, None] // 2).long(),
        "labels": torch.randint(num_classes, shape[:1]) if num_classes > 1 else torch.randn(shape[:1]),
    }


def inputs_of(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def stock_of(model):
    """transformers' model with the same weights, and the last exit's head."""
    config = transformers.BertConfig(**CONFIG, num_labels=model.num_classes)
    stock = transformers.BertForSequenceClassification(config).to(next(model.parameters()).dtype)
    bert, last = stock.bert, model.exits[-1]
    bert.embeddings.load_state_dict(model.blocks[0].embeddings.state_dict())
    for layer, block in zip(bert.encoder.layer, model.blocks, strict=True):
        layer.load_state_dict(block.layer.state_dict())
    bert.pooler.dense.load_state_dict(last.pooler.state_dict())
    stock.classifier.load_state_dict(last.classifier.state_dict())
    return stock.train(model.training)


@pytest.mark.parametrize("variant", ["dense", "detach", "split", "dfs"])
def test_every_exit_is_transformers_layer_pooler_and_classifier(variant):
    model = make(variant).eval()
    stock = stock_of(model)
    inputs = inputs_of(batch())
    logits, features = model(**inputs, return_features=True)
    expected = stock(**inputs, output_hidden_states=True)
    for index, (exit, hidden) in enumerate(zip(model.exits, expected.hidden_states[1:], strict=True)):
        assert_close(f"hidden state {index}", features[index], hidden)
        pooled = torch.tanh(F.linear(hidden[:, 0], exit.pooler.weight, exit.pooler.bias))
        assert_close(f"logits {index}", logits[index], F.linear(pooled, exit.classifier.weight, exit.classifier.bias))
    assert_close("last logits", logits[-1], expected.logits)


def test_dense_trains_as_transformers_does():
    model = make("dense").eval()
    stock, inputs = stock_of(model), batch()
    F.cross_entropy(model(**inputs_of(inputs))[-1], inputs["labels"]).backward()
    stock(**inputs).loss.backward()
    pairs = [(model.blocks[0].embeddings, stock.bert.embeddings), (model.exits[-1].classifier, stock.classifier)]
    pairs += [(block.layer, layer) for block, layer in zip(model.blocks, stock.bert.encoder.layer, strict=True)]
    largest = max(parameter.grad.abs().max().item() for parameter in model.parameters() if parameter.grad is not None)
    for mine, theirs in pairs:
        for (name, left), right in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            assert_close(name, left.grad, right.grad, scale=1e-2 * largest)


def test_padding_changes_nothing():
    model = make().eval()
    inputs = inputs_of(batch())
    together = model(**inputs)
    for row, length in enumerate(inputs["attention_mask"].sum(1).tolist()):
        alone = model(
            inputs["input_ids"][row, None, :length], token_type_ids=inputs["token_type_ids"][row, None, :length]
        )
        for index, logits in enumerate(alone):
            assert_close(f"logits {index}", logits[0], together[index][row])


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("reference", [True, False], ids=["reference", "no-reference"])
@pytest.mark.parametrize("exit_gradient", ["own", "whole"])
def test_dfs_and_split_are_detach_with_masks_and_dropout(beta, reference, exit_gradient):
    options = {"beta": beta, "reference": reference, "exit_gradient": exit_gradient}
    inputs, seed = batch(), int(torch.randint(2**31, ()))

    def step(model):
        # The same dropout; the last layer of dfs would draw for fewer tokens.
        torch.manual_seed(seed)
        for module in model.blocks[-1].modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        output = model(**inputs)
        output.loss.backward()
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        return {f"logits {index}": logits for index, logits in enumerate(output.exit_logits)}, grads

    detach = make("detach", **options).train()
    state = copy.deepcopy(detach.state_dict())
    expected, truth = step(detach)
    largest = max(grad.abs().max().item() for grad in truth.values())
    for variant in ("split", "dfs"):
        extra = {"backend": "aten"} if variant == "dfs" else {}
        logits, grads = step(make(variant, state, **options, **extra).train())
        for name, value in logits.items():
            assert_close(name, value, expected[name])
        for name, grad in grads.items():
            assert_close(name, grad, truth[name], scale=1e-2 * largest)


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_backward_computes_the_slices_only(beta):
    """Of query, key and value together, and of each exit's pooler on the first tokens; counted at run time.

    In the last layer all but keys and values for the first tokens alone. Attention is asked for as matrix products:
    what torch counts for the CPU's fused kernel depends on the release (nothing before 2.15).
    """
    counts, inputs = {}, batch()
    for variant in ("detach", "dfs"):
        model = make(variant, beta=beta, backend="aten" if variant == "dfs" else None).eval()
        with sdpa_kernel(SDPBackend.MATH):
            loss = model(**inputs).loss
        with FlopCounterMode(display=False) as counter:
            loss.backward()
        counts[variant] = counter.get_total_flops()
    width = CONFIG["hidden_size"]
    shared = round(beta * width)
    rows, num_forks = SENTENCES * TOKENS, CONFIG["num_hidden_layers"] - 1
    of_projection = 2 * rows * width * (width - shared)
    of_exit = 2 * SENTENCES * width * shared
    last_query = 2 * (rows * 2 * width**2 - SENTENCES * (width**2 + width * shared))
    behind_it = 2 * 2 * (rows - SENTENCES) * (width**2 + 2 * width * CONFIG["intermediate_size"])
    attention = 2 * 4 * (rows - SENTENCES) * TOKENS * width  # either gradient of both its products
    saved = (3 * num_forks - 1) * of_projection + num_forks * of_exit + last_query + behind_it + attention
    assert counts["detach"] - counts["dfs"] == saved


def test_query_key_and_value_of_a_split_state_are_one_product(monkeypatch):
    from dfs_engine.nn import linear

    rows = []
    stock = linear.partitioned_linear

    def spy(input, weight, *args, **kwargs):
        rows.append(len(weight))
        return stock(input, weight, *args, **kwargs)

    monkeypatch.setattr(linear, "partitioned_linear", spy)
    make()(**batch())
    width = CONFIG["hidden_size"]
    assert rows.count(3 * width) == CONFIG["num_hidden_layers"] - 2
    assert rows.count(2 * width) == 1  # the last layer's query is that of the first token


def test_outputs_as_transformers_gives_them():
    model, inputs = make("dense").eval(), batch()
    assert type(model(inputs["input_ids"])) is list
    output = model(**inputs, return_features=True)
    assert isinstance(output, transformers.modeling_outputs.SequenceClassifierOutput)
    parts = [F.cross_entropy(logits, inputs["labels"]) for logits in output.exit_logits]
    assert_close("loss", output.loss, sum(parts))
    assert torch.equal(output.logits, output.exit_logits[-1])
    assert type(output.hidden_states) is type(output.exit_logits) is tuple
    assert [tuple(hidden.shape) for hidden in output.hidden_states] == [(SENTENCES, TOKENS, 15)] * 3
    asked = model(**inputs_of(inputs), return_dict=True)
    assert asked.loss is None
    assert torch.equal(asked.logits, model(**inputs).logits)
    assert len(asked.exit_logits) == 3
    assert type(model(**inputs, return_dict=False)) is list
    model.config.return_dict = True
    assert torch.equal(model(inputs["input_ids"]).logits, model(inputs["input_ids"], return_dict=False)[-1])
    parameters = inspect.signature(type(model).forward).parameters
    assert {"input_ids", "attention_mask", "token_type_ids", "labels"} <= parameters.keys()  # what a Trainer passes on


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_class_is_a_regression(dtype):
    model, inputs = make(num_classes=1, dtype=dtype), batch(num_classes=1)
    output = model(**inputs)
    expected = sum((logits[:, 0] - inputs["labels"]).square().mean() for logits in output.exit_logits)
    assert_close("loss", output.loss, expected)
    output.loss.backward()


def test_dropout_is_where_transformers_has_it():
    """Each rate alone makes two forward passes differ; classifier_dropout only the logits."""
    off = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"), 0.0)
    inputs = inputs_of(batch())
    for name in off:
        model = make("dense", config=CONFIG | off | {name: 0.5}).train()
        passes = [model(**inputs, return_features=True) for _ in range(2)]
        logits, features = (
            [torch.equal(*pair) for pair in zip(*part, strict=True)] for part in zip(*passes, strict=True)
        )
        assert not any(logits)
        assert any(features) == (name == "classifier_dropout")
        assert all(torch.equal(*pair) for pair in zip(model.eval()(**inputs), model(**inputs), strict=True))


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float32])
def test_autocast(precision):
    inputs = batch()
    detach = make("detach", dtype=torch.float32).eval()
    dfs = make("dfs", detach.state_dict(), dtype=torch.float32).eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
        outputs = [model(**inputs) for model in (dfs, detach)]
    for left, right in zip(outputs[0].exit_logits, outputs[1].exit_logits, strict=True):
        assert left.dtype == right.dtype == precision
    for output in outputs:
        output.loss.backward()
    bound = Tolerance(5e-2, 5e-2) if precision is torch.bfloat16 else Tolerance(1e-4, 1e-4)
    largest = max(parameter.grad.abs().max().item() for parameter in detach.parameters())
    for (name, left), right in zip(dfs.named_parameters(), detach.parameters(), strict=True):
        assert left.grad.dtype == torch.float32
        assert_close(name, left.grad, right.grad, bound, scale=0.1 * largest)


@pytest.mark.slow
def test_compiled_as_one_graph():
    model, inputs = make().eval(), inputs_of(batch())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = [one(**inputs) for one in (compiled, model)]
    grads = [torch.autograd.grad([logits.sin().sum() for logits in one], list(model.parameters())) for one in results]
    largest = max(grad.abs().max().item() for grad in grads[1])
    for left, right in zip(*results, strict=True):
        assert_close("logits", left, right)
    for (name, _), left, right in zip(model.named_parameters(), *grads, strict=True):
        assert_close(name, left, right, scale=1e-2 * largest)


def test_pretrained_folder_gives_transformers_logits(tiny_bert):
    stock = transformers.BertForSequenceClassification.from_pretrained(tiny_bert).eval()
    ids = torch.randint(stock.config.vocab_size, (3, 8))
    model = create_model("bert", num_classes=2, pretrained=tiny_bert).eval()
    assert_close("logits", model(ids)[-1], stock(ids).logits)
    assert "pretrained" not in model.get_config()
    assert create_model(**model.get_config()).load_state_dict(model.state_dict())
    more = create_model("bert", num_classes=3, pretrained=str(tiny_bert), config={"hidden_dropout_prob": 0.3})
    assert more(ids)[-1].shape == (3, 3)
    assert more.get_config()["config"]["hidden_dropout_prob"] == 0.3
    assert torch.equal(more.blocks[2].layer.output.dense.weight, stock.bert.encoder.layer[2].output.dense.weight)
    assert torch.equal(more.exits[-1].pooler.weight, stock.bert.pooler.dense.weight)


def test_pretrained_without_a_head(tiny_bert, tmp_path):
    transformers.BertModel.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    model = create_model("bert", num_classes=4, pretrained=tmp_path)
    stock = transformers.BertModel.from_pretrained(tiny_bert)
    assert torch.equal(model.exits[-1].pooler.weight, stock.pooler.dense.weight)
    assert torch.equal(model.blocks[0].embeddings.word_embeddings.weight, stock.embeddings.word_embeddings.weight)


def test_config_as_object_folder_or_changes(tiny_bert):
    config = transformers.BertConfig(**CONFIG)
    kept = create_model("bert", config=config).get_config()["config"]
    assert config.num_labels == 2  # the caller's is left alone
    assert kept == create_model("bert", config=CONFIG).get_config()["config"]
    assert CONFIG.items() <= kept.items()
    assert create_model("bert", config=tiny_bert).get_config()["config"]["num_hidden_layers"] == 3
    assert create_model("bert", config=tiny_bert / "config.json").input_shape == (20,)


def test_default_is_bert_base_and_the_meta_device_makes_no_weights():
    model = create_model("bert", device="meta")
    assert model.num_exits == 12
    assert model.input_shape == (512,)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    official = 109_482_240 + 10 * 768 + 10  # BertModel, classifier
    assert sum(p.numel() for p in model.parameters()) == official + 11 * (768 * 768 + 768 + 10 * 768 + 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"config": {"hiden_size": 3}}, "config: expected keys of transformers' BertConfig, got hiden_size"),
        ({"config": {"is_decoder": True}}, r"config: expected is_decoder to be False, got True"),
        ({"config": {"problem_type": "multi_label_classification"}}, "config: expected problem_type"),
        ({"config": transformers.DistilBertConfig()}, "config: expected a bert, got model_type='distilbert'. Its name"),
    ],
    ids=["typo", "decoder", "multi-label", "another model"],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("bert", **options)


def test_a_package_that_carries_a_model(tmp_path, monkeypatch):
    package = tmp_path / "some_bert"
    (package / "model" / "1_Pooling").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('it is not to be imported')")
    for folder in (package / "model", package / "model" / "1_Pooling"):
        (folder / "config.json").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    assert pretrained_folder("some-bert") == package / "model"
    assert pretrained_folder(package / "model") == package / "model"


@pytest.mark.parametrize("source", ["no-such-package", "google/bert", "/nowhere", ".", "json"])
def test_no_pretrained_model_there(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"data\.tokenizer: expected a folder with config\.json, or an installed"
    ):
        pretrained_folder(source, "data.tokenizer")


class Items(torch.utils.data.Dataset):
    def __init__(self, num_items):
        self.items = [
            {"input_ids": torch.randint(30, (6,)), "attention_mask": torch.ones(6).long(), "labels": index % 2}
            for index in range(num_items)
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


@pytest.fixture
def make_trainer(tmp_path):
    pytest.importorskip("accelerate")

    def make_trainer(model, **options):
        sizes = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "max_steps": 2, "logging_steps": 1}
        arguments = transformers.TrainingArguments(
            str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, learning_rate=0.01, **sizes
        )
        data = {"train_dataset": Items(8), "eval_dataset": Items(5)}
        return transformers.Trainer(model=model, args=arguments, **data, **options)

    return make_trainer


def tutorial_accuracy(eval_pred):
    """As transformers' tutorials write it."""
    logits, labels = eval_pred
    predictions = np.argmax(logits, axis=-1)
    return {"accuracy": (predictions == labels).mean()}


def logits_by_hand(model, dataset):
    """Logits (num_exits, len(dataset), num_classes) and labels."""
    items = [dataset[index] for index in range(len(dataset))]
    inputs = {name: torch.stack([item[name] for item in items]) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        exits = model.eval()(**inputs, return_dict=False)
    return torch.stack(exits).numpy(), np.array([item["labels"] for item in items])


def test_transformers_trainer_measures_the_last_exit_as_tutorials_do(make_trainer, tiny_bert):
    model = make(num_classes=2, dtype=torch.float32)
    before = copy.deepcopy(model.state_dict())
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert)
    trainer = make_trainer(model, compute_metrics=tutorial_accuracy, processing_class=tokenizer)
    trainer.train()
    assert trainer.state.global_step == 2
    names = ("blocks.0.layer.output.dense.weight", "exits.0.classifier.weight", "exits.2.classifier.weight")
    assert all(not torch.equal(before[name], model.state_dict()[name]) for name in names)
    assert len([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]) == 2

    with torch.no_grad():  # other exits, other answers: so that the accuracy is seen to be the last one's
        model.exits[0].classifier.bias.copy_(torch.tensor([9.0, 0.0]))
        model.exits[1].classifier.bias.copy_(torch.tensor([0.0, 9.0]))
        model.exits[2].classifier.weight.normal_()
    exits, labels = logits_by_hand(model, trainer.eval_dataset)
    metrics = trainer.evaluate()
    assert metrics["eval_accuracy"] == (exits[-1].argmax(-1) == labels).mean()
    loss = sum(F.cross_entropy(torch.from_numpy(exit), torch.from_numpy(labels)).item() for exit in exits)
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-4)
    predictions = trainer.predict(trainer.eval_dataset).predictions
    np.testing.assert_allclose(predictions, exits[-1], rtol=1e-4, atol=1e-5)


def test_transformers_trainer_gives_all_exits_when_asked(make_trainer):
    def accuracy_of_exits(eval_pred):
        (_, exit_logits), labels = eval_pred
        return {f"accuracy_exit{k}": (exit.argmax(-1) == labels).mean() for k, exit in enumerate(exit_logits, start=1)}

    model = make(num_classes=2, dtype=torch.float32)
    trainer = make_trainer(model, compute_metrics=accuracy_of_exits)
    metrics = trainer.evaluate(ignore_keys=[])
    exits, labels = logits_by_hand(model, trainer.eval_dataset)
    for index, exit in enumerate(exits, start=1):
        assert metrics[f"eval_accuracy_exit{index}"] == (exit.argmax(-1) == labels).mean()
    logits, exit_logits = trainer.predict(trainer.eval_dataset, ignore_keys=[]).predictions
    np.testing.assert_allclose(np.stack(exit_logits), exits, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(logits, exit_logits[-1])


def test_transformers_trainer_predicts_without_labels(make_trainer):
    model = make(num_classes=2, dtype=torch.float32)
    model.config.return_dict = True
    trainer = make_trainer(model)
    for item in trainer.eval_dataset.items:
        del item["labels"]
    assert trainer.predict(trainer.eval_dataset).predictions.shape == (5, 2)


def test_official_key_count():
    """The published checkpoint has these tensors and no others: so does the model, under names of its own."""
    model = create_model("bert", device="meta", num_classes=2)
    layers, exits = 12 * 16, 12 * 4
    assert len(model.state_dict()) == 5 + layers + exits
    assert len(list(itertools.chain(*(block.layer.parameters() for block in model.blocks)))) == layers
