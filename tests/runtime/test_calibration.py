"""Which kernels run: known from the table, or measured in two halves that agree and kept, or ATen's."""

import functools
import json
import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dfs_engine.models import create_model
from dfs_engine.ops import partitioned_linear
from dfs_engine.runtime import calibration
from dfs_engine.runtime.backend import unavailable_reason
from dfs_engine.runtime.calibration import answers, kept, measure, table, table_entry
from dfs_engine.runtime.calibration.answers import HALF, HALF_NARROW, LINEAR, STRIDED, Answer, Question

pytestmark = pytest.mark.skipif(unavailable_reason("cpp") is not None, reason=str(unavailable_reason("cpp")))

ASKED = dict.fromkeys(LINEAR[:2], ("gemm", "onednn")) | {LINEAR[2]: ("gemm",)}
ASKED |= dict.fromkeys(STRIDED, ("gemm",)) | dict.fromkeys((*HALF, *HALF_NARROW), ("winograd",))
SPEEDUPS = {"gemm": 1.5, "onednn": 1.8, "winograd": 0.5}
WINS = (True, True, True, False, False)
NONE = (False,) * 5
MACHINE = table.Machine("AuthenticAMD", 25, 17, "avx512", "avx512", 2)


class Measurement:
    """Stands for `measure.measure`: what it was asked, what it answers, and what it cannot."""

    def __init__(self):
        self.asked: list[set[Question]] = []
        self.speedups = dict(SPEEDUPS)
        self.failing: set[Question] = set()

    def __call__(self, asked, *_):
        self.asked.append(set(asked))
        answered = {
            question: {kernel: self.speedups[kernel] for kernel in kernels}
            for question, kernels in asked.items()
            if question not in self.failing
        }
        return answered, {question: "the halves disagreed" for question in asked if question in self.failing}


@pytest.fixture
def measured(fresh_calibration, monkeypatch):
    measurement = Measurement()
    monkeypatch.setattr(measure, "measure", measurement)
    monkeypatch.setattr(answers, "questions", lambda: dict(ASKED))
    monkeypatch.setattr(table, "this_machine", lambda: MACHINE)
    return measurement


def ask_as_a_new_process() -> calibration.Wins:
    calibration._current = None
    return calibration.wins()


def entry(machine: table.Machine = MACHINE, version: int = measure.VERSION, **speedups: float) -> dict:
    known = {q: Answer({kernel: (SPEEDUPS | speedups)[kernel] for kernel in ASKED[q]}, "2026-01-02") for q in ASKED}
    rows = answers.to_rows(known)
    return {"version": version, "cpu": "", "torch": "", "machine": machine._asdict(), "answers": rows}


# What is kept.


def test_measured_once_and_kept(measured, tmp_path):
    assert calibration.wins() == WINS
    assert ask_as_a_new_process() == WINS
    assert measured.asked == [set(ASKED)]
    (file,) = (tmp_path / "cache").iterdir()
    rows = json.loads(file.read_text())["answers"]
    assert [Question(row["op"], row["dtype"], row["shape"]) for row in rows] == list(ASKED)
    assert rows[0]["speedups"] == {"gemm": 1.5, "onednn": 1.8}
    origins = calibration.settled().origins
    assert origins["half_conv"] == f"measured on {rows[0]['measured']}, kept in {file}"


def test_what_did_not_repeat_is_not_kept_and_atens_kernels_run(measured, tmp_path, caplog):
    measured.failing = set(ASKED)
    with caplog.at_level(logging.INFO):
        assert calibration.wins() == NONE
    assert not caplog.records
    assert not (tmp_path / "cache").exists()
    assert set(calibration.settled().origins.values()) == {
        "by default: measured now, not kept, because the halves disagreed"
    }
    measured.failing = set()
    assert ask_as_a_new_process() == WINS


