"""Train the network on synthetic images: resumable, in stages of rising resolution."""

import csv
import math
import sys
import time
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed
from torch.utils.data import DataLoader, Dataset

from babyseg_bids.errors import InputError, UsageError
from babyseg_bids.labels import label_table
from babyseg_bids.network.compass import COMPASS_NETWORK, quarters
from babyseg_bids.network.head import WIDE
from babyseg_bids.network.layout import quarter_turned, quarter_turns
from babyseg_bids.network.unet import GroupUNet, NetworkConfig
from babyseg_bids.resources import freed_memory_kept
from babyseg_bids.synthesis.gallery import picture, side_by_side
from babyseg_bids.synthesis.generator import draw_sample
from babyseg_bids.synthesis.losses import dice_cross_entropy, hard_dice
from babyseg_bids.synthesis.maps import TrainingMap, class_table
from babyseg_bids.synthesis.optimiser import Muon
from babyseg_bids.synthesis.settings import SynthesisSettings, load_settings

# Children that are never trained on; their maps measure the result (see the model card).
HELD_OUT = ('03mo', '08mo', '24mo')
DEFAULT_NETWORK = NetworkConfig(
    labels=len(label_table()),
    encoder=(16, 32, 64, 128),
    decoder=(128, 128, 96, 48),
    head=(48,),
    patch=2,
)
# The compass learns from heads that are turned by up to so many degrees about each axis, which
# after a quarter turn is every direction. Drawing costs more than a step: each is shown twice.
_COMPASS_TURN, _SHOWN = 60.0, 2
# Samples that are drawn at most for one of its steps; few show too little of a brain.
_TRIES = 64
# Hard Dice costs a twentieth of a step, so only some steps have it.
_MEASURE_EVERY = 5
_FIELDS = ('step', 'stage', 'spacing', 'loss', 'dice', 'rate', 'seconds')


@dataclass(frozen=True)
class Stage:
    """One stretch of the training at one resolution.

    Parameters
    ----------
    spacing : voxel size, mm
    size : voxels, multiples of what the network asks for
    steps, batch : optimiser steps, and samples in each
    """

    spacing: float
    size: tuple[int, int, int]
    steps: int
    batch: int

    @classmethod
    def parse(cls, text: str, /) -> 'Stage':
        """Read `SPACING:XxYxZ:STEPS:BATCH`, for example `2.0:64x80x64:1500:2`."""
        try:
            spacing, size, steps, batch = text.split(':')
            x, y, z = (int(n) for n in size.split('x'))
            return cls(float(spacing), (x, y, z), int(steps), int(batch))
        except ValueError as e:
            raise UsageError(
                f'{text!r} is not a training stage; write SPACING:XxYxZ:STEPS:BATCH, '
                'for example 2.0:64x80x64:1500:2.'
            ) from e


@dataclass(frozen=True)
class TrainingPlan:
    """All that decides a training but the maps.

    Parameters
    ----------
    stages : in order
    bfloat16 : compute the network in bfloat16; weights and loss stay float32
    checkpointing : see `GroupUNet`
    rate : peak learning rate; it warms up, stays, and falls to zero over the last `decay` share
    average : decay of the exponential moving average of the weights
    wide : share of the steps whose voxels are `WIDE` times as wide, and whose scans show half as
        much again: the network also has to find the head at a glance (see `head`)
    enlarged : share of the samples of the other steps whose brains have volumes around that which
        `head.enlarged` gives them at inference (`AnatomySettings.volume`)
    """

    stages: tuple[Stage, ...]
    network: NetworkConfig = DEFAULT_NETWORK
    synthesis: SynthesisSettings = field(default_factory=load_settings)
    seed: int = 0
    rate: float = 3e-3
    warmup: int = 100
    decay: float = 0.6
    average: float = 0.998
    clip: float = 1.0
    bfloat16: bool = False
    checkpointing: bool = False
    wide: float = 0.15
    enlarged: float = 0.8

    def __post_init__(self) -> None:
        for stage in self.stages:
            multiple = self.network.multiple
            if any(n % multiple for n in stage.size):
                raise UsageError(
                    f'A training stage has the size {"x".join(map(str, stage.size))}; the network '
                    f'needs multiples of {multiple} there.'
                )

    @property
    def compass(self) -> bool:
        """Whether it is the network that tells the direction of a head (see `compass_plan`)."""
        return self.network == COMPASS_NETWORK

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(s.steps for s in self.stages)

    def stage_at(self, step: int, /) -> int:
        """Number of the stage that a step belongs to."""
        for i, stage in enumerate(self.stages):
            if step < stage.steps:
                return i
            step -= stage.steps
        return len(self.stages) - 1

    def rate_at(self, step: int, /) -> float:
        """Learning rate of a step: linear warm-up, plateau, cosine to zero."""
        left = (self.steps - step) / (self.decay * self.steps)
        cooled = 0.5 * (1 - math.cos(math.pi * min(1.0, max(0.0, left))))
        return self.rate * min(1.0, (step + 1) / self.warmup) * cooled


