"""Several processes: the same training as in one, whatever their number, and no hang if one of them fails.

Started by torchrun, this file is a program that trains twice.
"""

import contextlib
import io
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import albumentations as A
import processes
import pytest
import torch
import torch.distributed as dist
from fakes import class_folders
from networks import Linear, TinyNetwork, interrupt

import train
from session8 import data, distributed, evaluation, training
from session8.checkpoint import load_checkpoint
from session8.config import Config
from session8.loaders import make_loader

ROOT = Path(__file__).resolve().parent.parent
# Of 135 images: five batches of 25, and one of 10. With all that a recipe can ask for.
RECIPE = Config(
    epochs=3, batch_size=25, lr=0.02, seed=3, padding="reflect", flip="alternate", low_res_epochs=1, ema_decay=0.9,
    bias_lr_scale=2.0,
)  # fmt: skip
# For linear networks, whose results do not depend on the number of processes.
PLAIN = Config(epochs=3, batch_size=25, lr=0.002, label_smoothing=0.1, precision="float32")
UNEVEN = Config(epochs=1, batch_size=5, lr=0.02, label_smoothing=0.2, precision="float32")  # of 13 images: 5, 5, 3
pytestmark = pytest.mark.xdist_group("several processes")  # in one worker, for the fixtures of the module

SCENARIOS = {}  # run in the order of this file by a group of two processes, and one of three: their start is slow


def scenario(function):
    """Register a function of (rank, world_size, folder). The fixture `group` holds its results, a dict of each rank."""
    SCENARIOS[function.__name__] = function
    return function


def run_scenarios(rank, world_size, folder):
    torch.set_num_threads(1)
    training.REFRESH_STEPS_ON_CPU = 1
    dist.init_process_group("gloo", init_method=f"file://{folder}/group-{world_size}", rank=rank, world_size=world_size)
    found = {}
    for name, function in SCENARIOS.items():
        (folder / name).mkdir(exist_ok=True)
        with contextlib.redirect_stdout(io.StringIO()) as log:
            found[name] = {**function(rank, world_size, folder / name), "log": log.getvalue()}
    return found


@pytest.fixture(scope="module")
def groups(tmp_path_factory):
    """Run the scenarios. Returns {world size: {scenario: [results of each rank]}}."""
    folder, found = tmp_path_factory.mktemp("groups"), {}
    class_folders(folder / "images")
    processes.run(int)  # starts the server, which imports the modules once
    for world_size in (2, 3):
        with processes.context.Pool(world_size) as pool:  # whose end kills processes that hang
            ranks = [(rank, world_size, folder) for rank in range(world_size)]
            by_rank = pool.starmap_async(run_scenarios, ranks, chunksize=1).get(timeout=120)
        found[world_size] = {name: [of_rank[name] for of_rank in by_rank] for name in SCENARIOS}
        if world_size == 2:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(training, "REFRESH_STEPS_ON_CPU", 1)
                assert passed_on(0, 1, folder / "passed_on")["raised"] == "RuntimeError: stopped"
    return found


@pytest.fixture(params=(2, 3), ids="{} processes".format)
def group(groups, request):
    return groups[request.param]


def images(n_train=135, n_test=100):
    return data.synthetic_cifar10(n_train, n_test)


def fit(model, config, folder=None, splits=None, device="cpu", **keywords):
    """Train with a checkpoint at every refresh. Returns weights and history, or what was raised, as a dict."""
    try:
        history = training.fit(model, *(splits or images()), config, device, folder, checkpoint_seconds=0, **keywords)
        return {"weights": model.state_dict(), "history": history}
    except Exception as error:
        return {"raised": f"{type(error).__name__}: {error}"}


def acting(model, step, action):
    """Have a model call action(model) before a step of training, counted in this process from 1; 0: never."""
    batches = []

    def before(module, inputs):
        if module.training and len(inputs[0]) > 2:  # not in the trial before training
            batches.append(len(inputs[0]))
            if len(batches) == step:
                action(module)

    model.register_forward_pre_hook(before)
    return model


def stop(_):
    raise RuntimeError("stopped")