def test_what_repeated_is_kept_and_the_others_are_asked_by_the_next_process(measured):
    measured.failing = {LINEAR[2], STRIDED[0]}
    assert calibration.wins() == (False, True, False, False, False)
    measured.failing = set()
    assert ask_as_a_new_process() == WINS
    assert measured.asked == [set(ASKED), {LINEAR[2], STRIDED[0]}]
    assert ask_as_a_new_process() == WINS
    assert len(measured.asked) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda text: "",
        lambda text: "{",
        lambda text: "[]",
        lambda text: '{"key": {}, "answers": []}',
        lambda text: text.replace(f'"version": {measure.VERSION}', '"version": 5'),
        lambda text: json.dumps(json.loads(text) | {"answers": 9.0}),
        lambda text: text.replace("1.5", "NaN"),
        lambda text: text.replace("1.5", "-1.5"),
        lambda text: text.replace("1.5", '"1.5"'),
        lambda text: text.replace('"gemm"', '"other"'),
        lambda text: text.replace('"dtype"', '"type"'),
        lambda text: text.replace('"conv2d', "[1]").replace('"linear', "[1]"),
    ],
)
def test_a_broken_or_foreign_file_is_measured_again(measured, tmp_path, change):
    calibration.wins()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(change(file.read_text()))
    assert ask_as_a_new_process() == WINS
    assert len(measured.asked) == 2
    assert ask_as_a_new_process() == WINS
    assert len(measured.asked) == 2, "it was not written anew"


def test_one_broken_row_costs_no_other(measured, tmp_path):
    calibration.wins()
    (file,) = (tmp_path / "cache").iterdir()
    saved = json.loads(file.read_text())
    saved["answers"][3] = None
    file.write_text(json.dumps(saved))
    assert ask_as_a_new_process() == WINS
    assert measured.asked[1:] == [{list(ASKED)[3]}]


def test_an_unwritable_folder_is_no_error(measured, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DFS_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.INFO):
        assert calibration.wins() == WINS
    assert not caplog.records
    assert calibration.settled().origins["linear"].startswith("measured now, not kept: ")


@pytest.mark.parametrize("known_from", ["file", "table"])
def test_asking_again_measures_everything_and_is_kept(measured, monkeypatch, known_from):
    if known_from == "table":
        monkeypatch.setattr(table, "entries", lambda: [entry()])
    assert calibration.wins() == WINS
    measured.asked.clear()
    measured.speedups = {"gemm": 0.5, "onednn": 0.5, "winograd": 2.0}
    assert calibration.recalibrate().wins == (False, False, False, True, True)
    assert ask_as_a_new_process() == (False, False, False, True, True)
    assert measured.asked == [set(ASKED)]


def test_asking_again_without_an_answer_forgets_what_was_kept(measured, tmp_path):
    calibration.wins()
    measured.failing = set(ASKED)
    assert calibration.recalibrate().wins == NONE
    assert not list((tmp_path / "cache").iterdir())


def test_asking_again_without_an_answer_leaves_the_table_and_says_so(measured, monkeypatch):
    monkeypatch.setattr(table, "entries", lambda: [entry()])
    measured.failing = {*STRIDED}
    again = calibration.recalibrate()
    assert again.wins == WINS
    assert again.origins["conv_grad_weight"] == (
        "the table of known machines, measured on 2026-01-02; "
        "asked again without an answer, because the halves disagreed"
    )
    assert again.origins["half_conv"].endswith(f"kept in {kept.file()}")


def test_a_new_entry_of_the_table_comes_before_what_was_kept(measured, monkeypatch):
    measured.speedups = dict.fromkeys(SPEEDUPS, 0.5)
    assert calibration.wins() == NONE
    monkeypatch.setattr(table, "entries", lambda: [entry()])
    assert ask_as_a_new_process() == WINS
    assert len(measured.asked) == 1


# What follows from answers.


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({"gemm": 1.04, "onednn": 1.04, "winograd": 1.05}, NONE),  # within noise
        (
            {"gemm": 1.06, "onednn": 1.06, "winograd": 1.06},
            (True, False, True, True, True),
        ),  # oneDNN's is no faster than ours
        ({"gemm": 0.9, "onednn": 1.06, "winograd": 1.06}, (False, True, False, True, True)),
        ({"gemm": 1.2, "onednn": 1.3, "winograd": 0.81}, (True, True, True, False, False)),
    ],
)
def test_a_kernel_is_on_where_it_is_clearly_faster_than_what_it_replaces(measured, speedups, expected):
    measured.speedups = speedups
    assert calibration.wins() == expected


