"""Starts train.py in several processes, from a notebook or another program."""

import codecs
import os
import shlex
import subprocess
import sys
from pathlib import Path

from session8.config import Config

TRAIN_SCRIPT = Path(__file__).resolve().parent.parent / "train.py"


def torchrun_command(processes, recipe, config, data_root=None, device=None, folder=None):
    """Return the command that trains AdvancedCNN with a recipe in several processes of this machine, as a list.

    folder: the folder that the run must have. The command fails if network or data differ. It then also accepts the
    stand-in.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(TRAIN_SCRIPT), "--recipe", recipe, "--epochs", str(config.epochs)]
    named = Config.named(recipe, epochs=config.epochs)
    for name, value in vars(config).items():
        if value != getattr(named, name):
            option = name.replace("_", "-")
            command += ["--" + "no-" * (value is False) + option] + [str(value)] * (not isinstance(value, bool))
    command += ["--device", str(device)] if device else []
    command += ["--data", str(Path(data_root).resolve())] if data_root else []
    command += ["--allow-synthetic", "--expect-folder", str(Path(folder).resolve())] if folder else []
    return command


def run_command(command):
    """Run a command and print its output as it appears, also in a notebook cell. Raises RuntimeError if it fails.

    If this process is interrupted, it ends the command.
    """
    print(shlex.join(command), flush=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a chunk may end within a character
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment) as process:
        try:
            while chunk := process.stdout.read1():
                print(decoder.decode(chunk), end="", flush=True)
        except BaseException:
            process.terminate()
            raise
    if process.returncode:
        raise RuntimeError(f"the command ended with status {process.returncode}; its messages are above")