def numbers(history):
    return {name: values for name, values in history.items() if name not in ("seconds", "run")}


def assert_equal(one, other):
    """Assert that weights and history of two results are bitwise equal."""
    assert numbers(one["history"]) == numbers(other["history"])
    for name, value in one["weights"].items():
        assert torch.equal(value, other["weights"][name]), name


def distance(one, other):
    """Return by how much the changes of a Linear network's weights differ, relative to the second."""
    one, other = (
        torch.cat([(result["weights"][name] - value).flatten() for name, value in Linear().state_dict().items()])
        for result in (one, other)
    )
    return ((one - other).norm() / other.norm()).item()


def assert_close(one, other, tolerance):
    assert distance(one, other) < tolerance
    for name, values in numbers(other["history"]).items():
        assert one["history"][name] == pytest.approx(values, rel=tolerance), name


# -- the same training ---------------------------------------------------------------------------------------------


@scenario
def uneven(*_):
    """Train for three steps, of 5, 5 and 3 images, with one refresh, and test with 2; then without the weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "REFRESH_STEPS_ON_CPU", 4)
        right, step = fit(Linear(), UNEVEN, splits=images(13, 2)), training.train_step
        patch.setattr(training, "train_step", lambda *arguments, weight, size: step(*arguments, size=size))
        return {**right, "mean of rank means": fit(Linear(), UNEVEN, splits=images(13, 2))}


def test_three_steps_equal_those_of_one_process(group):
    alone = uneven()
    for found in group["uneven"]:
        assert_close(found, alone, 1e-5)
        if len(group["uneven"]) == 2:  # shares of 3 and 2, and of 2 and 1: a mistake would be noticed
            assert distance(found["mean of rank means"], alone) > 1e-3


@scenario
def unbroken(rank, world_size, folder):
    """Train with the weights of rank 0, and note the random state from which dropout draws."""
    model, own, seeds = TinyNetwork(seed=rank), folder / f"{world_size}-{rank}", []
    model.register_forward_pre_hook(lambda module, _: seeds.extend([torch.initial_seed()] * module.training))
    return {**fit(model, RECIPE, own), "seeds": seeds[-18:], "saved": load_checkpoint(own)}


def test_all_ranks_have_the_weights_and_the_history_of_rank_0(group):
    first, *others = group["unbroken"]
    assert "1.running_var" in first["weights"]
    for other in others:
        assert_equal(other, first)
    run = first["history"]["run"]
    assert run["world_size"] == len(run["devices"]) == len(group["unbroken"])
    assert all(", 1 thread," in device for device in run["devices"])


def test_dropout_differs_between_ranks_and_steps(group):
    assert len({seed for found in group["unbroken"] for seed in found["seeds"]}) == 18 * len(group["unbroken"])


def test_the_saved_model_is_the_tested_one(group):
    model, state = TinyNetwork(), group["unbroken"][0]["saved"]
    model.load_state_dict(state["average"])
    loss, accuracy = evaluation.test(model, make_loader(images()[1], 500, train=False), RECIPE, "cpu")
    assert accuracy == state["history"]["test_accuracy"][-1]
    assert loss == pytest.approx(state["history"]["test_loss"][-1], rel=1e-5)


def test_rank_0_alone_prints_and_writes(group):
    first, *others = group["unbroken"]
    assert f"{1 + len(others)} processes share each batch of 25. Batch norm uses each process's share" in first["log"]
    assert first["log"].count("Test set: Average loss") == 3 and "Batch_id=5" in first["log"]
    assert not any(other["log"] or other["saved"] for other in others)


# -- resuming ------------------------------------------------------------------------------------------------------


@scenario
def resumed(rank, world_size, folder):
    """Train with an error in the first epoch, then Ctrl-C in the second, then to the end. No folder is shared."""
    acts = ((4, stop), (9, interrupt), (0, None))
    models = [acting(TinyNetwork(seed=3 * rank + index), *act) for index, act in enumerate(acts)]
    _, interrupted, result = (fit(model, RECIPE, folder / f"{world_size}-{rank}") for model in models)
    return {**result, "interrupted after": len(interrupted["history"]["seconds"])}


def test_resuming_with_the_same_number_of_processes_is_bitwise_equal(groups):
    # With three, the order of sums depends on DistributedDataParallel's buckets.
    for found, expected in zip(groups[2]["resumed"], groups[2]["unbroken"], strict=True):
        assert_equal(found, expected)
        assert found["history"]["run"]["resumed"] == 2 and found["interrupted after"] == 1


@scenario
def passed_on(rank, world_size, folder):
    """Train a part of the same run in two processes, in one, then in three. The folder of ranks above 0 is not used."""
    model = acting(Linear(), {2: 10, 1: 3}.get(world_size, 0), stop)
    return fit(model, PLAIN, folder / "run" if rank == 0 else "/dev/null/run")


def test_two_processes_then_one_then_three_train_the_run_of_one(groups):
    alone = fit(Linear(), PLAIN)
    for found in groups[3]["passed_on"]:
        assert_close(found, alone, 1e-4)
        run = found["history"]["run"]
        assert (run["first_start"]["world_size"], run["resumed"], run["world_size"]) == (2, 2, 3)
    assert re.search(r"Resuming from .*Changed since: .*world_size", groups[3]["passed_on"][0]["log"])


# -- failures ------------------------------------------------------------------------------------------------------


@scenario
def nan(rank, world_size, folder):
    def spoil(network):
        network.head.weight.data[0, 0] = float("nan")

    model = acting(Linear(), 4 if rank == 1 else 0, spoil)
    return {**fit(model, PLAIN, folder / f"{world_size}-{rank}"), "saved": load_checkpoint(folder / f"{world_size}-0")}


def test_a_nan_of_one_rank_ends_all_with_the_same_message(group):
    for found in group["nan"]:
        assert found["raised"].startswith("TrainingDiverged: the loss became nan in epoch 1, Batch_id=3 to 3")
        assert found["saved"]["step"] == 3 and found["saved"]["model"]["head.weight"].isfinite().all()


@scenario
def full_folder(rank, world_size, folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))  # bytes of a file, as on a full disk
    try:
        return fit(Linear(), PLAIN, folder / f"{world_size}-{rank}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_a_full_folder_is_reported_and_every_rank_goes_on(group):
    assert all(len(found["history"]["seconds"]) == 3 for found in group["full_folder"])
    log = group["full_folder"][0]["log"]
    assert re.search(r"Checkpoint not written to '.*' \(\[Errno 27\] File too large\): free some space", log)


CROP = A.Compose([A.CenterCrop(32, 32)])
BAD_INPUT = [  # arguments of the last rank; those of the others, if they are not the usual ones; what all ranks raise
    ({"config": replace(PLAIN, lr=0.03)}, {}, "rank {last} differs from rank 0: lr was 0.002 and is 0.03"),
    ({"splits": images(136)}, {}, "rank {last} differs from rank 0: data was "),
    ({"model": TinyNetwork()}, {}, "rank {last} differs from rank 0: network was 'Linear .* and is 'TinyNet"),
    ({"transform": CROP}, {}, "rank {last} differs from rank 0: augmentation was "),
    # Processors of two generations, of which the scenario makes the last rank's compute in bfloat16.
    (*[{"config": replace(PLAIN, precision="auto")}] * 2, "rank {last} differs.* arithmetic was 'float32' and is 'bf"),
    ({"device": "cuda:7"}, {}, "rank {last} of {n}: ValueError: device is 'cuda:7', which is not available"),
    ({}, {"folder": "/dev/null/run"}, r"rank 0 of {n}: CheckpointError: '/dev/null/run' cannot be written .*: choose"),
    (*[{"splits": images(126)}] * 2, "rank 0 .*: {n} processes share the last batch of 1 image: use at most 1 process"),
]


@scenario
def bad_input(rank, world_size, _):
    is_last = rank == world_size - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.cpu.get_capabilities", lambda: {"amx_bf16": is_last})
        changes = [of_last if is_last else of_others for of_last, of_others, _ in BAD_INPUT]
        return {"raised": [fit(**{"model": Linear(), "config": PLAIN, **change})["raised"] for change in changes]}


@pytest.mark.parametrize("case, words", [(case, words) for case, (*_, words) in enumerate(BAD_INPUT)])
def test_bad_input_of_one_rank_is_raised_by_all(group, case, words):
    n = len(group["bad_input"])
    for found in group["bad_input"]:
        assert re.match(f"RankError: {words}".format(n=n, last=n - 1), found["raised"][case]), found["raised"][case]


@scenario
def gpus(rank, *_):
    """Ask for a device on a machine that seems to have so many GPUs."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCAL_RANK", str(rank))
        patch.setattr("torch.cuda.is_available", lambda: True)
        patch.setattr("torch.cuda.current_device", lambda: 0)
        patch.setattr("torch.cuda.set_device", lambda device: None)
        for asked, count in ((None, 4), ("cuda", 4), ("cuda:1", 4), ("cuda", 1)):
            patch.setattr("torch.cuda.device_count", lambda count=count: count)
            try:
                with distributed.process_group(asked) as device:
                    found.append(str(device))
            except distributed.RankError as error:
                found.append(str(error))
    return {"devices": found}