def compass_plan(stages: Sequence[Stage], /, **about: Any) -> TrainingPlan:
    """A plan for the network that tells the direction of a head; `about` as of `TrainingPlan`."""
    if any(len(set(s.size)) > 1 for s in stages):
        raise UsageError('Heads in every direction need stages that are as long along each axis.')
    synthesis = about.pop('synthesis', None) or load_settings()
    synthesis = replace(
        synthesis,
        anatomy=replace(synthesis.anatomy, rotation_deg=_COMPASS_TURN),
        group_shares=(1.0,),
    )
    return TrainingPlan(tuple(stages), network=COMPASS_NETWORK, synthesis=synthesis, **about)


class SyntheticBatches(Dataset):
    """Batches of synthetic samples; item i depends on the plan's seed, i and the rank alone.

    That makes training resumable without storing generator states. The processes of one training
    (ranks) see different anatomies, but as many scans.

    Parameters
    ----------
    start, stop : first step, and the one after the last
    """

    def __init__(
        self,
        maps: Sequence[TrainingMap],
        plan: TrainingPlan,
        start: int,
        stop: int,
        *,
        rank: int = 0,
    ) -> None:
        self.maps = maps
        self.plan = plan
        self.start = start
        self.stop = stop
        self.rank = rank
        self.table = class_table()

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        """Images (B, G, *size) float16 and target (B, *size) uint8 of the step `start + item`."""
        torch.set_num_threads(1)
        step = self.start + item
        stage = self.plan.stages[self.plan.stage_at(step)]
        seed = self.plan.seed * 1_000_003 + step
        if self.plan.compass:
            return self._in_all_directions(stage, seed)
        generator = torch.Generator().manual_seed(seed)
        shares = torch.tensor(self.plan.synthesis.group_shares)
        scans = int(torch.multinomial(shares, 1, generator=generator))
        one_hot = tuple(float(i == scans) for i in range(len(shares)))
        size, spacing = stage.size, stage.spacing
        enlarged = self.plan.enlarged
        if float(torch.rand((), generator=generator)) < self.plan.wide:
            size, spacing = self.plan.network.fitting([0.75 * n for n in size]), WIDE * spacing
            # Brains are enlarged once they were found.
            enlarged = 0.0
        settings = replace(
            self.plan.synthesis,
            size=size,
            spacing=spacing,
            anatomy=replace(self.plan.synthesis.anatomy, volume_probability=enlarged),
            group_shares=one_hot,
        )
        samples = [
            draw_sample(self.maps, seed=seed * 64 + i, settings=settings, table=self.table)
            for i in range(self.rank * stage.batch, (self.rank + 1) * stage.batch)
        ]
        images = torch.stack([s.images for s in samples])
        target = torch.stack([s.target for s in samples])
        return images.half(), target.byte()

    def _in_all_directions(self, stage: Stage, seed: int) -> tuple[Tensor, Tensor]:
        """Images and quarters of a step; every sample is shown after several quarter turns."""
        settings = replace(self.plan.synthesis, size=stage.size, spacing=stage.spacing)
        generator = torch.Generator().manual_seed(seed)
        rows: list[Tensor] = []
        for i in range(_TRIES):
            sample = draw_sample(
                self.maps,
                seed=(seed * 64 + self.rank) * _TRIES + i,
                settings=settings,
                table=self.table,
            )
            target = quarters(sample.target, label_table(), spacing=stage.spacing)
            if target is None:
                continue
            both = torch.cat([sample.images, target[None]])
            chosen = torch.randperm(24, generator=generator)[:_SHOWN].tolist()
            rows += [quarter_turned(both, quarter_turns()[i]) for i in chosen]
            if len(rows) >= stage.batch:
                break
        else:
            raise InputError(
                f'{len(rows)} of {_TRIES} samples show enough of a brain to tell its direction; '
                'train the compass on maps of whole brains, in stages that hold them.'
            )
        batch = torch.stack(rows[: stage.batch])
        return batch[:, :1].half(), batch[:, 1].byte()


