"""`dfs doctor` tells the truth about this machine, and needs only torch for it."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfs_engine.cli import main
from dfs_engine.runtime import backend, calibration, doctor, machine
from dfs_engine.runtime.calibration import answers, measure, table

ROOT = Path(__file__).parents[2]
FAILURE = "the two halves of the measurement disagreed"
needs_extension = pytest.mark.skipif(
    backend.unavailable_reason("cpp") is not None, reason=str(backend.unavailable_reason("cpp"))
)


@pytest.fixture(autouse=True)
def measured(fresh_calibration, monkeypatch):
    """Nothing is measured here: a set of questions that get no answer, the others get 2.0."""
    failing: set[answers.Question] = set()

    def measure_nothing(asked, *_):
        answered = {q: dict.fromkeys(kernels, 2.0) for q, kernels in asked.items() if q not in failing}
        return answered, {q: FAILURE for q in asked if q in failing}

    monkeypatch.setattr(measure, "measure", measure_nothing)
    monkeypatch.setattr(doctor, "busy_reason", lambda: None)
    return failing


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


@needs_extension
def test_every_answer_tells_where_it_comes_from(measured, monkeypatch):
    strided = answers.STRIDED
    known = {question: answers.Answer({"gemm": 1.25}, "2026-01-02") for question in strided}
    monkeypatch.setattr(table, "known", lambda machine: known)
    measured.add(answers.LINEAR[0])
    asked = answers.questions() | dict.fromkeys(answers.HALF, ("winograd",))
    monkeypatch.setattr(answers, "questions", lambda: asked)
    report = json.loads(json.dumps(doctor.report()))["calibration"]
    kernels, file = report["kernels"], report["file"]
    assert kernels["conv_grad_weight"] == {
        "on": True,
        "speedup": 1.25,
        "origin": "the table of known machines, measured on 2026-01-02",
    }
    assert kernels["linear"] == {
        "on": False,
        "speedup": None,
        "origin": f"by default: measured now, not kept, because {FAILURE}",
    }
    (day,) = {row["measured"] for row in report["answers"] if row["op"] == "conv2d"}
    assert kernels["half_conv"] == {"on": True, "speedup": 2.0, "origin": f"measured on {day}, kept in {file}"}
    text = doctor.format_report(doctor.report())
    assert "  conv_grad_weight on  1.25 x; the table of known machines, measured on 2026-01-02\n" in text
    assert f"  linear           off by default: measured now, not kept, because {FAILURE}\n" in text
    assert f"  half_conv        on  2.00 x; measured on {day}, kept in {file}\n" in text
    monkeypatch.setattr(doctor, "busy_reason", lambda: "a load average of 3.1 on 2 cores")
    assert "the machine      is busy: a load average of 3.1 on 2 cores\n" in doctor.format_report(doctor.report())
    assert "  to ask again     dfs doctor --recalibrate, while nothing else runs\n" in text
    calibration._current = None
    measured.clear()
    assert "is busy" not in doctor.format_report(doctor.report())


@needs_extension
def test_recalibrate_measures_again_and_keeps_it(measured, capsys):
    assert main(["doctor"]) == 0
    assert "conv_grad_weight on  2.00 x" in capsys.readouterr().out
    measured |= set(answers.STRIDED)
    assert main(["doctor"]) == 0
    assert "conv_grad_weight on  2.00 x" in capsys.readouterr().out
    assert main(["doctor", "--recalibrate"]) == 0
    assert f"conv_grad_weight off by default: measured now, not kept, because {FAILURE}" in capsys.readouterr().out
    calibration._current = None
    measured.clear()
    assert main(["doctor"]) == 0
    assert "conv_grad_weight on  2.00 x; measured on" in capsys.readouterr().out


@needs_extension
def test_recalibrate_warns_on_a_busy_machine(monkeypatch, caplog):
    monkeypatch.setattr(doctor, "busy_reason", lambda: "a load average of 3.1 on 2 cores")
    with caplog.at_level(logging.WARNING):
        doctor.report()
        assert not caplog.records
        doctor.report(recalibrate=True)
    assert "the machine is busy (a load average of 3.1 on 2 cores)" in caplog.text


def test_recalibrate_without_the_extension_says_that_there_is_nothing_to_measure(monkeypatch, caplog):
    monkeypatch.setattr(backend, "_extension_missing", "no compiler")
    with caplog.at_level(logging.WARNING):
        assert doctor.report(recalibrate=True)["calibration"] == {}
    assert "nothing to calibrate, because no compiler" in caplog.text
    assert "Calibration" not in doctor.format_report(doctor.report())


@pytest.mark.parametrize(
    ("load", "cores", "busy"), [(0.4, 2, False), (0.6, 2, True), (3.9, 16, False), (4.1, 16, True)]
)
def test_a_machine_is_busy_by_its_load_average(monkeypatch, load, cores, busy):
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert machine.busy_reason() == (f"a load average of {load} on {cores} cores" if busy else None)


def test_a_system_without_a_load_average_or_a_cpuinfo(monkeypatch):
    monkeypatch.delattr(os, "getloadavg")
    assert machine.busy_reason() is None
    monkeypatch.setattr(Path, "read_text", lambda path: (_ for _ in ()).throw(FileNotFoundError()))
    assert machine.cpuinfo() == {}
    assert machine.cpu_model()


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
    assert doctor._automatic("norm_act", "cuda") == "aten"
    monkeypatch.setattr(doctor.kernels, "gpu_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(doctor.kernels, "read_tables", lambda: {"NVIDIA H100": {}})
    assert doctor._automatic("norm_act", "cuda").startswith("triton where this GPU's tuned table says")
    with backend.use_backend("aten"):
        assert doctor._automatic("norm_act", "cuda") == "aten"


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
    code = f"{before}\nfrom dfs_engine.runtime import doctor\nprint(doctor.format_report(doctor.report()))"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment).stdout


def test_a_bad_environment_variable_is_reported_and_does_not_raise():
    text = run_doctor(DFS_BACKEND="atenn")
    assert "DFS_BACKEND    atenn" in text
    assert "Did you mean 'aten'?" in text


def test_doctor_runs_with_torch_alone():
    others = ("torchvision", "timm", "transformers", "accelerate", "sklearn", "tqdm", "rich")
    assert "Backends on cpu" in run_doctor(f"import sys\nsys.modules.update(dict.fromkeys({others}))")