def test_each_rank_uses_the_gpu_of_its_local_rank(group):
    for rank, found in enumerate(group["gpus"]):
        *devices, refused = found["devices"]
        assert devices == [f"cuda:{rank}", f"cuda:{rank}", "cuda:1"]
        assert "LOCAL_RANK is 1, but this machine has 1 GPU: use --nproc-per-node=1" in refused


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
RESTARTS = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}


@pytest.mark.parametrize(
    "environment, missing, words",
    [
        (TORCHRUN, ["RANK"], r"^rank \?: RANK not set, but other variables of torchrun are: .* or unset RANK, "),
        (TORCHRUN, ["WORLD_SIZE"], "^rank 1: WORLD_SIZE not set, but .*: start the processes with torchrun"),
        (TORCHRUN, ["LOCAL_RANK", "MASTER_PORT"], "^rank 1: LOCAL_RANK, MASTER_PORT not set, but"),
        (RESTARTS, [], "^--max-restarts is 3, after which .* set .* TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for torchrun"),
    ],
)
def test_bad_input_variables_of_torchrun(monkeypatch, environment, missing, words):
    monkeypatch.setattr(dist, "init_process_group", lambda *_: pytest.fail("would wait for the other ranks"))
    for name in {*environment} - {*missing}:
        monkeypatch.setenv(name, environment[name])
    with pytest.raises(ValueError, match=words):
        training.fit(Linear(), *images(), PLAIN, "cpu")


