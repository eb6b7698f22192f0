"""Models in folders as the Hugging Face Hub has them: weights, config.json and a model card. Needs huggingface_hub."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, PyTorchModelHubMixin, hf_hub_download

from dfs_engine.models.multi_exit import MultiExitModel
from dfs_engine.models.weights import WEIGHTS_FILE, load_model, save_model

_PAPER = "https://arxiv.org/abs/2407.13986"
_TEMPLATE = """---
{{ card_data }}
---

# {{ title }}

A network with {{ num_exits }} exits, trained together by [Deep Feature Surgery]({{ paper }}) (ECCV 2024).
Every exit is a classifier of its own: an easy input can leave at the first that is sure of it.

| | |
|---|---|
{% for name, value in facts.items() %}| {{ name }} | {{ value }} |
{% endfor %}
## Use

```python
{{ code }}
```

## Training and evaluation

What it was trained on, and how accurate each exit is: to be added by who trained it.
"""
_CODE = {
    "dfs_engine": """from dfs_engine.models.hub import HubModel

model = HubModel.from_pretrained("FOLDER_OR_REPOSITORY").model
logits = model.eval()(images)  # list of {num_exits} tensors (N, {num_classes}), shallow to deep""",
    "transformers": """import dfs_engine.models.huggingface  # so that transformers knows the model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("FOLDER_OR_REPOSITORY")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_REPOSITORY")
output = model(**tokenizer(["a sentence"], return_tensors="pt"))
output.logits       # of the last exit
output.exit_logits  # of all {num_exits}, shallow to deep""",
}
_TASKS = {"dfs_engine": "image-classification", "transformers": "text-classification"}


class HubModel(PyTorchModelHubMixin):
    """`save_pretrained`, `push_to_hub` and `from_pretrained` of huggingface_hub for any multi-exit model.

    ``HubModel(model).save_pretrained(folder)`` writes what `save_model` does, config.json and a model card;
    ``HubModel.from_pretrained(folder_or_repository).model`` is the model again, in evaluation mode. With exits attached
    to a backbone, or of a class of one's own, it needs such a model to put the weights in:
    ``HubModel.from_pretrained(folder, model=...)``. A model of the BERT family has these methods itself.

    Attributes:
        model: the `MultiExitModel`.
    """

    def __init__(self, model: MultiExitModel) -> None:
        self.model = model
        self._hub_mixin_config = model.get_config()  # what the mixin writes as config.json

    def _save_pretrained(self, save_directory: Path) -> None:
        save_model(self.model, save_directory)

    @classmethod
    def _from_pretrained(  # releases differ in what they pass on to the download
        cls, *, model_id: str, model: MultiExitModel | None = None, config: Any = None, **options: Any
    ) -> "HubModel":
        file = model_id if Path(model_id).is_dir() else hf_hub_download(model_id, WEIGHTS_FILE, **options)
        loaded = load_model(file, model=model)
        loaded.eval()
        return cls(loaded)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        return _card(self.model, "dfs_engine")


def write_card(model: MultiExitModel, folder: Path) -> None:
    """Writes README.md for a model of transformers, where there is none."""
    if not (folder / "README.md").exists():
        _card(model, "transformers").save(folder / "README.md")


def _card(model: MultiExitModel, library: str) -> ModelCard:
    config = model.get_config()
    facts = {
        "exits": model.num_exits,
        "classes": model.num_classes,
        "parameters": f"{sum(parameter.numel() for parameter in model.parameters()):,}",
        "beta (share of each feature's channels that deeper exits train)": config["beta"],
        "variant": config["variant"],
        "feature referencing": "yes" if config["reference"] else "no",
    }
    data = ModelCardData(
        library_name=library,
        pipeline_tag=_TASKS[library],
        tags=["multi-exit", "early-exit", "deep-feature-surgery", "dfs_engine"],
    )
    code = _CODE[library].format(num_exits=model.num_exits, num_classes=model.num_classes)
    name = config["name"].rpartition(".")[2]
    return ModelCard.from_template(
        data,
        template_str=_TEMPLATE,
        title=f"{name} with {model.num_exits} exits",
        paper=_PAPER,
        num_exits=model.num_exits,
        facts=facts,
        code=code,
    )
