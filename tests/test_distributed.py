"""Several processes: the same training as in one, whatever their number, and no hang if one of them fails."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from networks import Linear

from session8 import distributed, trainer, training
from session8.checkpoint import load_checkpoint

if os.name != "posix":
    pytest.skip("the processes are forked", allow_module_level=True)

import processes
import ranks

ROOT = Path(__file__).resolve().parent.parent
WORLD_SIZES = (2, 3)
pytestmark = pytest.mark.xdist_group("several processes")  # in one worker, for the fixtures of the module


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Run all checks in a group of two processes, then of three. Returns {world size: [what each rank found]}."""
    folder, found = tmp_path_factory.mktemp("groups"), {"folder": tmp_path_factory.getbasetemp()}
    for world_size in WORLD_SIZES:
        if world_size == 3:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(training, "REFRESH_SECONDS", 0)
                found["alone"] = ranks.continue_alone(folder)
        started = [
            processes.start(ranks.join, ranks.checks, rank, world_size, str(folder)) for rank in range(world_size)
        ]
        deadline = time.monotonic() + 120
        for process in started:
            process.join(max(0, deadline - time.monotonic()))
        hung = [process for process in started if process.exitcode is None]
        for process in hung:
            process.kill()
        assert not hung and all(process.exitcode == 0 for process in started)
        found[world_size] = [torch.load(folder / f"{world_size}-{rank}.pt") for rank in range(world_size)]
    found["folder"] = folder
    return found


@pytest.fixture(params=WORLD_SIZES)
def group(groups, request):
    return groups[request.param]


@pytest.fixture(scope="module")
def alone():
    return ranks.train_uneven()


def update(result):
    """Return the change of the weights of a Linear network, as one vector."""
    weights = result["weights"]
    return torch.cat([(weights[name] - value).flatten() for name, value in Linear().state_dict().items()])


def relative(one, other):
    return ((one - other).norm() / other.norm()).item()


def equal(one, other):
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def numbers(history):
    return {name: values for name, values in history.items() if name not in ("seconds", "parts")}


# -- the same training ---------------------------------------------------------------------------------------------


def test_three_steps_equal_those_of_one_process(group, alone):
    for found in group:
        assert relative(update(found["uneven"]), update(alone)) < 1e-5
        for name, values in numbers(alone["history"]).items():
            assert found["uneven"]["history"][name] == pytest.approx(values, rel=1e-5), name


def test_the_mean_of_rank_means_would_be_noticed(groups, alone):
    for found in groups[2]:  # batches of 5 and 3: shares of 3 and 2, and of 2 and 1
        assert relative(update(found["mistake"]), update(alone)) > 1e-3


def test_testing_counts_every_image_once(group):
    expected = ranks.test_sizes()
    for found in group:
        for (loss, accuracy), (one_loss, one_accuracy) in zip(found["tests"], expected, strict=True):
            assert loss == pytest.approx(one_loss, rel=1e-5) and accuracy == one_accuracy


def test_all_ranks_have_the_weights_and_the_history_of_rank_0(group):
    first, *others = (found["unbroken"] for found in group)
    assert any("running_var" in name for name in first["weights"])
    for other in others:
        assert equal(first["weights"], other["weights"])
        assert numbers(first["history"]) == numbers(other["history"])
    random = {tuple(found["random"].tolist()) for found in group}
    assert len(random) == len(group)  # dropout differs between the ranks


def test_the_saved_model_is_the_tested_one(group, groups):
    state = load_checkpoint(groups["folder"] / f"unbroken-{len(group)}")
    model = ranks.FailingNetwork()
    average = {name.removeprefix("module."): value for name, value in state["average"].items()}
    model.load_state_dict({name: average[name] for name in model.state_dict()})
    loader = trainer.make_loader(ranks.splits()[1], 500, train=False)
    loss, accuracy = training.test(model, loader, ranks.RECIPE, torch.device("cpu"))
    assert accuracy == state["history"]["test_accuracy"][-1]
    assert loss == pytest.approx(state["history"]["test_loss"][-1], rel=1e-5)


def test_rank_0_alone_prints_and_says_how_the_work_is_shared(group):
    first, *others = (found["printed"] for found in group)
    assert f"{len(group)} processes share each batch of 25. Batch norm uses each process's share" in first
    assert first.count("Test set: Average loss") == 3 and "Batch_id=5" in first
    assert not any(others)


def test_the_history_names_the_number_of_processes_and_each_device(group):
    (part,) = group[0]["unbroken"]["history"]["parts"]
    assert part["world_size"] == len(part["devices"]) == len(group)
    assert all(", 1 thread," in device for device in part["devices"])