# -- train.py ------------------------------------------------------------------------------------------------------


@scenario  # the last one: the command leaves the group at its end
def command(rank, world_size, folder):
    """Run train.py with a wrong option, without its data, with a learning rate that is too high, and to the end."""
    small = ["--epochs", "1", "--batch-size", "10", "--width", "0.25", "--device", "cpu", "--data"]
    found, own, folders = [], folder / f"{world_size}-{rank}", str(folder.parent / "images")
    own.mkdir()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as errors:
        patch.chdir(own)
        patch.setenv("RANK", str(rank))
        for options in (["--epochs", "0"], [*small, "nowhere"], [*small, folders, "--lr", "1e30"], [*small, folders]):
            patch.setattr("sys.argv", ["train.py", *options])
            try:
                found.append(train.main())
            except SystemExit as ended:
                found.append(ended.code)
    records = [json.loads(path.read_text()) for path in own.rglob("record.json")]
    return {"ended": found, "errors": errors.getvalue(), "records": records}


def test_the_command_of_several_processes_prints_one_message_and_writes_one_record(group):
    first, *others = group["command"]
    wrong, missing, diverged, trained = first["ended"]
    assert wrong == 2 and "epochs is 0; expected at least 1" in first["errors"]
    assert re.match(r"rank 0 of \d: DatasetUnavailable: root is 'nowhere', which is not a directory", missing)
    assert re.match("the loss became (nan|inf) in epoch 1.*: use a smaller lr", diverged) and trained is None
    assert [record["world_size"] for record in first["records"]] == [1 + len(others)]
    assert "Record and weights: " in first["log"]
    assert all(other == {"ended": [2, 1, 1, None], "errors": "", "records": [], "log": ""} for other in others)


