"""`dfs doctor` tells the truth about this machine, and needs only torch for it."""

import json
import subprocess
import sys

import pytest
import torch

from dfs_engine import backend, doctor


def test_report_is_json_and_names_every_backend_and_op():
    report = json.loads(json.dumps(doctor.report()))
    assert set(report["backends"]["cpu"]) == set(backend.BACKENDS)
    assert report["backends"]["cpu"]["aten"] is None
    assert set(report["auto"]["cpu"]) == set(backend.OPS)
    assert report["versions"]["torch"] == torch.__version__
    assert report["cpu"]["threads"] == torch.get_num_threads()
    assert report["libraries"]["oneDNN"]


def test_missing_package_and_unusable_backend_are_said_with_the_reason(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    reason = "no compiler was found on this machine"
    usable = backend.unavailable_reason
    monkeypatch.setattr(
        backend, "unavailable_reason", lambda name, device="cpu": reason if name == "cpp" else usable(name, device)
    )
    text = doctor.format_report(doctor.report())
    assert "no-such-package not installed" in text
    assert f"not usable: {reason}" in text


@pytest.mark.parametrize("name", ["aten", "reference"])
def test_auto_follows_the_environment_variable(monkeypatch, name):
    monkeypatch.setenv("DFS_BACKEND", name)
    report = doctor.report()
    assert set(report["auto"]["cpu"].values()) == {name}
    assert report["environment"]["DFS_BACKEND"]["value"] == name


def test_a_bad_environment_variable_is_reported_and_does_not_raise(monkeypatch):
    monkeypatch.setenv("DFS_BACKEND", "atenn")
    assert "Did you mean 'aten'?" in doctor.format_report(doctor.report())


def test_doctor_runs_with_torch_alone():
    code = (
        "import sys\n"
        "for name in ('torchvision', 'timm', 'transformers', 'accelerate', 'jsonargparse', 'sklearn', 'tqdm', 'rich'):\n"
        "    sys.modules[name] = None\n"
        "from dfs_engine import doctor\n"
        "print(doctor.format_report(doctor.report()))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "Backends on cpu" in output