class Trainer:
    """State of a training in a folder: weights, averaged weights, optimiser, step.

    Where torch's process group is set up (`torchrun`), gradients are averaged over its processes,
    and the first one writes.

    Parameters
    ----------
    folder : holds `checkpoint.pt` and `log.csv`; an existing checkpoint is continued
    """

    def __init__(self, plan: TrainingPlan, folder: Path, *, device: str = 'cpu') -> None:
        self.plan = plan
        self.folder = folder
        self.device = device
        torch.manual_seed(plan.seed)
        self.rank, self.world = 0, 1
        if distributed.is_initialized():
            self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        network = GroupUNet(plan.network, checkpointing=plan.checkpointing)
        layout = torch.channels_last_3d if plan.network.dim == 3 else torch.channels_last
        self.network = network.to(device, memory_format=layout)
        self.averaged = deepcopy(self.network).requires_grad_(False)
        self.optimiser = Muon(self.network.parameters(), rate=plan.rate, bfloat16=plan.bfloat16)
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        if self.checkpoint.exists():
            self._resume()

    @property
    def checkpoint(self) -> Path:
        """The file that holds the newest state."""
        return self.folder / 'checkpoint.pt'

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        if state['network_config'] != self.plan.network.to_dict():
            raise InputError(
                f'{self.checkpoint} belongs to another network; continue it with the same '
                'network settings or train into another folder.'
            )
        self.network.load_state_dict(state['network'])
        self.averaged.load_state_dict(state['averaged'])
        self.optimiser.load_state_dict(state['optimiser'])
        self.step = state['step']

    def start_from(self, weights: Mapping[str, Tensor], /) -> None:
        """Begin with other weights; what they lack keeps its own start.

        Raises
        ------
        InputError
            If a weight has another shape or is unknown here.
        """
        try:
            missing, unknown = self.network.load_state_dict(dict(weights), strict=False)
        except RuntimeError as e:
            raise InputError(f'The weights to start from do not fit the network: {e}') from e
        if unknown or len(missing) == len(self.network.state_dict()):
            raise InputError(
                'The weights to start from belong to another network: it has no '
                f'{", ".join(unknown[:3]) or "layer in common"}.'
            )
        self.averaged.load_state_dict(self.network.state_dict())

    def save(self, name: str = 'checkpoint.pt') -> None:
        """Write the state; a kill at any moment leaves the old or the new one."""
        if self.rank:
            return
        state = {
            'network': self.network.state_dict(),
            'averaged': self.averaged.state_dict(),
            'optimiser': self.optimiser.state_dict(),
            'step': self.step,
            'network_config': self.plan.network.to_dict(),
            'stages': [asdict(s) for s in self.plan.stages],
        }
        temporary = self.folder / f'{name}.tmp'
        torch.save(state, temporary)
        temporary.replace(self.folder / name)

    def train_step(self, images: Tensor, target: Tensor, /) -> tuple[float, float]:
        """One optimiser step; loss and mean hard Dice (or NaN).

        Parameters
        ----------
        images : (B, G, *size), of any floating-point type
        target : (B, *size), of any integer type
        """
        rate = self.plan.rate_at(self.step)
        for group in self.optimiser.param_groups:
            group['lr'] = rate
        images = images.to(self.device, non_blocking=True).float()
        target = target.to(self.device, non_blocking=True).long()
        with torch.autocast(self.device.split(':')[0], torch.bfloat16, enabled=self.plan.bfloat16):
            logits = self.network(images)
        loss = dice_cross_entropy(logits, target)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        self._share_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.plan.clip)
        if torch.isfinite(norm):
            self.optimiser.step()
            self._average()
        self.step += 1
        dice = float('nan')
        if self.step % _MEASURE_EVERY == 0:
            prediction = logits.detach().argmax(1)
            dice = float(hard_dice(prediction, target, classes=logits.shape[1])[1:].nanmean())
        return float(loss.detach()), dice

    def _share_gradients(self) -> None:
        """Average the gradients over the processes of the training."""
        if self.world == 1:
            return
        parameters = list(self.network.parameters())
        gradients = [p.grad for p in parameters]
        flat = torch.cat([g.flatten() for g in gradients])
        distributed.all_reduce(flat)
        flat /= self.world
        parts = flat.split([g.numel() for g in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def _average(self) -> None:
        # Early on the average must follow quickly, or it would remember the random start.
        decay = min(self.plan.average, (1 + self.step) / (10 + self.step))
        ours, theirs = list(self.averaged.parameters()), list(self.network.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - decay)

    def run(
        self,
        maps: Sequence[TrainingMap],
        *,
        workers: int = 1,
        save_every: int = 100,
        stop: int | None = None,
        validation: Sequence[TrainingMap] = (),
        validate_every: int = 0,
    ) -> None:
        """Train from the present step to the plan's end, or to the step `stop`.

        Parameters
        ----------
        validation : maps that are never trained on
        validate_every : steps after which the averaged weights segment one synthetic sample of
            each of them; writes `validation.csv` and a picture. 0 for never.
        """
        end = min(stop or self.plan.steps, self.plan.steps)
        batches = DataLoader(
            SyntheticBatches(maps, self.plan, self.step, end, rank=self.rank),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=3 if workers else None,
            pin_memory=self.device.startswith('cuda'),
        )
        log = _Log(self.folder, self.plan.steps, quiet=bool(self.rank))
        with freed_memory_kept():
            for images, target in batches:
                stage = self.plan.stage_at(self.step)
                rate = self.plan.rate_at(self.step)
                loss, dice = self.train_step(images, target)
                log.add(self.step, stage, self.plan.stages[stage].spacing, loss, dice, rate)
                if self.step % save_every == 0 or self.step == end:
                    self.save()
                if self.plan.stage_at(self.step) != stage:
                    self.save(f'stage-{stage}.pt')
                if validate_every and self.step % validate_every == 0 and not self.rank:
                    log.validated(self.step, validate(self, validation))
        log.close()


@torch.inference_mode()
def validate(trainer: Trainer, maps: Sequence[TrainingMap], /) -> float:
    """Mean Dice of the averaged weights on one synthetic sample of each map, always the same.

    Writes `validation-STEP.png` into the trainer's folder: image, truth and result.
    """
    plan = trainer.plan
    stage = plan.stages[plan.stage_at(max(0, trainer.step - 1))]
    settings = replace(
        plan.synthesis,
        anatomy=replace(
            plan.synthesis.anatomy.of_one_child(), volume_probability=float(plan.enlarged > 0)
        ),
        size=stage.size,
        spacing=stage.spacing,
        group_shares=(1.0,),
    )
    shown, dices = [], []
    for i, source in enumerate(maps):
        sample = draw_sample([source], seed=i, settings=settings)
        images = sample.images[None].to(trainer.device)
        labels = trainer.averaged(images)[0].argmax(0).cpu()
        dice = hard_dice(labels, sample.target, classes=plan.network.labels)
        dices.append(float(dice[1:].nanmean()))
        shown.append(picture(replace(sample, images=sample.images[:1]), labels))
    (trainer.folder / f'validation-{trainer.step:06d}.png').write_bytes(side_by_side(shown))
    return sum(dices) / len(dices)


class _Log:
    """Means over 20 steps, to a CSV file, the screen and TensorBoard where it is installed."""

    def __init__(self, folder: Path, steps: int, *, quiet: bool) -> None:
        self.folder = folder
        self.steps = steps
        self.quiet = quiet
        self.rows: list[tuple[float, float]] = []
        self.began = time.monotonic()
        self.board = None
        if not quiet and find_spec('tensorboard'):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder / 'tensorboard'))

    def add(
        self, step: int, stage: int, spacing: float, loss: float, dice: float, rate: float
    ) -> None:
        """Take in one step."""
        self.rows.append((loss, dice))
        if len(self.rows) < 20 or self.quiet:
            return
        mean_loss = sum(loss for loss, _ in self.rows) / len(self.rows)
        dices = [dice for _, dice in self.rows if dice == dice]
        mean_dice = sum(dices) / len(dices) if dices else float('nan')
        seconds = (time.monotonic() - self.began) / len(self.rows)
        row = (
            step,
            stage,
            spacing,
            f'{mean_loss:.4f}',
            f'{mean_dice:.4f}',
            f'{rate:.2e}',
            f'{seconds:.2f}',
        )
        self._write('log.csv', _FIELDS, row)
        left = timedelta(seconds=round(seconds * (self.steps - step)))
        print(' '.join(f'{k} {v}' for k, v in zip(_FIELDS, row, strict=True)), 'left', left)
        self._scalars(step, {'loss': mean_loss, 'dice': mean_dice, 'rate': rate})
        self.rows = []
        self.began = time.monotonic()

    def validated(self, step: int, dice: float) -> None:
        """Take in a validation."""
        self._write('validation.csv', ('step', 'dice'), (step, f'{dice:.4f}'))
        print(f'step {step} validation dice {dice:.4f}', flush=True)
        self._scalars(step, {'validation dice': dice})

    def close(self) -> None:
        """Write what is still held back."""
        if self.board:
            self.board.close()

    def _write(self, name: str, names: Sequence[str], row: Sequence[object]) -> None:
        path = self.folder / name
        new = not path.exists()
        with path.open('a', newline='') as f:
            writer = csv.writer(f)
            if new:
                writer.writerow(names)
            writer.writerow(row)

    def _scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            if self.board:
                self.board.add_scalar(name, value, step)
        sys.stdout.flush()