# -- torchrun ------------------------------------------------------------------------------------------------------


def program(job, folder):
    """Train twice, each rank with folders of its own. Rank 1 is killed in the first, or fails in the second."""
    folder, rank = Path(folder), int(os.environ["RANK"])
    (folder / f"pid-{os.getpid()}").touch()
    torch.set_num_threads(1)
    training.REFRESH_STEPS_ON_CPU = 1
    is_killed = job == "restarts" and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if job == "fails":  # without TORCH_DISABLE_SHARE_RDZV_TCP_STORE
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
            assert "ValueError: --max-restarts is 3, after which" in fit(Linear(), PLAIN)["raised"]

    def fail(_):
        (folder / "failed").write_text(str(time.time()))
        raise ArithmeticError("this rank cannot go on")

    model = acting(TinyNetwork(), 9 if is_killed else 0, lambda _: os.kill(os.getpid(), signal.SIGKILL))
    torch.save(fit(model, RECIPE, folder / f"first-{rank}"), folder / f"result-{rank}.pt")
    time.sleep(1 - rank)  # rank 1 must not meet the group of the first training
    model, own = acting(Linear(), 4 if job == "fails" and rank == 1 else 0, fail), folder / f"second-{rank}"
    training.fit(model, *images(), PLAIN, "cpu", own, checkpoint_seconds=0)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    """Run two jobs at once: of two agents, as on two machines, and of one. Returns {job: (status, output, folder)}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    restarts = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=test", "--rdzv-backend=c10d"]
    restarts += [f"--rdzv-endpoint={endpoint}", "--local-addr=127.0.0.1"]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    one_store_each = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

    def start(job, options, **environment):
        command = [sys.executable, "-m", "torch.distributed.run", *options, __file__, job, folders[job]]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env={**os.environ, **paths, **environment}, **pipes)

    folders = {job: tmp_path_factory.mktemp(job) for job in ("restarts", "fails")}
    agents = {
        "restarts": [start("restarts", restarts, **one_store_each) for _ in "12"],
        "fails": [start("fails", ["--standalone", "--nproc-per-node=2"])],
    }
    found, left, deadline = {}, [], time.monotonic() + 120
    try:
        for job in ("fails", "restarts"):
            outputs = [agent.communicate(timeout=max(1, deadline - time.monotonic()))[0] for agent in agents[job]]
            (folders[job] / "ended").write_text(str(time.time()))
            found[job] = (max(agent.returncode for agent in agents[job]), "".join(outputs), folders[job])
    finally:
        pids = [int(path.name.removeprefix("pid-")) for folder in folders.values() for path in folder.glob("pid-*")]
        for pid in [agent.pid for started in agents.values() for agent in started] + pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                left.append(pid)
    assert not left
    return found


@pytest.mark.parametrize("job", ["restarts", "fails"])
def test_jobs_under_torchrun_train_as_an_undisturbed_group(jobs, groups, job):
    _, output, folder = jobs[job]
    for rank, expected in enumerate(groups[2]["unbroken"]):
        found = torch.load(folder / f"result-{rank}.pt")
        assert_equal(found, expected)
        assert found["history"]["run"]["resumed"] == (job == "restarts"), output
    assert sorted(path.name for path in folder.glob("*-*/")) == ["first-0", "second-0"]  # rank 1 writes nothing


def test_a_job_that_is_restarted_trains_to_the_end_and_a_second_time(jobs):
    status, output, folder = jobs["restarts"]
    assert status == 0, output
    assert load_checkpoint(folder / "second-0")["step"] == 18


def test_a_rank_that_fails_ends_all_and_the_same_command_could_resume(jobs):
    status, output, folder = jobs["fails"]
    assert status != 0 and "ArithmeticError: this rank cannot go on" in output
    assert float((folder / "ended").read_text()) - float((folder / "failed").read_text()) < 30
    assert load_checkpoint(folder / "second-0")["step"] == 3


if __name__ == "__main__":
    program(*sys.argv[1:])
