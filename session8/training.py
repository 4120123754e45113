"""Training: `fit` is the whole loop, `train_step` one step of it.

Data flow: uint8 images; augmented uint8 batches, made on the host or by a DeviceLoader on the GPU; normalisation on the
device; network; log-probabilities; negative log-likelihood (NLL); the optimizer.
"""

import math
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from session8 import distributed
from session8.augment import normalize, scale_down
from session8.config import Config
from session8.data import Split
from session8.device import autocast, backend_flags
from session8.evaluation import test
from session8.optim import set_lr
from session8.start import epoch_line, epochs_done, prepare

REFRESH_STEPS, REFRESH_STEPS_ON_CPU = 20, 4  # between reads of the loss, each of which waits for the device


def fit(
    model: nn.Module,
    train_split: Split,
    test_split: Split,
    config: Config,
    device: torch.device | str | None = None,
    checkpoint_dir: Path | str | None = None,
    checkpoint_seconds: float | None = None,
    transform=None,
    num_workers: int | None = None,
    on_epoch: Callable[[dict], None] | None = None,
) -> dict:
    """Train a model in place with a recipe, and test it after every epoch.

    The test accuracy is only shown: there is no early stopping and no selection of the best epoch. With
    `config.ema_decay`, the moving average of the weights is tested, and left in the model. On Ctrl-C, `fit` restores
    the state after the last completed epoch, or at the start of this call, saves it unless a newer checkpoint exists,
    and returns the history: KeyboardInterrupt is not raised again.

    Under torchrun, or with a process group of the caller's, the processes share each batch (PyTorch's
    DistributedDataParallel) and the test images. All must make the same call. Rank 0 prints, and reads and writes
    checkpoints. Every trainable parameter must then receive a gradient in every step. On CUDA a copy with synchronised
    batch norm is trained, and `model` is overwritten at the end.

    Args:
        model: any module from float (B, 3, 32, 32) to log-probabilities or logits (B, C). Modules must change their
            buffers in place.
        config: the recipe. PyTorch's global random state, which dropout uses, is seeded before each step.
        device: as in `get_device`; of several processes, each on CUDA uses the GPU of its LOCAL_RANK.
        checkpoint_dir: folder of checkpoints. If it holds some of the same run, training resumes, with any number of
            processes; a finished run is not trained again. The weights of the model are then replaced. With one process
            on one CPU the result is bitwise equal to an uninterrupted run.
        checkpoint_seconds: minimum interval between checkpoints (0: every few steps); they are also written at the end
            of training and on Ctrl-C. None: 30, or 300 on Google Drive in Colab.
        transform: an albumentations transform that replaces crop, flip and cutout of the recipe; see `make_loader`.
        num_workers: of the training loader; the result does not depend on it.
        on_epoch: called with the history after each epoch, on rank 0. An exception that it raises ends training; the
            model then has the weights that were tested.

    Returns the history, a dict of lists with one number per epoch, shorter after Ctrl-C: `train_loss`, `test_loss`
    (mean NLL), `train_accuracy`, `test_accuracy` (percent), `lr` (of the last step), `seconds` (with the test). Those
    of training are measured on augmented images, with dropout, while the weights change. The entry `run` is a dict for
    `write_record`.

    Raises ValueError for a device that is not available, a negative checkpoint_seconds or number of workers, and for a
    network that cannot be saved, cannot take the smallest batch, or has not one output per class;
    CheckpointError, before training, if the folder cannot be written or belongs to another run; TrainingDiverged if
    the loss or a weight is not finite; RuntimeError if a worker process dies. With several processes, all ranks raise
    RankError if one of them fails before training, or if their arguments differ.
    """
    with distributed.process_group(device) as device, backend_flags(config):
        state, train_loader, test_loader, checkpoints = prepare(
            model, train_split, test_split, config, device, checkpoint_dir, checkpoint_seconds, transform, num_workers
        )
        rank, world_size, steps_per_epoch = distributed.rank(), distributed.world_size(), len(train_loader)
        network = state.model  # the module of forward and backward passes
        if world_size > 1:  # it averages gradients over the ranks, and each forward pass uses the buffers of rank 0
            network = DistributedDataParallel(state.model, gradient_as_bucket_view=True)
        # Sums since the last refresh, on the device: of the loss over images, and of correct predictions.
        sums = torch.zeros(2, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        refresh_steps = REFRESH_STEPS_ON_CPU if device.type == "cpu" else REFRESH_STEPS
        snapshot = deepcopy(state.state_dict())  # what Ctrl-C restores: the state after an epoch, or of the start

        try:
            for epoch in range(state.step // steps_per_epoch, config.epochs):
                batch = state.step % steps_per_epoch  # not 0 if training resumes within the epoch
                print(epoch_line(config, epoch, batch / steps_per_epoch, state.history["seconds"]), flush=True)
                started = time.perf_counter() - state.seconds
                train_loader.set_epoch(epoch, start=batch)
                network.train()
                bar = tqdm(train_loader, total=steps_per_epoch, initial=batch, file=sys.stdout, mininterval=0.3)
                for images, labels in bar:
                    lr = config.lr_at(state.step, steps_per_epoch)
                    n = train_loader.batch_size_at(batch)  # of all ranks together
                    set_lr(state.optimizer, lr)
                    seed_step(config.seed, state.step, rank)
                    loss, correct = train_step(
                        network, images, labels, state.optimizer, state.scaler, config, device,
                        # DistributedDataParallel averages gradients over ranks: the weight corrects for unequal shares.
                        weight=len(labels) * world_size / n, size=config.image_size(epoch),
                    )  # fmt: skip
                    state.update_average(config.ema_decay_at(state.step))
                    sums[0].add_(loss, alpha=len(labels))
                    sums[1] += correct
                    state.step += 1
                    batch += 1

                    if batch % refresh_steps == 0 or batch == steps_per_epoch:
                        # Between the steps of an epoch, only this and saving wait for the device.
                        read = torch.stack([*sums, loss * len(labels)])
                        loss_sum, hits, last_loss = distributed.sum_over_ranks(read).tolist()
                        sums.zero_()
                        if not math.isfinite(loss_sum):
                            first = (batch - 1) // refresh_steps * refresh_steps  # since the last refresh
                            raise TrainingDiverged(f"the loss became {loss_sum}", epoch, first, batch - 1, lr)
                        state.loss_sum, state.correct = state.loss_sum + loss_sum, state.correct + hits
                        state.seconds = time.perf_counter() - started
                        accuracy = 100 * state.correct / train_loader.images_until(batch)
                        shown = f"Train: Loss={last_loss / n:.4f} Batch_id={batch - 1} Accuracy={accuracy:.2f}"
                        bar.set_description(shown, refresh=False)
                        if checkpoints.due() and batch < steps_per_epoch:
                            if not state.is_finite():
                                raise TrainingDiverged("a weight became NaN or infinite", epoch, 0, batch - 1, lr)
                            checkpoints.save(state.state_dict())

                state.sync_buffers()
                test_loss, test_accuracy = test(state.result, test_loader, config, device)
                if not math.isfinite(test_loss) or not state.is_finite():
                    raise TrainingDiverged("the test loss or a weight became NaN or infinite", epoch, 0, batch - 1, lr)
                state.end_epoch(
                    train_loss=state.loss_sum / len(train_split),
                    train_accuracy=accuracy,
                    test_loss=test_loss,
                    test_accuracy=test_accuracy,
                    lr=lr,
                    seconds=time.perf_counter() - started,
                )
                snapshot = deepcopy(state.state_dict())
                if checkpoints.due() or epoch == config.epochs - 1:
                    checkpoints.save(snapshot)
                if on_epoch is not None and rank == 0:
                    on_epoch(state.history)
        except KeyboardInterrupt:
            state.load_state_dict(snapshot)
            checkpoints.save(snapshot)  # does nothing if a later step of the interrupted epoch was saved
            print(f"\nInterrupted: history and weights are those after {epochs_done(state.step, steps_per_epoch)}.")
        except TrainingDiverged:  # on all ranks, and again if it were resumed
            raise
        except RuntimeError as error:
            if world_size > 1:
                error.add_note(f"Rank {rank} of {world_size}. If another rank ended first, see its message.")
            if checkpoints.step >= 0:
                error.add_note(f"The same call resumes from the last checkpoint in '{checkpoint_dir}'.")
            raise
        finally:
            if state.result is not model:
                model.load_state_dict(state.result.state_dict())
            model.eval()
        return state.history


# -- one step -------------------------------------------------------------------------------------------------------


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Seed PyTorch's global generators, which dropout uses, as a function of the step: none has to be saved."""
    torch.manual_seed(int(np.random.SeedSequence((seed, step, rank)).generate_state(1, np.uint64)[0]))


def train_step(
    model: nn.Module,
    images: torch.Tensor,
    labels: torch.Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    config: Config,
    device: torch.device | str,
    weight: float = 1.0,
    size: int = 32,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Take one step of the optimizer on images, uint8 (B, 32, 32, 3), and labels, int64 (B,).

    weight: factor on the loss. size: side in pixels to which the images are scaled down first.

    Returns the batch's mean NLL, without label smoothing, and its number of correct predictions, both as tensors on
    the device: reading them would wait for it.
    """
    labels = labels.to(device, non_blocking=labels.is_pinned())
    with autocast(config.precision, device):
        outputs = model(scale_down(normalize(images, device), size))
    # Log-probabilities stay as they are; the logits of other networks become log-probabilities.
    log_probs = F.log_softmax(outputs.float(), dim=1)
    nll = F.nll_loss(log_probs, labels)
    smoothing = config.label_smoothing
    loss = weight * (1 - smoothing) * nll - weight * smoothing * log_probs.mean()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return nll.detach(), (log_probs.detach().argmax(1) == labels).sum()


class TrainingDiverged(RuntimeError):
    """The loss or a weight is NaN or infinite. The message names the steps, the learning rate and the remedy."""

    def __init__(self, what: str, epoch: int, first: int, last: int, lr: float):
        """first, last: batches of the epoch, any of which may be the cause; like the epoch, counted from 0."""
        super().__init__(
            f"{what} in epoch {epoch + 1}, Batch_id={first} to {last}, at a learning rate of {lr:.4g}: use a smaller "
            "lr, with Muon also a smaller muon_lr, or schedule='one_cycle', which starts with a small one"
        )
