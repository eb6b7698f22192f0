"""`dfs doctor` tells the truth about this machine, and needs only torch for it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfs_engine import backend, doctor

ROOT = Path(__file__).parents[1]


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


def test_the_extension_tells_its_build_and_instruction_set(monkeypatch):
    if backend.unavailable_reason("cpp") is None:
        extension = doctor.report()["extension"]
        assert extension["instructions"] in ("baseline", "avx2", "avx512")
        assert extension["compiler"]
        assert f"  instructions   {extension['instructions']}\n" in doctor.format_report(doctor.report())
    monkeypatch.setattr(backend, "_extension_missing", "no compiler")
    assert doctor.report()["extension"] == {}
    assert "C++ kernels\n  not built" in doctor.format_report(doctor.report())


def test_the_triton_kernels_tell_version_interpreter_and_tables(monkeypatch):
    triton = doctor.report()["triton"]
    assert triton["version"] == (doctor.version_of("triton") or "not installed")
    assert triton["interpreter"].startswith("on" if doctor.kernels.INTERPRETED else "off")
    monkeypatch.setattr(doctor.kernels, "read_tables", lambda: {"NVIDIA H100": {}, "NVIDIA A100": {}})
    assert "  tuned for      NVIDIA H100, NVIDIA A100\n" in doctor.format_report(doctor.report())
    monkeypatch.setattr(doctor.kernels, "read_tables", dict)
    text = doctor.format_report(doctor.report())
    assert "  tuned for      no GPU; auto takes aten on CUDA" in text
    assert "never run on a GPU" in text


def test_auto_on_cuda_goes_by_the_tuned_table(monkeypatch):
    assert doctor._automatic("conv_block", "cuda") == "aten"
    monkeypatch.setattr(doctor.kernels, "gpu_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(doctor.kernels, "read_tables", lambda: {"NVIDIA H100": {}})
    assert doctor._automatic("conv_block", "cuda").startswith("triton where this GPU's tuned table says")
    with backend.use_backend("aten"):
        assert doctor._automatic("conv_block", "cuda") == "aten"


def test_every_environment_variable_of_the_project_is_documented():
    sources = [
        path for folder in ("dfs_engine", "csrc") for path in (ROOT / folder).rglob("*.[chpi]*") if path.is_file()
    ]
    used = set(
        re.findall(
            r"\bDFS_[A-Z_]+\b", "".join(path.read_text(errors="ignore") for path in [*sources, ROOT / "setup.py"])
        )
    )
    used -= {"DFS_X86", "DFS_DISPATCH"}  # macros
    assert used == {name for name in doctor.ENVIRONMENT_VARIABLES if name.startswith("DFS_")}


@pytest.mark.parametrize("name", ["aten", "reference"])
def test_auto_tells_what_a_request_in_force_leads_to(name):
    with backend.use_backend(name):
        assert set(doctor.report()["auto"]["cpu"].values()) == {name}


def run_doctor(before: str = "", **environment: str) -> str:
    code = f"{before}\nfrom dfs_engine import doctor\nprint(doctor.format_report(doctor.report()))"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment).stdout


def test_a_bad_environment_variable_is_reported_and_does_not_raise():
    text = run_doctor(DFS_BACKEND="atenn")
    assert "DFS_BACKEND    atenn" in text
    assert "Did you mean 'aten'?" in text


def test_doctor_runs_with_torch_alone():
    others = ("torchvision", "timm", "transformers", "accelerate", "sklearn", "tqdm", "rich")
    assert "Backends on cpu" in run_doctor(f"import sys\nsys.modules.update(dict.fromkeys({others}))")