def test_the_worst_size_decides_on_the_strided_weight_gradient_and_the_sum_of_the_passes_elsewhere(
    measured, monkeypatch
):
    def unequal(asked):
        answered, failed = measured(asked)
        answered[STRIDED[1]] = {"gemm": 1.01}
        answered[HALF[0]], answered[HALF[1]], answered[HALF[2]] = ({"winograd": speedup} for speedup in (1.0, 2.0, 4.0))
        return answered, failed

    monkeypatch.setattr(measure, "measure", unequal)
    speedups = calibration.recalibrate().speedups
    assert speedups["conv_grad_weight"] == 1.01
    assert speedups["half_conv"] == pytest.approx(3 / (1 / 1.0 + 1 / 2.0 + 1 / 4.0))


def test_what_does_not_apply_is_not_asked(measured, monkeypatch):
    monkeypatch.setattr(answers, "questions", lambda: dict.fromkeys((*LINEAR, *STRIDED), ("gemm",)))
    assert calibration.wins() == (True, False, True, False, False)
    assert measured.asked == [{*LINEAR, *STRIDED}]
    assert calibration.settled().origins["half_conv"].startswith("never: ")


@pytest.mark.parametrize("num_threads", [1, 2])
def test_onednns_product_is_asked_for_where_it_can_run(num_threads):
    torch.set_num_threads(num_threads)
    assert ("onednn" in answers.questions()[LINEAR[0]]) == (num_threads > 1)


# The table.


def test_a_machine_that_is_in_the_table_measures_nothing_and_writes_nothing(measured, monkeypatch, tmp_path):
    monkeypatch.setattr(table, "entries", lambda: [entry(gemm=0.9), entry(MACHINE._replace(model=18))])
    assert calibration.wins() == (False, True, False, False, False)
    assert not measured.asked
    assert not (tmp_path / "cache").exists()
    assert calibration.settled().origins["linear"] == "the table of known machines, measured on 2026-01-02"


@pytest.mark.parametrize(
    "other",
    [
        {"vendor": "GenuineIntel"},
        {"family": 26},
        {"model": 1},
        {"instructions": "avx2"},
        {"bfloat16": "amx"},
        {"threads": 4},
    ],
)
def test_another_machine_is_measured(measured, monkeypatch, other):
    monkeypatch.setattr(table, "entries", lambda: [entry(MACHINE._replace(**other))])
    calibration.wins()
    assert measured.asked == [set(ASKED)]


def test_an_entry_of_another_version_of_the_questions_does_not_count(measured, monkeypatch):
    monkeypatch.setattr(table, "entries", lambda: [entry(version=measure.VERSION - 1)])
    calibration.wins()
    assert measured.asked == [set(ASKED)]


def test_what_an_entry_lacks_is_measured(measured, monkeypatch):
    partial = entry()
    partial["answers"] = partial["answers"][:-1]
    monkeypatch.setattr(table, "entries", lambda: [partial])
    assert calibration.wins() == WINS
    assert measured.asked == [{list(ASKED)[-1]}]


CPUINFO = {"vendor_id": "AuthenticAMD", "cpu family": "25", "model": "17", "flags": "fpu avx512f avx512_bf16"}


@pytest.mark.parametrize(("num_threads", "expected"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (96, 128)])
def test_threads_count_as_the_next_power_of_two(monkeypatch, num_threads, expected):
    monkeypatch.setattr(table, "cpuinfo", lambda: CPUINFO)
    monkeypatch.setattr(table, "num_cores", lambda: 96)
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_threads)
    assert table.this_machine().threads == expected


@pytest.mark.parametrize(
    ("flags", "expected"), [("amx_bf16 avx512_bf16", "amx"), ("avx512_bf16", "avx512"), ("", "none")]
)
def test_this_machine_is_told_by_the_cpuid(monkeypatch, flags, expected):
    monkeypatch.setattr(table, "cpuinfo", lambda: CPUINFO | {"flags": flags})
    machine = table.this_machine()
    assert machine[:3] == ("AuthenticAMD", 25, 17)
    assert machine.bfloat16 == expected


