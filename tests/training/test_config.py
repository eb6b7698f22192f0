import pytest

from dfs_engine.data import DataConfig
from dfs_engine.methods import list_methods, section_of
from dfs_engine.training.build import build_model, input_shape
from dfs_engine.training.config import ModelConfig, OptimConfig, TrainConfig


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ModelConfig(name="vgg8_64"), r"model.name: expected one of .*vgg7_64.*got 'vgg8_64'. Did you mean"),
        (lambda: ModelConfig(variant="dsf"), r"model.variant: expected one of .* Did you mean 'dfs'"),
        (lambda: ModelConfig(backend="cuda"), r"model.backend: expected one of .*triton"),
        (lambda: ModelConfig(beta=1.5), r"model.beta: expected .*1\.5"),
        (lambda: ModelConfig(exit_gradient="hole"), r"model.exit_gradient: .* Did you mean 'whole'"),
        (lambda: OptimConfig(lr=-1.0), r"optim.lr: expected a number >= 0, got -1.0"),
        (lambda: OptimConfig(lr=float("nan")), r"optim.lr: expected a number >= 0, got nan"),
        (lambda: OptimConfig(schedule="cosin"), r"optim.schedule: .* Did you mean 'cosine'"),
        (lambda: OptimConfig(milestones=(3,)), r"optim.milestones: expected none with optim.schedule=cosine"),
        (lambda: OptimConfig(schedule="multistep", milestones=(5, 3)), r"optim.milestones: expected rising epochs"),
        (lambda: OptimConfig(schedule="multistep", milestones=(0,)), r"optim.milestones: expected rising epochs"),
        (lambda: OptimConfig(nesterov=True, momentum=0), r"optim.nesterov: expected optim.momentum > 0"),
        (lambda: OptimConfig(name="adam"), r"optim.name: expected one of sgd, adamw, got 'adam'. Did you mean 'adamw'"),
        (lambda: OptimConfig(name="adamw", nesterov=True), r"optim.nesterov: expected optim.name=sgd, got adamw"),
        (
            lambda: OptimConfig(name="adamw", adam_beta2=1.0),
            r"optim.adam_beta2: expected a number in \[0, 1\), got 1.0",
        ),
        (lambda: OptimConfig(adam_eps=-1.0), r"optim.adam_eps: expected a number >= 0"),
        (lambda: TrainConfig(epochs=0), r"epochs: expected a number >= 1, got 0"),
        (lambda: TrainConfig(batch_size=0), r"batch_size: expected a number >= 1"),
        (lambda: TrainConfig(num_threads=0), r"num_threads: expected a number >= 1"),
        (lambda: TrainConfig(precision="bf17"), r"precision: .* Did you mean 'bf16'"),
        (lambda: TrainConfig(method="joined"), r"method: expected one of bdl1, .*joint"),
        (lambda: TrainConfig(resume=True), r"resume: expected run_dir .*--run_dir"),
        (lambda: TrainConfig(epochs=2, optim=OptimConfig(warmup_epochs=2)), r"optim.warmup_epochs: .*epochs=2"),
    ],
)
def test_wrong_values_name_field_and_remedy(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_frozen():
    with pytest.raises(AttributeError):
        TrainConfig().epochs = 3  # type: ignore[misc]


def plain_tuples(values: dict) -> dict:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def test_to_dict_is_plain_and_rebuilds():
    config = TrainConfig(
        model=ModelConfig(beta=0.3, options={"width": 8}),
        optim=OptimConfig(schedule="multistep", milestones=(1, 2)),
        data=DataConfig(name="synthetic", flip=True),
        epochs=4,
    )
    values = config.to_dict()
    assert values["optim"]["milestones"] == [1, 2]
    optim = values.pop("optim")
    rebuilt = TrainConfig(
        **{
            **values,
            "model": ModelConfig(**values["model"]),
            "data": DataConfig(**values["data"]),
            **{
                name: type(getattr(config, name))(**plain_tuples(values[name]))
                for name in {section_of(method) for method in list_methods()} & values.keys()
            },
            "optim": OptimConfig(**{**optim, "milestones": tuple(optim["milestones"])}),
        }
    )
    assert rebuilt == config


def test_options_of_the_family_reach_the_model():
    config = ModelConfig(name="vgg7_64", options={"width": 3, "in_channels": 1})
    model = build_model(config, num_classes=4)
    assert model.get_config()["width"] == 3
    assert input_shape(config) == (1, 32, 32)
    with pytest.raises(TypeError, match="widht"):
        build_model(ModelConfig(options={"widht": 3}), num_classes=4)
    with pytest.raises(TypeError, match="beta"):  # said twice
        build_model(ModelConfig(options={"beta": 0.3}), num_classes=4)