def test_what_the_ranks_tell_each_other(group):
    n = len(group)
    for found in group:
        assert found["gathered"] == [10 * rank for rank in range(n)] and found["sent"] == 5
        assert found["sum"] == [n, sum(range(n))]


def test_one_process_alone_does_not_communicate():
    tensor = torch.ones(2)
    assert distributed.gather("a") == ["a"] and distributed.broadcast("a") == "a"
    assert distributed.sum_over_ranks(tensor) is tensor and (distributed.rank(), distributed.world_size()) == (0, 1)
    with distributed.process_group("cpu") as device:
        assert device == torch.device("cpu") and not dist.is_initialized()
    with pytest.raises(KeyError, match="unchanged"), distributed.raise_together():
        raise KeyError("unchanged")


# -- resuming ------------------------------------------------------------------------------------------------------


def test_resuming_with_the_same_number_of_processes_is_bitwise_equal(groups):
    for found in groups[2]:  # with three, the order of sums depends on DistributedDataParallel's buckets
        assert equal(found["resumed"]["weights"], found["unbroken"]["weights"])
        assert numbers(found["resumed"]["history"]) == numbers(found["unbroken"]["history"])
        assert [part["epochs"] for part in found["resumed"]["history"]["parts"]] == [
            [0, pytest.approx(3 / 6)],
            [pytest.approx(3 / 6), pytest.approx(11 / 6)],
            [pytest.approx(11 / 6), 3],
        ]


def test_two_processes_then_one_then_three_train_the_run_of_one(groups):
    assert groups[2][0]["passed on"][:2] == groups["alone"][:2] == ["RuntimeError", "stopped"]
    model = Linear()
    history = trainer.fit(model, *ranks.splits(), ranks.RESUMED, "cpu")
    for found in groups[3]:
        assert [part["world_size"] for part in found["passed on"]["parts"]] == [2, 1, 3]
        for name, values in numbers(history).items():
            assert found["passed on"][name] == pytest.approx(values, rel=1e-4), name
        ours = {"weights": found["passed on, weights"]}
        assert relative(update(ours), update({"weights": model.state_dict()})) < 1e-4
    log = groups[3][0]["passed on, log"]
    assert "It was saved with world size 1: dropout draws other numbers" in log
    assert "Changed since: processes. " in log


# -- failures ------------------------------------------------------------------------------------------------------


def test_fault_a_nan_of_one_rank_ends_all_with_the_same_message(group):
    messages = {tuple(found["nan"][:2]) for found in group}
    ((kind, message),) = messages
    assert kind == "TrainingDiverged" and "the loss became nan in epoch 1, Batch_id=3" in message
    assert all(value.isfinite().all() for found in group for value in found["nan, saved"].values())


def test_fault_full_folder_is_reported_and_every_rank_goes_on(group):
    for found in group:
        assert len(found["full"]["test_loss"]) == 3
    assert "Checkpoint not written ([Errno 28] No space left on device). Training continues" in group[0]["full, log"]
    assert not any(found["full, log"] for found in group[1:])


@pytest.mark.parametrize(
    "what, message",
    [
        ("configuration", "rank {last} differs from rank 0: lr was 0.02 and is 0.03"),
        ("data", "rank {last} differs from rank 0: data was "),
        ("folder", "rank {last} of {n}: CheckpointError: '.*' is not the folder of rank 0: use one that all"),
        ("folder or none", "rank {last} differs from rank 0: checkpoint_dir given was True and is False"),
        ("file", "rank {last} of {n}: CheckpointError: '.*' is not the folder of rank 0"),
        ("too many", "rank 0 of {n}: ValueError: {n} processes share the last batch of 1 image: use at most 1"),
        ("arithmetic", "rank {last} differs from rank 0: arithmetic was 'float32' and is 'bfloat16'"),
        ("checkpoint", "rank {last} differs from rank 0: checkpoint was "),
        ("device", "rank {last} of {n}: ValueError: device is 'cuda:7', which is not available"),
    ],
)
def test_bad_input_of_one_rank_is_raised_by_all(group, what, message):
    message = message.format(n=len(group), last=len(group) - 1)
    for found in group:
        kind, text, _ = found[what]
        assert kind == "RankError" and re.match(message, text), text
        assert found["seconds"] < 30 and found["left"] == []


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"])
def test_bad_input_variables_of_torchrun_half_set(monkeypatch, missing):
    values = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name in {*values} - {missing}:
        monkeypatch.setenv(name, values[name])
    with pytest.raises(ValueError, match=rf"^rank (1|\?): {missing} not set, but other variables of torchrun are"):
        trainer.fit(Linear(), *ranks.splits(), ranks.PLAIN, "cpu")
    assert not dist.is_initialized()


