"""
One study of 24 runs through a real Ray and a real Slurm, with workers, nodes, jobs and the driver killed under way: what
comes out is what this machine alone finds. `make test-clusters` installs what is needed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import yaml
from clusters.slurm_here import free_ports, missing_programs, slurm

from hf_sam.experiments.json_files import read_json
from hf_sam.experiments.records import find_records
from hf_sam.reporting.comparison import write_report

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs/image_classification"
pytestmark = pytest.mark.clusters

# `ray start` may ask for tokens, which no driver here has. By default workers have the lowest priority, and with them
# the runs: on a busy machine they would hardly come to begin.
RAY_SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_worker_niceness": "0"}
STUDY = {
    "recipe": "experiments.toy_task",
    "task": "toy",
    "arms": {"adamw": {}, "sam": {"learning_rate": 0.05}},
    "seeds": list(range(12)),
    "settings": {"sleep": 2.0},
}


@pytest.fixture(scope="module")
def home():
    """A folder with a short path, since sockets are in it."""
    folder = Path(tempfile.mkdtemp(prefix="hf-sam-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def study(home):
    path = home / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def found_here(study, home):
    """What this machine finds by itself."""
    driver = start_driver(study, home / "local", "local", "workers=2")
    assert driver.wait(timeout=1200) == 0, said(home / "local")
    return numbers(home / "local")


def start_driver(study, out, *options, environment=()):
    variables = {**os.environ, **RAY_SETTINGS, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **dict(environment)}
    words = [sys.executable, str(ROOT / "tests/experiments/toy_driver.py"), str(study), str(out), *options]
    with open(out.with_suffix(".out"), "ab") as log:
        return subprocess.Popen(words, env=variables, stdout=log, stderr=log)


def said(out):
    return out.with_suffix(".out").read_text()


def numbers(out):
    """All that was measured in a study, without clocks and places, and the comparisons of its report."""
    records, problems = find_records(out)
    assert not problems
    measured = {
        (run.arm, run.seed): (run.status, run.metrics, run.model["fingerprint"], [e.get("loss") for e in run.curves])
        for run in records
    }
    write_report(records, out / "report", control="adamw", treatment="sam", metric="accuracy")
    return measured, (out / "report/data/comparisons.csv").read_text()


def lines_of(out, name):
    """How many lines the file `name` of each run has: one for each time that it began, or came to its end."""
    return {path.parent: len(path.read_text().splitlines()) for path in sorted(out.rglob(name))}


def places(out):
    """The runs that are being made: folder and process."""
    found = {}
    for path in sorted(out.rglob("place.json")):
        place = read_json(path)
        if (path.parent / "submission.json").exists() and not (path.parent / "ended.txt").exists() and place:
            found[path.parent] = place
    return {folder: place for folder, place in found.items() if psutil.pid_exists(place["pid"])}


def wait_for(condition, what, seconds=600):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    return pytest.fail(f"waited {seconds} s for {what}")


def one_under_way(out, but=()):
    """Folder and process of a run that has begun its task."""

    def find():
        for folder, place in places(out).items():
            if folder not in but and (folder / "begun.txt").exists():
                return folder, place["pid"]
        return None

    return wait_for(find, "a run to be under way")


def check_ends(out, found_here, hit):
    """The same numbers; every run came to its end once, and only those in `hit` began more than once."""
    assert numbers(out) == found_here
    assert set(lines_of(out, "ended.txt").values()) == {1}
    assert len(lines_of(out, "ended.txt")) == 24
    again = {folder for folder, count in lines_of(out, "begun.txt").items() if count > 1}
    assert again <= set(hit), again
    pids = [int(line) for path in out.rglob("begun.txt") for line in path.read_text().split()]
    wait_for(lambda: not any(map(is_of_the_study, pids)), "every process of a run to end", seconds=30)


def is_of_the_study(pid):
    try:
        return "hf_sam.experiments.execution" in psutil.Process(pid).cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def test_ray_finds_the_same_with_a_run_a_worker_a_node_and_the_driver_killed(study, home, found_here, monkeypatch):
    cluster_utils = pytest.importorskip("ray.cluster_utils", reason="Ray is missing: pip install 'hf-sam[ray]'")
    out = home / "ray"
    options = ["ray", "num_cpus=1", "queue=8", "patience=1"]
    for name, value in RAY_SETTINGS.items():
        monkeypatch.setenv(name, value)
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    driver = None
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
        options.append(f"address={cluster.address}")
        driver = start_driver(study, out, *options)

        first, pid = one_under_way(out)
        os.kill(pid, signal.SIGKILL)  # the run itself
        second, pid = one_under_way(out, but=[first])
        psutil.Process(pid).parent().kill()  # the worker that holds it
        wait_for(lambda: not psutil.pid_exists(pid), "the run to end with its worker", seconds=60)

        _, pid = one_under_way(out, but=[first, second])
        driver.kill()
        driver.wait()
        assert psutil.pid_exists(pid)  # it goes on without a driver
        driver = start_driver(study, out, *options)
        wait_for(lambda: "attached" in said(out), "the second driver to attach")

        hit = {first, second, *places(out)}
        cluster.remove_node(nodes[0], allow_graceful=False)
        cluster.add_node(num_cpus=1)
        hit |= set(places(out))
        assert driver.wait(timeout=1800) == 0, said(out)
    finally:
        if driver is not None and driver.poll() is None:
            driver.kill()
            driver.wait()
        cluster.shutdown()
    check_ends(out, found_here, hit)
    assert lines_of(out, "begun.txt").get(first, 0) == lines_of(out, "begun.txt").get(second, 0) == 2


@contextmanager
def head_at(port, home):
    """A Ray of one node, whose processes are killed at the end of the block, as when the machine is lost."""
    words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", f"--port={port}"]
    words += ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats", f"--temp-dir={home}/ray-{port}"]
    with open(home / "head.out", "ab") as log:
        head = subprocess.Popen(
            words, env={**os.environ, **RAY_SETTINGS}, stdout=log, stderr=log, start_new_session=True
        )
    try:
        wait_for(lambda: head.poll() is not None or "Ray runtime started" in (home / "head.out").read_text(), "a head")
        yield
    finally:
        processes = [psutil.Process(head.pid), *psutil.Process(head.pid).children(recursive=True)]
        processes += [entry for entry in psutil.process_iter() if f"{home}/ray-{port}" in " ".join(words_of(entry))]
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
        (home / "head.out").write_text("")


def words_of(process):
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return []


def test_the_same_command_goes_on_with_the_next_ray_head_after_one_is_lost(home):
    """Runs of two processes each, by their own launcher."""
    pytest.importorskip("ray", reason="Ray is missing: pip install 'hf-sam[ray]'")
    out, path = home / "restart", home / "restart.yaml"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path.write_text(yaml.safe_dump({**STUDY, "seeds": [0], "launcher": launcher}, sort_keys=False))
    (port,) = free_ports(1)
    options = ["ray", f"address=127.0.0.1:{port}", "num_cpus=2", "patience=1"]
    with head_at(port, home):
        driver = start_driver(path, out, *options)
        _, pid = one_under_way(out)
    try:
        assert driver.wait(timeout=300) != 0  # Ray ends a driver at once whose own node is lost
        wait_for(lambda: not psutil.pid_exists(pid), "the run to end with its worker", seconds=120)
        with head_at(port, home):
            driver = start_driver(path, out, *options)
            assert driver.wait(timeout=900) == 0, said(out)
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.wait()
    records, problems = find_records(out)
    assert not problems
    assert [run.status for run in records] == ["finished"] * 2
    assert {run.environment["hardware"]["processes"] for run in records} == {2}
    assert set(lines_of(out, "ended.txt").values()) == {2}  # once in each of the two processes
    assert not list(out.rglob("deaths.txt"))


@pytest.fixture(scope="module")
def slurm_variables(home):
    pytest.importorskip("submitit", reason="submitit is missing: pip install 'hf-sam[slurm]'")
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} missing; on Debian: apt-get install slurm-wlm munge")
    with slurm(home / "slurm") as variables:
        yield variables


def ask(variables, *words):
    return subprocess.run(words, env={**os.environ, **variables}, capture_output=True, text=True, check=True).stdout


def job_of(folder):
    return read_json(folder / "submission.json")["id"].split()[1]


def test_slurm_finds_the_same_with_a_run_and_the_driver_killed_and_jobs_cancelled_requeued_and_preempted(
    study, home, found_here, slurm_variables
):
    out = home / "slurm-study"
    options = ["slurm", "partition=main", "minutes=60", "queue=8", "poll=0.5", "patience=1"]
    driver = start_driver(study, out, *options, environment=slurm_variables)
    try:
        first, pid = one_under_way(out)
        os.kill(pid, signal.SIGKILL)
        second, pid = one_under_way(out, but=[first])
        cancelled = job_of(second)
        ask(slurm_variables, "scancel", cancelled)
        third, pid = one_under_way(out, but=[first, second])
        requeued = job_of(third)
        ask(slurm_variables, "scontrol", "requeue", requeued)
        wait_for(lambda: not psutil.pid_exists(pid), "the requeued run to end", seconds=60)

        _, pid = one_under_way(out, but=[first, second, third])
        driver.kill()
        driver.wait()
        assert psutil.pid_exists(pid)
        driver = start_driver(study, out, *options, environment=slurm_variables)
        wait_for(lambda: "attached" in said(out), "the second driver to attach")

        one_under_way(out, but=[first, second, third])
        hit = {first, second, third, *places(out)}
        urgent = ask(
            slurm_variables, "sbatch", "--parsable", "--partition=urgent", "--cpus-per-task=2", "--wrap=sleep 1",
            f"--output={home}/urgent.out",
        ).strip()  # fmt: skip
        wait_for(lambda: urgent not in ask(slurm_variables, "squeue", "-h", "-o", "%i"), "the urgent job to end")
        hit |= set(places(out))
        assert driver.wait(timeout=1800) == 0, said(out)
    finally:
        if driver.poll() is None:
            driver.kill()
            driver.wait()
    check_ends(out, found_here, hit)
    began = lines_of(out, "begun.txt")
    assert began[first] == began[second] == began[third] == 2
    assert max(began[folder] for folder in hit) <= 3
    assert not ask(slurm_variables, "squeue", "-h").strip()


@pytest.fixture
def cluster(kind, request):
    """The environment and the options of the executor `kind`."""
    if kind == "ray":
        pytest.importorskip("ray", reason="Ray is missing: pip install 'hf-sam[ray]'")
        return RAY_SETTINGS, ["num_cpus=1", "patience=1"]
    return request.getfixturevalue("slurm_variables"), ["partition=main", "poll=0.5", "patience=1"]


@pytest.mark.parametrize("kind", ["ray", "slurm"])
def test_a_comparison_of_the_digits_is_the_same_on_a_cluster(cluster, kind, home):
    variables, options = cluster
    path = home / "digits.yaml"
    study = {
        "recipe": "image_classification",
        "config": str(CONFIGS / "digits.yaml"),
        "task": "digits",
        "settings": {"max_steps": 6, "train_samples": 64, "logging_steps": 2, "use_cpu": True},
        "arms": {"adamw": {"sam_rho": 0}, "sam": {"sam_rho": 0.05}},
        "seeds": [0],
    }
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    for name, words in {"digits": [], kind: ["--executor", kind, "--executor_options", *options]}.items():
        if name == "digits" and (home / "digits-digits/report").exists():
            continue
        run_program("compare", str(path), f"--output_dir={home}/{name}-digits", *words, environment=variables)
    assert numbers(home / f"{kind}-digits") == numbers(home / "digits-digits")


@pytest.mark.parametrize("kind", ["ray", "slurm"])
def test_a_search_for_rho_is_the_same_on_a_cluster(cluster, kind, home):
    variables, options = cluster
    words = ["image_classification", str(CONFIGS / "digits.yaml"), "--train_samples=64"]
    words += ["--max_steps=24", "--use_cpu=true", "--points=1", "--seeds=2", "--budget=2"]  # with a probe
    found = {}
    for name, chosen in {"local": [], kind: ["--executor", kind, "--executor_options", *options]}.items():
        out = home / f"rho-{name}"
        path = out / "find_rho/find_rho.json"
        if not path.exists():
            run_program("find_rho", *words, f"--output_dir={out}", *chosen, environment=variables)
        found[name] = json.loads(path.read_text())
        jobs = {json.loads(path.read_text())["id"].split()[0] for path in out.rglob("place.json")}
        assert jobs == {"local" if name == "local" else kind}
        assert (out / "find_rho/probe/run_record.json").exists()
    for name in ("curve", "passes", "recommended_rho", "sentence"):
        assert found[kind][name] == found["local"][name]


@pytest.mark.parametrize("kind", ["ray", "slurm"])
def test_forgetting_is_the_same_on_a_cluster(cluster, kind, home):
    variables, options = cluster
    start = home / "start"
    common = ["--train_samples=64", "--max_steps=6", "--use_cpu=true"]
    if not start.exists():
        run_program(
            "image_classification",
            str(CONFIGS / "digits.yaml"),
            *common,
            f"--output_dir={start}",
            environment=variables,
        )
    settings = {"dataset": "digits", "label_noise": 0.5, "train_samples": 64, "max_steps": 6, "use_cpu": True}
    words = [f"adamw={start}", "--recipe=image_classification", f"--settings={json.dumps(settings)}"]
    words += ["--learning_rates", "0.001", "0.01", "--max_examples=64"]
    found = {}
    for name, chosen in {"local": [], kind: ["--executor", kind, "--executor_options", *options]}.items():
        out = home / f"forgetting-{name}"
        if not out.exists():
            run_program("forgetting", *words, f"--output_dir={out}", *chosen, environment=variables)
        results = {path.parent.relative_to(out): read_json(path) for path in out.rglob("forgetting.json")}
        found[name] = {folder: (each["first"], each["second"]) for folder, each in results.items()}
        jobs = {json.loads(path.read_text())["id"].split()[0] for path in out.rglob("place.json")}
        assert jobs == {"local" if name == "local" else kind}
    assert len(found["local"]) == 2
    assert found[kind] == found["local"]


def run_program(name, *words, environment):
    command = [sys.executable, str(ROOT / f"recipes/{name}.py"), *words]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **environment}
    result = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1800)
    assert result.returncode == 0, result.stdout + result.stderr