def test_a_machine_that_cannot_be_told_or_shares_cores_matches_nothing(monkeypatch):
    monkeypatch.setattr(table, "cpuinfo", dict)
    assert table.this_machine() is None
    assert table.known(None) == {}
    monkeypatch.setattr(table, "cpuinfo", lambda: CPUINFO)
    monkeypatch.setattr(table, "num_cores", lambda: 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert table.this_machine() is None


def check_table(file: Path) -> None:
    content = json.loads(file.read_text())
    assert content.keys() == {"entries"}
    for item in content["entries"]:
        assert item.keys() == {"version", "cpu", "torch", "machine", "answers"}
        assert item["version"] == measure.VERSION, "measure it again with table_entry, or take it out"
        machine = table.Machine(**item["machine"])
        assert [type(value) for value in machine] == [str, int, int, str, str, int]
        assert machine.instructions in ("avx512", "avx2", "baseline")
        assert machine.bfloat16 in ("amx", "avx512", "none")
        assert machine.threads == table._class(machine.threads)
        known = answers.from_rows(item["answers"])
        assert len(known) == len(item["answers"])
        for question, answer in known.items():
            assert answer.speedups.keys() <= set(ASKED[question])
    assert not [
        machine for machine, n in Counter(tuple(e["machine"].values()) for e in content["entries"]).items() if n > 1
    ]


def test_the_shipped_table_is_valid():
    check_table(table.FILE)


# Writing an entry.


@pytest.fixture
def quiet(measured, monkeypatch):
    monkeypatch.setattr(table_entry, "busy_reason", lambda: None)
    return measured


def test_an_entry_is_written_and_matched(quiet, tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    other = entry(MACHINE._replace(model=1))
    file.write_text(json.dumps({"entries": [entry(gemm=9.0), other]}))
    assert table_entry.main(["--output", str(file)]) == 0
    check_table(file)
    content = json.loads(file.read_text())["entries"]
    assert [item["machine"]["model"] for item in content] == [1, 17]
    assert content[0] == other
    quiet.asked.clear()
    monkeypatch.setattr(table, "entries", lambda: content)
    assert calibration.wins() == WINS
    assert calibration.settled().answers[STRIDED[0]].speedups == {"gemm": 1.5}
    assert not quiet.asked


def test_no_entry_is_written_on_a_busy_machine_unless_forced(quiet, tmp_path, monkeypatch, capsys):
    file = tmp_path / "table.json"
    monkeypatch.setattr(table_entry, "busy_reason", lambda: "a load average of 3.1 on 2 cores")
    assert table_entry.main(["--output", str(file)]) == 2
    assert "a load average of 3.1 on 2 cores" in capsys.readouterr().err
    assert not file.exists()
    assert not quiet.asked
    assert table_entry.main(["--output", str(file), "--force"]) == 0
    assert file.exists()


def test_no_entry_is_written_of_answers_that_do_not_repeat(quiet, tmp_path, capsys):
    quiet.failing = {HALF[1]}
    assert table_entry.main(["--output", str(tmp_path / "table.json"), "--force"]) == 1
    assert "conv2d_grad_input bf16 3x3, stride 1: the halves disagreed" in capsys.readouterr().err
    assert not (tmp_path / "table.json").exists()


# The measurement.


class Kernels:
    """A machine with a clock of its own, on which calls take what `cost` says."""

    def __init__(self, monkeypatch):
        self.now = self.cpu = 0.0
        self.cpu_share = 1.0
        self.calls: Counter = Counter()
        self.cost = lambda question, kernel, number: {"aten": 3.0, "gemm": 2.0, "onednn": 1.5, "winograd": 4.0}[kernel]
        monkeypatch.setattr(measure, "_clock", lambda: self.now)
        monkeypatch.setattr(measure, "_cpu_clock", lambda: self.cpu)
        monkeypatch.setattr(measure, "_calls", lambda question: [functools.partial(self.run, question)])

    def run(self, question, kernel):
        seconds = self.cost(question, kernel, self.calls[question, kernel])
        self.calls[question, kernel] += 1
        self.now += seconds
        self.cpu += seconds * self.cpu_share


@pytest.fixture
def kernels(monkeypatch):
    return Kernels(monkeypatch)


def test_the_fastest_calls_count(kernels):
    fair = kernels.cost
    # In each half of 5 rounds one call is undisturbed, another for each kernel.
    fast = {"aten": 4, "gemm": 0, "onednn": 2, "winograd": 3}
    kernels.cost = lambda q, kernel, n: fair(q, kernel, n) * (1 if n % 5 == fast[kernel] else 7 + n)
    speedups, failed = measure.measure(ASKED, rounds=5, seconds=1e6)
    assert not failed
    assert speedups[LINEAR[0]] == pytest.approx({"gemm": 1.5, "onednn": 2.0})
    assert speedups[HALF[0]] == pytest.approx({"winograd": 0.75})


@pytest.mark.parametrize("busy_half", [0, 1])
@pytest.mark.parametrize("slowed", [("aten", "gemm"), ("gemm",)])
def test_a_half_that_was_slower_is_no_answer(kernels, busy_half, slowed):
    fair = kernels.cost
    kernels.cost = lambda q, kernel, n: (
        fair(q, kernel, n) * (1.2 if q == STRIDED[0] and kernel in slowed and n // 5 == busy_half else 1.0)
    )
    speedups, failed = measure.measure(ASKED, rounds=5, seconds=1e6)
    assert failed == {STRIDED[0]: "the two halves of the measurement disagreed"}
    assert speedups.keys() == ASKED.keys() - {STRIDED[0]}


def test_halves_that_differ_a_little_agree_on_the_fastest(kernels):
    fair = kernels.cost
    kernels.cost = lambda q, kernel, n: fair(q, kernel, n) * (1.08 if (n // 5 == 0) == (kernel == "aten") else 1.0)
    speedups, failed = measure.measure(ASKED, rounds=5, seconds=1e6)
    assert not failed
    assert speedups[LINEAR[2]] == pytest.approx({"gemm": 1.5})


def test_a_steady_load_which_both_halves_agree_on_is_no_answer(kernels):
    kernels.cpu_share = 0.5
    speedups, failed = measure.measure(ASKED, rounds=5, seconds=1e6)
    assert not speedups
    assert set(failed.values()) == {"the machine was busy: the measurement had a CPU for 50 % of its time only"}
    assert max(kernels.calls.values()) == 5, "the second half was not needed"


def test_a_measurement_ends(kernels):
    # Time for the first two questions in each half: 5 * 6.5 s of three kernels each.
    speedups, failed = measure.measure(ASKED, rounds=5, seconds=2 * 66.0)
    assert list(speedups) == list(LINEAR[:2])
    assert set(failed.values()) == {"the machine is slow or busy: there was no time left to measure it"}
    assert kernels.now <= 2 * 66 + 2 * 4


def test_the_real_measurement_answers_or_says_why_not():
    asked = answers.questions()
    speedups, failed = measure.measure(asked, rounds=1, seconds=1.0)
    assert speedups.keys() | failed.keys() == asked.keys()
    assert not speedups.keys() & failed.keys()
    assert all(min(ratios.values()) > 0 for ratios in speedups.values())


@pytest.mark.parametrize("question", ASKED, ids=" ".join)
def test_a_question_runs_its_kernels_in_its_dtype_whatever_the_defaults_are(question, monkeypatch):
    torch.set_default_dtype(torch.float64)
    try:
        calls = measure._calls(question)
    finally:
        torch.set_default_dtype(torch.float32)
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16}[question.dtype]
    for call in calls:
        assert all(argument.dtype == expected for argument in call.args if isinstance(argument, torch.Tensor))
        assert call.func is getattr(torch.ops.dfs_engine, question.op).kernel


# When a process asks.


@pytest.mark.skipif(unavailable_reason("cpp") is not None, reason="there is nothing to choose among")
def test_the_first_op_that_depends_on_it_asks_compiled_or_not(measured):
    """A compiled one, too, which runs what this machine is fastest with."""
    weight, x = torch.randn(16, 32), torch.randn(4, 32)
    create_model("vgg7_64", width=4)
    assert not measured.asked
    torch.compile(lambda: partitioned_linear(x, weight, start=0, stop=8), backend="eager")()
    assert len(measured.asked) == 1
    partitioned_linear(x, weight, start=0, stop=8)
    assert len(measured.asked) == 1


def test_fake_tensors_are_not_measured(measured):
    with FakeTensorMode():
        assert calibration.wins() == (True,) * 5
    assert not measured.asked
    assert calibration.wins() == WINS
    assert len(measured.asked) == 1


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("DFS_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.cache_dir() == tmp_path / "dfs_engine"
    monkeypatch.setenv("DFS_CACHE_DIR", str(tmp_path / "here"))
    assert kept.cache_dir() == tmp_path / "here"