def test_bad_input_restarts_on_several_machines_that_would_hang(monkeypatch):
    values = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    elastic = {"USE_AGENT_STORE": "True", "MAX_RESTARTS": "3"}
    for name, value in {**values, **{f"TORCHELASTIC_{key}": value for key, value in elastic.items()}}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="needs the environment variable TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        trainer.fit(Linear(), *ranks.splits(), ranks.PLAIN, "cpu")


@pytest.mark.parametrize(
    "device, local, message",
    [
        (None, 1, "LOCAL_RANK is 1, but this machine has 1 GPU: use --nproc-per-node=1"),
        ("cuda:0", 0, "device is 'cuda:0', but each process uses the GPU of its LOCAL_RANK: use 'cuda'"),
    ],
)
def test_bad_input_a_rank_without_a_gpu_of_its_own(monkeypatch, device, local, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    with pytest.raises(ValueError, match=message):
        distributed._own_device(device, joined=True)


def test_in_a_group_of_the_callers_each_rank_uses_the_gpu_of_its_local_rank(monkeypatch):
    chosen = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert distributed._own_device(None, joined=False) == distributed._own_device("cuda", joined=False)
    assert distributed._own_device("cuda:1", joined=False) == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", index) for index in (2, 2, 1)]


# -- torchrun ------------------------------------------------------------------------------------------------------


def torchrun(what, folder, *options):
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "torch.distributed.run", *options, ROOT / "tests" / "ranks.py", what, folder]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(agents, folder):
    """Wait for the agents. Returns their output and the time; fails if they hang or leave a process behind."""
    output, deadline = "", time.monotonic() + 120
    try:
        for agent in agents:
            output += agent.communicate(timeout=max(1, deadline - time.monotonic()))[0]
        ended = time.time()
    finally:
        left = []
        for process in (*(agent.pid for agent in agents), *(int(path.name[4:]) for path in folder.glob("pid-*"))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
                left.append(process)
    assert not left
    return output, ended


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Two jobs at once: one loses a rank and is restarted, the other consists of two agents, as on two machines."""
    folders = [tmp_path_factory.mktemp(name) for name in ("restarted", "agents")]
    restarted = torchrun("killed", folders[0], "--standalone", "--nproc-per-node=2", "--max-restarts=3")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}"]
    options += ["--rdzv-id=together", "--local-addr=127.0.0.1", "--max-restarts=0"]
    agents = [torchrun("trains", folders[1], *options) for _ in "12"]
    output = finish([restarted], folders[0])[0]
    return {
        "restarted": (restarted.returncode, output, folders[0]),
        "agents": (0, finish(agents, folders[1])[0], folders[1]),
    }


@pytest.mark.parametrize("job", ["restarted", "agents"])
def test_jobs_under_torchrun_train_as_an_undisturbed_group(jobs, groups, job):
    code, output, folder = jobs[job]
    assert code == 0, output
    for rank, expected in enumerate(groups[2]):
        result = torch.load(folder / f"result-{rank}.pt")
        assert equal(result["weights"], expected["unbroken"]["weights"])
        assert numbers(result["history"]) == numbers(expected["unbroken"]["history"])
    parts = result["history"]["parts"]
    assert [part["world_size"] for part in parts] == [2] * (2 if job == "restarted" else 1)
    assert ("Resuming from" in output) == (job == "restarted")
    if job == "restarted":
        assert parts[1]["epochs"][0] == pytest.approx(8 / 6)  # rank 1 was killed in the ninth step


@pytest.mark.parametrize(
    "what, message",
    [
        ("raises", r"ArithmeticError: this rank cannot go on"),
        ("gpus", r"RankError: rank 1 of 2: ValueError: LOCAL_RANK is 1, but this machine has 1 GPU"),
    ],
)
def test_fault_a_rank_that_fails_under_torchrun_ends_all(tmp_path, what, message):
    job = torchrun(what, tmp_path, "--standalone", "--nproc-per-node=2")
    output, ended = finish([job], tmp_path)
    assert job.returncode != 0 and re.search(message, output), output
    assert ended - float((tmp_path / "failed").read_text()) < 30
    assert not list(tmp_path.glob("result-*"))
    if what == "raises":
        assert load_checkpoint(tmp_path / "run")["epoch"] == 1  # a later call resumes


def test_the_seeds_of_ranks_and_positions_differ(synthetic):
    seen = []
    for rank in range(3):
        state = trainer.Trainer(Linear(), *synthetic, ranks.PLAIN, "cpu", rank=rank, world_size=3)
        for state.epoch in range(2):
            for state.progress.batches in range(3):
                state.seed()
                seen.append(torch.initial_seed())
    assert len(set(seen)) == 18
    trainer.Trainer(Linear(), *synthetic, ranks.PLAIN, "cpu").seed()
    assert torch.initial_seed() == ranks.PLAIN.seed
